"""The queue and the models behind the server, without HTTP."""

import asyncio
import os
import pickle
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvpo_rllib.bench.http_load import fresh_bundle
from qvpo_rllib.serving import load
from qvpo_rllib.serving.batcher import (
    MAX_BATCH_SAMPLES,
    MAX_PENDING_REQUESTS,
    Batcher,
    OverloadedError,
)
from qvpo_rllib.serving.models import Models
from qvpo_rllib.serving.policy import NonFiniteActionError

OBS_DIM = 11
ACTS_AND_FORKS = """
import os, signal, sys
import numpy as np, torch
from qvpo_rllib.serving import load
torch.set_num_threads(2)
torch.ones(10**6).exp().sum()  # the threads that do not survive the fork
policy, obs = load(sys.argv[1]), np.ones((16, 11))
act = lambda: policy.act(obs, 32, torch.Generator().manual_seed(0))
expected = act()
child = os.fork()
if not child:
    signal.alarm(30)
    print("same" if (act() == expected).all() else "other", flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any) -> Path:
    return fresh_bundle(tmp_path_factory.mktemp("batcher") / "hopper")


@pytest.fixture
def policy(bundle: Path, monkeypatch: Any) -> Any:
    """A policy that notes the rows of every call of the networks in `calls`."""
    policy: Any = load(bundle)
    policy.warm_up(1)
    policy.calls = []
    act = policy.act_with_noise

    def noting(obs: Any, noise: Any) -> Any:
        policy.calls.append(len(obs))
        return act(obs, noise)

    monkeypatch.setattr(policy, "act_with_noise", noting)
    return policy


def obs_of(seed: int, rows: int = 1) -> Any:
    return torch.randn(rows, OBS_DIM, generator=torch.Generator().manual_seed(seed))


def test_requests_that_wait_are_computed_together(policy: Any) -> None:
    async def scenario() -> Any:
        batcher = Batcher()
        return await asyncio.gather(*(batcher.act(policy, obs_of(i), 1, i) for i in range(20)))

    results = asyncio.run(scenario())
    assert sum(policy.calls) == 20
    assert len(policy.calls) <= 3  # the first alone, the others together
    for i, result in enumerate(results):
        alone = policy.act(obs_of(i).numpy(), 1, torch.Generator().manual_seed(i))
        np.testing.assert_array_equal(result.actions, alone)
        assert result.queued_s >= 0
        assert result.computing_s > 0


def test_one_bad_observation_spoils_no_other_request(policy: Any) -> None:
    async def scenario() -> Any:
        batcher = Batcher()
        bad = torch.full((1, OBS_DIM), 3e38)
        jobs = [batcher.act(policy, obs, 2, 0) for obs in (obs_of(0), bad, obs_of(1))]
        return await asyncio.gather(*jobs, return_exceptions=True)

    first, second, third = asyncio.run(scenario())
    assert isinstance(second, NonFiniteActionError)
    assert np.isfinite(first.actions).all()
    assert np.isfinite(third.actions).all()


def test_the_queue_is_bounded_and_empties(policy: Any) -> None:
    async def scenario() -> Any:
        batcher = Batcher()
        jobs = [
            asyncio.ensure_future(batcher.act(policy, obs_of(i), 1, i))
            for i in range(MAX_PENDING_REQUESTS + 50)
        ]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        after = await batcher.act(policy, obs_of(0), 1, 0)
        return results, after, batcher._pending_samples

    results, after, waiting = asyncio.run(scenario())
    refused = [r for r in results if isinstance(r, OverloadedError)]
    assert 49 <= len(refused) <= 50
    assert np.isfinite(after.actions).all()
    assert waiting == 0


def test_a_batch_is_bounded_and_different_k_do_not_mix(policy: Any) -> None:
    async def scenario() -> Any:
        batcher = Batcher()
        large = [batcher.act(policy, obs_of(i, 200), 1, i) for i in range(8)]
        return await asyncio.gather(*large, batcher.act(policy, obs_of(9), 2, 9))

    results = asyncio.run(scenario())
    assert len(results) == 9
    assert sum(policy.calls) == 1601
    assert 1 in policy.calls
    assert max(policy.calls) <= MAX_BATCH_SAMPLES


def test_a_client_that_left_is_not_computed_for(policy: Any) -> None:
    async def scenario() -> Any:
        batcher = Batcher()
        first = asyncio.ensure_future(batcher.act(policy, obs_of(0, 50), 1, 0))
        left = asyncio.ensure_future(batcher.act(policy, obs_of(1, 7), 1, 1))
        await asyncio.sleep(0)
        left.cancel()
        await first
        await batcher.act(policy, obs_of(2, 3), 1, 2)
        return batcher._pending_samples

    assert asyncio.run(scenario()) == 0
    assert 7 not in policy.calls


@pytest.mark.parametrize("k", [1, 8])
def test_a_row_is_the_same_bits_in_every_batch_at_the_papers_sizes(bundle: Path, k: int) -> None:
    """With K = 8, two rows at once give other bits in the other place on some machines."""
    policy, rows = load(bundle), 24
    obs, noise = obs_of(0, rows), policy.draw_noise(rows, k, torch.Generator().manual_seed(1))
    together, _ = policy.act_with_noise(obs, noise)
    order = np.random.default_rng(0).permutation(rows)
    shuffled, _ = policy.act_with_noise(obs[order], noise[:, order])
    np.testing.assert_array_equal(shuffled, together[order])
    for row in (slice(3, 4), slice(4, 7)):
        alone, _ = policy.act_with_noise(obs[row], noise[:, row])
        np.testing.assert_array_equal(alone, together[row])


def test_a_missing_bundle_goes_on_being_served(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "here")
    models = Models()
    models.open([tmp_path / "here"])
    (tmp_path / "here").rename(tmp_path / "away")
    models.refresh()
    assert "hopper@fresh" in models.snapshot.by_reference
    assert models.snapshot.problems == (None,)


def test_a_bad_replacement_is_reported_and_the_next_good_one_is_taken(
    bundle: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    shutil.copytree(bundle, tmp_path / "here")
    models = Models()
    models.open([tmp_path / "here"])
    description = tmp_path / "here" / "policy.json"
    good = description.read_bytes()
    for bad in (b'{"x":' * 300, b"\xff", b'{"env": "\\ud800"}'):
        description.write_bytes(bad)
        models.refresh()
        assert "JSON" in str(models.snapshot.problems)
    description.write_bytes(good + b" ")
    with monkeypatch.context() as patch:
        patch.setattr("qvpo_rllib.serving.models.load", lambda _: 1 / 0)  # whatever it may do
        models.refresh()
    assert "division" in str(models.snapshot.problems)
    models.refresh()
    assert models.snapshot.problems == (None,)


def test_two_different_bundles_may_not_share_a_version(bundle: Path) -> None:
    from dataclasses import replace

    from qvpo_rllib.serving import write_bundle

    other = bundle.parent / "other"
    description = replace(load(bundle).description, act_high=[2.0] * 3)
    write_bundle(other, description, (bundle / "policy.safetensors").read_bytes())
    models = Models()
    models.open([bundle])
    with pytest.raises(ValueError, match="hopper@fresh"):
        models.open([bundle, other])
    assert set(models.snapshot.by_reference) == {"hopper", "hopper@fresh"}  # as it was


def test_a_policy_that_was_exported_twice_is_served_once(bundle: Path) -> None:
    from dataclasses import replace

    from qvpo_rllib.serving import write_bundle

    again = bundle.parent / "again"
    description = replace(load(bundle).description, created="2026-11-22", versions={"torch": "3"})
    write_bundle(again, description, (bundle / "policy.safetensors").read_bytes())
    models = Models()
    models.open([bundle, again])
    [policy] = models.snapshot.policies
    assert models.snapshot.is_default(policy)


def test_the_bundle_given_last_has_the_name(bundle: Path) -> None:
    from dataclasses import replace

    from qvpo_rllib.serving import write_bundle

    newer = bundle.parent / "newer"
    description = replace(load(bundle).description, version="newer")
    write_bundle(newer, description, (bundle / "policy.safetensors").read_bytes())
    models = Models()
    models.open([bundle, newer])
    served = models.snapshot.by_reference
    assert set(served) == {"hopper", "hopper@fresh", "hopper@newer"}
    assert served["hopper"] is served["hopper@newer"]
    models.open([newer, bundle])
    served = models.snapshot.by_reference
    assert served["hopper"] is served["hopper@fresh"]


@pytest.mark.parametrize("copy", [deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_policy_that_has_acted_can_be_copied(bundle: Path, copy: Any) -> None:
    policy = load(bundle)
    obs = obs_of(0, 3).numpy()
    expected = policy.act(obs, 4, torch.Generator().manual_seed(1))
    actions = copy(policy).act(obs, 4, torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(actions, expected)


def test_a_policy_that_has_acted_acts_in_a_forked_child(bundle: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", ACTS_AND_FORKS, str(bundle)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout.split() == ["same", "0"], run.stderr
