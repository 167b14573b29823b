"""How the driver of an experiment asks its trials to save and stop.

A trial that trains answers no call until its iteration ends, which may take many minutes. So the
driver leaves a mark in Ray's key-value store, under the number of its job, and each trial looks for
it now and then.
"""

import contextlib
import time

import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv

NAMESPACE = "qvpo_rllib"
LOOK_EVERY_S = 1.0  # a look takes about half a millisecond


def ask_trials_to_stop() -> None:
    """All those that this process, the driver, has started or will start."""
    internal_kv._internal_kv_put(_key(), b"1", namespace=NAMESPACE)


class StopSignal:
    """Whether the driver has asked, as seen from one of its actors; once it has, it stays so."""

    def __init__(self) -> None:
        self._asked = False
        self._looked_s = float("-inf")

    @property
    def asked(self) -> bool:
        """At most `LOOK_EVERY_S` old."""
        if not self._asked and time.monotonic() - self._looked_s >= LOOK_EVERY_S:
            self.look()
        return self._asked

    def look(self) -> None:
        """Now."""
        with contextlib.suppress(RayError):  # not to be reached just now: at the next look
            self._asked = internal_kv._internal_kv_get(_key(), namespace=NAMESPACE) is not None
        self._looked_s = time.monotonic()


def _key() -> str:
    return f"stop-{ray.get_runtime_context().get_job_id()}"
