"""Every algorithm through the one harness: the table, `--algo`, experiments of several, reports."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvpo_rllib import cli
from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.bench import rivals
from qvpo_rllib.core.options import Options, options_of
from qvpo_rllib.report.runs import load_runs
from qvpo_rllib.training.plan import make_plan
from qvpo_rllib.training.run import TrainingRun
from qvpo_rllib.training.run_directory import RunDirectory
from qvpo_rllib.tuning.results import read_rows, read_trials
from qvpo_rllib.tuning.smoke import shrink
from qvpo_rllib.tuning.spec import ExperimentSpec
from qvpo_rllib.tuning.tuner import fixed_config

BASE: dict[str, Any] = {"name": "x", "task": "InvertedPendulum-v5", "preset": "quick"}
TINY = {
    "spo": ["hidden=8", "train_batch_size=80", "minibatch_size=40", "num_epochs=1"],
    "sac": ["hidden=8", "batch_size=8", "warmup_steps=100", "replay_capacity=1000"],
}
SEVERAL = """
name: several
algorithm: [td3, ppo, sac]
task: InvertedPendulum-v5
preset: quick
env_steps: 160
per_algorithm:
  td3: {hidden: [8], batch_size: 8, warmup_steps: 40, engine: eager}
  ppo: {hidden: [8], train_batch_size: 80, minibatch_size: 40, num_epochs: 1}
  sac: {hidden: [8], batch_size: 8, warmup_steps: 40}
evaluation: {interval: 80, episodes: 2}
"""


def refused(capsys: Any, *arguments: str) -> str:
    assert cli.main([*arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def plan_of(algo: str, **values: Any) -> Any:
    nothing = {"env": None, "preset": None, "seed": 0, "env_steps": None, "eval_interval": None,
               "num_env_runners": 0, "num_envs_per_env_runner": None, "num_gpus": 0,
               "settings": []}  # fmt: skip
    return make_plan(algo=algo, **{**nothing, **values})


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_without_an_update_is_warned_of(name: str, caplog: Any) -> None:
    warmup = "warmup_steps" in options_of(ALGORITHMS[name].hyperparameters)
    settings = ["warmup_steps=600"] if warmup else []
    for env_steps, warns in ((600, warmup), (601, False)):
        caplog.clear()
        plan_of(name, env_steps=env_steps, settings=settings)
        assert ("no update will be done" in caplog.text) == warns


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_preset_becomes_a_plan_with_nothing_left_open(name: str) -> None:
    kind = ALGORITHMS[name].hyperparameters
    assert {"default", "light", "quick"} <= set(kind.presets) <= set(kind.runs)
    for preset in kind.presets:
        plan = plan_of(name, preset=preset, env_steps=12_345)
        assert set(plan.hyperparameters) == set(options_of(kind))
        json.dumps(plan.to_dict())
        for end, steps in kind.decays:
            if plan.hyperparameters[end] is not None:
                assert plan.hyperparameters[steps] == 12_345
    assert set(kind.smoke) <= set(options_of(kind))
    assert ALGORITHMS[name].load().config_class.algorithm_name == ALGORITHMS[name].label


@pytest.mark.parametrize("name", ["qvpo", "td3", "ppo", "sac"])
def test_options_are_made_at_most_eight_times_before_the_first_step(
    name: str, monkeypatch: Any, tmp_path: Path, ray_session: None
) -> None:
    made: list[Options] = []
    check = Options.__post_init__

    def counting(options: Options) -> None:
        made.append(options)
        check(options)

    monkeypatch.setattr(Options, "__post_init__", counting)
    plan = plan_of(name, preset="quick", env_steps=400)
    with RunDirectory.create(tmp_path / "run", plan.to_dict(), []) as directory:
        TrainingRun(plan, directory, resume=False).close()
    assert 1 < len(made) <= 8
    assert len({repr(options) for options in made}) == 1


def test_the_paper_s_seven_are_there() -> None:
    assert set(ALGORITHMS) == {"qvpo", "dipo", "qsm", "td3", "spo", "ppo", "sac"}
    spec = ExperimentSpec.load(Path(__file__).parents[1] / "tune_configs" / "table1.yaml")
    assert set(spec.algorithms) == set(ALGORITHMS)
    for algorithm in spec.algorithms:
        config = fixed_config(shrink(spec), algorithm)
        assert config["hidden"] == [32, 32]


def test_options_of_one_algorithm_are_its_own() -> None:
    spec = ExperimentSpec.from_dict(
        {**BASE, "algorithm": ["ppo", "sac"], "training": {"gamma": 0.9},
         "per_algorithm": {"ppo": {"clip_param": 0.1}}}
    )  # fmt: skip
    ppo, sac = (fixed_config(spec, name) for name in spec.algorithms)
    assert (ppo["gamma"], ppo["clip_param"], sac["gamma"]) == (0.9, 0.1, 0.9)
    assert "clip_param" not in sac


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"clip_param": 0.1}}, "There is no option 'clip_param'"),
        ({"per_algorithm": {"ppo": {"clip_parm": 0.1}}}, "Did you mean 'clip_param'"),
        ({"per_algorithm": {"spo": {"lr": 0.1}}}, "per_algorithm.spo: there is no such key"),
        ({"preset": "authors"}, "PPO has no preset 'authors'"),
    ],
)
def test_options_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ExperimentSpec.from_dict({**BASE, "algorithm": ["ppo", "sac"], **values})


# --- the command line --------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path, capsys: Any) -> None:
    run = ["--run-dir", str(tmp_path / "run")]
    assert "Did you mean 'ppo'" in refused(capsys, "train", "--algo", "pppo", *run)
    text = refused(capsys, "train", "--algo", "ppo", "--set", "clip_parm=0.3", *run)
    assert "Did you mean 'clip_param'" in text
    text = refused(capsys, "train", "--algo", "sac", "--preset", "paper", *run)
    assert "SAC has no preset 'paper'" in text
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module", params=["spo", "sac"])
def trained(request: Any, tmp_path_factory: Any, qvpo: Callable[..., str]) -> tuple[str, Path]:
    """A run of 240 env steps with evaluations every 80."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    settings = [word for setting in TINY[request.param] for word in ("--set", setting)]
    output = qvpo(
        "train", "--algo", request.param, "--preset", "quick", "--env-steps", "240",
        "--eval-interval", "80", *settings, "--run-dir", str(run),
    )  # fmt: skip
    assert f"{ALGORITHMS[request.param].label} InvertedPendulum-v5 quick: evaluation" in output
    return request.param, run


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_directory_has_what_qvpos_has(trained: tuple[str, Path]) -> None:
    algo, run = trained
    assert json.loads((run / "config.json").read_text())["algo"] == algo
    for name in ("run.json", "metrics.parquet", "learning_curve.png", "tensorboard"):
        assert (run / name).exists()
    rows = rows_of(run)
    evaluated = [row for row in rows if row.get("evaluation/return_mean") is not None]
    assert [row["env_steps"] for row in evaluated] == [80, 160, 240]
    assert all(row["evaluation/episodes"] == 10 for row in evaluated)
    assert rows[-1]["updates"] == {"spo": 6, "sac": 140}[algo]
    for loss in ALGORITHMS[algo].hyperparameters.losses:
        assert isinstance(rows[-1][f"learner/{loss}"], float)


def test_its_policy_is_evaluated_and_not_exported(
    trained: tuple[str, Path], tmp_path: Path, capsys: Any
) -> None:
    algo, run = trained
    assert cli.main(["evaluate", str(run), "--episodes", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["k"], result["episodes"]) == (None, 2)
    assert "takes one action in each state" in refused(capsys, "evaluate", str(run), "--k", "2")
    text = refused(capsys, "export", str(run), str(tmp_path / "bundle"))
    assert f"is a checkpoint of {ALGORITHMS[algo].label}" in text
    assert not (tmp_path / "bundle").exists()


def test_it_goes_on_and_is_reported(trained: tuple[str, Path], qvpo: Callable[..., str]) -> None:
    _, run = trained
    before = rows_of(run)
    qvpo("train", "--resume", str(run), "--env-steps", "320")
    rows = rows_of(run)
    assert rows[: len(before)] == before
    assert rows[-1]["env_steps"] == 320
    assert rows[-1]["updates"] > before[-1]["updates"]
    (found,) = load_runs([run])
    assert (found.algorithm, found.env_steps) == (ALGORITHMS[trained[0]].label, 320)


def test_an_experiment_of_several_runs_to_its_report(
    tmp_path: Path, qvpo: Callable[..., str]
) -> None:
    (tmp_path / "several.yaml").write_text(SEVERAL)
    results = tmp_path / "results"
    output = qvpo("tune", str(tmp_path / "several.yaml"), "--storage", str(results))
    assert "Done." in output
    for part in ("td3", "ppo", "sac"):
        (trial,) = read_trials(results / "several" / part)
        rows = read_rows(results / "several" / part, trial)
        assert [row["env_steps"] for row in rows] == [80, 160]
        assert rows[-1]["updates"] > 0
        assert all(row["evaluation/episodes"] == 2 for row in rows)
    assert cli.main(["report", str(results / "several"), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(label in page for label in ("TD3", "PPO", "SAC"))


def test_the_benchmark_times_an_update_and_an_action_of_each_algorithm() -> None:
    options = argparse.Namespace(task=["hopper"], setting=["light"], repeats=1)
    rows = {row["algorithm"]: row for row in rivals.run(options)}
    assert set(rows) == {entry.label for entry in ALGORITHMS.values()}
    for row in rows.values():
        assert min(row["explore_ms"], row["evaluate_ms"]) > 0
        hours = 1e6 * row["updates_per_step"] * row["update_ms"] / 1e3 / 3600
        assert row["learning_h"] == pytest.approx(hours)
    assert rows["QVPO"]["updates_per_step"] == 1
    assert rows["PPO"]["updates_per_step"] == pytest.approx(10 / 256)
