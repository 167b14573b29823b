"""What the READMEs say is so: tables, links, commands, examples, and what CI runs."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from readmes import ROOT, all_readmes, all_text, fenced

from qvpo_rllib.algorithms import dipo, qsm, td3
from qvpo_rllib.cli import build_parser
from qvpo_rllib.core.options import option_table
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.options.shared import DiffusionHyperparameters, OffPolicyHyperparameters
from qvpo_rllib.core.qvpo import QVPOLearner, QVPONetworks
from qvpo_rllib.core.replay import ReplayBuffer, Transitions

README = (ROOT / "README.md").read_text()
TEXT = all_text()
BY_NAME = {str(file.relative_to(ROOT)): file for file in all_readmes()}
every_readme = pytest.mark.parametrize("name", BY_NAME)


def test_the_root_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 250


def test_the_options_table_is_the_code():
    assert option_table(QVPOHyperparameters) in TEXT


def test_every_option_is_in_the_table():
    for name in QVPOHyperparameters().to_dict():
        assert f"| `{name}` |" in TEXT


@pytest.mark.parametrize(
    "kind", [td3.TD3Hyperparameters, dipo.DIPOHyperparameters, qsm.QSMHyperparameters]
)
def test_the_rivals_options_that_differ_are_listed(kind):
    shared = option_table(OffPolicyHyperparameters).splitlines()
    rows = [row for row in option_table(kind).splitlines() if row not in shared]
    assert len(rows) >= 4
    assert "\n".join(rows) in TEXT


# DIPO leaves these to the task; there is none here.
DIPO = {"action_steps": 1, "action_clip_ratio": 0.1, "target_actor_interval": 1}
SOFT = {"k_target": 1, "q_weights": "softmax", "entropy_weight": "auto"}
REFINED = {"k_target": 1, "target_refinement": "gradient", "entropy_in_target": 0.1}
LEARNERS = [
    (QVPOLearner, QVPONetworks, QVPOHyperparameters, {"k_target": 1}),
    (QVPOLearner, QVPONetworks, QVPOHyperparameters, {"k_target": 1, "critic": "quantile"}),
    (QVPOLearner, QVPONetworks, QVPOHyperparameters, SOFT),
    (QVPOLearner, QVPONetworks, QVPOHyperparameters, REFINED),
    (td3.TD3Learner, td3.TD3Networks, td3.TD3Hyperparameters, {}),
    (dipo.DIPOLearner, QVPONetworks, dipo.DIPOHyperparameters, DIPO),
    (qsm.QSMLearner, QVPONetworks, qsm.QSMHyperparameters, {}),
]


@pytest.mark.parametrize(("learner", "networks", "kind", "options"), LEARNERS)
def test_every_metric_of_a_learner_is_in_a_table(learner, networks, kind, options):
    values = {"hidden": (4,), "batch_size": 2, "engine": "eager", **options}
    if issubclass(kind, DiffusionHyperparameters):
        values["diffusion_steps"] = 2
    hp = kind(**values)
    trained = learner(networks(3, 1, hp), hp, seed=0, device="cpu")
    replay = ReplayBuffer(4, 3, 1, seed=0, device="cpu", improves_actions=True)
    column = torch.zeros(4)
    replay.add(Transitions(torch.rand(4, 3), torch.rand(4, 1), column, torch.rand(4, 3), column))
    trained.train(replay, 2)
    metrics = trained.pop_metrics()
    assert len(metrics) >= 4
    for name in metrics:
        assert re.search(rf"^\|[^|]*`learner/{name}`", TEXT, re.MULTILINE), name


def test_ci_finds_the_test_command():
    block = README.split("<!-- test command -->")[1]
    command = re.search(r"```bash\n(.+)\n```", block).group(1)
    assert command.endswith("&& pytest -n 3 --dist loadfile")
    assert 'pip install -e ".[test]"' in command


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@", TEXT)


# --- links ---------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(file: Path) -> set[str]:
    """Returns the names that GitHub gives the headings of a file."""
    titles = re.findall(r"^#+ (.+)$", without_code(file.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(file: Path) -> list[str]:
    """Returns the targets of all relative links and pictures."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(file.read_text()))
    return [target for target in found if not target.startswith(("http:", "https:"))]


def broken_links(file: Path) -> list[str]:
    broken = []
    for target in links(file):
        path, _, anchor = target.partition("#")
        aim = (file.parent / path).resolve() if path else file
        known = anchors(aim) if anchor and aim.suffix == ".md" and aim.is_file() else {anchor}
        if not aim.exists() or ROOT not in (aim, *aim.parents) or anchor not in known:
            broken.append(target)
    return broken


@every_readme
def test_every_link_and_picture_exists(name):
    assert broken_links(BY_NAME[name]) == []


@pytest.mark.parametrize("room", ["core", "rollout", "serving", "checkpoints"])
def test_a_rooms_table_has_every_file_with_code(room):
    folder = ROOT / "qvpo_rllib" / room
    code = [f for f in folder.rglob("*") if f.suffix in (".py", ".cpp", ".hpp")]
    text = (folder / "README.md").read_text()
    names = [str(f.relative_to(folder)) for f in code if f.name != "__init__.py"]
    assert [name for name in names if f"]({name})" not in text] == []


def test_the_root_shows_a_picture_and_every_readme_can_be_reached():
    assert any(target.endswith(".png") for target in links(BY_NAME["README.md"]))
    reached, waiting = set(), [BY_NAME["README.md"]]
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            targets = [(file.parent / t.partition("#")[0]).resolve() for t in links(file)]
            waiting += [target for target in targets if target.name == "README.md"]
    assert reached == set(BY_NAME.values())


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    file = tmp_path / "README.md"
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file.write_text("# A b!\n[x](#a-b) [y](#c) [z](gone.md) ![p](README.md#a-b) [w](https://a.b)\n")
    assert broken_links(file) == ["#c", "gone.md"]


# --- examples ------------------------------------------------------------------------------------


def commands(text: str, program: str) -> list[list[str]]:
    """Returns the arguments of every command of `program` in the text's bash blocks."""
    found: list[list[str]] = []
    for line in "".join(fenced(text, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            if words[0] == program:
                found.append(words[1:end])
            words = words[end + 1 :]
    return found


def refused(arguments: list[str]) -> str | None:
    """Returns what the parser says about the arguments of `qvpo`, or None if it takes them."""
    try:
        build_parser().parse_args(arguments)
    except (SystemExit, argparse.ArgumentError) as error:
        return f"qvpo {shlex.join(arguments)}: {error}"
    return None


def test_every_command_parses():
    found = commands(TEXT, "qvpo")
    assert len(found) >= 30
    assert [reason for arguments in found if (reason := refused(arguments))] == []


def test_commands_in_running_text_parse():
    spans = re.findall(r"`qvpo ([^`]+)`", without_code(TEXT).replace("\n", " "))
    parts = [part.removeprefix("qvpo ") for span in spans for part in span.split(" && ")]
    # Not whole: a bare name, an ellipsis, a placeholder such as `--seed S`, only an option named.
    fragment = re.compile(r"^(replay )?\w+$|…|\b[A-Z]+\b(?!-)| \| |--\S+$")
    whole = [part.split() for part in parts if not fragment.search(part)]
    assert len(whole) >= 10
    assert [reason for arguments in whole if (reason := refused(arguments))] == []


def test_a_wrong_command_is_found():
    (arguments,) = commands("```bash\ncd x && qvpo train --nosuch 3  # why\n```\n", "qvpo")
    assert arguments == ["train", "--nosuch", "3"]
    assert refused(arguments)


def test_what_ray_submit_sends_parses():
    sent = [words for words in commands(TEXT, "ray") if words[0] == "submit"]
    assert sent
    for words in sent:
        assert refused(words[words.index("--") + 1 :]) is None


def test_every_file_that_a_command_names_exists():
    named = {
        word
        for program in ("qvpo", "ray")
        for arguments in commands(TEXT, program)
        for word in arguments
        if re.match(r"(tune_configs|cluster|tests)/", word)
    }
    assert named
    assert [word for word in named if not (ROOT / word).exists()] == []


EXAMPLES = [
    (name, number, example)
    for name, file in BY_NAME.items()
    for number, example in enumerate(fenced(file.read_text(), "python"))
]


@pytest.mark.parametrize(("name", "number", "example"), EXAMPLES)
def test_a_python_example_compiles_and_its_imports_exist(name, number, example):
    tree = ast.parse(example)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_dotted_names_of_the_package_exist():
    """Such as `qvpo_rllib.core.options.qvpo.QVPOHyperparameters`, in text and in YAML."""
    names = set(re.findall(r"`qvpo_rllib((?:\.\w+)+)", TEXT))
    assert len(names) >= 5
    for name in names:
        found, path = importlib.import_module("qvpo_rllib"), "qvpo_rllib"
        for part in name[1:].split("."):
            path += f".{part}"
            found = getattr(found, part, None) or importlib.import_module(path)
