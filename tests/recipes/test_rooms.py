"""The direction of imports between the rooms of the recipes.

shared <- language and clip <- the recipes <- the programs that drive them.
"""

import ast
from pathlib import Path

import pytest

import recipes

ROOT = Path(recipes.__file__).parent
SHARED = ("shared", "language", "clip")
RECIPES = ("classification", "instruction_tuning", "nlg", "clip_contrastive", "clip_fewshot", "vqa")
PROGRAMS = ("demo", "clip_demo", "comparison", "benchmarks", "evidence", "reproduce", "choose_rho")


def rooms_imported_by(path: Path) -> set[str]:
    """The rooms of the recipes that a file imports, inside of functions too."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which this test does not follow"
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {module.split(".")[1] for module in modules if module.startswith("recipes.")}


def may_import(room: str) -> set[str]:
    if room == "shared":
        return {room}
    if room in SHARED:
        return {"shared", room}
    if room in RECIPES:
        return {*SHARED, room}
    return {*SHARED, *RECIPES, room}


def test_every_folder_with_code_is_a_room() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders == {*SHARED, *RECIPES, *PROGRAMS}
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("room", [*SHARED, *RECIPES, *PROGRAMS])
def test_imports_between_rooms_have_one_direction(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        forbidden = rooms_imported_by(path) - may_import(room)
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_the_direction_is_seen(tmp_path: Path) -> None:
    """The test above would find an import in any of its forms."""
    path = tmp_path / "module.py"
    path.write_text(
        "import recipes.vqa.data\nfrom recipes import demo\ndef f():\n    from recipes.clip.model import x\n"
    )
    assert rooms_imported_by(path) == {"vqa", "demo", "clip"}
    assert not may_import("vqa") & {"demo", "instruction_tuning"}
