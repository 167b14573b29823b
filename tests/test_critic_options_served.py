"""Quantile critics with layer normalisation outside of training: bundle, ONNX, server, commands."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.policy.policy import Policy
from test_serving_bundle import change, seeded
from test_serving_cli import serving

from qvpo_rllib import cli
from qvpo_rllib.bench.http_load import fresh_bundle
from qvpo_rllib.checkpoints.metadata import Metadata
from qvpo_rllib.core.networks import QuantileTwinQ
from qvpo_rllib.core.options.qvpo import (
    CRITIC_OPTIONS,
    QVPOHyperparameters,
    resolved_hyperparameters,
)
from qvpo_rllib.play.trained_policy import TrainedPolicy
from qvpo_rllib.serving import ServedPolicy, load
from qvpo_rllib.serving.client import Client
from qvpo_rllib.serving.description import _digest

MODEL = "InvertedPendulum-v5"
CRITICS = {
    "critic": "quantile",
    "num_quantiles": 7,
    "dropped_quantiles": 3,
    "critic_layer_norm": True,
}


@pytest.fixture(scope="module")
def checkpoint(save_trained: Any, tiny_config: Any) -> Path:
    # A rate so high that the ranking is far from that of new networks.
    return Path(save_trained(tiny_config(MODEL, **CRITICS, critic_lr=0.03)))


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "bundle"
    assert cli.main(["export", str(checkpoint), str(out), "--onnx"]) == 0
    return out


@pytest.fixture(scope="module")
def policy(bundle: Path) -> ServedPolicy:
    return load(bundle)


def observations(num: int) -> Any:
    return np.random.default_rng(0).normal(size=(num, 4)).astype(np.float32)


def test_a_bundle_says_which_critics_it_has_and_acts_as_the_policy(
    checkpoint: Path, bundle: Path, policy: Any
) -> None:
    content = json.loads((bundle / "policy.json").read_text())
    assert {name: content[name] for name in CRITIC_OPTIONS} == CRITICS
    critic = policy.networks.critic
    assert isinstance(critic, QuantileTwinQ)
    assert (critic.outputs, critic.kept, len(critic.q1.norms)) == (7, 8, 1)
    trained = Policy.from_checkpoint(str(checkpoint))["default_policy"]
    obs = observations(40)
    normalized = trained.act(obs, k=8, generator=seeded(3))
    actions = policy.act(obs, 8, seeded(3))
    np.testing.assert_allclose(actions, policy.scale.to_env(normalized), atol=1e-5)
    assert len(np.unique(actions.round(2))) > 3  # where all actions are one, any ranking is right
    played = TrainedPolicy.load(str(checkpoint)).act(obs, 8, seeded(3))
    np.testing.assert_array_equal(played, actions)


@pytest.mark.parametrize("engine", ["native", "eager"])
def test_a_row_is_the_same_bits_in_every_batch(policy: Any, engine: str) -> None:
    policy = ServedPolicy(policy.description, policy.networks, engine)
    obs = torch.as_tensor(observations(20))
    noise = policy.draw_noise(20, 8, seeded(9))
    together, finite = policy.act_with_noise(obs, noise)
    assert finite.all()
    for rows in (slice(0, 1), slice(5, 8)):
        alone, _ = policy.act_with_noise(obs[rows], noise[:, rows])
        np.testing.assert_array_equal(alone, together[rows])


def test_onnx_gives_the_same_actions_and_q(bundle: Path, policy: Any) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession((bundle / "policy.onnx").read_bytes())
    for num, k in ((1, 1), (1, 32), (6, 4)):
        obs, noise = observations(num), policy.draw_noise(num, k, seeded(num))
        actions, q = session.run(None, {"observations": obs, "noise": noise.numpy()})
        rows = torch.as_tensor(obs)
        expected = policy.scale.to_env(policy.act_with_noise(rows, noise)[0])
        np.testing.assert_allclose(actions, expected, atol=2e-5)
        if k > 1:
            np.testing.assert_allclose(q, policy._selector.act(rows, noise)[1], atol=1e-4)


def test_a_server_gives_the_bits_of_the_bundle(bundle: Path, policy: Any) -> None:
    with serving(str(bundle)) as (_, url, _), Client(url) as client:
        actions = client.act(MODEL, observations(5), k=8, seed=1)
    np.testing.assert_array_equal(actions, policy.act(observations(5), 8, seeded(1)))


def test_evaluate_plays_the_checkpoint_as_its_bundle(
    checkpoint: Path, bundle: Path, capsys: Any
) -> None:
    returns = []
    for subject in (checkpoint, bundle):
        assert cli.main(["evaluate", str(subject), "--episodes", "2", "--json"]) == 0
        returns.append(json.loads(capsys.readouterr().out)["returns"])
    assert returns[0] == returns[1]


# --- What is older, and what does not fit --------------------------------------------------------


def test_a_bundle_from_before_these_options_has_twins(tmp_path: Path) -> None:
    old = fresh_bundle(tmp_path / "old")
    obs = np.random.default_rng(0).normal(size=(3, 11))
    expected = load(old).act(obs, 4, seeded(1))
    content = json.loads((old / "policy.json").read_text())
    for name in ("digest", *CRITIC_OPTIONS):
        content.pop(name, None)
    (old / "policy.json").write_text(json.dumps(content | {"digest": _digest(content)}))
    np.testing.assert_array_equal(load(old).act(obs, 4, seeded(1)), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"critic": "twin", "num_quantiles": 25, "dropped_quantiles": 2}, "describes"),
        ({"critic": "triplet"}, "critic='triplet'"),
        ({"critic": ["twin"]}, "critic="),
        ({"num_quantiles": 8}, "describes"),
        ({"num_quantiles": 10**9}, "num_quantiles"),
        ({"dropped_quantiles": 7}, "below num_quantiles=7"),
        ({"dropped_quantiles": False}, "dropped_quantiles"),
        ({"critic_layer_norm": 1}, "critic_layer_norm"),
        ({"critic_layer_norm": False}, "missing or foreign"),
    ],
    ids=str,
)
def test_a_bundle_that_contradicts_its_critics_is_refused(
    bundle: Path, tmp_path: Path, changes: Any, words: str
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    change(copy, **changes)
    with pytest.raises(ValueError, match=words):
        load(copy)


def test_a_policy_from_before_these_options_has_twins() -> None:
    given = {**QVPOHyperparameters().to_dict(), "env": "Hopper-v5", "hidden": (8,)}
    before = {name: value for name, value in given.items() if name not in CRITIC_OPTIONS}
    expected = QVPOHyperparameters.for_task({"hidden": given["hidden"]}, "Hopper-v5")
    assert resolved_hyperparameters(before, QVPOHyperparameters) == expected


@pytest.mark.parametrize("name", CRITIC_OPTIONS)
def test_a_run_goes_on_with_the_critics_of_its_checkpoint_alone(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    found = Metadata.read(checkpoint)
    found.check_fits(found, tmp_path, QVPOHyperparameters)
    defaults = {**dict.fromkeys(CRITIC_OPTIONS), "critic": "twin", "num_quantiles": 25,
                "dropped_quantiles": 2, "critic_layer_norm": False}  # fmt: skip
    other = replace(found, hyperparameters={**found.hyperparameters, name: defaults[name]})
    with pytest.raises(ValueError, match=re.escape(f"{name}={CRITICS[name]!r}")):
        found.check_fits(other, tmp_path, QVPOHyperparameters)
    # A checkpoint that is older than the options was made with the defaults.
    before = {n: v for n, v in found.hyperparameters.items() if n not in CRITIC_OPTIONS}
    old = replace(found, hyperparameters=before)
    now = replace(found, hyperparameters=before | defaults)
    old.check_fits(now, tmp_path, QVPOHyperparameters)
    with pytest.raises(ValueError, match="made with critic='twin'"):
        old.check_fits(found, tmp_path, QVPOHyperparameters)
