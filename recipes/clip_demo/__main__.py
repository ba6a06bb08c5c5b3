"""`make clip-demo`: a small CLIP trained here on emoji, then LoRA, EFMLoRA and FMLoRA on a style it has never seen.

The model is a small one of open_clip's kind, no OpenAI CLIP: it knows emoji and nothing else. It is trained once and
kept in the cache. Then every method adapts it with few images of each class, and all are tested on the same images.
What is finished is kept: after Ctrl-C the same command resumes.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

from recipes.clip import emoji
from recipes.clip_contrastive.pretrain import Pretraining, pretrained
from recipes.clip_demo import report
from recipes.clip_demo.run import ZERO_SHOT, Run, Settings, ledger, perform
from recipes.clip_fewshot.emoji import examples
from recipes.shared.demos import Demo
from recipes.shared.ledger import each_once
from recipes.shared.methods import OURS
from recipes.shared.mistakes import without_traceback
from recipes.shared.tables import print_and_write

_SHOWN = "EFMLoRA"  # beside zero-shot in the picture, with the most shots and the first seed


def work(options: argparse.Namespace) -> None:
    """Train the small model if it is not there, do what is missing, and report."""
    data, precision = emoji.prepare(), options.precision
    settings = Settings(rho=options.rho, iterations_per_shot=options.iterations_per_shot, precision=precision)
    model = pretrained(Pretraining(steps=options.pretraining_steps, precision=precision), data)
    runs = _runs(options, settings, model, data.target)
    rows = list(ledger(options.folder).complete(runs, perform))
    test = examples(data.target, "test")
    # In the order in which labels are counted.
    names = [path.name for path in sorted((data.target / "test").iterdir())]
    print_and_write(report.table(rows, len(names)), options.folder / "table.txt")
    report.plot(rows, len(names), options.folder / "shots.png")
    most, predictions = max(options.shots), {}
    for row in rows:
        if row["method"] == ZERO_SHOT:
            predictions[ZERO_SHOT] = row["given"]
        elif (row["method"], row["shots"], row["seed"]) == (_SHOWN, most, options.seeds[0]):
            predictions[f"{_SHOWN}, {most} shots"] = row["given"]
    report.picture(test, names, predictions, options.folder / "predictions.png")
    print(f"The model is in {model}; open_clip loads it as local-dir:{model}")


def _runs(options: argparse.Namespace, settings: Settings, model: Path, images: Path) -> list[Run]:
    """Zero-shot, and then the methods innermost: whatever else the machine does meanwhile slows them all alike."""
    runs = [Run(ZERO_SHOT, 0, options.seeds[0], settings, model, images)]
    for seed, shots, method in product(each_once(options.seeds), each_once(options.shots), OURS):
        runs.append(Run(method, shots, seed, settings, model, images))
    return runs


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shots", type=int, nargs="+", default=[1, 4, 16], help="images of each class to train on; 16 at most")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of shots, adapter and batches")
    add("--rho", type=float, default=Settings.rho, help="radius of the perturbation of EFMLoRA and FMLoRA")
    add("--iterations_per_shot", type=int, default=Settings.iterations_per_shot, help="optimizer steps for each shot")
    add(
        "--pretraining_steps", type=int, default=Pretraining.steps, help="optimizer steps of the small model's training"
    )


WRITTEN = ("table.txt", "shots.png", "predictions.png")
main = Demo("clip_demo", __doc__, WRITTEN, work, _add_options).main

if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
