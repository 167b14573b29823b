"""Ending training between two training steps, with a state to save that can go on from there."""

import time
from typing import Any

import psutil
import ray
import torch
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from ray.rllib.algorithms.algorithm import TrainIterCtx
from ray.rllib.utils.metrics import TRAINING_ITERATION_TIMER
from ray.tune.result import TIME_TOTAL_S, TRAINING_ITERATION

from qvpo_rllib.runtime.stop_signal import StopSignal

# The evaluation return at the top level of a result, by which Ray Tune keeps the best checkpoint.
SCORE = "evaluation_return_mean"
UNFINISHED = "unfinished_iteration"


class Interruptible:
    """To be put before RLlib's algorithm.

    Whoever sets `stop_requested` gets a `KeyboardInterrupt` from `train` between two training steps
    or in the midst of an evaluation. As a trial of Ray Tune, whose driver asks by a `StopSignal`,
    `train` returns no result at all instead, and the trial waits to be saved: its checkpoint holds
    how far the iteration is, and the first `train` after a restore finishes it.
    """

    def setup(self: Any, config: Any) -> None:
        # Set it from a signal handler; it may be read often.
        self._stop_requested = False
        in_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        self._signal = StopSignal() if in_actor else None
        # Counters at its beginning, and results so far; None between iterations.
        self._iteration_so_far: tuple[dict[str, int], dict[str, Any] | None] | None = None
        super().setup(config)  # type: ignore[misc]

    @property
    def stop_requested(self: Any) -> bool:
        return self._stop_requested or (self._signal is not None and self._signal.asked)

    @stop_requested.setter
    def stop_requested(self, value: bool) -> None:
        self._stop_requested = value

    def raise_if_stop_requested(self) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt

    def train(self: Any) -> dict[str, Any] | list[Any]:
        """A result, or none (Ray Tune takes a list of results too) if the driver asked to stop."""
        started_s = time.time()
        if self._signal is not None:
            self._signal.look()
        try:
            result: dict[str, Any] = super().train()  # type: ignore[misc]
            return result
        except BaseException as error:
            if not (isinstance(error, KeyboardInterrupt) and self._signal and self._signal.asked):
                self._iteration_so_far = None
                raise
        # What Tune is to know of the checkpoint that it makes next. Its policy was not evaluated.
        self._last_result = {
            **(self._last_result or {}),
            TRAINING_ITERATION: self._iteration,
            TIME_TOTAL_S: self._time_total + time.time() - started_s,
            SCORE: float("-inf"),
        }
        return []

    def _run_one_training_iteration_old_api_stack(self: Any) -> tuple[dict[str, Any], Any]:
        """RLlib's own, but that an iteration which was interrupted goes on where it was."""
        with self._timers[TRAINING_ITERATION_TIMER], TrainIterCtx(algo=self) as context:
            if self._iteration_so_far is None:
                counters = {n: v for n, v in vars(context).items() if n.startswith("init_")}
                self._iteration_so_far = counters, None
            counters, results = self._iteration_so_far
            vars(context).update(counters)
            while not context.should_stop(results):
                with self._timers["restore_workers"]:
                    restored = self.restore_env_runners(self.env_runner_group)
                    if restored:
                        self._make_on_env_runners_recreated_callbacks(
                            config=self.config,
                            env_runner_group=self.env_runner_group,
                            restored_env_runner_indices=restored,
                        )
                with self._timers["training_step"]:
                    results = self.training_step() or results or {}
                self._iteration_so_far = counters, results
        return dict(results or {}), context

    def _compile_iteration_results_old_api_stack(
        self: Any, *, episodes_this_iter: Any, step_ctx: Any, iteration_results: dict[str, Any]
    ) -> dict[str, Any]:
        results: dict[str, Any] = super()._compile_iteration_results_old_api_stack(  # type: ignore[misc]
            episodes_this_iter=episodes_this_iter,
            step_ctx=step_ctx,
            iteration_results=iteration_results,
        )
        self._iteration_so_far = None
        return results

    def __getstate__(self: Any) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]
        state[UNFINISHED] = self._iteration_so_far
        return state

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._iteration_so_far = state.get(UNFINISHED)


def available_bytes(device: torch.device) -> int:
    """Free bytes on `device`; on a CPU within the container's limit as well as the machine's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    in_container = get_system_memory() - get_used_memory()  # Ray reads the cgroup's figures
    return int(max(0, min(psutil.virtual_memory().available, in_container)))
