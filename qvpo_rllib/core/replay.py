"""The replay buffer, and the ledger of the updates that are owed for its transitions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from qvpo_rllib.core.seeding import restore_generator

# Up to so many transitions go to a GPU in one transfer; more would take as much memory once more.
PACKED_TRANSITIONS = 10_000


class Transitions(NamedTuple):
    """Columns of B transitions, float32. Actions are in [-1, 1]."""

    obs: Tensor  # [B, O]
    action: Tensor  # [B, A]
    reward: Tensor  # [B]
    next_obs: Tensor  # [B, O]
    terminal: Tensor  # [B], 1 where the return ends, else 0; of n-step returns see `sample`


class EpisodeSteps(NamedTuple):
    """Where each of B transitions stands in its episode."""

    episode: NDArray[np.int64]  # [B], a number that no other episode of the run has
    step: NDArray[np.int64]  # [B], 0 for an episode's first
    last: NDArray[np.bool_]  # [B], whether the episode ended with it


def replay_bytes(
    capacity: int,
    obs_dim: int,
    act_dim: int,
    *,
    improves_actions: bool = False,
    follows_episodes: bool = False,
) -> int:
    """Returns the bytes that a replay of this size takes."""
    num_actions = 2 if improves_actions else 1
    successor = 8 if follows_episodes else 0
    return capacity * ((2 * obs_dim + num_actions * act_dim + 2) * 4 + successor)


class ReplayBuffer:
    """The last `capacity` transitions; once full, a new one overwrites the oldest.

    Sampling is uniform with replacement and draws from the buffer's own generator, on `device`.

    Args:
        improves_actions: keeps a second copy of each action, `improved_action`, which a learner
            overwrites by better ones.
        follows_episodes: keeps in `successor` where the next step of each transition's episode is,
            for n-step returns.
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
        follows_episodes: bool = False,
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
        # [capacity] int64: the row of the next step; a transition without one has its own row.
        self.successor = torch.arange(capacity, device=self.device) if follows_episodes else None
        # By episode under way: number and step of its newest transition.
        self._newest: dict[int, tuple[int, int]] = {}
        self.size = 0
        # The same number on the device, where a captured graph reads it as it grows.
        self._size = torch.zeros((), dtype=torch.float64, device=self.device)
        self.num_added = 0
        self.generator = Generator(device=self.device)
        self.generator.manual_seed(seed)

    def __len__(self) -> int:
        return self.size

    def add(self, transitions: Transitions, steps: EpisodeSteps | None = None) -> None:
        """Appends a batch of transitions, in order of time, from any device.

        Args:
            steps: which of them follow which; without it each stands for itself.
        """
        columns = [torch.as_tensor(column) for column in transitions]
        num_new = columns[0].shape[0]
        for name, new, own in zip(Transitions._fields, columns, self.columns, strict=True):
            if new.shape != (num_new, *own.shape[1:]):
                raise ValueError(
                    f"{name} has shape {tuple(new.shape)}; the replay needs "
                    f"{(num_new, *own.shape[1:])}."
                )
        if self.device.type == "cuda" and num_new <= PACKED_TRANSITIONS:
            columns = moved(columns, self.device)
        for new, own in zip(columns, self.columns, strict=True):
            self._write(own, new[-self.capacity :], num_new)
        if self.improved_action is not None:
            self._write(self.improved_action, columns[1][-self.capacity :], num_new)
        self.num_added += num_new
        self._set_size()
        if self.successor is not None:
            self._follow(self.successor, self.num_added - num_new, steps)

    def _follow(self, successor: Tensor, first: int, steps: EpisodeSteps | None) -> None:
        """Notes which transitions the new ones, from number `first` on, follow."""
        rows = self._ring_rows(max(first, self.oldest))
        successor[rows] = rows
        pairs: list[tuple[int, int]] = []
        for number, (episode, step, last) in enumerate(
            zip(*(column.tolist() for column in steps or ()), strict=True), start=first
        ):
            before, step_before = self._newest.pop(episode, (-1, -1))
            # A fragment between the two may be lost, or the first of them overwritten by now.
            if before >= self.oldest and step_before + 1 == step:
                pairs.append((before % self.capacity, number % self.capacity))
            if not last:
                self._newest[episode] = number, step
        if pairs:
            table = torch.tensor(pairs)
            if self.device.type == "cuda":
                table = table.pin_memory().to(self.device, non_blocking=True)
            successor[table[:, 0]] = table[:, 1]

    def _set_size(self) -> None:
        self.size = min(self.num_added, self.capacity)
        self._size.fill_(self.size)

    def _write(self, own: Tensor, new: Tensor, num_new: int) -> None:
        kept = new.shape[0]
        start = (self.num_added + num_new - kept) % self.capacity
        first = min(kept, self.capacity - start)
        own[start : start + first] = new[:first].to(own)
        own[: kept - first] = new[first:].to(own)

    def sample(self, batch_size: int, n_step: int = 1, gamma: float = 1.0) -> Transitions:
        """Returns `batch_size` transitions, drawn uniformly with replacement.

        With `n_step` > 1 each spans k steps of its episode (Sutton and Barto 2018, Eq. 7.1, without
        a correction for the actions in between): `reward` is Σ_{i<k} γ^i r_i, `next_obs` is the
        last of them's, and `terminal` is 1 - γ^(k-1)(1 - terminal of the last), so that
        r + γ(1 - terminal)·Q is the n-step target Σ γ^i r_i + γ^k Q. k is `n_step`, or what is held
        until the episode's end, its newest transition, or a gap.
        """
        index = self.sample_index(batch_size)
        if n_step == 1:
            return Transitions(*(column.index_select(0, index) for column in self.columns))
        assert self.successor is not None
        columns, last = self.columns, index
        reward = columns.reward[index]
        weight = torch.ones_like(reward)  # γ^(k-1)
        for i in range(1, n_step):
            following = self.successor[last]
            goes_on = following != last
            reward = reward + gamma**i * goes_on * columns.reward[following]
            weight = torch.where(goes_on, gamma**i, weight)
            last = following
        return Transitions(
            columns.obs[index],
            columns.action[index],
            reward,
            columns.next_obs[last],
            1 - weight * (1 - columns.terminal[last]),
        )

    def sample_index(self, batch_size: int) -> Tensor:
        """Returns such a sample's rows in `columns` and `improved_action`, [batch_size] int64."""
        if self.size == 0:
            raise ValueError("The replay is empty: add transitions before sampling.")
        # Double precision reaches every index. The product with the size stays on the device.
        share = torch.rand(
            batch_size, generator=self.generator, dtype=torch.float64, device=self.device
        )
        return (share * self._size).long()

    @property
    def oldest(self) -> int:
        """The number of the oldest transition held; the very first one added is number 0."""
        return self.num_added - self.size

    def rows(self, first: int, last: int) -> list[Transitions]:
        """Returns transitions `first` to `last` - 1, all held, as one or two views of the ring."""
        start, count = first % self.capacity, last - first
        in_front = min(count, self.capacity - start)
        parts = [slice(start, start + in_front)]
        if count > in_front:
            parts.append(slice(0, count - in_front))
        return [Transitions(*(column[part] for column in self.columns)) for part in parts]

    def segments(self) -> list[Transitions]:
        """Returns everything held, oldest first, as one or two views of the ring."""
        return self.rows(self.oldest, self.num_added)

    def improved_actions(self) -> Tensor:
        """Returns a copy of `improved_action` of everything held, oldest first: [size, A]."""
        assert self.improved_action is not None
        return self.improved_action.index_select(0, self._ring_rows(self.oldest))

    def set_improved_actions(self, actions: Tensor) -> None:
        """Restores `improved_actions()` after `load`; a smaller ring keeps the newest."""
        assert self.improved_action is not None
        newest = actions[actions.shape[0] - self.size :].to(self.improved_action)
        self.improved_action.index_copy_(0, self._ring_rows(self.oldest), newest)

    def steps_to_successors(self) -> Tensor:
        """Returns how many transitions later each one's next step was added, oldest first.

        [size] int32; 0 for one without a next step.
        """
        assert self.successor is not None
        rows = self._ring_rows(self.oldest)
        return ((self.successor[rows] - rows) % self.capacity).int()

    def set_steps_to_successors(self, steps: Tensor) -> None:
        """Restores `steps_to_successors()` after `load`; a smaller ring keeps the newest."""
        assert self.successor is not None
        rows = self._ring_rows(self.oldest)
        newest = steps[steps.shape[0] - self.size :].to(rows)
        self.successor[rows] = (rows + newest) % self.capacity

    def _ring_rows(self, first: int) -> Tensor:
        """Returns the rows of the transitions from number `first` on, which are held."""
        return torch.arange(first, self.num_added, device=self.device) % self.capacity

    def state_dict(self) -> dict[str, Any]:
        """Returns counters and the generator's state; `segments()` has the transitions."""
        state = {
            "capacity": self.capacity,
            "num_added": self.num_added,
            "generator": self.generator.get_state().cpu(),
        }
        if self.successor is None:
            return state
        # The episodes of lost workers never end, but are overwritten.
        self._newest = {e: newest for e, newest in self._newest.items() if newest[0] >= self.oldest}
        return {**state, "newest": [[e, *newest] for e, newest in self._newest.items()]}

    def load(self, state: dict[str, Any], parts: Sequence[Transitions]) -> None:
        """Restores `state_dict()` and `segments()`, oldest first.

        A ring of another capacity takes the newest transitions that it can hold, and numbers the
        given ones from 0.

        Raises:
            ValueError: there are more or fewer transitions than the counters say.
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
        renumbered = num_added - self.num_added
        self._newest = {
            episode: (number - renumbered, step)
            for episode, number, step in state.get("newest", [])
            if number - renumbered < self.num_added
        }
        restore_generator(self.generator, state["generator"])


def moved(columns: list[Tensor], device: torch.device) -> list[Tensor]:
    """Returns columns of one length on `device`, by one transfer; a GPU's nobody waits for."""
    tables = [column if column.ndim == 2 else column[:, None] for column in columns]
    packed = torch.cat(tables, dim=1)
    if device.type == "cuda" and not packed.is_cuda:
        packed = packed.pin_memory()
    parts = torch.split(packed.to(device, non_blocking=True), [t.shape[1] for t in tables], dim=1)
    return [part.view(column.shape) for part, column in zip(parts, columns, strict=True)]


@dataclass
class UpdateLedger:
    """Counts the updates that a run owes: floor(ratio · (ingested - warm-up)) - updates done.

    The ratio is exact (0.1 is a tenth, not its binary neighbour), so the count never drifts.
    """

    update_ratio: float
    warmup_steps: int
    ingested: int = 0  # env steps taken into the replay
    done: int = 0  # updates done
    free_steps: int = 0  # env steps after the warm-up that owe nothing (see `rebase`)

    @property
    def owed(self) -> int:
        """The updates to do now."""
        steps = self.ingested - self.warmup_steps - self.free_steps
        return max(0, math.floor(Fraction(repr(self.update_ratio)) * steps) - self.done)

    @property
    def warming_up(self) -> bool:
        """Whether env steps are still taken at random."""
        lost = self.free_steps if self.done == 0 else 0
        return self.ingested - lost < self.warmup_steps

    def rebase(self, *, refill: bool) -> None:
        """Forgives what is owed, since the ratio or the warm-up has changed.

        With `refill`, since the replay is lost: updates are owed again after one more warm-up.
        """
        paid_for = math.ceil(Fraction(self.done) / Fraction(repr(self.update_ratio)))
        self.free_steps = self.ingested - paid_for - (0 if refill else self.warmup_steps)
        if self.done == 0:  # in the warm-up nothing is owed yet
            self.free_steps = max(0, self.free_steps)

    def state_dict(self) -> dict[str, int]:
        """Returns the counts, without ratio and warm-up."""
        return {"ingested": self.ingested, "done": self.done, "free_steps": self.free_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores `state_dict()`."""
        self.ingested, self.done = state["ingested"], state["done"]
        self.free_steps = state["free_steps"]
