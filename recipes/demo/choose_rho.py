"""How the demo's rho was chosen: a sweep judged on the validation part, which the demo's table never shows.

python -m recipes.demo.choose_rho --rho 0.01 0.03 0.1 0.3
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from recipes.demo.__main__ import quiet
from recipes.demo.run import Settings, train
from recipes.precision import precision_of_runs


def main(arguments: list[str] | None = None) -> None:
    """Train what is not there yet, and print validation loss and accuracy for each method and rho."""
    parser = argparse.ArgumentParser(prog="python -m recipes.demo.choose_rho", description=__doc__)
    parser.add_argument("--rho", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3], help="radii to try")
    parser.add_argument("--methods", nargs="+", choices=["EFMLoRA", "FMLoRA"], default=["EFMLoRA", "FMLoRA"])
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps of each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-rho"), help="where the runs land")
    options = parser.parse_args(arguments)
    quiet()
    precision = precision_of_runs(options.folder)
    table = Table("method", "rho", "validation loss", "validation accuracy")
    runs = [("LoRA", 0.0), *((method, rho) for method in options.methods for rho in options.rho)]
    for method, rho in runs:
        folder = options.folder / f"{method}-{rho:g}-{options.steps}"
        row = _validated(method, Settings(rho=rho, steps=options.steps, precision=precision), folder)
        table.add_row(method, f"{rho:g}", f"{row['val_loss']:.3f}", f"{row['val_accuracy']:.3f}")
        Console().print(table)


def _validated(method: str, settings: Settings, folder: Path) -> dict[str, float]:
    """Validation metrics after training, from a file if it is there."""
    path = folder / "validation.json"
    if not path.exists():
        trainer, module, data, _ = train(method, settings, folder)
        path.write_text(json.dumps(trainer.validate(module, data, verbose=False)[0]) + "\n")
    row: dict[str, float] = json.loads(path.read_text())
    return row


if __name__ == "__main__":
    main()
