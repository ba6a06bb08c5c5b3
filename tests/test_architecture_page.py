"""What the pages for developers point to exists: files, names in them, targets of make."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md", ".github/pull_request_template.md")
PATH = re.compile(r"[\w.-]*(/[\w.-]+)+/?|[\w-]+\.(py|md|toml|txt|cff|yaml)|Makefile")
ANYWHERE = {"conftest.py", "__main__.py", "results.jsonl"}
"""Names of files without a folder, of which there are several or none in the repository."""


def quoted(page: str) -> list[str]:
    """What stands in backticks, commands in blocks apart."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What a module or a class defines, functions, classes and variables, by name."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    names[target.id] = node
    return names


def defines(path: Path, dotted: str) -> bool:
    body = ast.parse(path.read_text()).body
    for name in dotted.split("."):
        node = names_in(body).get(name)
        if node is None:
            return False
        body = node.body if isinstance(node, ast.ClassDef) else []
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_name_exists(page: str) -> None:
    missing = []
    for text in quoted(page):
        path, _, name = text.partition("::")
        if not PATH.fullmatch(path) or path in ANYWHERE:
            continue
        if not (ROOT / path).exists() or (name and not defines(ROOT / path, name)):
            missing.append(text)
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_target_of_make_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)`|^make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE):
        name = target[0] or target[1]
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def test_missing_files_and_names_are_seen() -> None:
    assert PATH.fullmatch("lightning_flatlora/nothing.py")
    assert not defines(ROOT / "lightning_flatlora" / "functional.py", "ascent_nothing")
    assert defines(ROOT / "lightning_flatlora" / "functional.py", "Ascent.direction")
    assert len([text for text in quoted("docs/architecture.md") if "::" in text]) > 25
