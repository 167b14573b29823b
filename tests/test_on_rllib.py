"""PPO, SPO and SAC on RLlib's own: formulas, options, updates, the replay buffer."""

import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.sac.sac_torch_policy import _get_dist_class
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.models.torch.torch_action_dist import TorchSquashedGaussian
from ray.rllib.policy.sample_batch import DEFAULT_POLICY_ID, MultiAgentBatch, SampleBatch
from readmes import all_text

from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.algorithms.columnar_buffer import ColumnarBuffer
from qvpo_rllib.algorithms.normalization import ReturnTracker
from qvpo_rllib.algorithms.sac import RivalSACConfig, SquashedGaussian
from qvpo_rllib.algorithms.spo import spo_loss
from qvpo_rllib.core.normalization import CLIP, Moments, RunningMoments
from qvpo_rllib.core.options import option_table

NAMES = ("ppo", "spo", "sac")
ON_POLICY = ("ppo", "spo")
TINY = {
    "ppo": {"hidden": [8], "train_batch_size": 60, "minibatch_size": 20, "num_epochs": 2},
    "spo": {"hidden": [8], "train_batch_size": 60, "minibatch_size": 20, "num_epochs": 2},
    "sac": {"hidden": [8], "batch_size": 8, "warmup_steps": 40, "replay_capacity": 500},
}
LIMIT = 7  # env steps of an episode in `SevenSteps`


class SevenSteps(gym.Env[Any, Any]):
    """Observes the time, 0 to 7, pays 1 a step, and is cut off after 7 steps."""

    observation_space = gym.spaces.Box(0, LIMIT, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        return np.full(1, self.time, np.float32), 1.0, False, self.time == LIMIT, {}


gym.register("SevenSteps-v0", SevenSteps)


def config_of(name: str, env: str = "InvertedPendulum-v5", **training: Any) -> Any:
    config = ALGORITHMS[name].load().get_default_config()
    config.environment(env).training(**{**TINY[name], **training})
    config.reporting(min_sample_timesteps_per_iteration=60)
    config.debugging(seed=0, log_level="ERROR")
    config.evaluation(evaluation_interval=1, evaluation_duration=3)
    return config


# --- formulas ----------------------------------------------------------------------------------


def test_spo_loss_is_the_formula() -> None:
    generator = np.random.default_rng(0)
    ratio, advantage = generator.uniform(0.3, 2.5, 50), generator.normal(size=50)
    epsilon, total = 0.3, 0.0
    for r, a in zip(ratio, advantage, strict=True):
        total += a * r - abs(a) * (r - 1) ** 2 / (2 * epsilon)
    found = spo_loss(torch.from_numpy(ratio), torch.from_numpy(advantage), epsilon)
    assert float(found) == pytest.approx(-total / 50)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_spo_loss_is_least_where_the_ratio_has_moved_by_epsilon(advantage: float) -> None:
    best = 1 + np.sign(advantage) * 0.2
    ratio = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    loss = spo_loss(ratio, torch.tensor([advantage]), 0.2)
    loss.backward()
    assert float(ratio.grad) == pytest.approx(0)  # type: ignore[arg-type]
    for other in (best - 0.1, best + 0.1):
        assert spo_loss(torch.tensor([other]), torch.tensor([advantage]), 0.2) > loss


@pytest.mark.parametrize("mean", [0.0, 1.0, 20.0, -20.0])
def test_sac_knows_how_likely_its_saturated_actions_are(mean: float) -> None:
    inputs = torch.tensor([[mean, mean, -1.0, 0.5]]).repeat(50, 1)
    ours, rllibs = SquashedGaussian(inputs, None), TorchSquashedGaussian(inputs, None)
    torch.manual_seed(0)
    found = ours.logp(ours.sample())
    torch.manual_seed(0)
    z = ours.dist.rsample().double().numpy()
    deviation = np.exp([-1.0, 0.5])
    normal = -0.5 * ((z - mean) / deviation) ** 2 - np.log(deviation * np.sqrt(2 * np.pi))
    log_cosh = np.logaddexp(z, -z) - np.log(2)
    np.testing.assert_allclose(found, (normal + 2 * log_cosh).sum(axis=1), rtol=1e-4, atol=1e-4)
    rllibs_are_near = torch.allclose(rllibs.logp(ours.last_sample), found, atol=0.5)
    assert rllibs_are_near == (abs(mean) < 5)  # else the subclass is not needed any more
    drawn_elsewhere = torch.full((50, 2), 0.3)
    assert torch.equal(ours.logp(drawn_elsewhere), rllibs.logp(drawn_elsewhere))


def test_sacs_loss_asks_that_distribution(build: Callable[[Any], Any]) -> None:
    policy = build(config_of("sac")).get_policy()
    assert _get_dist_class(policy, policy.config, policy.action_space) is SquashedGaussian


def test_moments_of_parts_are_those_of_the_whole() -> None:
    rows = np.random.default_rng(1).normal(3, [1.0, 50.0], (40, 2))
    total = Moments.none(2)
    running = RunningMoments(2)
    for part in np.split(rows, [1, 7, 30]):
        total = total.plus(Moments.of(part))
        running.add(Moments.of(part))
    for found in (total, running.read()):
        assert found.number == 40
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.variance, rows.var(0), rtol=1e-6)
    scaled = running.standardize(torch.tensor([[3.0, 1e6]]))
    assert scaled[0, 1] == CLIP


def test_returns_are_discounted_sums_that_survive_a_fragments_end() -> None:
    rewards = np.random.default_rng(2).normal(size=9)
    whole = [sum(0.9 ** (t - i) * rewards[i] for i in range(t + 1)) for t in range(9)]
    tracker = ReturnTracker(0.9)
    parts = [tracker.follow(5, rewards[:4], False), tracker.follow(5, rewards[4:], True)]
    np.testing.assert_allclose(np.concatenate(parts), whole)
    assert tracker.follow(5, rewards[:1], True) == rewards[0]


# --- what RLlib does at a time limit -----------------------------------------------------------


@pytest.mark.parametrize("name", ON_POLICY)
@pytest.mark.parametrize("as_terminal", [False, True])
def test_the_value_of_the_last_observation_follows_a_time_limit(
    name: str, as_terminal: bool, build: Callable[[Any], Any]
) -> None:
    """Advantages and value targets against GAE written out, with the final observation's value."""
    config = config_of(
        name, "SevenSteps-v0", truncation_as_terminal=as_terminal, normalize_rewards=False
    )
    config.env_runners(rollout_fragment_length=LIMIT)
    algorithm = build(config)
    batch = algorithm.env_runner.sample()[DEFAULT_POLICY_ID]
    assert batch[SampleBatch.OBS][:, 0].tolist() == list(range(LIMIT))
    assert batch[SampleBatch.NEXT_OBS][-1, 0] == LIMIT
    policy = algorithm.get_policy()
    policy.model({"obs": torch.tensor([[float(LIMIT)]])})
    last = 0.0 if as_terminal else float(policy.model.value_function())
    values = [*batch[SampleBatch.VF_PREDS], last]
    advantage, hp = 0.0, config.hyperparameters()
    for t in reversed(range(LIMIT)):
        advantage *= hp.gamma * hp.lambda_
        advantage += 1 + hp.gamma * values[t + 1] - values[t]
        assert batch[Postprocessing.ADVANTAGES][t] == pytest.approx(advantage, rel=1e-5)
        assert batch[Postprocessing.VALUE_TARGETS][t] == pytest.approx(
            advantage + values[t], rel=1e-5
        )


@pytest.mark.parametrize("as_terminal", [False, True])
def test_sac_stores_time_limits_as_it_is_told(
    as_terminal: bool, build: Callable[[Any], Any]
) -> None:
    algorithm = build(config_of("sac", "SevenSteps-v0", truncation_as_terminal=as_terminal))
    for _ in range(2 * LIMIT):
        algorithm.training_step()
    columns = algorithm.local_replay_buffer.replay.segments()[0]
    ends = columns.next_obs[:, 0] == LIMIT
    assert int(ends.sum()) == 2
    assert (columns.terminal == (ends.float() if as_terminal else 0)).all()
    # The final observation is kept, not the one that the next episode begins with.
    assert (columns.next_obs - columns.obs == 1).all()


# --- SAC's replay ------------------------------------------------------------------------------


def test_the_buffer_keeps_its_rows_and_its_stream_through_a_checkpoint() -> None:
    def fresh() -> ColumnarBuffer:
        return ColumnarBuffer(10, batch_size=4, seed=3, truncation_as_terminal=False)

    buffer, other = fresh(), fresh()
    assert len(buffer.sample(1)) == 0
    for start in (0, 6):
        numbers = np.arange(start, start + 6, dtype=np.float32)
        rows = SampleBatch(
            {
                SampleBatch.OBS: numbers[:, None],
                SampleBatch.ACTIONS: numbers[:, None] / 10,
                SampleBatch.REWARDS: numbers,
                SampleBatch.NEXT_OBS: numbers[:, None] + 1,
                SampleBatch.TERMINATEDS: numbers == 7,
            }
        )
        buffer.add(MultiAgentBatch({DEFAULT_POLICY_ID: rows}, 6))
    buffer.sample(2)
    other.set_state(buffer.get_state())
    assert len(other) == 10
    for _ in range(3):
        first, second = (b.sample(2)[DEFAULT_POLICY_ID] for b in (buffer, other))
        assert first.count == 8
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
        assert (first[SampleBatch.NEXT_OBS] - first[SampleBatch.OBS] == 1).all()
        assert first[SampleBatch.REWARDS].min() >= 2  # the oldest two were overwritten
        assert (first[SampleBatch.TERMINATEDS] == (first[SampleBatch.REWARDS] == 7)).all()


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("ppo", {"clip_parm": 0.1}, "Did you mean 'clip_param'"),
        ("ppo", {"lr": 0}, "lr=0.0 is not allowed: it must be a number above 0"),
        ("ppo", {"activation": "mish"}, "must be one of tanh, relu"),
        ("spo", {"minibatch_size": 61}, "at most train_batch_size=60"),
        ("spo", {"lambda_": 1.5}, "lambda_=1.5 is not allowed"),
        ("sac", {"lr": 1e-3}, "SAC does not read 'lr': use actor_lr and critic_lr instead"),
        ("sac", {"warmup_steps": 501}, "replay_capacity=500 is not allowed"),
        ("sac", {"update_ratio": 0.3}, "must be a whole number"),
        ("sac", {"tau": "fast"}, "it must be a finite number"),
    ],
)
def test_wrong_options_are_refused(name: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(name, **wrong).validate()


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_valid_and_the_papers_values_are_the_default(name: str) -> None:
    kind = ALGORITHMS[name].hyperparameters
    for preset in kind.presets:
        assert kind.resolve(preset).gamma == 0.99
        assert preset in kind.runs
    paper = {
        "ppo": {"hidden": [256, 256], "activation": "tanh", "lr": 7e-4, "entropy_coeff": 0.01,
                "vf_loss_coeff": 0.5, "grad_clip": 0.5, "minibatch_size": 256},
        "spo": {"hidden": [64, 64], "activation": "tanh", "lr": 3e-4, "lr_end": 0.0,
                "lambda_": 0.95, "clip_param": 0.2, "grad_clip": 0.5, "minibatch_size": 256},
        "sac": {"hidden": [256, 256], "activation": "relu", "actor_lr": 3e-4, "critic_lr": 3e-4,
                "alpha": 0.2, "auto_alpha": False, "tau": 0.005, "batch_size": 256},
    }[name]  # fmt: skip
    assert paper.items() <= kind.resolve().to_json().items()


@pytest.mark.parametrize("name", NAMES)
def test_the_readmes_have_every_option(name: str) -> None:
    text = all_text()
    for row in option_table(ALGORITHMS[name].hyperparameters).splitlines():
        assert row in text


@pytest.mark.parametrize(("ratio", "envs", "workers"), [(1, 1, 0), (0.5, 1, 0), (1, 4, 0)])
def test_sac_does_the_updates_that_the_ratio_asks_for(
    ratio: float, envs: int, workers: int, build: Callable[[Any], Any]
) -> None:
    config = config_of("sac", update_ratio=ratio).env_runners(num_envs_per_env_runner=envs)
    algorithm = build(config)
    while algorithm.env_steps < 100:
        algorithm.training_step()
    # RLlib learns as soon as the warm-up has been passed.
    assert algorithm.updates == pytest.approx(ratio * (100 - 40), abs=envs * ratio)


def test_sac_begins_with_uniform_actions(build: Callable[[Any], Any]) -> None:
    """The box of this task is ±3: actions are stored in [-1, 1]."""
    algorithm = build(config_of("sac", warmup_steps=200))
    while algorithm.env_steps < 200:
        algorithm.training_step()
    actions = algorithm.local_replay_buffer.replay.segments()[0].action
    assert actions.abs().max() <= 1
    assert actions.std() == pytest.approx(3**-0.5, rel=0.15)


def test_replay_can_be_left_out_of_checkpoints() -> None:
    config = RivalSACConfig().environment("InvertedPendulum-v5").training(**TINY["sac"])
    config.replay_in_checkpoints = False
    config.validate()
    assert not config.store_buffer_in_checkpoints
