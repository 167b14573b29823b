"""`normalize_observations` on RLlib: workers, evaluation, checkpoints, bundles, for all seven."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from test_exact_resume import assert_identical, identity_of
from test_rivals_rllib import config_of as rival_config
from test_seven_algorithms import TINY, config_of

from qvpo_rllib import cli
from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.play.evaluation import evaluate_checkpoint
from qvpo_rllib.play.trained_policy import TrainedPolicy
from qvpo_rllib.serving import load

ENV = "environments:Counting-v0"  # observes (episode, step): numbers that grow
OFF_POLICY = ("qvpo", "dipo", "qsm", "td3")
seven = pytest.mark.parametrize("name", ALGORITHMS)


def normalizing(name: str, num_workers: int = 0, **options: Any) -> Any:
    return config_of(name, num_workers, **{"normalize_observations": True, **options})


def moments_of(policy: Any) -> Any:
    networks = getattr(policy, "networks", None) or policy.model
    return networks.observations


def observed(algorithm: Any) -> Any:
    """All observations of training: the replay holds them as the environment gave them."""
    buffer = getattr(algorithm, "replay", None) or algorithm.local_replay_buffer.replay
    assert buffer.num_added == len(buffer)
    return reference.in_order(buffer).obs.numpy()


def act(policy: Any, obs: Any, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    return policy.act(obs, generator=generator, **options)
