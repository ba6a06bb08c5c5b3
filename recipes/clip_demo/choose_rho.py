"""How the demo's rho was chosen: a sweep judged on the validation part, which the demo's table never shows.

python -m recipes.clip_demo.choose_rho --rho 0.01 0.03 0.1
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from recipes.clip_demo import emoji
from recipes.clip_demo.pretrain import Pretraining, pretrained
from recipes.clip_demo.report import mean_and_error
from recipes.clip_demo.run import METHODS, Settings, append, finished, key, run
from recipes.demo.__main__ import quiet
from recipes.precision import precision_of_runs

RADII = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def main(arguments: list[str] | None = None) -> None:
    """Train what is not there yet, and print the validation accuracy for each method and rho."""
    parser = argparse.ArgumentParser(prog="python -m recipes.clip_demo.choose_rho", description=__doc__)
    parser.add_argument("--rho", type=float, nargs="+", default=RADII, help="to try")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="LoRA has no radius")
    parser.add_argument("--shots", type=int, default=4, help="images of each class to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of shots, adapter and batches")
    parser.add_argument("--learning_rate", type=float, default=Settings.learning_rate, help="AdamW's at the start")
    parser.add_argument("--folder", type=Path, default=Path("runs/clip_demo_rho"), help="where the results land")
    options = parser.parse_args(arguments)
    quiet()
    options.folder.mkdir(parents=True, exist_ok=True)
    data = emoji.prepare()
    precision = precision_of_runs(options.folder)
    model = pretrained(Pretraining(precision=precision), data)
    table = Table("method", "rho", "validation accuracy in %")
    tried = [(method, rho) for method in options.methods for rho in (options.rho if method != "LoRA" else [0.0])]
    for method, rho in tried:
        settings = Settings(rho=rho, learning_rate=options.learning_rate, precision=precision)
        accuracies = [_accuracy(method, options, seed, settings, model, data.target) for seed in options.seeds]
        table.add_row(method, f"{rho:g}", "{:.1f} ± {:.1f}".format(*mean_and_error(accuracies)))
        Console().print(table)


def _accuracy(
    method: str, options: argparse.Namespace, seed: int, settings: Settings, model: Path, images: Path
) -> float:
    """Validation accuracy after training, from results.jsonl if it is there."""
    path = options.folder / "results.jsonl"
    row = finished(path, key(method, options.shots, seed, settings, model, "validation"))
    if row is None:
        row = run(method, options.shots, seed, settings, model, images, "validation")
        append(path, row)
    return float(row["accuracy"])


if __name__ == "__main__":
    main()
