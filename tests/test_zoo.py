"""The trained policies in tune_configs/results/zoo do what its README says."""

import re
from pathlib import Path

import pytest

from qvpo_rllib.play.evaluation import evaluate_checkpoint

ZOO = Path(__file__).parents[1] / "tune_configs" / "results" / "zoo"
# | [name](name) | … | mean ± deviation |
ROW = re.compile(r"^\| \[(\S+)\]\(\S+\) \|.*\| (−?[\d,]+\.?\d*) ± ([\d,]+\.?\d*) \|$", re.MULTILINE)
CLAIMS = {
    name: [float(number.replace("−", "-").replace(",", "")) for number in numbers]
    for name, *numbers in ROW.findall((ZOO / "README.md").read_text())
}


def test_every_policy_has_a_row_and_no_pickle() -> None:
    folders = [path for path in ZOO.iterdir() if path.is_dir()]
    assert {path.name for path in folders} == CLAIMS.keys()
    for folder in folders:
        assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
        assert sum(path.stat().st_size for path in folder.iterdir()) < 2_500_000


@pytest.mark.parametrize("name", CLAIMS)
def test_a_policy_has_the_return_that_it_claims(name: str) -> None:
    """Other processors round otherwise, so that its episodes are not the same to the last bit."""
    mean, deviation = CLAIMS[name]
    played = evaluate_checkpoint(ZOO / name, episodes=5)
    returns = [episode.episode_return for episode in played.episodes]
    margin = max(0.1 * mean, 3 * deviation / len(returns) ** 0.5)
    assert sum(returns) / len(returns) == pytest.approx(mean, abs=margin)
