"""The README's table of options is the code's, and its test command is what CI runs."""

import re
from pathlib import Path

import pytest

from qvpo_rllib.algorithms import dipo, qsm, td3
from qvpo_rllib.core.hyperparameters import OffPolicyHyperparameters, QVPOHyperparameters
from qvpo_rllib.core.options import option_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_options_table_is_the_code():
    assert option_table(QVPOHyperparameters) in README


def test_every_option_is_in_the_table():
    for name in QVPOHyperparameters().to_dict():
        assert f"| `{name}` |" in README


def test_ci_finds_the_test_command():
    block = README.split("<!-- test command -->")[1]
    command = re.search(r"```bash\n(.+)\n```", block).group(1)
    assert command.endswith("&& pytest -n 2 --dist loadfile")
    assert 'pip install -e ".[test]"' in command


def test_nothing_is_left_to_fill_in_and_every_picture_exists():
    assert not re.search(r"@[A-Z]+@", README)
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


@pytest.mark.parametrize(
    "kind", [td3.TD3Hyperparameters, dipo.DIPOHyperparameters, qsm.QSMHyperparameters]
)
def test_the_rivals_options_that_differ_are_listed(kind):
    shared = option_table(OffPolicyHyperparameters).splitlines()
    rows = [row for row in option_table(kind).splitlines() if row not in shared]
    assert len(rows) >= 4
    assert "\n".join(rows) in README
