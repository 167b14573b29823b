"""When a run's next checkpoint is due, by env steps or by time."""

from dataclasses import dataclass


@dataclass
class CheckpointClock:
    """Neither interval: never due; a run saves at its evaluations anyway.

    Args:
        env_steps: a checkpoint whenever a multiple of these has been passed.
        minutes: a checkpoint so long after the one before.
    """

    env_steps: int | None
    minutes: float | None
    saved_at_env_steps: int = 0
    saved_at_s: float = 0.0

    def saved(self, env_steps: int, now_s: float) -> None:
        """There is a checkpoint of this moment."""
        self.saved_at_env_steps, self.saved_at_s = env_steps, now_s

    def is_due(self, env_steps: int, now_s: float) -> bool:
        if self.env_steps is not None:
            return env_steps // self.env_steps > self.saved_at_env_steps // self.env_steps
        return self.minutes is not None and now_s - self.saved_at_s >= 60 * self.minutes
