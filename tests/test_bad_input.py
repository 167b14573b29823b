"""Bad input is refused with one paragraph that names it; bad numbers stop a run at once."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import reference
import torch

from qvpo_rllib import QVPO, QVPOConfig, cli
from qvpo_rllib.algorithms import ALGORITHMS, entry_of
from qvpo_rllib.checkpoints.metadata import Metadata
from qvpo_rllib.core.errors import NonFiniteError

ENV = "InvertedPendulum-v5"

UNSUITED = {
    "DiscreteActions": ["Discrete(3)", "continuous"],
    "UnboundedActions": ["inf", "finite"],
    "MatrixActions": ["(2, 2)", "one-dimensional"],
    "PartlyImages": ["Dict", "'eye'", "is an image", "encode it in a wrapper"],
    "PartlyText": ["Tuple", "'1'", "is a Text", "encode it in a wrapper"],
    "ImageObservations": ["(8, 8, 3)", "one-dimensional", "encode images"],
}
OPTIONS = {
    "k_behaviour=4": ["k_behaviour", "'k_behavior'"],
    "k_target=0": ["k_target=0", "1 or more"],
    "k_behavior=-1": ["k_behavior=-1", "1 or more"],
    "k_eval=0": ["k_eval=0", "1 or more"],
    "diffusion_steps=0": ["diffusion_steps=0", "1 or more"],
    "diffusion_steps=2.5": ["diffusion_steps='2.5'", "integer"],
    "noise_schedule=cosin": ["'cosin'", "cosine, linear, vp", "Did you mean 'cosine'"],
    "q_weights=softmin": ["'softmin'", "qadv, qcut, qrelu, qexp"],
    "gamma=1": ["gamma=1", "[0, 1)"],
    "hidden=64,0": ["(64, 0)", "1 or more"],
    "batch_size": ["'batch_size'", "key=value"],
}
WORDS = {
    ("--env", "HalfCheta-v5"): ["'HalfCheta-v5'", "'HalfCheetah-v5'"],
    ("--env", "Ant"): ["'Ant'", "'Ant-v5'"],
    ("--env", "Ant-v3"): ["Ant-v3"],
    ("--env", "no_such_module:Ant-v5"): ["no_such_module"],
    ("--env-config", "frame"): ["'frame'", "key=value"],
    ("--env-config", "a=[1"): ["'a=[1'", "YAML"],
    ("--env-config", "nonsense=1"): ["could not be made", "nonsense", ".py:"],
    ("--set", "frame_skip=0"): ["frame_skip=0", "1 or more"],
    ("--set", "wrappers=halved"): ["wrappers=('halved',)", "module:function"],
    ("--set", "wrappers=environments:nothing"): ["'environments:nothing'", "no attribute"],
    ("--set", "wrappers=environments:none_at_all"): ["none_at_all", "NoneType", "gymnasium.Env"],
    ("--env-steps", "0"): ["--env-steps 0", "1 or more"],
    ("--env-steps", "many"): ["--env-steps", "'many'"],
    ("--eval-interval", "0"): ["--eval-interval 0", "1 or more"],
    ("--seed", "-1"): ["--seed -1", "0 or more"],
    ("--num-env-runners", "-1"): ["--num-env-runners -1", "0 or more"],
    ("--num-envs-per-env-runner", "0"): ["--num-envs-per-env-runner 0", "1 or more"],
    ("--num-gpus", "2"): ["2", "one GPU at most"],
    ("--num-gpus", "-1"): ["-1", "one GPU at most"],
    ("--num-gpus", "nan"): ["nan", "one GPU at most"],
    ("--preset", "quik"): ["'quik'", "'quick'"],
    ("--env_steps", "10"): ["--env_steps", "Did you mean --env-steps?"],
}


def run(*arguments: str) -> int:
    """The exit code of `qvpo`, whether it returns it or exits with it."""
    try:
        return cli.main(list(arguments))
    except SystemExit as exit_:
        return int(exit_.code or 0)


def assert_refused(capsys: Any, arguments: list[str], words: list[str]) -> str:
    """`qvpo` exits with code 2, starts nothing, and one paragraph on stderr has the words.

    Returns the paragraph.
    """
    running = ray.is_initialized()
    assert run(*arguments) == cli.EXIT_BAD_INPUT
    assert ray.is_initialized() == running
    output, error = capsys.readouterr()
    assert output == ""
    notes = error[: ("\n" + error).index("\nqvpo")].splitlines()
    assert all(note.startswith("Loading the checkpoint") for note in notes)
    assert "\n\n" not in error.strip()
    assert "Traceback" not in error
    paragraph = " ".join(error.split())
    for word in words:
        assert word in paragraph
    return paragraph


# --- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNSUITED)
def test_unsuited_spaces_are_refused(capsys: Any, tmp_path: Path, name: str) -> None:
    env, directory = f"environments:{name}-v0", tmp_path / "run"
    arguments = ["train", "--env", env, "--run-dir", str(directory)]
    assert "QVPO" not in assert_refused(capsys, arguments, [env, *UNSUITED[name]])
    assert not directory.exists()


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_discrete_actions_are_refused_for_a_reason_true_of_the_algorithm(
    capsys: Any, tmp_path: Path, algo: str
) -> None:
    arguments = ["train", "--algo", algo, "--env", "CartPole-v1", "--run-dir", str(tmp_path / "r")]
    words = ["CartPole-v1: The action space Discrete(2) is not supported", "continuous"]
    assert "QVPO" not in assert_refused(capsys, arguments, words)


@pytest.mark.parametrize("setting", OPTIONS)
def test_bad_hyperparameters_are_refused(capsys: Any, tmp_path: Path, setting: str) -> None:
    directory = tmp_path / "run"
    assert_refused(
        capsys, ["train", "--set", setting, "--run-dir", str(directory)], OPTIONS[setting]
    )
    assert not directory.exists()


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_bad_options_are_refused(capsys: Any, tmp_path: Path, words: tuple[str, ...]) -> None:
    directory = tmp_path / "run"
    assert_refused(capsys, ["train", *words, "--run-dir", str(directory)], WORDS[words])
    assert not directory.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA device")
def test_gpu_is_refused_where_there_is_none(capsys: Any, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert_refused(
        capsys,
        ["train", "--num-gpus", "1", "--run-dir", str(directory)],
        ["--num-gpus 1", "no CUDA device", "--num-gpus 0"],
    )
    assert not directory.exists()


def test_run_directory_that_holds_a_run_is_not_touched(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    arguments = ["train", "--run-dir", str(tmp_path)]
    assert_refused(capsys, arguments, [str(tmp_path), "already holds a run", "last checkpoint"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "{}"


def test_resuming_what_is_no_run_is_refused(capsys: Any, tmp_path: Path) -> None:
    assert_refused(
        capsys, ["train", "--resume", str(tmp_path)], [str(tmp_path), "not a run directory"]
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "option"),
    [(["--seed", "1"], "--seed"), (["--set", "gamma=0.9"], "--set"), (["--env", ENV], "--env")],
)
def test_changing_options_on_resume_is_refused(
    capsys: Any, tmp_path: Path, words: list[str], option: str
) -> None:
    assert_refused(
        capsys, ["train", "--resume", str(tmp_path), *words], [option, "Only --env-steps"]
    )


def test_missing_command_and_unknown_command_are_refused(capsys: Any) -> None:
    assert_refused(capsys, [], ["COMMAND"])
    assert_refused(capsys, ["trian"], ["'trian'", "'train'"])


# --- the Python interface ----------------------------------------------------------------------


@pytest.mark.parametrize("name", UNSUITED)
def test_unsuited_spaces_are_refused_by_the_algorithm(
    ray_session: None, tiny_config: Any, name: str
) -> None:
    with pytest.raises(ValueError, match=r"is not supported|is unbounded|has shape"):
        tiny_config(f"environments:{name}-v0").build_algo()


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_discrete_actions_are_refused_by_every_algorithm(ray_session: None, algo: str) -> None:
    config = entry_of(algo).load().get_default_config().environment("CartPole-v1")
    with pytest.raises(ValueError, match="is not supported") as error:
        config.build_algo()
    assert "continuous" in str(error.value)
    assert "QVPO" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("k_target", 0, "k_target=0.*1 or more"),
        ("engine", "cuda_graph", "engine='cuda_graph' needs.*num_gpus=0.*'native'"),
        ("sampling_precision", "tf32", "sampling_precision='tf32' needs.*num_gpus=0.*'bf16'"),
        ("ranking_precision", "tf32", "ranking_precision='tf32' needs.*num_gpus=0.*'fp32'"),
        ("k_behavior", 0, "k_behavior=0.*1 or more"),
        ("diffusion_steps", 0, "diffusion_steps=0.*1 or more"),
        ("noise_schedule", "sine", "'sine'.*cosine, linear, vp"),
        ("q_weights", "softmin", "'softmin'.*qadv"),
    ],
)
def test_bad_hyperparameters_are_refused_by_the_config(option: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QVPOConfig().environment(ENV).training(**{option: value}).validate()


@pytest.mark.parametrize("num_gpus", [2, 1.5, -1, float("nan")])
def test_more_than_one_gpu_is_refused(num_gpus: float) -> None:
    with pytest.raises(ValueError, match=f"num_gpus={num_gpus}.*one GPU at most"):
        QVPOConfig().environment(ENV).resources(num_gpus=num_gpus).validate()


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA device")
def test_gpu_is_refused_by_the_algorithm_where_there_is_none(
    ray_session: None, tiny_config: Any
) -> None:
    with pytest.raises(ValueError, match=r"num_gpus=1 .*no CUDA device"):
        tiny_config().resources(num_gpus=1).build_algo()


def test_unknown_environment_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'HalfCheta-v5'.*'HalfCheetah-v5'"):
        QVPOConfig().environment("HalfCheta-v5").validate()


# --- checkpoints -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(build_shared: Any, tiny_config: Any, tmp_path_factory: Any) -> Path:
    algorithm = build_shared(tiny_config())
    algorithm.train()
    return Path(algorithm.save(str(tmp_path_factory.mktemp("saved"))).checkpoint.path)


@pytest.fixture
def altered(checkpoint: Path, tmp_path: Path) -> Any:
    """`altered(**values)`: a copy of the checkpoint whose qvpo.json has these values."""

    def make(**values: Any) -> Path:
        directory = Path(shutil.copytree(checkpoint, tmp_path / "altered"))
        if "format" in values:
            metadata = json.loads((directory / "qvpo.json").read_text()) | values
            (directory / "qvpo.json").write_text(json.dumps(metadata))
        else:
            replace(Metadata.read(directory), **values).write(directory)
        return directory

    return make


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"format": 99}, ["format 99", "reads format 2"]),
        ({"env": "NoSuchEnv-v0"}, ["'NoSuchEnv-v0'"]),
        ({"shapes": [4, 2]}, ["[4, 1]", "[4, 2]"]),
    ],
)
def test_evaluate_refuses_a_foreign_checkpoint(
    capsys: Any, altered: Any, values: dict[str, Any], words: list[str]
) -> None:
    assert_refused(capsys, ["evaluate", str(altered(**values))], words)


@pytest.mark.parametrize("option", ["--episodes", "--k"])
def test_evaluate_refuses_bad_numbers(capsys: Any, checkpoint: Path, option: str) -> None:
    assert_refused(capsys, ["evaluate", str(checkpoint), option, "0"], [f"{option} 0", "1 or more"])


def test_evaluate_refuses_what_is_no_checkpoint(capsys: Any, tmp_path: Path) -> None:
    assert_refused(capsys, ["evaluate", str(tmp_path)], [str(tmp_path), "not a QVPO checkpoint"])
    missing = str(tmp_path / "missing")
    assert_refused(capsys, ["evaluate", missing], [missing, "no checkpoint directory"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"env": "Hopper-v5"}, "env='Hopper-v5'.*env='InvertedPendulum-v5'"),
        ({"shapes": [9, 1]}, r"shapes=\[9, 1\]"),
        ({"format": 99}, "format 99.*reads format 2"),
    ],
)
def test_restore_refuses_a_foreign_checkpoint_and_changes_nothing(
    build: Any, tiny_config: Any, altered: Any, values: dict[str, Any], words: str
) -> None:
    algorithm = build(tiny_config().debugging(seed=3))
    algorithm.train()
    before = algorithm.policy.get_weights()
    with pytest.raises(ValueError, match=words):
        algorithm.restore(str(altered(**values)))
    assert algorithm.ledger.ingested == len(algorithm.replay) == 60
    assert algorithm.iteration == 1
    for name, value in algorithm.policy.get_weights().items():
        assert (value == before[name]).all()


def test_from_checkpoint_refuses_another_format(altered: Any) -> None:
    with pytest.raises(ValueError, match="format 99"):
        QVPO.from_checkpoint(str(altered(format=99)))


def test_the_format_before_is_refused(
    capsys: Any, build: Any, tiny_config: Any, altered: Any
) -> None:
    directory = str(altered(format=1))
    assert_refused(capsys, ["evaluate", directory], ["format 1", "reads format 2"])
    with pytest.raises(ValueError, match=r"format 1, .*reads format 2"):
        build(tiny_config()).restore(directory)


def test_resume_refuses_a_damaged_checkpoint_and_changes_nothing(
    capsys: Any, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / "000000060")
    (run / "checkpoints" / "last").symlink_to("000000060")
    (run / "config.json").write_text("{}")
    files = [f for f in (run / "checkpoints" / "000000060").rglob("*") if f.is_file()]
    assert {"algorithm_state.pkl", "policy_state.pkl", "worker-0.zst"} <= {f.name for f in files}
    before = {entry.name for entry in run.iterdir()}
    for file in files:
        content = file.read_bytes()
        for damage in (content[:-3], content[:40] + b"?" + content[41:], None):
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            words = ["not a QVPO checkpoint" if damage is None else "is damaged"]
            if damage is None and file.name != "qvpo.json":
                words = ["lacks its file", file.name]
            assert_refused(capsys, ["train", "--resume", str(run)], words)
        file.write_bytes(content)
    assert {entry.name for entry in run.iterdir()} == before


@pytest.mark.parametrize("config", ["{}", '{"algo": "qvpo", "colour": "red"}'])
def test_resume_refuses_a_configuration_that_is_no_plan(
    config: str, capsys: Any, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / "000000060")
    (run / "checkpoints" / "last").symlink_to("000000060")
    (run / "config.json").write_text(config)
    for _ in range(2):  # the first leaves no lock behind
        assert_refused(capsys, ["train", "--resume", str(run)], ["config.json", "no training plan"])


# --- NaN and infinity --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "quantity", "num_workers"),
    [("NanObservation", "observation", 0), ("InfiniteReward", "reward", 0),
     ("InfiniteReward", "reward", 1)],
)  # fmt: skip
def test_non_finite_environment_stops_training(
    build: Any, tiny_config: Any, name: str, quantity: str, num_workers: int
) -> None:
    env = f"environments:{name}-v0"
    algorithm = build(tiny_config(env).env_runners(num_env_runners=num_workers))
    algorithm.train()
    started_s = time.monotonic()
    with pytest.raises(NonFiniteError, match=f"{env}.*non-finite {quantity} at step 70 ") as found:
        algorithm.train()
    # Another exception of a remote worker would restart it.
    assert time.monotonic() - started_s < 20
    assert f"worker {num_workers}" in str(found.value)
    # A remote worker's fragments of 64 env steps: the second one is never sent.
    expected = 69 if num_workers == 0 else 64
    assert algorithm.ledger.ingested == len(algorithm.replay) == expected
    assert all(column.isfinite().all() for column in reference.in_order(algorithm.replay))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_non_finite_environment_stops_an_evaluation(
    build: Any, tiny_config: Any, num_workers: int
) -> None:
    env = "environments:NanObservation-v0"
    config = tiny_config(env)
    config.evaluation(evaluation_interval=1, evaluation_num_env_runners=num_workers)
    algorithm = build(config)
    with pytest.raises(NonFiniteError, match=f"{env}.*evaluation.*observation at step 70 "):
        algorithm.evaluate()


@pytest.mark.parametrize(("part", "quantity"), [("critic", "critic_loss"), ("actor", "action")])
def test_non_finite_weights_stop_training(
    build: Any, tiny_config: Any, part: str, quantity: str
) -> None:
    algorithm = build(tiny_config())
    algorithm.train()
    with torch.no_grad():
        for parameter in getattr(algorithm.policy.networks, part).parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=f"{ENV}.*{quantity}.* step ") as found:
        algorithm.train()
    assert "nan" in str(found.value)
    assert algorithm.ledger.ingested <= 61
