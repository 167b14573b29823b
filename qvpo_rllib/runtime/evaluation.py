"""Evaluates on RLlib's workers: whole episodes, all of them, whichever worker plays them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.evaluation.metrics import summarize_episodes

from qvpo_rllib.core.errors import ENDS_TRAINING

# What RLlib's evaluation methods return: metrics, env steps, agent steps, batches.
Summary = tuple[Any, int, int, list[Any]]


class Share(NamedTuple):
    """The episodes that one worker plays."""

    seeds: list[int]  # of the environments, one per episode
    action_seed: int


def evaluate_shares(group: EnvRunnerGroup, shares: Sequence[Share], timeout_s: float) -> list[Any]:
    """Returns the result of `evaluate_episodes` for each share that was played.

    When a worker dies, another one takes its share and plays the very same episodes.
    """
    calls = [functools.partial(_evaluate_on, index=i, share=s) for i, s in enumerate(shares)]
    workers = group.healthy_worker_ids()
    results: dict[int, Any] = {}
    while workers and len(results) < len(calls):
        missing = [call for i, call in enumerate(calls) if i not in results][: len(workers)]
        answers = group.foreach_env_runner(
            missing,
            kwargs=[{}] * len(missing),
            local_env_runner=False,
            remote_worker_ids=workers[: len(missing)],
            timeout_seconds=timeout_s,
        )
        results |= dict(answers)
        workers, before = group.healthy_worker_ids(), workers
        if len(answers) < len(missing) and workers == before:
            break  # out of time
    return [results[i] for i in sorted(results)]


def summarize(results: Sequence[Any], config: Any, *, keep_custom_metrics: bool) -> Summary:
    """Returns one summary of all episodes.

    Raises:
        NonFiniteError, UnusableOutcome: a worker met one.
        RuntimeError: episodes are missing.
    """
    episodes = []
    for metrics in results:
        if isinstance(metrics, ENDS_TRAINING):
            raise metrics
        episodes += metrics
    if len(episodes) != config.evaluation_duration:
        raise RuntimeError(
            f"Only {len(episodes)} of {config.evaluation_duration} evaluation episodes "
            "came back: a worker died or took longer than evaluation_sample_timeout_s="
            f"{config.evaluation_sample_timeout_s}. A mean over the others would favour "
            "short episodes. Raise the time-out, or use fewer episodes or more workers."
        )
    steps = sum(e.episode_length for e in episodes)
    return summarize_episodes(episodes, episodes, keep_custom_metrics), steps, steps, []


def _evaluate_on(worker: Any, index: int, share: Share) -> tuple[int, Any]:
    return index, worker.evaluate_episodes(share.seeds, share.action_seed)
