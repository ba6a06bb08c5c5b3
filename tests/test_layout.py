"""The direction of imports: equations know no state, state knows no Lightning, and the library knows no recipe."""

import ast
import gc
import sys
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from helpers import Classifier, calling, fit

import lightning_flatlora
from lightning_flatlora import EFMLoRA, FMLoRA

ROOT = Path(lightning_flatlora.__file__).parent
TYPES_ONLY = {"torch.distributed.fsdp", "torch.distributed.tensor"}
LAYERS = {
    "functional": 1,
    "class_overlay": 2,
    "clip": 2,
    "flatness": 2,
    "full_weight": 2,
    "pairs": 2,
    "patching": 2,
    "perturbation": 2,
    "perturbed_read": 2,
    "rank_zero": 2,
    "schedules": 2,
    "sharding": 2,
    "wrappers": 2,
    "methods": 3,
    "callbacks": 4,
    "loops": 4,
    "__init__": 5,
    "baselines": 5,
    "module": 5,
    "pytorch_lightning": 5,
    "transformers": 5,
}
"""The layers of docs/architecture.md, by the package's own files and folders."""
ENGINE = 2
DEEPEST_IMPORT = 11
"""Files of the package that the longest chain of imports passes, without those that only pass names on."""


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def names_bound_by(froms: list[ast.ImportFrom]) -> set[str]:
    """The names that ``from ... import`` statements give a module."""
    names = set()
    for node in froms:
        names |= {alias.asname or alias.name for alias in node.names}
    return names


def layer_of(place: str) -> int:
    """The layer of a file or folder of the package, without ``.py``; its exported names belong to __init__."""
    return LAYERS.get(place, LAYERS["__init__"])


def place_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def places_imported_by(path: Path) -> set[str]:
    """The package's files and folders from which a file imports, including imports within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which this test does not follow"
            # With the imported name, since it is a module in ``from lightning_flatlora import loops``.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    places = set()
    for name in names:
        library, *inner = name.split(".")
        if library == "lightning_flatlora":
            places.add(inner[0] if inner else "__init__")
    return places


def test_a_layer_imports_only_from_itself_and_from_those_below() -> None:
    for path in ROOT.rglob("*.py"):
        place = place_of(path)
        above = {each for each in places_imported_by(path) if layer_of(each) > layer_of(place)}
        assert not above, f"{path} imports {above}"


def test_the_order_of_layers_is_seen(tmp_path: Path) -> None:
    """The test above finds an import in any form."""
    path = tmp_path / "file.py"
    path.write_text(
        "import lightning_flatlora.module\n"
        "from lightning_flatlora import ParameterRef, loops\n"
        "def f():\n    from lightning_flatlora.callbacks.base import x\n"
    )
    assert places_imported_by(path) == {"module", "loops", "ParameterRef", "callbacks"}
    from_below = ["functional", "pairs", "flatness", "methods", "callbacks", "loops", "ParameterRef"]
    assert [layer_of(place) for place in from_below] == [1, 2, 2, 3, 4, 4, 5]


def test_every_file_and_folder_has_a_layer_and_is_on_the_page() -> None:
    files = {path.stem for path in ROOT.glob("*.py")}
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert files | rooms == set(LAYERS)
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    for place in LAYERS:
        assert place == "__init__" or f"lightning_flatlora/{place}" in page, place


def files_imported_by(name: str, files: dict[str, Path]) -> set[str]:
    """The package's modules from which one of them imports."""
    found = set()
    for node in ast.walk(ast.parse(files[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in files else str(node.module))
    return {module for module in found if module in files and module != name}


def test_imports_are_not_deep() -> None:
    """This many files must be read to understand one completely."""
    files = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path

    @cache
    def depth(name: str) -> int:
        below = max(map(depth, files_imported_by(name, files)), default=0)
        return below if files[name].name == "__init__.py" else below + 1

    assert max(map(depth, files)) <= DEEPEST_IMPORT


def test_the_methods_know_no_trainer() -> None:
    """They are used by callbacks, the module and loops alike."""
    for path in (ROOT / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning.pytorch"):
                assert node.module.rpartition(".")[2] in ("rank_zero", "exceptions"), path


def test_files_of_the_package_are_short() -> None:
    """From 300 lines on, ask whether a file has two subjects; meaning is more important than length up to 400."""
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


ALL_FILES = set(ROOT.rglob("*.py"))
ENGINE_FILES = {path for path in ALL_FILES if layer_of(place_of(path)) <= ENGINE}
# A second entry to everything.
DOOR = {ROOT / "pytorch_lightning.py"}
FORBIDDEN: dict[str, tuple[Any, set[str]]] = {
    "the engine knows no Lightning": (ENGINE_FILES, {"lightning", "lightning_flatlora.callbacks.both_lightnings"}),
    "loops know no callback": ((ROOT / "loops").glob("*.py"), {"lightning_flatlora.callbacks"}),
    "callbacks know no loop": ((ROOT / "callbacks").rglob("*.py"), {"lightning_flatlora.loops"}),
    "the method knows no baseline": (
        ALL_FILES - DOOR - set((ROOT / "baselines").glob("*.py")),
        {"lightning_flatlora.baselines"},
    ),
    "the other name of Lightning is for its users alone": (ALL_FILES - DOOR, {"pytorch_lightning", "lightning_fabric"}),
    "the library knows no recipe and none of their libraries": (
        ALL_FILES,
        {"recipes", "datasets", "matplotlib", "rich"},
    ),
    "only its own file knows transformers": (ALL_FILES - {ROOT / "transformers.py"}, {"transformers"}),
}


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_what_is_never_imported(rule: str) -> None:
    files, names = FORBIDDEN[rule]
    for file in files:
        for module in imports(file):
            assert not any(f"{module}.".startswith(f"{name}.") for name in names), file


def test_the_equations_know_nothing_but_torch() -> None:
    assert imports(ROOT / "functional.py") <= {"collections.abc", "typing", "torch"}
    assert imports(ROOT / "flatness" / "factors.py") <= {"torch"}


def test_objects_of_lightning_are_told_apart_under_both_of_its_names() -> None:
    """isinstance with a class of lightning.pytorch would miss pytorch_lightning's class of that name."""
    for path in ROOT.rglob("*.py"):
        if path.name == "both_lightnings.py":
            continue
        tree = ast.parse(path.read_text())
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        lightnings = [node for node in froms if (node.module or "").split(".")[0] == "lightning"]
        classes = names_bound_by(lightnings)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "issubclass"):
                named = {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)}
                assert not named & classes, f"{path}:{call.lineno}"


def test_no_function_hides_a_module() -> None:
    """``import lightning_flatlora.flatness.factors as f`` gives the module, not a function of that name."""
    for path in ROOT.rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = names_bound_by(froms)
        modules = {each.stem for each in path.parent.glob("*.py")} | {
            each.parent.name for each in path.parent.glob("*/*.py")
        }
        assert not names & modules, path


def test_collectives_are_in_one_file() -> None:
    """Other files may name the types of sharded tensors and modules, but not send or gather anything."""
    for path in ROOT.rglob("*.py"):
        sends = {module for module in imports(path) if module.startswith("torch.distributed")} - TYPES_ONLY
        gathers = any(word in path.read_text() for word in (".full_tensor(", ".redistribute(", "summon_full_params"))
        assert path.name == "sharding.py" or not (sends or gathers), path


def test_facts_about_strategies_are_in_one_file() -> None:
    """Other files may name the type of all strategies, but not ask which one a Trainer has."""
    for path in ROOT.rglob("*.py"):
        if path.name == "strategies.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lightning.pytorch.strategies":
                assert {alias.name for alias in node.names} <= {"Strategy"}, path
            if isinstance(node, ast.ImportFrom) and node.module == "lightning.pytorch":
                assert "strategies" not in names_bound_by([node]), path


@pytest.mark.parametrize(("kind", "most"), [(EFMLoRA, 12), (FMLoRA, 18)])
def test_a_step_passes_few_files(kind: Any, most: int, tmp_path: Path) -> None:
    """So that a newcomer can follow one."""
    seen: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT):
            seen.add(str(file.relative_to(ROOT)))

    def start(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            gc.collect()  # other tests' garbage would otherwise be collected within this step
            sys.setprofile(note)

    starts = calling(on_train_batch_start=start)
    ends = calling(on_train_batch_end=lambda *args: sys.setprofile(None))
    fit(tmp_path, Classifier(), [starts, kind(rho=0.5), ends], max_epochs=1)
    assert "methods/b_perturbation.py" in seen
    assert len(seen) <= most, sorted(seen)


def test_test_files_are_short_and_import_no_other_one() -> None:
    """Code that several test files share is in a file without tests next to them."""
    for path in (ROOT.parent / "tests").rglob("test_*.py"):
        assert not any(module.startswith("test_") for module in imports(path)), path
        assert len(path.read_text().splitlines()) <= 400, path
