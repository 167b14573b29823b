"""Environments that people have: observations in parts, wrappers, action repeat, other packages.

Every path must see the same environment: training, evaluation, checkpoints, bundles, the server.
"""

import importlib.util
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import PARTS, Counting, InParts, RecordingActions, Six, halved
from gymnasium import spaces
from ray.rllib.callbacks.callbacks import RLlibCallback
from readmes import ROOT
from test_exact_resume import assert_identical, identity_of
from test_seven_algorithms import TINY

from qvpo_rllib import cli
from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.core.errors import UnusableOutcome
from qvpo_rllib.play.evaluation import evaluate_checkpoint, evaluate_server
from qvpo_rllib.play.trained_policy import TrainedPolicy
from qvpo_rllib.ray_session import LOOPBACK
from qvpo_rllib.rollout.episodes import try_a_step
from qvpo_rllib.rollout.wrapping import FrameSkip, entry_point, env_steps_of, wrapped
from qvpo_rllib.serving import load
from qvpo_rllib.serving.client import Client, ServerError
from qvpo_rllib.training.plan import check_environment

ENV = "environments:InParts-v0"
WRAPPERS = ("environments:halved",)
LENGTH = 10  # env steps of an episode; with `frame_skip` 3 the policy acts 4 times
WRAPPED = {"frame_skip": 3, "wrappers": WRAPPERS}
PARTS_OF_ENV = [("goal.at", 1), ("goal.kind", 3), ("legs.0", 2), ("legs.1", 5), ("velocity", 2)]


# --- one environment ---------------------------------------------------------------------------


def test_an_action_is_repeated_and_its_rewards_are_summed() -> None:
    env = wrapped(RecordingActions(length=7), frame_skip=3)
    env.reset(seed=0)
    action = env.action_space.sample()
    steps = [env.step(action) for _ in range(3)]
    assert [step[1] for step in steps] == [3.0, 3.0, 1.0]  # the episode ends within the third
    assert [bool(step[2] or step[3]) for step in steps] == [False, False, True]
    assert [step[0][1] for step in steps] == [3, 6, 7]
    assert len(env.unwrapped.received) == env_steps_of(env, 3) == 7
    env.reset()
    assert env_steps_of(env, 0) == 0


def test_without_frame_skip_nothing_is_wrapped() -> None:
    env = Counting()
    assert wrapped(env) is env
    assert env_steps_of(env, 4) == 4


def test_wrappers_are_applied_in_their_order_under_the_action_repeat() -> None:
    env = wrapped(InParts(offset=1.0), 2, ["environments:halved", "environments:halved"])
    env.reset(seed=0)
    assert isinstance(env, FrameSkip)
    assert env.step(np.zeros(1))[1] == 2 * 0.25


def test_the_vector_is_gymnasiums() -> None:
    for kind in ("InParts", "InTuple"):
        raw, flat = (
            gym.make(f"environments:{kind}-v0"),
            wrapped(gym.make(f"environments:{kind}-v0")),
        )
        assert flat.observation_space == spaces.flatten_space(raw.observation_space)
        expected = spaces.flatten(raw.observation_space, raw.reset(seed=5)[0])
        np.testing.assert_array_equal(flat.reset(seed=5)[0], expected)
        assert flat.reset(seed=5)[0].dtype == flat.observation_space.dtype


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_module:f", "no_such_module"),
        ("environments:nothing", "nothing"),
        ("environments:LENGTHS", "LENGTHS"),
        ("environments:__name__", "is no function but str"),
    ],
)
def test_a_wrapper_that_is_none_is_refused(path: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        entry_point(path)
    assert entry_point("environments:halved") is halved


@pytest.mark.parametrize("env", ["environments.Six", Six], ids=["by name", "class"])
def test_a_wrapper_that_cannot_be_imported_is_refused_before_anything_starts(
    env: Any, tiny_config: Any
) -> None:
    with pytest.raises(ValueError, match="There is no wrapper 'environments:nothing'"):
        tiny_config(wrappers=["environments:nothing"]).environment(env).validate()


def test_an_observation_that_lacks_a_part_names_it() -> None:
    env = wrapped(InParts(broken_at=1), frame_skip=2)
    env.unwrapped.length = 1
    with pytest.raises(UnusableOutcome, match=r"here: step 1 .* it must have the parts .*'legs'"):
        try_a_step(env, "here")
    with pytest.raises(UnusableOutcome, match=r"its reset returned an observation"):
        try_a_step(wrapped(InParts(broken_at=0)), "here")


# --- packages that register their environments when they are imported ---------------------------


@pytest.mark.parametrize(
    ("env", "module", "extra"),
    [
        ("dm_control/cartpole-swingup-v0", "shimmy", "dm-control"),
        ("FetchReachDense-v4", "gymnasium_robotics", "robotics"),
        ("PointMaze_UMaze-v3", "gymnasium_robotics", "robotics"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(
    env: str, module: str, extra: str, monkeypatch: Any
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == module else found(name)
    )
    with pytest.raises(ValueError, match=rf"{module!r}.*pip install 'qvpo_rllib\[{extra}\]'"):
        check_environment(env)


@pytest.mark.parametrize("env", ["dm_control/cartpole-swingup-v0", "dm_control/walker-walk-v0"])
def test_dm_control_is_made_by_its_id_alone(env: str, build: Any, tiny_config: Any) -> None:
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    train_and_go_on(env, build, tiny_config)


def test_goal_environments_are_made_by_their_id_alone(build: Any, tiny_config: Any) -> None:
    pytest.importorskip("gymnasium_robotics")
    try:
        check_environment("FetchReachDense-v4")
    except ValueError as error:
        if "AssertionError" in str(error):  # the package fails by itself under this MuJoCo
            pytest.skip(str(error))
        raise
    train_and_go_on("FetchReachDense-v4", build, tiny_config)


def test_box2d_starts_new_episodes_on_resume_and_says_so(
    build: Any, tiny_config: Any, caplog: Any
) -> None:
    pytest.importorskip("Box2D")
    pytest.importorskip("pygame")
    original = build(tiny_config("BipedalWalker-v3"))
    original.train()
    path = original.save().checkpoint.path
    resumed = build(tiny_config("BipedalWalker-v3"))
    resumed.restore(path)
    assert "1 environments or workers start new episodes" in caplog.text
    resumed.train()
    assert resumed.ledger.ingested == 120


def train_and_go_on(env: str, build: Any, tiny_config: Any, **options: Any) -> Any:
    """Trains in mid-episode, saves, and compares what follows with a run that is restored."""
    config = tiny_config(env, update_ratio=0.25, **options)
    original = build(config)
    original.train()
    original.training_step()
    path = original.save().checkpoint.path
    expected = identity_of(original, [original.train()])
    resumed = build(config.copy(copy_frozen=False))
    resumed.restore(path)
    assert_identical(identity_of(resumed, [resumed.train()]), expected)
    return resumed


# --- training ----------------------------------------------------------------------------------


class Lengths(RLlibCallback):
    """Puts the number of the policy's steps beside each episode."""

    def on_episode_end(self, *, episode: Any, **kwargs: Any) -> None:
        episode.custom_metrics["policy_steps"] = episode.length


# There are two kinds of remote workers: of the off-policy algorithms, and of those on RLlib's.
@pytest.mark.parametrize(
    ("name", "num_workers"), [*((name, 0) for name in ALGORITHMS), ("qvpo", 1), ("ppo", 1)]
)
def test_all_algorithms_train_and_evaluate_the_wrapped_environment(
    name: str, num_workers: int, build: Any
) -> None:
    config = ALGORITHMS[name].load().get_default_config().environment(ENV)
    config.training(**{**TINY[name], **WRAPPED}).callbacks(Lengths)
    config.env_runners(num_env_runners=num_workers, num_envs_per_env_runner=2)
    config.reporting(min_sample_timesteps_per_iteration=60)
    config.evaluation(evaluation_interval=1, evaluation_duration=2)
    algorithm = build(config.debugging(seed=0, log_level="ERROR"))
    result = algorithm.train()
    for episodes in (result["env_runners"], result["evaluation"]["env_runners"]):
        assert set(episodes["hist_stats"]["episode_lengths"]) == {LENGTH}
        assert episodes["custom_metrics"]["policy_steps_mean"] == 4
    metadata = algorithm.metadata()
    assert metadata.shapes == [13, 1]
    assert [(p["name"], p["width"]) for p in metadata.observation_parts or []] == PARTS_OF_ENV
    played = evaluate_checkpoint(Path(algorithm.save().checkpoint.path), episodes=2)
    assert [episode.length for episode in played.episodes] == [LENGTH, LENGTH]
    assert [len(episode.rewards) for episode in played.episodes] == [4, 4]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_environment_is_always_made_with_its_arguments(
    name: str, build: Any, tmp_path: Path
) -> None:
    """RLlib would make one without them, to see whether it is an Atari game."""
    config = ALGORITHMS[name].load().get_default_config().training(**TINY[name])
    config.environment("environments:Limited-v0", env_config={"limited": str(tmp_path / "not")})
    build(config.debugging(log_level="ERROR"))


def test_a_resumed_run_is_the_uninterrupted_one(build: Any, tiny_config: Any) -> None:
    train_and_go_on(ENV, build, tiny_config, **WRAPPED)


@pytest.mark.parametrize("change", [{"frame_skip": 2}, {"wrappers": ()}])
def test_a_checkpoint_goes_on_with_the_same_wrapping_alone(
    change: dict[str, Any], build: Any, tiny_config: Any
) -> None:
    original = build(tiny_config(ENV, **WRAPPED))
    path = original.save().checkpoint.path
    other = build(tiny_config(ENV, **{**WRAPPED, **change}))
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*this run has"):
        other.restore(path)


def test_a_part_that_is_missing_ends_training_and_is_named(build: Any, tiny_config: Any) -> None:
    algorithm = build(tiny_config("environments:LateMisfit-v0"))
    with pytest.raises(UnusableOutcome, match=r"step 7 .*'legs'"):
        algorithm.train()


def test_a_registered_name_and_a_class_are_wrapped_too(build: Any, tiny_config: Any) -> None:
    from ray import tune

    tune.register_env("mine", lambda config: InParts(**config))
    for env in ("mine", "environments.Six", Six):
        config = tiny_config(**WRAPPED).environment(env, env_config={"length": 6})
        result = build(config).train()
        assert set(result["env_runners"]["hist_stats"]["episode_lengths"]) == {6}


# --- the command line, bundles and the server ---------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any, qvpo: Callable[..., str]) -> Path:
    """A run of `qvpo train` with all of it: parts, wrapper, action repeat, arguments."""
    path = tmp_path_factory.mktemp("kinds") / "run"
    command = ["train", "--env", ENV, "--preset", "quick", "--env-steps", "60"]
    command += ["--eval-interval", "60", "--run-dir", str(path), "--env-config", "offset=2.5"]
    settings = {
        "frame_skip": 3, "wrappers": WRAPPERS[0], "hidden": 8, "warmup_steps": 40, "batch_size": 8,
        "diffusion_steps": 2, "num_policy_samples": 2, "k_eval": 2, "engine": "eager",
    }  # fmt: skip
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    qvpo(*command)
    return path


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    out = run.parent / "bundle"
    assert cli.main(["export", str(run), str(out), "--name", "parts"]) == 0
    return out


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    import uvicorn

    from qvpo_rllib.serving.api import create_api

    server = uvicorn.Server(
        uvicorn.Config(create_api([bundle]), host=LOOPBACK, port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield f"http://{LOOPBACK}:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def test_a_run_records_and_resumes_it(run: Path, tmp_path: Path, qvpo: Callable[..., str]) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["env_config"] == {"offset": 2.5}
    assert config["hyperparameters"]["frame_skip"] == 3
    assert config["hyperparameters"]["wrappers"] == list(WRAPPERS)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["episode_length_mean"] for row in rows if row["episode_length_mean"]} == {LENGTH}
    assert rows[-1]["evaluation/length_mean"] == LENGTH
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    qvpo("train", "--resume", str(copy), "--env-steps", "90")
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert (rows[-1]["env_steps"], rows[-1]["evaluation/length_mean"]) == (92, LENGTH)


def test_run_bundle_and_server_play_the_same_episodes(run: Path, bundle: Path, url: str) -> None:
    modules = ["environments"]
    played = [
        evaluate_checkpoint(run, episodes=3, seed=4),
        evaluate_checkpoint(bundle, episodes=3, seed=4, modules=modules),
        evaluate_server(url, "parts", episodes=3, seed=4, modules=modules),
    ]
    first = played[0].episodes
    assert [episode.length for episode in first] == [LENGTH] * 3
    assert len({episode.episode_return for episode in first}) == 3
    # An untrained policy's rewards are about the offset, which the wrapper halves.
    for other in played[1:]:
        assert [e.rewards for e in other.episodes] == [e.rewards for e in first]


def test_a_server_of_an_earlier_version_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of wrapping and parts."""
    model = {
        "name": "old", "version": "1", "default": True, "env": "InvertedPendulum-v5",
        "env_config": {}, "obs_dim": 4, "act_low": [-3.0], "act_high": [3.0], "k_eval": 4,
    }  # fmt: skip
    monkeypatch.setattr(Client, "models", lambda self: [model])
    monkeypatch.setattr(Client, "act", lambda self, name, obs, k, seed: np.zeros((len(obs), 1)))
    found = evaluate_server("http://127.0.0.1:1", "old", episodes=1)
    assert (found.k, len(found.episodes)) == (4, 1)


def test_an_environment_with_other_parts_is_refused(url: str) -> None:
    """As many numbers in all, but in another order."""
    with pytest.raises(ValueError, match=r"parts 0\.at: 1, .* but the policy .* on goal\.at: 1"):
        evaluate_server(url, "parts", "environments:InTuple-v0", modules=["environments"])


def test_a_bundles_modules_are_imported_only_if_they_are_named(
    bundle: Path, url: str, capsys: Any
) -> None:
    for command in (
        ["evaluate", str(bundle)],
        ["evaluate", "--server", url, "--model", "parts"],
        # Another environment, but the wrappers are the model's.
        ["evaluate", "--server", url, "--model", "parts", "--env", ENV],
        ["record", str(bundle), "--import", "gymnasium"],
    ):
        assert cli.main(command) == cli.EXIT_BAD_INPUT
        assert "--import environments" in capsys.readouterr().err
    assert cli.main(["evaluate", str(bundle), "--episodes", "1", "--import", "environments"]) == 0


def test_a_bundle_describes_it_and_an_older_one_is_read(bundle: Path, tmp_path: Path) -> None:
    from qvpo_rllib.serving import description as d

    text = (bundle / "policy.json").read_bytes()
    description, _ = d.decode(text)
    assert (description.frame_skip, description.wrappers) == (3, list(WRAPPERS))
    assert [(p["name"], p["width"]) for p in description.obs_parts or []] == PARTS_OF_ENV
    content = json.loads(text)
    for name in (*d.ADDED_SINCE, "digest"):
        content.pop(name, None)
    content["digest"] = d._digest(content)
    older, _ = d.decode(json.dumps(content).encode())
    assert (older.frame_skip, older.wrappers, older.obs_parts) == (1, [], None)
    content["obs_parts"] = (description.obs_parts or [])[:-1]
    content["digest"] = d._digest({k: v for k, v in content.items() if k != "digest"})
    with pytest.raises(ValueError, match="obs_parts have 11 numbers, not 13"):
        d.decode(json.dumps(content).encode())


def test_the_server_takes_the_vector_and_the_parts_by_name(
    bundle: Path, url: str, tiny_config: Any
) -> None:
    PARTS.seed(1)
    named = [PARTS.sample() for _ in range(3)]
    vectors = np.stack([spaces.flatten(PARTS, obs) for obs in named])
    policy = load(bundle)
    expected = policy.act(vectors, 2, torch.Generator().manual_seed(5))
    with Client(url) as client:
        (model,) = client.models()
        assert [part["name"] for part in model["obs_parts"]] == [name for name, _ in PARTS_OF_ENV]
        for observations in (vectors, named, [named[0], *vectors[1:]]):
            np.testing.assert_array_equal(client.act("parts", observations, 2, 5), expected)
        for wrong, words in (
            ({**named[0], "velocity": [1.0]}, r"observations\[0\]: part 'velocity' has shape"),
            ({**named[0], "velocity": [np.nan, 0]}, "not finite"),
            ({}, r"observations\[0\]"),
            ([1.0], "has 1 numbers; parts needs 13"),
        ):
            with pytest.raises(ServerError, match=words) as error:
                client.act("parts", [wrong])
            assert error.value.status == 422
    trained = TrainedPolicy.load(bundle)
    assert trained.parts is not None
    np.testing.assert_array_equal(trained.parts.flatten(named[0]), vectors[0])


def test_a_model_without_parts_refuses_them() -> None:
    from types import SimpleNamespace

    from starlette.exceptions import HTTPException

    from qvpo_rllib.serving import api

    policy: Any = SimpleNamespace(parts=None, description=SimpleNamespace(name="plain", obs_dim=4))
    with pytest.raises(HTTPException) as error:
        api._check(policy, [{"a": 1}])
    assert "plain has no parts: send a list of 4 numbers" in error.value.detail


def test_a_video_keeps_the_speed_of_the_environment(run: Path, tmp_path: Path) -> None:
    """100 pictures a second, one for three of them: 33 a second, four after the first."""
    imageio = pytest.importorskip("imageio.v2")
    out = tmp_path / "video.mp4"
    assert cli.main(["record", str(run), "--out", str(out)]) == 0
    with imageio.get_reader(out) as reader:
        assert reader.get_meta_data()["fps"] == pytest.approx(100 / 3, abs=0.01)
        assert reader.count_frames() == 5


FAMILIES = {
    "pendulum": None,
    "dm_control_cartpole": "dm-control",
    "dm_control_walker": "dm-control",
    "robotics_fetch_reach": "robotics",
    "box2d_bipedal_walker": "box2d",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_example_says_what_it_needs(name: str, monkeypatch: Any) -> None:
    import yaml

    from qvpo_rllib.tuning import spec

    file = ROOT / "tune_configs" / "families" / f"{name}.yaml"
    head, values = file.read_text().split("\nname:")[0], yaml.safe_load(file.read_text())
    for word in ("# Shows:", "# Costs:", f"qvpo tune tune_configs/families/{name}.yaml"):
        assert word in head
    extra = FAMILIES[name]
    assert (f'pip install -e ".[{extra}]"' in head) == (extra is not None)
    assert f"families/{name}.yaml" in (ROOT / "tune_configs" / "README.md").read_text()
    monkeypatch.setattr(spec, "check_environment", lambda *args, **kwargs: None)  # without extras
    assert spec.ExperimentSpec.from_dict(values).name == name


def test_all_examples_are_known() -> None:
    files = (ROOT / "tune_configs" / "families").iterdir()
    assert {file.stem for file in files} == FAMILIES.keys()


def test_an_experiment_file_says_it_all(tmp_path: Path) -> None:
    from qvpo_rllib.tuning.spec import ExperimentSpec, SpecError
    from qvpo_rllib.tuning.tuner import fixed_config

    values = {
        "name": "x", "task": ENV, "preset": "quick", "env_config": {"length": 8},
        "training": {"frame_skip": 2, "wrappers": list(WRAPPERS)}, "storage": str(tmp_path),
    }  # fmt: skip
    spec = ExperimentSpec.from_dict(values)
    config = fixed_config(spec, "qvpo")
    assert (config["env_config"], config["frame_skip"]) == ({"length": 8}, 2)
    assert config["wrappers"] == list(WRAPPERS)
    assert spec.to_dict()["env_config"] == {"length": 8}
    for wrong, words in (
        ({"env_config": {"lenght": 8}}, "lenght"),
        ({"training": {"wrappers": ["environments:none_at_all"]}}, "none_at_all"),
        ({"env_config": {"length": object()}}, "env_config"),
    ):
        with pytest.raises(SpecError, match=words):
            ExperimentSpec.from_dict({**values, **wrong})
