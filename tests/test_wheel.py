"""The built wheel installs in a clean environment, with its declared dependencies alone, and works there."""

import subprocess
import sys
import venv
from pathlib import Path

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
print(EFMLoRA(rho=0.5).beta, lightning_flatlora.__version__)
"""


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_works_in_a_clean_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("lightning_flatlora-*.whl")
    names = run(sys.executable, "-m", "zipfile", "-l", str(wheel), cwd=tmp_path)
    assert "lightning_flatlora/py.typed" in names
    assert "LICENSE" in names
    assert "recipes/" not in names
    assert "tests/" not in names
    venv.create(tmp_path / "clean", with_pip=True)
    python = str(tmp_path / "clean" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip", cwd=tmp_path)
    run(python, "-m", "pip", "install", "--quiet", str(wheel), cwd=tmp_path)
    assert run(python, "-c", USE, cwd=tmp_path).split() == ["0.9", "0.1.0"]
