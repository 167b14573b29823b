"""The evaluation return at the top level of a result."""

from typing import Any

from ray.rllib.callbacks.callbacks import RLlibCallback

from qvpo_rllib.interruptible import SCORE


class ScoreCallback(RLlibCallback):  # type: ignore[misc]
    """Ray Tune 2.60 looks for the score of a checkpoint at the top level alone: given a nested
    name, it keeps the last checkpoint and deletes the best, silently."""

    def on_train_result(self, *, algorithm: Any, result: dict[str, Any], **kwargs: Any) -> None:
        evaluation = result.get("evaluation", {}).get("env_runners", {})
        if "episode_return_mean" in evaluation:
            result[SCORE] = evaluation["episode_return_mean"]
