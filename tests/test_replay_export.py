"""`qvpo replay export`: a run's replay as a data set that RLlib's offline API and Ray Data read."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reference

from qvpo_rllib import cli
from qvpo_rllib.checkpoints import metadata as checkpoint
from qvpo_rllib.ray_session import LOOPBACK

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


# In a process and a Ray of its own: after other tests in one Ray, Ray Data 2.60 was seen to wait
# for ever with all of its workers idle.
OFFLINE = """
import sys

import numpy as np
import ray.data
from gymnasium.spaces import Box
from ray.rllib.algorithms.bc import BCConfig

ray.init(address="local", num_cpus=4, include_dashboard=False, _node_ip_address=sys.argv[2],
         log_to_driver=False)
assert ray.data.read_parquet(sys.argv[1]).count() == 100
obs_dim, act_dim, high = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
config = (
    BCConfig()
    .environment(
        observation_space=Box(-np.inf, np.inf, (obs_dim,)),
        action_space=Box(-high, high, (act_dim,)),
    )
    .offline_data(
        input_=[sys.argv[1]], input_read_method="read_parquet", dataset_num_iters_per_learner=1
    )
    .training(train_batch_size_per_learner=32)
    .debugging(log_level="ERROR")
)
learner = config.build_algo()
result = learner.train()["learners"]["default_policy"]
learner.stop()
assert np.isfinite(result["policy_loss"])
assert result["num_module_steps_trained"] >= 32
print("learnt")
"""


@pytest.mark.slow
def test_rllibs_offline_api_and_ray_data_read_it(trained: Any, tmp_path: Path) -> None:
    algorithm, run = trained
    assert cli.main(["replay", "export", str(run), str(tmp_path / "out")]) == 0
    env = algorithm.env_runner.envs[0]
    sizes = env.observation_space.shape[0], env.action_space.shape[0], env.action_space.high[0]
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "out"), LOOPBACK, *map(str, sizes)]
    for attempt in (1, 2):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            break
        except subprocess.TimeoutExpired:
            if attempt == 2:
                raise
    assert done.returncode == 0, done.stderr[-3000:]
    assert "learnt" in done.stdout


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
