"""Over a grid of five seeds nothing random is shared: every stream is read where it is used."""

from collections.abc import Callable
from typing import Any

import numpy as np

from qvpo_rllib import QVPOConfig
from qvpo_rllib.tuning.spec import ExperimentSpec
from qvpo_rllib.tuning.tuner import fixed_config, planned_trials

WORKERS, ENVS, SEEDS = 2, 2, [0, 1, 2, 3, 4]


def streams_of(worker: Any) -> dict[str, list[int]]:
    """What a rollout worker's environments, warm-up and diffusion noise were seeded with."""
    warmup = worker._warmup.bit_generator.seed_seq
    return {
        "environment": [int(env.unwrapped.np_random_seed) for env in worker.envs],
        "warm-up": [int(warmup.generate_state(1, np.uint64)[0])],
        "noise": [int(worker.policy.generator.initial_seed())],
    }


def worker_of(algorithm: Any, config: QVPOConfig, index: int) -> Any:
    """Rollout worker `index` of a run with `config`, made in this process as RLlib makes it."""
    worker = algorithm.config.env_runner_cls(
        env_creator=algorithm.env_creator,
        default_policy_class=type(algorithm.policy),
        config=config,
        worker_index=index,
        num_workers=WORKERS,
    )
    worker.collect(random_actions=True)
    return worker


def test_seeds_workers_and_environments_have_streams_of_their_own(
    build: Callable[[Any], Any],
) -> None:
    """One seed's workers are processes; the others', equal to them, are made in this one."""
    spec = ExperimentSpec.from_dict(
        {
            "name": "seeds",
            "task": "InvertedPendulum-v5",
            "preset": "quick",
            "seeds": SEEDS,
            "env_steps": 80,
            "workers": {"num_env_runners": WORKERS, "num_envs_per_env_runner": ENVS},
            "evaluation": {"interval": 80, "episodes": 1},
        }
    )
    configs = [
        QVPOConfig().update_from_dict({**fixed_config(spec, "qvpo"), **trial})
        for trial in planned_trials(spec, "qvpo") or []
    ]
    assert [config.seed for config in configs] == SEEDS
    algorithm = build(configs[0].copy(copy_frozen=False))
    algorithm.training_step()
    remote = algorithm.env_runner_group.foreach_env_runner(streams_of, local_env_runner=False)
    seen: dict[str, list[int]] = {"environment": [], "warm-up": [], "noise": [], "learner": []}
    for config in configs:
        workers = [worker_of(algorithm, config, index) for index in range(1, WORKERS + 1)]
        runners = [streams_of(worker) for worker in workers]
        if config.seed == SEEDS[0]:
            assert runners == remote
        for streams in runners:
            for name, seeds in streams.items():
                seen[name] += seeds
        alone = config.copy(copy_frozen=False).env_runners(num_env_runners=0)
        learner = build(alone).learner
        seen["learner"].append(int(learner.generator.initial_seed()))
    assert seen["learner"][0] == algorithm.learner.generator.initial_seed()
    assert len(seen["environment"]) == len(SEEDS) * WORKERS * ENVS
    assert len(seen["warm-up"]) == len(seen["noise"]) == len(SEEDS) * WORKERS
    assert len(seen["learner"]) == len(SEEDS)
    every = [seed for seeds in seen.values() for seed in seeds]
    assert len(set(every)) == len(every)
