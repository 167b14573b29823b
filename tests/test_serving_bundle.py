"""Exported bundles: the same actions as the RLlib policy, no code inside, nothing bad loaded."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.policy.policy import Policy

from qvpo_rllib import QVPO, cli
from qvpo_rllib.play.trained_policy import TrainedPolicy, load_checkpoint
from qvpo_rllib.serving import ServedPolicy, load
from qvpo_rllib.serving.bundle import digest
from qvpo_rllib.serving.description import _digest
from qvpo_rllib.serving.policy import NonFiniteActionError

ROOT = Path(__file__).parents[1]
WITHOUT_RAY = """
import json, sys
import numpy as np, torch
from qvpo_rllib.serving import load
policy = load(sys.argv[1])
actions = policy.act(np.ones((3, 2)), k=4, generator=torch.Generator().manual_seed(5))
loaded = sorted({m.split(".")[0] for m in sys.modules})
print(json.dumps({"actions": actions.tolist(), "loaded": loaded}))
"""


@pytest.fixture(scope="module")
def checkpoint(save_trained: Any, tiny_config: Any) -> Path:
    """A checkpoint of a policy whose action box is lopsided."""
    return Path(save_trained(tiny_config("environments:RecordingActions-v0", diffusion_steps=5)))


@pytest.fixture(scope="module")
def rllib_policy(checkpoint: Path) -> Any:
    return Policy.from_checkpoint(str(checkpoint))["default_policy"]


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "bundle"
    assert cli.main(["export", str(checkpoint), str(out), "--onnx"]) == 0
    return out


@pytest.fixture(scope="module")
def policy(bundle: Path) -> ServedPolicy:
    return load(bundle)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def observations(num: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(num, 2)).astype(np.float32)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"x": value}
    return value


def change(bundle: Path, honest: bool = True, **changes: Any) -> None:
    """Edits `policy.json`; an honest edit also renews its digest, as a careful forger would."""
    file = bundle / "policy.json"
    content = json.loads(file.read_text()) | changes
    if honest:
        del content["digest"]
        content["digest"] = _digest(content)
    file.write_text(json.dumps(content))


# --- the same policy ----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 32])
@pytest.mark.parametrize("num", [1, 7])
def test_acts_as_the_rllib_policy(policy: Any, rllib_policy: Any, k: int, num: int) -> None:
    obs = observations(num)
    normalized = rllib_policy.act(obs, k=k, generator=seeded(3))
    low, high = rllib_policy.action_space.low, rllib_policy.action_space.high
    expected = low + (normalized.astype(np.float64) + 1) / 2 * (high - low)  # RLlib's unsquash
    actions = policy.act(obs, k, seeded(3))
    assert actions.dtype == np.float32
    assert np.abs(normalized).max() > 0.01
    np.testing.assert_allclose(actions, expected, atol=1e-6 * (high - low).max())
    assert (actions >= low).all()
    assert (actions <= high).all()


def test_a_checkpoint_plays_as_its_bundle_to_the_last_bit(checkpoint: Path, bundle: Path) -> None:
    """The checkpoint was trained with engine="eager", whose batches have other last bits."""
    trained, exported = TrainedPolicy.load(checkpoint), TrainedPolicy.load(bundle)
    obs = observations(7)
    for k in (None, 1, 32):
        actions = trained.act(obs, k, seeded(3))
        np.testing.assert_array_equal(actions, exported.act(obs, k, seeded(3)))
        assert actions.dtype == np.float32
    names = ("env", "env_config", "obs_dim", "k")
    assert [getattr(trained, n) for n in names] == [getattr(exported, n) for n in names]
    assert (trained.source, exported.source) == (checkpoint, bundle)


def test_a_checkpoint_that_plays_has_no_learner_and_needs_no_gpu(checkpoint: Path) -> None:
    policy = load_checkpoint(checkpoint).policy
    assert policy.learner is None
    assert policy.device.type == "cpu"
    assert policy.config["num_gpus"] == 0


def test_k_left_out_is_the_checkpoints_k_eval(policy: Any) -> None:
    obs = observations(3)
    np.testing.assert_array_equal(policy.act(obs, None, seeded(1)), policy.act(obs, 4, seeded(1)))
    assert not np.array_equal(policy.act(obs, 4, seeded(1)), policy.act(obs, 4, seeded(2)))


@pytest.mark.parametrize("engine", ["native", "eager"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 32])
def test_a_row_is_the_same_bits_in_every_batch(policy: Any, k: int, engine: str) -> None:
    policy = ServedPolicy(policy.description, policy.networks, engine)
    obs = torch.as_tensor(observations(40))
    noise = policy.draw_noise(40, k, seeded(9))
    together, finite = policy.act_with_noise(obs, noise)
    assert finite.all()
    order = np.random.default_rng(0).permutation(40)
    shuffled, _ = policy.act_with_noise(obs[order], noise[:, order])
    np.testing.assert_array_equal(shuffled, together[order])
    for rows in (slice(0, 1), slice(5, 8), slice(39, 40)):
        alone, _ = policy.act_with_noise(obs[rows], noise[:, rows])
        np.testing.assert_array_equal(alone, together[rows])


def test_where_products_depend_on_the_place_rows_go_one_by_one(
    policy: Any, monkeypatch: Any
) -> None:
    policy = ServedPolicy(policy.description, policy.networks, "eager")
    obs = torch.as_tensor(observations(8))
    noise = policy.draw_noise(8, 2, seeded(9))
    expected, _ = policy.act_with_noise(obs, noise)
    act = policy._selector.act

    def with_places(obs: Any, noise: Any) -> Any:
        actions, q = act(obs, noise)
        return actions + torch.arange(len(actions))[:, None] * 1e-3, q

    monkeypatch.setattr(policy._selector, "act", with_places)
    np.testing.assert_array_equal(policy.act_with_noise(obs, noise)[0], expected)


def test_loads_and_acts_without_ray_and_gymnasium(bundle: Path, policy: Any) -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, str(bundle)], capture_output=True, text=True, check=True
    )
    report = json.loads(run.stdout)
    assert {"torch", "numpy", "safetensors"} <= set(report["loaded"])
    assert not {"ray", "gymnasium", "mujoco", "pydantic", "pyarrow", "onnx"} & set(report["loaded"])
    expected = policy.act(np.ones((3, 2)), 4, seeded(5))
    np.testing.assert_array_equal(np.float32(report["actions"]), expected)


def test_only_the_application_imports_ray() -> None:
    modules = [f.stem for f in (ROOT / "qvpo_rllib" / "serving").glob("[!_]*.py")]
    assert {"api", "app", "bundle", "client", "onnx"} <= set(modules)
    names = [f"qvpo_rllib.serving.{module}" for module in modules if module != "app"]
    program = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
print(sorted({{"ray", "gymnasium"}} & set(sys.modules)))
print(sorted(m for m in sys.modules if m.startswith("qvpo_rllib.") and m.count(".") == 1))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    rooms = [f"qvpo_rllib.{room}" for room in ("core", "serving", "version")]
    assert run.stdout.splitlines() == ["[]", str(rooms)]


def test_onnx_gives_the_same_actions(bundle: Path, policy: Any) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession((bundle / "policy.onnx").read_bytes())
    for num, k in ((1, 1), (1, 32), (6, 4)):
        obs, noise = observations(num), policy.draw_noise(num, k, seeded(num))
        actions, q = session.run(None, {"observations": obs, "noise": noise.numpy()})
        expected = policy.scale.to_env(policy.act_with_noise(torch.as_tensor(obs), noise)[0])
        np.testing.assert_allclose(actions, expected, atol=2e-5)
        assert q.shape == (num,)


def test_rllibs_own_export_writes_the_same_bundle(
    bundle: Path, checkpoint: Path, tmp_path: Path, ray_session: None
) -> None:
    algorithm = QVPO.from_checkpoint(str(checkpoint))
    out = tmp_path / "bundle"
    try:
        algorithm.export_policy_model(str(out), onnx=18)
        assert (out / "policy.onnx").read_bytes() == (bundle / "policy.onnx").read_bytes()
        found, expected = (asdict(load(path).description) for path in (out, bundle))
        del found["created"], expected["created"]
        assert found.pop("source")["env_steps"] == expected.pop("source")["env_steps"]
        assert found == expected
        algorithm.export_policy_model(str(tmp_path / "without"))
        assert not (tmp_path / "without" / "policy.onnx").exists()
        with pytest.raises(ValueError, match=r"onnx=11 is not allowed.*onnx=18"):
            algorithm.export_policy_model(str(tmp_path / "other"), onnx=11)
        with pytest.raises(ValueError, match="exists"):
            algorithm.export_policy_model(str(out))
    finally:
        algorithm.stop()


# --- what is in it ------------------------------------------------------------------------------


def test_the_description_says_where_it_comes_from(bundle: Path) -> None:
    content = json.loads((bundle / "policy.json").read_text())
    assert content["env"] == "environments:RecordingActions-v0"
    assert content["name"] == "RecordingActions-v0"
    assert content["sha256"]["policy.safetensors"].startswith(content["version"])
    assert content["act_low"] == [-2.0, 0.0, 10.0]
    assert content["act_high"] == [1.0, 5.0, 10.5]
    assert content["obs_low"] == [None, None]
    assert content["source"]["env_steps"] == 60
    for name, sha256 in content["sha256"].items():
        assert digest((bundle / name).read_bytes()) == sha256
    assert {file.name for file in bundle.iterdir()} == {"policy.json", *content["sha256"]}


def test_holds_no_pickle(bundle: Path, checkpoint: Path) -> None:
    def is_pickle(content: bytes) -> bool:
        if content.startswith((b"PK", b"\x80")):  # torch.save's archive; any modern pickle
            return True
        try:
            pickle.loads(content)
        except Exception:  # whatever a parser says of what is no pickle
            return False
        return True

    assert any(is_pickle(file.read_bytes()) for file in checkpoint.rglob("*.pkl"))
    assert not any(is_pickle(file.read_bytes()) for file in bundle.iterdir())


def test_a_run_directory_means_its_best(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best").symlink_to(checkpoint)
    assert cli.main(["export", str(run), str(tmp_path / "b"), "--name", "m", "--version", "2"]) == 0
    description = load(tmp_path / "b").description
    assert (description.name, description.version) == ("m", "2")


# --- nothing in it runs --------------------------------------------------------------------------


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_nothing_beside_a_bundles_files_is_unpickled(
    capsys: Any, copy: Path, checkpoint: Path, tmp_path: Path
) -> None:
    trapped = copy / "checkpoints" / "best"
    shutil.copytree(checkpoint, trapped)
    for file in trapped.rglob("*.pkl"):
        file.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    shutil.copytree(trapped, copy, dirs_exist_ok=True)  # as if it were one itself, too
    assert "is a bundle" in error_of(capsys, "export", str(copy), str(tmp_path / "out"))
    assert "--import environments" in error_of(capsys, "evaluate", str(copy))
    (copy / "policy.json").unlink()
    (copy / "policy.json").symlink_to("nowhere")
    assert "not a bundle" in error_of(capsys, "evaluate", str(copy))
    assert not (tmp_path / "ran").exists()


def test_a_bundles_word_alone_imports_no_module(copy: Path, tmp_path: Path) -> None:
    """Neither the environment's module in the bundle's own folder, nor one named as a package."""
    change(copy, env="trap:Env-v0")
    for name in ("trap", "numpy"):
        (copy / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    run = subprocess.run(
        [sys.executable, "-m", "qvpo_rllib", "evaluate", "."],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert "--import trap" in " ".join(run.stderr.split())
    assert not (tmp_path / "ran").exists()


def test_a_module_that_is_named_is_imported(capsys: Any, bundle: Path, checkpoint: Path) -> None:
    command = ["evaluate", str(bundle), "--episodes", "1", "--json"]
    assert cli.main([*command, "--import", "environments"]) == 0
    assert cli.main(["evaluate", str(checkpoint), "--episodes", "1"]) == 0
    assert "runs code" in capsys.readouterr().err


# --- refusals -----------------------------------------------------------------------------------


def error_of(capsys: Any, *arguments: str) -> str:
    assert cli.main([*arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_overwrites_nothing(capsys: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("kept", "dangling"):
        assert "exists already" in error_of(capsys, "export", str(checkpoint), str(tmp_path / name))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "kept"]


def test_leaves_nothing_behind_when_it_fails(capsys: Any, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "name='../x'" in error_of(capsys, "export", str(checkpoint), str(out), "--name", "../x")
    assert "no checkpoint" in error_of(capsys, "export", str(tmp_path / "none"), str(out))
    (tmp_path / "file").touch()
    inside = str(tmp_path / "file" / "out")
    assert "cannot be written" in error_of(capsys, "export", str(checkpoint), inside)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("file", ["policy.safetensors", "policy.json"])
def test_refuses_every_truncation_and_flip(copy: Path, file: str) -> None:
    content = (copy / file).read_bytes()
    middle = len(content) // 2
    bad = [b"", content[:-1], content[:middle], content + b"x", b"\x80\x04" + content]
    bad += [
        content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]
        for i in (*range(0, middle, middle // 30), len(content) - 10)
    ]
    for damaged in bad:
        (copy / file).write_bytes(damaged)
        # A JSON text may change in white space only, which changes no meaning.
        if file == "policy.json" and _same_json(damaged, content):
            continue
        with pytest.raises(ValueError, match="is refused"):
            load(copy)
    (copy / file).write_bytes(content)
    load(copy)


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def test_refuses_another_policys_parameters(copy: Path, policy: Any) -> None:
    from safetensors.torch import save

    tensors = {n: p.clone() for n, p in policy.networks.state_dict().items()}
    foreign = {
        "a NaN": tensors | {"critic.q1.layers.0.bias": torch.full((16,), torch.nan)},
        "missing or foreign": {n: p for n, p in tensors.items() if "q2" not in n},
        "describes": {n: p.double() for n, p in tensors.items()},
        "longer than": tensors | {"actor.huge": torch.zeros(2**19)},
    }
    for words, parameters in foreign.items():
        content = save(parameters)
        (copy / "policy.safetensors").write_bytes(content)
        change(copy, sha256={"policy.safetensors": digest(content)})
        with pytest.raises(ValueError, match=words):
            load(copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "another"}, "does not say format"),
        ({"format_version": 2, "versions": {"qvpo_rllib": "9.1"}}, "version is 2.*'9.1'"),
        ({"format_version": None}, "format version is None"),
        ({"diffusion_steps": 10**9}, "diffusion_steps"),
        ({"noise_schedule": "mine"}, "noise_schedule"),
        ({"act_high": [-3.0, 5.0, 10.5]}, "below act_high"),
        ({"act_low": [0.0]}, "act_high has 3 numbers, not 1"),
        ({"act_low": "abc"}, "act_low"),
        ({"obs_dim": 10**12}, "obs_dim"),
        ({"obs_dim": 3, "obs_low": [None] * 3, "obs_high": [None] * 3}, "describes"),
        ({"hidden": [2**19, 2**19]}, "actor.mlp|missing or foreign|describes|whole"),
        ({"k_eval": 0}, "k_eval"),
        ({"name": "../../etc"}, "name"),
        ({"surprise": 1}, "surprise"),
        ({"act_low": [-1e39] * 3}, "finite as float32"),
        ({"act_high": [float("inf")] * 3}, "no number"),
        ({"act_low": [-1e308] * 3, "act_high": [1e308] * 3, "act_dtype": "float64"}, "too far"),
        ({"diffusion_steps": 10_000, "k_eval": 10_000}, "random numbers"),
        ({"hidden": [2**20] * 64}, "more than"),
        ({"env": "\ud800"}, "JSON"),
        ({"env_config": {"x": float("nan")}}, "no number"),
        ({"env_config": nested(300)}, "nested"),
        ({"sha256": {}}, "SHA-256"),
        ({"sha256": 3}, "sha256"),
    ],
)
def test_refuses_what_the_description_may_not_say(copy: Path, changes: Any, words: str) -> None:
    change(copy, **changes)
    with pytest.raises(ValueError, match=words):
        load(copy)


def test_refuses_what_is_no_regular_file_and_reads_no_sparse_one(copy: Path) -> None:
    (copy / "policy.safetensors").unlink()
    os.mkfifo(copy / "policy.safetensors")
    with pytest.raises(ValueError, match="not a regular file"):
        load(copy)
    (copy / "policy.safetensors").unlink()
    with (copy / "policy.safetensors").open("wb") as file:
        file.truncate(30 * 2**30)
    with pytest.raises(ValueError, match="longer than"):
        load(copy)


def test_refuses_an_edited_description(copy: Path) -> None:
    change(copy, honest=False, act_high=[1.0, 5.0, 1000.0])
    with pytest.raises(ValueError, match="digest"):
        load(copy)


def test_refuses_what_is_no_bundle(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="no such directory"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no policy\.json"):
        load(checkpoint)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_refuses_observations_that_are_not_finite(policy: Any, bad: float) -> None:
    obs = np.zeros((2, 2))
    obs[1, 0] = bad
    with pytest.raises(ValueError, match="Observation 1"):
        policy.act(obs)
    with pytest.raises(ValueError, match=r"\[batch, 2\]"):
        policy.act(obs[:, :1])


def test_never_returns_an_action_that_is_not_finite(bundle: Path) -> None:
    policy = load(bundle)
    with torch.no_grad():
        for parameter in policy.networks.parameters():
            parameter.mul_(1e3)  # now a large observation overflows, and no other
    assert np.isfinite(policy.act(np.zeros((1, 2)))).all()
    with pytest.raises(NonFiniteActionError, match="observation 1"):
        policy.act(np.array([[0, 0], [3e38, -3e38]]))
