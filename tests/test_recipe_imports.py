"""The direction of imports between the recipes' folders, and the base classes of a recipe's module.

data <- training <- command_line <- studies, and clip <- offline <- language, which the recipes use; above them the
programs that drive recipes.
"""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from lightning import LightningModule

import recipes

ROOT = Path(recipes.__file__).parent
BELOW = {
    "data": (),
    "training": ("data",),
    "command_line": ("data", "training"),
    "studies": ("data", "training", "command_line"),
    "clip": ("data", "training", "command_line"),
    "offline": ("data", "clip"),
    "language": ("data", "training", "command_line", "offline"),
}
"""What several recipes share, a folder for each subject, and the folders that it may import."""
RECIPES = ("classification", "instruction_tuning", "nlg", "clip_contrastive", "clip_fewshot", "vqa")
PROGRAMS = ("demo", "benchmarks", "pretrain", "report", "reproduce", "tune")


def folders_imported_by(path: Path) -> set[str]:
    """The recipes' folders from which a file imports, including imports within functions."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which this test does not follow"
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {module.split(".")[1] for module in modules if module.startswith("recipes.")}


def may_import(folder: str) -> set[str]:
    if folder in BELOW:
        return {folder, *BELOW[folder]}
    if folder in RECIPES:
        return {*BELOW, folder}
    return {*BELOW, *RECIPES, folder}


def test_every_folder_with_code_is_known() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders == {*BELOW, *RECIPES, *PROGRAMS}
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("folder", [*BELOW, *RECIPES, *PROGRAMS])
def test_imports_between_folders_have_one_direction(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        forbidden = folders_imported_by(path) - may_import(folder)
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_module_has_at_most_three_own_classes_above_it(name: str) -> None:
    """So that whoever changes a recipe can read everything that its module inherits."""
    file = import_module(f"recipes.{name}.module")
    modules = [kind for kind in vars(file).values() if isinstance(kind, type) and kind.__module__ == file.__name__]
    (module,) = (kind for kind in modules if issubclass(kind, LightningModule))
    own = [kind for kind in module.__mro__[1:] if kind.__module__.startswith(("recipes.", "lightning_flatlora."))]
    assert len(own) <= 3, own


def test_a_command_imports_bitsandbytes_only_if_it_needs_it() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    program = (
        "import sys\n"
        "import recipes.command_line.cli, recipes.vqa.module, recipes.instruction_tuning.data\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "from peft.import_utils import is_bnb_4bit_available\n"
        "from peft.tuners.lora import Linear4bit\n"
        "assert is_bnb_4bit_available() and 'bitsandbytes' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT.parent)
