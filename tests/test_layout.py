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
        assert not any(module.split(".")[0] == "lightning" for module in imports(ROOT / name)), name


def test_the_equations_know_nothing_but_torch() -> None:
    assert imports(ROOT / "functional.py") <= {"typing", "torch"}


def test_the_instruments_know_no_callback() -> None:
    assert imports(ROOT / "flatness" / "factors.py") <= {"torch"}
    for path in (ROOT / "flatness").glob("*.py"):
        assert not any(module.startswith("lightning_flatlora.callbacks") for module in imports(path)), path


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
