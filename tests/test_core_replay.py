"""The replay against a deque, its snapshots, and the shapes it refuses."""

from collections import deque

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvpo_rllib.core.replay import ReplayBuffer, Transitions, moved, replay_bytes

OBS, ACT = 3, 2
quick = settings(deadline=None, max_examples=80, derandomize=True)
sizes = st.lists(st.integers(0, 12), max_size=10)
capacities = st.integers(1, 8)


def buffer(capacity, seed=0):
    return ReplayBuffer(capacity, OBS, ACT, seed=seed, device="cpu")


def transitions(first, count):
    """`count` transitions numbered from `first`; every entry of one carries its number."""
    number = np.arange(first, first + count, dtype=np.float32)

    def column(width, offset):
        return number[:, None] + offset * np.ones((1, width), dtype=np.float32)

    return Transitions(
        column(OBS, 0), column(ACT, 0.25), number, column(OBS, 0.5), (number % 3 == 0).astype("f")
    )


def filled(capacity, counts, seed=0):
    """A buffer after additions of these sizes."""
    result, first = buffer(capacity, seed), 0
    for count in counts:
        result.add(transitions(first, count))
        first += count
    return result


def torch_of(columns):
    return Transitions(*(torch.from_numpy(c) for c in columns))


def assert_same(one, other):
    for name, a, b in zip(Transitions._fields, one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


@quick
@given(capacities, sizes)
def test_the_ring_holds_what_a_deque_would(capacity, counts):
    model, result, first = deque(maxlen=capacity), buffer(capacity), 0
    for count in counts:
        result.add(transitions(first, count))
        model.extend(range(first, first + count))
        first += count
        assert reference.in_order(result).reward.tolist() == list(model)
        assert len(result) == len(model)
        assert result.num_added == first
    if model:  # every column is in step with the rewards
        assert_same(reference.in_order(result), transitions(model[0], len(model)))


def test_adding_takes_tensors_and_converts_other_dtypes():
    result = buffer(10)
    result.add(Transitions(*(torch.from_numpy(c) for c in transitions(0, 4))))
    result.add(Transitions(*(c.astype(np.float64) for c in transitions(4, 2))))
    assert_same(reference.in_order(result), transitions(0, 6))
    assert all(column.dtype == torch.float32 for column in reference.in_order(result))


@quick
@given(capacities, sizes.filter(any), st.integers(0, 100))
def test_sampling_draws_whole_transitions_that_are_held(capacity, counts, seed):
    held = filled(capacity, counts, seed)
    drawn = held.sample(50)
    numbers = drawn.reward.numpy()
    assert set(numbers) <= set(reference.in_order(held).reward.tolist())
    for number, *row in zip(numbers, *drawn, strict=True):
        expected = transitions(number, 1)
        assert_same([value[None] for value in row], expected)


def test_sampling_is_uniform():
    drawn = filled(10, [14]).sample(20_000).reward
    counts = torch.bincount(drawn.long(), minlength=14)
    assert counts[:4].tolist() == [0, 0, 0, 0]
    assert ((counts[4:] > 1800) & (counts[4:] < 2200)).all()


def test_sampling_is_reproducible():
    one, same, other = filled(8, [20], seed=5), filled(8, [20], seed=5), filled(8, [20], seed=6)
    first, second = one.sample(30), one.sample(30)
    assert_same(first, same.sample(30))
    assert_same(second, same.sample(30))
    assert not torch.equal(first.reward, second.reward)
    assert not torch.equal(first.reward, other.sample(30).reward)


def test_a_sample_is_a_copy():
    held = filled(4, [4])
    drawn = held.sample(6)
    before = [column.clone() for column in drawn]
    held.add(transitions(100, 4))
    assert_same(drawn, before)


@quick
@given(capacities, sizes.filter(any), st.integers(0, 8), st.integers(1, 9))
def test_a_snapshot_goes_on_as_the_original(capacity, counts, draws_before, added_after):
    original = filled(capacity, counts, seed=1)
    for _ in range(draws_before):
        original.sample(3)
    state = original.state_dict()
    content = Transitions(*(column.clone() for column in reference.in_order(original)))

    restored = filled(capacity, [5], seed=2)  # its own content must vanish
    restored.load(state, [content])
    assert len(restored) == len(original)
    assert_same(reference.in_order(restored), content)
    for held in (original, restored):
        held.add(transitions(1000, added_after))
    assert restored.num_added == original.num_added
    assert_same(reference.in_order(restored), reference.in_order(original))
    assert_same(restored.sample(40), original.sample(40))


def test_an_empty_snapshot_empties():
    restored = filled(4, [6])
    restored.load(buffer(4).state_dict(), [])
    assert len(restored) == 0


@pytest.mark.parametrize(("held", "num_added", "capacity"), [(3, 4, 5), (5, 5, 4), (4, 9, 5)])
def test_a_snapshot_of_another_size_is_refused(held, num_added, capacity):
    state = {**buffer(capacity).state_dict(), "num_added": num_added}
    with pytest.raises(ValueError, match=f"holds {held} .*{num_added} added, capacity {capacity}"):
        buffer(capacity).load(state, [torch_of(transitions(0, held))])


@pytest.mark.parametrize("name", Transitions._fields)
@pytest.mark.parametrize("wrong", ["one row less", "one dimension more", "wider"])
def test_a_wrong_shape_is_refused_and_nothing_is_added(name, wrong):
    held, good = filled(6, [2]), transitions(2, 3)
    column = getattr(good, name)
    if wrong == "one row less":
        column = column[:-1]
    elif wrong == "one dimension more":
        column = column[..., None]
    else:
        column = np.stack([column, column], axis=-1).reshape(3, -1)
    guilty = "obs|action" if name == "obs" and wrong == "one row less" else name
    with pytest.raises(ValueError, match=rf"^({guilty}) has shape \(.*\); the replay needs \(.*\)"):
        held.add(good._replace(**{name: column}))
    assert_same(reference.in_order(held), transitions(0, 2))
    assert held.num_added == 2


def test_sampling_from_nothing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        buffer(4).sample(1)


@pytest.mark.parametrize(("capacity", "obs_dim", "act_dim"), [(7, 3, 2), (100, 17, 6), (1, 1, 1)])
def test_bytes_are_those_of_the_columns(capacity, obs_dim, act_dim):
    held = ReplayBuffer(capacity, obs_dim, act_dim, seed=0, device="cpu")
    assert replay_bytes(capacity, obs_dim, act_dim) == sum(c.nbytes for c in held.columns)


def test_columns_packed_for_one_transfer_are_the_same_columns():
    columns = list(torch_of(transitions(0, 5)))
    for column, same in zip(columns, moved(columns, torch.device("cpu")), strict=True):
        assert torch.equal(column, same)
