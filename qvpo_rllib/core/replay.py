"""The replay buffer, and the ledger of the updates that its transitions are owed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from qvpo_rllib.core.seeding import restore_generator


class Transitions(NamedTuple):
    """Columns of B transitions, float32. Actions are scaled to [-1, 1]."""

    obs: Tensor  # [B, O]
    action: Tensor  # [B, A]
    reward: Tensor  # [B]
    next_obs: Tensor  # [B, O]
    terminal: Tensor  # [B], 1 where the return ends, else 0


def replay_bytes(
    capacity: int, obs_dim: int, act_dim: int, *, improves_actions: bool = False
) -> int:
    """Bytes that a replay of this size takes."""
    num_actions = 2 if improves_actions else 1
    return capacity * (2 * obs_dim + num_actions * act_dim + 2) * 4


class ReplayBuffer:
    """The last `capacity` transitions; once full, a new one overwrites the oldest.

    Sampling is uniform with replacement and draws from the buffer's own generator, on `device`.

    Args:
        improves_actions: keep a second copy of each action, `improved_action`, for a learner to
            write better ones over it.
    """

    def __init__(
        self,
        capacity: int,
        obs_dim: int,
        act_dim: int,
        *,
        seed: int,
        device: torch.device | str,
        improves_actions: bool = False,
    ) -> None:
        self.capacity = capacity
        self.device = torch.device(device)
        shapes = ((obs_dim,), (act_dim,), (), (obs_dim,), ())
        self.columns = Transitions(
            *(torch.zeros(capacity, *shape, device=self.device) for shape in shapes)
        )
        self.improved_action: Tensor | None = None  # [capacity, A]
        if improves_actions:
            self.improved_action = torch.zeros_like(self.columns.action)
        self.size = 0
        # The same number where the device reads it: a captured graph sees it grow.
        self._size = torch.zeros((), dtype=torch.float64, device=self.device)
        self.num_added = 0
        self.generator = Generator(device=self.device)
        self.generator.manual_seed(seed)

    def __len__(self) -> int:
        return self.size

    def add(self, transitions: Transitions) -> None:
        """Appends a batch of transitions; in order of time, on any device."""
        columns = [torch.as_tensor(column) for column in transitions]
        num_new = columns[0].shape[0]
        for name, new, own in zip(Transitions._fields, columns, self.columns, strict=True):
            if new.shape != (num_new, *own.shape[1:]):
                raise ValueError(
                    f"{name} has shape {tuple(new.shape)}; the replay needs "
                    f"{(num_new, *own.shape[1:])}."
                )
        for new, own in zip(columns, self.columns, strict=True):
            self._write(own, new[-self.capacity :], num_new)
        if self.improved_action is not None:
            self._write(self.improved_action, columns[1][-self.capacity :], num_new)
        self.num_added += num_new
        self._set_size()

    def _set_size(self) -> None:
        self.size = min(self.num_added, self.capacity)
        self._size.fill_(self.size)

    def _write(self, own: Tensor, new: Tensor, num_new: int) -> None:
        kept = new.shape[0]
        start = (self.num_added + num_new - kept) % self.capacity
        first = min(kept, self.capacity - start)
        own[start : start + first] = new[:first].to(own)
        own[: kept - first] = new[first:].to(own)

    def sample(self, batch_size: int) -> Transitions:
        """`batch_size` transitions, uniform with replacement."""
        index = self.sample_index(batch_size)
        return Transitions(*(column.index_select(0, index) for column in self.columns))

    def sample_index(self, batch_size: int) -> Tensor:
        """The rows of such a sample in `columns` and `improved_action`: [batch_size] int64."""
        if self.size == 0:
            raise ValueError("The replay is empty: add transitions before sampling.")
        # Double precision reaches every index; a product with the size needs no host.
        share = torch.rand(
            batch_size, generator=self.generator, dtype=torch.float64, device=self.device
        )
        return (share * self._size).long()

    @property
    def oldest(self) -> int:
        """Number of the oldest transition held; the first that was ever added is number 0."""
        return self.num_added - self.size

    def rows(self, first: int, last: int) -> list[Transitions]:
        """Transitions number `first` to `last` - 1, all held, as one or two views of the ring."""
        start, count = first % self.capacity, last - first
        in_front = min(count, self.capacity - start)
        parts = [slice(start, start + in_front)]
        if count > in_front:
            parts.append(slice(0, count - in_front))
        return [Transitions(*(column[part] for column in self.columns)) for part in parts]

    def segments(self) -> list[Transitions]:
        """Everything held, oldest first, as one or two views of the ring."""
        return self.rows(self.oldest, self.num_added)

    def improved_actions(self) -> Tensor:
        """`improved_action` of everything held, oldest first, as a copy: [size, A]."""
        assert self.improved_action is not None
        return self.improved_action.index_select(0, self._rows_by_age())

    def set_improved_actions(self, actions: Tensor) -> None:
        """Restores `improved_actions()` after `load`: the newest are kept if there is less room."""
        assert self.improved_action is not None
        newest = actions[actions.shape[0] - self.size :].to(self.improved_action)
        self.improved_action.index_copy_(0, self._rows_by_age(), newest)

    def _rows_by_age(self) -> Tensor:
        numbers = torch.arange(self.oldest, self.num_added, device=self.device)
        return numbers % self.capacity

    def state_dict(self) -> dict[str, Any]:
        """Counters and the generator's state; the transitions themselves are `segments()`."""
        return {
            "capacity": self.capacity,
            "num_added": self.num_added,
            "generator": self.generator.get_state().cpu(),
        }

    def load(self, state: dict[str, Any], parts: Sequence[Transitions]) -> None:
        """Restores what `state_dict()` and `segments()` gave, oldest first.

        Into a ring of another capacity go the newest transitions that it can hold; they are then
        numbered from 0.
        """
        num_added, held = int(state["num_added"]), sum(part.reward.shape[0] for part in parts)
        expected = min(num_added, int(state["capacity"]))
        if held != expected:
            raise ValueError(
                f"The snapshot holds {held} transitions, but {expected} were expected "
                f"({num_added} added, capacity {state['capacity']})."
            )
        # With the same capacity every transition returns to its old place in the ring.
        self.num_added = num_added - held if state["capacity"] == self.capacity else 0
        self._set_size()
        for part in parts:
            self.add(part)
        restore_generator(self.generator, state["generator"])


@dataclass
class UpdateLedger:
    """updates owed = floor(ratio · (ingested - warm-up)) - updates done.

    The ratio is exact (0.1 is a tenth, not its binary neighbour), so nothing drifts.
    """

    update_ratio: float
    warmup_steps: int
    ingested: int = 0  # env steps taken into the replay
    done: int = 0  # updates done
    free_steps: int = 0  # env steps after the warm-up that owe nothing (see `rebase`)

    @property
    def owed(self) -> int:
        steps = self.ingested - self.warmup_steps - self.free_steps
        return max(0, math.floor(Fraction(repr(self.update_ratio)) * steps) - self.done)

    @property
    def warming_up(self) -> bool:
        lost = self.free_steps if self.done == 0 else 0
        return self.ingested - lost < self.warmup_steps

    def rebase(self, *, refill: bool) -> None:
        """From here on as if nothing were owed: the ratio or the warm-up was changed.

        With `refill` the replay was lost too: one warm-up fills it again before updates are owed.
        """
        paid_for = math.ceil(Fraction(self.done) / Fraction(repr(self.update_ratio)))
        self.free_steps = self.ingested - paid_for - (0 if refill else self.warmup_steps)

    def state_dict(self) -> dict[str, int]:
        return {"ingested": self.ingested, "done": self.done, "free_steps": self.free_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.ingested, self.done = state["ingested"], state["done"]
        self.free_steps = state["free_steps"]
