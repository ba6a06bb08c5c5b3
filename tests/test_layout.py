"""The direction of imports: equations know no state, no state knows Lightning, the library knows no recipe."""

import ast
from pathlib import Path

import lightning_flatlora

ROOT = Path(lightning_flatlora.__file__).parent
TORCH_ONLY = (
    "functional.py",
    "pairs.py",
    "perturbation.py",
    "read_through.py",
    "schedules.py",
    "distributed.py",
    "clip.py",
    "weight_noise.py",
    "baselines/joint_ascent.py",
    *(f"flatness/{path.name}" for path in (ROOT / "flatness").glob("*.py")),
)
TYPES_ONLY = {"torch.distributed.fsdp", "torch.distributed.tensor"}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_the_engine_knows_no_lightning() -> None:
    for name in TORCH_ONLY:
        found = imports(ROOT / name)
        assert not any(module.split(".")[0] == "lightning" for module in found), name
        assert "lightning_flatlora.lightning_names" not in found, name


def test_the_other_name_of_lightning_is_imported_for_its_users_alone() -> None:
    for path in ROOT.rglob("*.py"):
        libraries = {module.split(".")[0] for module in imports(path)}
        assert path == ROOT / "pytorch_lightning.py" or not {"pytorch_lightning", "lightning_fabric"} & libraries, path


def test_objects_of_lightning_are_told_apart_under_both_of_its_names() -> None:
    """An isinstance, and an except, with a class of lightning.pytorch would miss pytorch_lightning's of that name."""
    for path in ROOT.rglob("*.py"):
        if path.name == "lightning_names.py":
            continue
        tree = ast.parse(path.read_text())
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        lightnings = [node for node in froms if (node.module or "").split(".")[0] == "lightning"]
        classes = {alias.asname or alias.name for node in lightnings for alias in node.names}
        assert "MisconfigurationException" not in classes, path
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id in ("isinstance", "issubclass"):
                named = {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)}
                assert not named & classes, f"{path}:{call.lineno}"


def test_the_equations_know_nothing_but_torch() -> None:
    assert imports(ROOT / "functional.py") <= {"typing", "torch"}


def test_the_instruments_know_no_callback() -> None:
    assert imports(ROOT / "flatness" / "factors.py") <= {"torch"}
    for path in (ROOT / "flatness").glob("*.py"):
        assert not any(module.startswith("lightning_flatlora.callbacks") for module in imports(path)), path


def test_no_function_hides_a_module() -> None:
    """``import lightning_flatlora.flatness.factors as f`` gives the module and not a function of that name."""
    for path in ROOT.rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names = {alias.asname or alias.name for node in froms for alias in node.names}
        modules = {each.stem for each in path.parent.glob("*.py")} | {
            each.parent.name for each in path.parent.glob("*/*.py")
        }
        assert not names & modules, path


def test_the_library_knows_no_recipe() -> None:
    for path in ROOT.rglob("*.py"):
        assert not any(module.startswith("recipes") for module in imports(path)), path


def test_collectives_are_in_one_file() -> None:
    """Others may name the types of sharded tensors and modules, but not send or gather anything."""
    for path in ROOT.rglob("*.py"):
        sends = {module for module in imports(path) if module.startswith("torch.distributed")} - TYPES_ONLY
        gathers = any(word in path.read_text() for word in (".full_tensor(", ".redistribute(", "summon_full_params"))
        assert path.name == "distributed.py" or not (sends or gathers), path


def test_the_method_knows_no_baseline() -> None:
    """Baselines stand on the callbacks' base, and nothing of the method stands on them."""
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "pytorch_lightning.py":  # a second door to all that there is
            continue
        used = any(module.startswith("lightning_flatlora.baselines") for module in imports(path))
        assert path.parent.name == "baselines" or not used, path


def test_only_the_report_needs_its_libraries() -> None:
    """Nobody else imports the report, nor, outside of it, what its extra installs."""
    extra = {"datasets", "matplotlib", "rich", "transformers"}
    for path in ROOT.rglob("*.py"):
        if path.parent.name != "report":
            found = imports(path)
            assert not any(module.startswith("lightning_flatlora.report") for module in found), path
            assert not extra & {module.split(".")[0] for module in found}, path
    for path in (ROOT / "report").glob("*.py"):
        assert not any(module.split(".")[0] == "lightning" for module in imports(path)), path
