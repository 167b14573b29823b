"""The READMEs of the project: a fact may stand in any of them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def all_readmes() -> list[Path]:
    """Returns the root's README and those of the folders that belong to the project."""
    folders = ("qvpo_rllib", "tune_configs", "cluster", "tests")
    found = [file for folder in folders for file in sorted((ROOT / folder).rglob("README.md"))]
    return [ROOT / "README.md", *found]


def all_text() -> str:
    """Returns the text of all READMEs, one after the other."""
    return "\n".join(file.read_text() for file in all_readmes())


def fenced(text: str, language: str) -> list[str]:
    """Returns the content of the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
