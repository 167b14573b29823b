"""`qvpo replay export`: a run's replay as a data set that RLlib's offline API and Ray Data read."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray.data
import reference
from ray.rllib.algorithms.bc import BCConfig

from qvpo_rllib import cli
from qvpo_rllib.checkpoints import metadata as checkpoint

ENV = "Humanoid-v5"  # its box is not [-1, 1]


@pytest.fixture(scope="module")
def trained(build_shared: Any, tiny_config: Any, tmp_path_factory: Any) -> tuple[Any, Path]:
    """An algorithm whose ring has wrapped, and a run directory with its checkpoint."""
    algorithm = build_shared(tiny_config(ENV, replay_capacity=100))
    algorithm.train()
    run = tmp_path_factory.mktemp("run")
    algorithm.save(str(run / "checkpoints" / "1"))
    algorithm.train()
    algorithm.save(str(run / "checkpoints" / "2"))
    (run / "checkpoints" / "last").symlink_to("2")
    return algorithm, run


def test_a_data_set_holds_the_replay(trained: Any, tmp_path: Path, capsys: Any) -> None:
    algorithm, run = trained
    assert cli.main(["replay", "export", str(run), str(tmp_path / "out")]) == 0
    assert f"100 transitions of {ENV}, " in capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "out")
    held = reference.in_order(algorithm.replay)
    np.testing.assert_array_equal(np.stack(table.obs), held.obs)
    np.testing.assert_array_equal(np.stack(table.new_obs), held.next_obs)
    np.testing.assert_array_equal(table.rewards, held.reward)
    np.testing.assert_array_equal(table.terminateds, held.terminal == 1)
    np.testing.assert_allclose(np.stack(table.actions), 0.4 * held.action, atol=1e-6)
    assert not table.truncateds.any()


def test_rllibs_offline_api_and_ray_data_read_it(trained: Any, tmp_path: Path) -> None:
    algorithm, run = trained
    assert cli.main(["replay", "export", str(run), str(tmp_path / "out")]) == 0
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data = ray.data.read_parquet(str(tmp_path / "out"))
    assert data.count() == 100
    env = algorithm.env_runner.envs[0]
    config = (
        BCConfig()
        .environment(observation_space=env.observation_space, action_space=env.action_space)
        .offline_data(
            input_=[str(tmp_path / "out")],
            input_read_method="read_parquet",
            dataset_num_iters_per_learner=1,
        )
        .training(train_batch_size_per_learner=32)
        .debugging(log_level="ERROR")
    )
    learner = config.build_algo()
    try:
        result = learner.train()["learners"]["default_policy"]
    finally:
        learner.stop()
    assert np.isfinite(result["policy_loss"])
    assert result["num_module_steps_trained"] >= 32


@pytest.mark.parametrize("case", ["no replay", "occupied", "no run", "damaged"])
def test_what_cannot_be_exported(trained: Any, tmp_path: Path, capsys: Any, case: str) -> None:
    algorithm, _ = trained
    source, out, words = tmp_path / "source", tmp_path / "out", ""
    if case == "no run":
        words = "no checkpoint directory"
    else:
        algorithm.save(str(source))
    if case == "no replay":
        checkpoint.drop_replay(source)
        words = "has no replay"
    if case == "occupied":
        out.mkdir()
        (out / "thesis.tex").write_text("precious")
        words = "files in it"
    if case == "damaged":
        file = next((source / "replay").iterdir())
        file.unlink()  # it may be shared with the other checkpoints
        file.write_bytes(b"short")
        words = "damaged"
    assert cli.main(["replay", "export", str(source), str(out)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not out.exists() or [f.name for f in out.iterdir()] == ["thesis.tex"]
