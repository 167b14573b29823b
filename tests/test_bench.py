"""`qvpo bench`: counted arithmetic, sound timings, and no need of Ray or Gymnasium."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import qvpo_rllib
from qvpo_rllib import cli
from qvpo_rllib.bench import learner, rollout, runtime, sizes
from qvpo_rllib.bench.timing import Times, measure, ratio
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.replay import Transitions
from qvpo_rllib.core.sampler import ActionSelector, draw_noise

CPU = torch.device("cpu")
# A finder that refuses everything but what the benchmarks may use.
PROGRAM = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "gymnasium", "mujoco", "pyarrow", "tensorboard",
                                      "rich", "matplotlib", "psutil"}:
            raise ImportError(f"{name} is not to be needed")
sys.meta_path.insert(0, Refuse())
from qvpo_rllib.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture
def double():
    """Tensors are float64 within the test: their products are PyTorch's own, which are counted."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("task", sizes.TASKS.values(), ids=list(sizes.TASKS))
def test_flops_of_an_update_are_those_of_its_products(double, task):
    hp = sizes.hyperparameters("light", task, engine="eager", batch_size=16)
    learner = QVPOLearner(
        QVPONetworks(task.obs_dim, task.act_dim, hp).double(), hp, seed=0, device=CPU
    )
    shapes = ((task.obs_dim,), (task.act_dim,), (), (task.obs_dim,), ())
    batch = Transitions(*(torch.zeros(16, *shape) for shape in shapes))
    # Beyond the needed: the step's embedding, whose rows are as few as T.
    assert counted(lambda: learner.update(batch, batch)) == pytest.approx(
        sizes.update_flops(task, hp), rel=0.03
    )


@pytest.mark.parametrize("k", [1, 4])
def test_flops_of_acting_are_those_of_its_products(double, k):
    task = sizes.TASKS["ant"]
    hp = sizes.hyperparameters("light", task)
    nets = QVPONetworks(task.obs_dim, task.act_dim, hp).double()
    obs = torch.zeros(50, task.obs_dim)
    noise = draw_noise(hp.diffusion_steps, 50, k, task.act_dim, torch.Generator(), CPU)
    selector = ActionSelector(nets.actor, nets.critic, nets.schedule)
    expected = sizes.acting_flops(task, hp, 50, k)
    assert counted(lambda: selector.act(obs, noise)) == pytest.approx(expected, rel=0.03)


def test_the_papers_update_is_103_gflop_nine_tenths_of_it_sampling():
    task = sizes.TASKS["ant"]
    hp = sizes.hyperparameters("paper", task)
    total = sizes.update_flops(task, hp)
    assert total == pytest.approx(103.2e9, rel=1e-3)
    assert sizes.sampling_flops(task, hp, 256, 64) > 0.85 * total


def test_measure_and_ratio(monkeypatch):
    """By a clock that the calls alone move."""
    now = 0.0

    def take(seconds):
        nonlocal now
        now += seconds

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr("qvpo_rllib.bench.timing.time", clock)
    calls = {"long": lambda: take(0.02), "short": lambda: take(0.002)}
    times = measure(calls, repeats=3, device=CPU)
    assert times["long"].rounds == pytest.approx([0.02] * 3)
    assert times["short"].rounds == pytest.approx([0.002] * 3)
    found = ratio(Times([2.0, 9.0, 6.0]), Times([1.0, 9.0, 2.0]))
    assert (found.rounds, found.median, found.spread) == ([2.0, 1.0, 3.0], 2.0, (1.0, 3.0))


def bench(*arguments):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, "bench", *arguments], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


COMMON = ("--task", "hopper", "--repeats", "1", "--threads", "1")


def test_learner_as_json_without_ray_or_gymnasium():
    output = bench("learner", *COMMON, "--setting", "light", "--engine", "eager", "--json")
    result = json.loads(output)
    assert result["machine"]["threads"] == 1
    (row,) = result["rows"]
    assert (row["setting"], row["task"], row["engine"]) == ("light", "hopper", "eager")
    assert row["updates_per_s"] == pytest.approx(1e3 / row["update_ms"])
    assert row["speedup"] == pytest.approx(row["straightforward_ms"] / row["update_ms"])
    task = sizes.TASKS["hopper"]
    flops = sizes.update_flops(task, sizes.hyperparameters("light", task))
    floor_ms = flops / row["matmul_gflop_per_s"] / 1e6
    assert row["matmul_bound"] == pytest.approx(floor_ms / row["update_ms"], rel=1e-6)


def test_act_and_replay_as_tables():
    lines = bench(
        "act", *COMMON, "--setting", "light", "--engine", "eager", "--observations", "1", "8",
        "--k", "4",
    ).splitlines()  # fmt: skip
    assert "ms per call" in lines[1]
    assert len(lines) == 4
    lines = bench("replay", *COMMON, "--capacity", "2000").splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["add", "sample"]


def options(part, *arguments):
    return cli.build_parser().parse_args(["bench", part, *arguments])


def test_learner_with_an_option_beside_the_same_without():
    arguments = (*COMMON, "--setting", "light", "--engine", "eager", "--set", "critic=quantile")
    plain, changed = learner.run(options("learner", *arguments, "--set", "num_quantiles=50"))
    assert (plain["options"], changed["options"]) == ("", "critic=quantile num_quantiles=50")
    assert changed["gflop"] > plain["gflop"]
    assert changed["straightforward_ms"] > 0  # it has twins, or it would fail


@pytest.mark.parametrize(
    "changes",
    [
        ("n_step=3",),
        ("q_weights=softmax", "kl_target=0.5", "target_refinement=none"),
        ("num_chosen_samples=2",),
        ("entropy_weight=auto",),
    ],
    ids=" ".join,
)
def test_learner_with_options_that_the_straightforward_update_does_not_know(changes):
    given = [argument for change in changes for argument in ("--set", change)]
    arguments = (*COMMON, "--setting", "light", "--engine", "eager", *given)
    _, changed = learner.run(options("learner", *arguments))
    assert changed["options"] == " ".join(changes)
    assert changed["straightforward_ms"] > 0


def test_rollouts_beside_the_stock_worker(ray_session):
    (row,) = rollout.run(options("rollout", "--num-envs", "8", "--repeats", "2"))
    for rate in ("environment_per_s", "columnar_per_s", "stock_per_s", "acting_per_s"):
        low, high = row[f"{rate}_range"]
        assert 0 < low <= row[rate] <= high
    # Four times and more on a quiet machine; on any, what the rounds allow.
    (low, high), (least, most) = row["columnar_per_s_range"], row["stock_per_s_range"]
    assert 0.99 * low / most <= row["speedup"] <= 1.01 * high / least


@pytest.mark.slow
def test_the_runtimes_time_is_accounted_for(ray_session):
    arguments = ("--mode", "async", "--engine", "eager", "--seconds", "1", "--repeats", "1")
    local, beside = runtime.rounds(options("runtime", *arguments))
    assert local["limit"] == "update"
    assert 0 <= local["other_share"] < 0.5  # under 0.15 on a quiet machine
    assert 0 < beside["update_share"] + beside["waiting_share"] <= 1
    assert beside["staleness_max"] > 0
    for row in (local, beside):
        ratio = sizes.hyperparameters("light", sizes.TASKS["hopper"]).update_ratio
        assert row["updates_per_s"] == pytest.approx(ratio * row["env_steps_per_s"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learner", "--device", "tpu"], "'tpu'.*cpu or cuda"),
        (["learner", "--engine", "cuda_graph"], "cuda_graph.*needs a CUDA device"),
        (["learner", "--precision", "tf32"], "tf32.*needs an NVIDIA GPU"),
        (["learner", "--set", "critic"], "critic is not allowed: KEY=VALUE"),
        (["learner", "--set", "critik=quantile"], "Did you mean 'critic'"),
        (["learner", "--set", "critic=quantle"], "Did you mean 'quantile'"),
        (["act", "--k", "0"], "0 is not allowed"),
        (["runtime", "--seconds", "0"], "--seconds 0 is not allowed"),
        (["rollout", "--num-envs", "0"], "0 is not allowed"),
        (["act", "--task", "hoper"], "hoper"),
        (["replay", "--capacty", "9"], "Did you mean --capacity"),
    ],
)
def test_bad_input(arguments, message, capsys):
    try:
        code = cli.main(["bench", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_peers_says_what_to_install_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "peers"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "pip install 'qvpo_rllib[peers]'" in said


# Everything but the replay: parameters, optimisers, noise, activations. In MiB. VmHWM is this
# process's own peak; `getrusage` would begin with the parent's.
MEMORY = """
import pathlib, torch
from qvpo_rllib.bench.sizes import TASKS, hyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.replay import ReplayBuffer, Transitions

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

task = TASKS["humanoid"]
hp = hyperparameters("paper", task, engine="eager")
replay = ReplayBuffer(2000, task.obs_dim, task.act_dim, seed=0, device="cpu")
replay.add(Transitions(*(torch.randn(2000, *c.shape[1:]) for c in replay.columns)))
before = peak()
learner = QVPOLearner(QVPONetworks(task.obs_dim, task.act_dim, hp), hp, seed=0, device="cpu")
learner.train(replay, 2)
print(peak() - before)
"""


def test_the_learner_takes_less_than_a_gibibyte_at_the_papers_setting():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert 20 < float(run.stdout) < 1024


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("program", [sys.executable, "bash"])
def test_the_gpus_command_says_in_one_line_that_there_is_none(program, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    command = Path(__file__).parents[1] / ".ci" / "gpu"
    run = subprocess.run([program, command], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert len(run.stderr.splitlines()) == 1
    assert "No NVIDIA GPU here" in run.stderr


@pytest.fixture
def the_gpus_command(tmp_path, monkeypatch):
    """`.ci/gpu` as a module, which writes to `tmp_path`."""
    monkeypatch.setenv("OUT", str(tmp_path))
    path = str(Path(__file__).parents[1] / ".ci" / "gpu")
    spec = importlib.util.spec_from_loader("gpu", SourceFileLoader("gpu", path))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module)
    return module


def test_the_gpus_command_lets_its_parts_find_what_it_finds(
    the_gpus_command, tmp_path, monkeypatch
):
    """As where Ray lies on PYTHONPATH alone; the tree itself comes first."""
    for directory, name in ((tmp_path, "only_here"), (tmp_path / "qvpo_rllib", "__init__")):
        directory.mkdir(exist_ok=True)
        (directory / f"{name}.py").touch()
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", tmp_path.name]))
    program = "import only_here, qvpo_rllib; print(qvpo_rllib.__file__)"
    results = the_gpus_command.Results()
    lines = the_gpus_command.lines_of(results, "x", [sys.executable, "-c", program], 60)
    assert [line.strip() for line in lines] == [str(Path(qvpo_rllib.__file__))]
    assert not results.failed


def test_the_gpus_command_says_which_part_a_missing_ray_skips(the_gpus_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    results = the_gpus_command.Results()
    the_gpus_command.train(results)
    [row] = results.rows
    assert row["part"] == "train"
    assert "qvpo train needs Ray" in row["skipped"]
