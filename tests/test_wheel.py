"""The built wheel installs in a clean environment, and works there with only its declared dependencies."""

import os
import re
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_flatlora

ROOT = Path(__file__).parent.parent
USE = """
import torch
from peft import LoraConfig, get_peft_model
import lightning_flatlora
from lightning_flatlora import EFMLoRA, Perturbation, find_pairs
assert "site-packages" in lightning_flatlora.__file__, lightning_flatlora.__file__
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
perturbation = Perturbation(find_pairs(model).pairs)
model(torch.ones(5, 4)).sum().backward()
assert perturbation.ascend(0.5, at_perturbed=False).stacks[0].norm() > 0
print(EFMLoRA(rho=0.5).method.beta, lightning_flatlora.__version__)
"""


def run(*command: str, cwd: Path) -> str:
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=elsewhere, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def dependencies(start: Distribution) -> dict[str, Distribution]:
    """The requirements of a distribution and, in turn, their requirements, as installed here."""
    found: dict[str, Distribution] = {}
    wanted = [Requirement(line) for line in start.requires or []]
    seen: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        if str(requirement) in seen or not _applies(requirement):
            continue
        seen.add(str(requirement))
        installed = distribution(requirement.name)
        found[installed.metadata["Name"]] = installed
        for line in installed.requires or []:
            further = Requirement(line)
            if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                further.marker = None
                wanted.append(further)
    return found


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def link(installed: Distribution, site: Path) -> None:
    """Make an installed distribution available in another environment, by links to its folders and modules."""
    for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(installed.locate_file(top))).resolve())


def first_program(page: str) -> str:
    """A page's first program, or the result of a diff that changes the user's own program."""
    blocks = re.findall(r"^```(?:python|diff)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    programs = [re.sub(r"^[+ ]", "", block, flags=re.MULTILINE) if "\n+" in block else block for block in blocks]
    return next(program for program in programs if "import" in program)


def test_the_wheel_works_in_a_clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment links to the packages installed here, instead of installing PyTorch again."""
    monkeypatch.setenv("REPOSITORY", "https://github.com/owner/name")
    monkeypatch.setenv("GITHUB_REF_NAME", "v0.1.0")
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("lightning_flatlora-*.whl")
    names = run(sys.executable, "-m", "zipfile", "-l", str(wheel), cwd=tmp_path)
    assert "lightning_flatlora/py.typed" in names
    assert "LICENSE" in names
    assert "recipes/" not in names
    assert "tests/" not in names
    clean = tmp_path / "clean"
    venv.create(clean)
    python = str(clean / "bin" / "python")
    run(*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    (installed,) = clean.rglob("lightning_flatlora-*.dist-info")
    # README's relative links would not work on PyPI.
    shown = Distribution.at(installed).read_text("METADATA") or ""
    assert re.findall(r"\]\((?!https://)[^)]*", shown) == []
    assert "](https://github.com/owner/name/raw/v0.1.0/docs/results/demo.png)" in shown
    assert "](https://github.com/owner/name/blob/v0.1.0/docs/start.md)" in shown
    needed = dependencies(Distribution.at(installed))
    assert "torch" in needed
    assert "pytest" not in needed
    for each in needed.values():
        link(each, installed.parent)
    run(*pip, "--python", python, "check", cwd=tmp_path)
    assert run(python, "-I", "-c", USE, cwd=tmp_path).split() == ["0.9", lightning_flatlora.__version__]
    # The pages' programs, without the clone; only the last needs a library that is not declared.
    for page in ("README.md", "docs/other_loops.md"):
        run(python, "-I", "-c", first_program(page), cwd=tmp_path)
    drawing = distribution("matplotlib")
    for each in (drawing, *dependencies(drawing).values()):
        link(each, installed.parent)
    assert "sharpness" in run(python, "-I", "-c", first_program("docs/flatness.md"), cwd=tmp_path)
    assert (tmp_path / "flatness.png").exists()
