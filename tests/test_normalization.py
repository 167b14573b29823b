"""`normalize_observations` on RLlib: workers, evaluation, checkpoints, bundles, for all seven."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from test_seven_algorithms import config_of

from qvpo_rllib import cli
from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.play.trained_policy import TrainedPolicy
from qvpo_rllib.serving import load
from qvpo_rllib.serving.bundle import build_networks, encode_parameters

OFF_POLICY = ("qvpo", "dipo", "qsm", "td3")
OBS = np.random.default_rng(5).normal(0, [0.1, 0.3, 2, 50], (6, 4)).astype(np.float32)


def moments_of(policy: Any) -> dict[str, torch.Tensor]:
    networks = getattr(policy, "networks", None) or policy.model
    return {name: buffer.clone() for name, buffer in networks.observations.named_buffers()}


def observed(algorithm: Any) -> Any:
    """All observations of training, as the environment gave them: the replay's."""
    replay = getattr(algorithm, "replay", None) or algorithm.local_replay_buffer.replay
    assert replay.num_added == len(replay)
    return reference.in_order(replay).obs.numpy()


def act(policy: Any) -> Any:
    return policy.act(OBS, generator=torch.Generator().manual_seed(3))


def assert_same_moments(one: Any, other: Any) -> None:
    for name, value in moments_of(one).items():
        assert torch.equal(value, moments_of(other)[name]), name


@pytest.fixture(scope="module", params=ALGORITHMS)
def trained(request: Any, build_shared: Any) -> tuple[str, Any]:
    algorithm = build_shared(config_of(request.param, normalize_observations=True))
    algorithm.train()
    return request.param, algorithm


def test_the_statistics_are_those_of_training_alone(trained: Any) -> None:
    name, algorithm = trained
    before = moments_of(algorithm.get_policy())
    assert before["number"] == algorithm.env_steps == 60
    algorithm.evaluate()
    for key, value in moments_of(algorithm.get_policy()).items():
        assert torch.equal(value, before[key])
    if name not in ("ppo", "spo"):  # which have no replay
        history = observed(algorithm)
        np.testing.assert_allclose(before["mean"], history.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(before["variance"], history.var(0), rtol=1e-4)


def test_the_networks_see_normalised_observations(trained: Any) -> None:
    name, algorithm = trained
    policy = algorithm.get_policy()
    if name in OFF_POLICY:
        found = policy.network_input(OBS)
    elif name == "sac":
        found, _ = policy.model({"obs": torch.from_numpy(OBS)}, [], None)
        target, _ = policy.target_model({"obs": torch.from_numpy(OBS)}, [], None)
        assert torch.equal(found, target)
    else:
        return  # tests/test_on_rllib.py
    expected = reference.standardized(observed(algorithm), OBS)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_evaluation_acts_by_trainings_statistics(trained: Any) -> None:
    _, algorithm = trained
    algorithm.evaluate()
    evaluating = algorithm.eval_env_runner_group.local_env_runner.get_policy()
    assert evaluating is not algorithm.get_policy()
    assert_same_moments(evaluating, algorithm.get_policy())
    np.testing.assert_array_equal(act(evaluating), act(algorithm.get_policy()))


def test_a_checkpoint_acts_and_goes_on_with_them(trained: Any, build: Any, tmp_path: Path) -> None:
    name, algorithm = trained
    algorithm.save(str(tmp_path))
    loaded = TrainedPolicy.load(tmp_path)
    found, expected = act(loaded), loaded.scale.to_env(act(algorithm.get_policy()))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    resumed = build(config_of(name, normalize_observations=True))
    resumed.restore(str(tmp_path))
    assert_same_moments(resumed.get_policy(), algorithm.get_policy())
    resumed.train()
    assert moments_of(resumed.get_policy())["number"] == resumed.env_steps == 120
    if name in ("ppo", "spo"):  # whose networks always have them
        return
    with pytest.raises(ValueError, match=r"normalize_observations=True.*this run has .*=False"):
        build(config_of(name)).restore(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("qvpo", {"sampling_mode": "sync"}, marks=pytest.mark.slow),
        ("td3", {"sampling_mode": "async"}),
        pytest.param("sac", {}, marks=pytest.mark.slow),
        ("ppo", {}),
    ],
)
def test_remote_workers_act_by_the_learners_statistics(
    build: Any, name: str, options: dict[str, Any]
) -> None:
    num_workers = 2 if name in ("qvpo", "ppo") else 1  # whose observations are put together
    algorithm = build(config_of(name, num_workers, normalize_observations=True, **options))
    for _ in range(3):
        algorithm.train()
    algorithm.drain()
    mine = moments_of(algorithm.get_policy())
    assert mine["number"] == algorithm.env_steps
    if name != "ppo":
        history = observed(algorithm)
        np.testing.assert_allclose(mine["mean"], history.mean(0), rtol=1e-4, atol=1e-6)
    workers = algorithm.env_runner_group.foreach_env_runner(
        lambda worker: moments_of(worker.get_policy()), local_env_runner=False
    )
    # As new as the weights that came with them.
    assert 20 <= max(worker["number"] for worker in workers) <= mine["number"]
    for worker in workers:
        assert name in OFF_POLICY or torch.equal(worker["mean"], mine["mean"])


# --- bundles of QVPO ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(build_shared: Any, tmp_path_factory: Any) -> Path:
    """A checkpoint and a bundle, with ONNX, of a policy that normalises."""
    directory: Path = tmp_path_factory.mktemp("normalizing")
    algorithm = build_shared(config_of("qvpo", normalize_observations=True))
    algorithm.train()
    algorithm.save(str(directory / "checkpoint"))
    command = ["export", str(directory / "checkpoint"), str(directory / "bundle"), "--onnx"]
    assert cli.main(command) == 0
    return directory


def test_a_bundle_acts_as_the_checkpoint(saved: Path) -> None:
    bundle, checkpoint = load(saved / "bundle"), TrainedPolicy.load(saved / "checkpoint")
    np.testing.assert_array_equal(act(bundle), act(checkpoint))
    content = json.loads((saved / "bundle" / "policy.json").read_text())
    assert content["normalize_observations"] is True
    # The numbers matter: without them it acts otherwise.
    bundle.networks.observations = None
    assert not np.allclose(act(bundle), act(checkpoint), atol=1e-3)


def test_onnx_acts_as_the_bundle(saved: Path) -> None:
    import onnxruntime

    policy = load(saved / "bundle")
    session = onnxruntime.InferenceSession((saved / "bundle" / "policy.onnx").read_bytes())
    noise = policy.draw_noise(len(OBS), 4, torch.Generator().manual_seed(3))
    actions, _ = session.run(None, {"observations": OBS, "noise": noise.numpy()})
    expected, _ = policy.act_with_noise(torch.from_numpy(OBS), noise)
    np.testing.assert_allclose(actions, policy.scale.to_env(expected), atol=1e-4)


def test_evaluate_plays_the_same_from_checkpoint_and_bundle(saved: Path, capsys: Any) -> None:
    returns = []
    for path in ("checkpoint", "bundle"):
        command = ["evaluate", str(saved / path), "--episodes", "2", "--json"]
        assert cli.main(command) == 0
        returns.append(json.loads(capsys.readouterr().out)["returns"])
    assert returns[0] == returns[1]


def test_a_bundle_with_impossible_statistics_is_refused(saved: Path) -> None:
    policy = load(saved / "bundle")
    policy.networks.observations.variance.neg_()
    parameters = encode_parameters(policy.networks.state_dict())
    with pytest.raises(ValueError, match=r"observations\.variance has a number below 0"):
        build_networks(policy.description, parameters)


def test_a_bundle_that_does_not_normalise_is_as_it_was(build: Any, tmp_path: Path) -> None:
    algorithm = build(config_of("qvpo"))
    algorithm.save(str(tmp_path / "checkpoint"))
    assert cli.main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "bundle")]) == 0
    assert "normalize" not in (tmp_path / "bundle" / "policy.json").read_text()
    assert load(tmp_path / "bundle").description.normalize_observations is False
