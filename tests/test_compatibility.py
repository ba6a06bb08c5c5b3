"""The page on compatibility says what pyproject.toml and oldest.txt say, and versions stand in all places alike."""

import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement

import lightning_flatlora

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "compatibility.md").read_text()
ROWS = re.findall(r"^\| ([\w-]+)[^|]*\| (>=[\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
ACCEPTED = {name: floor for name, floor, _, _ in ROWS}
OLDEST = {name: oldest for name, _, oldest, _ in ROWS}
DECLARED = (ROOT / "pyproject.toml").read_text()


def test_the_floors_are_those_of_the_package() -> None:
    declared = {"Python": re.findall(r'^requires-python = "(.+)"', DECLARED, re.MULTILINE)}
    for line in re.findall(r'"([\w-]+(?:\[\w+\])?>=[\d.]+)"', DECLARED):
        requirement = Requirement(line)
        declared.setdefault(requirement.name, []).append(str(requirement.specifier))
    assert ACCEPTED.keys() >= {"Python", "torch", "lightning", "peft", "torchmetrics", "transformers"}
    for name, floor in ACCEPTED.items():
        assert set(declared[name]) == {floor}, name


def test_the_oldest_releases_are_those_that_are_installed() -> None:
    pinned = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE)
    assert pinned
    for name, version in pinned:
        assert OLDEST[name] == version, name


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == lightning_flatlora.__version__
