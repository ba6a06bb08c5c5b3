"""``make clip-demo``: a small CLIP trained here on emoji, then LoRA, EFMLoRA and FMLoRA on a style it has never seen.

The model is a small one of open_clip's kind, no OpenAI CLIP: it knows emoji and nothing else. It is trained once and
kept in the cache. Then every method adapts it with few images of each class, and all are tested on the same images.
What is finished is kept: Ctrl-C and start again goes on.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import get_args

from recipes.clip_demo import emoji, report
from recipes.clip_demo.pretrain import Pretraining, pretrained
from recipes.clip_demo.run import METHODS, ZERO_SHOT, Row, Settings, append, examples, finished, key, run
from recipes.demo.__main__ import quiet
from recipes.precision import Precision, precision_of_runs

_SHOWN = "EFMLoRA"  # beside zero-shot in the picture, with the most shots and the first seed


def main(arguments: list[str] | None = None) -> int:
    """Run what is not there yet, and report; returns the exit status."""
    options = _parser().parse_args(arguments)
    quiet()
    options.folder.mkdir(parents=True, exist_ok=True)
    data = emoji.prepare()
    precision = precision_of_runs(options.folder, options.precision)
    print(f"Precision: {precision}; --precision takes another", flush=True)
    settings = Settings(rho=options.rho, iterations_per_shot=options.iterations_per_shot, precision=precision)
    try:
        model = pretrained(Pretraining(steps=options.pretraining_steps, precision=precision), data)
        rows = list(_runs(options, settings, model, data.target))
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into an exit
        print("Stopped. The same command goes on: what is finished is kept, the model's training from its checkpoint")
        return 130
    test = examples(data.target, "test")
    names = [path.name for path in sorted((data.target / "test").iterdir())]
    report.write_table(rows, len(names), options.folder / "table.txt")
    report.plot(rows, len(names), options.folder / "shots.png")
    most = max(options.shots)
    given = {
        row["method"] if row["method"] == ZERO_SHOT else f"{row['method']}, {most} shots": row["given"]
        for row in rows
        if row["method"] == ZERO_SHOT or (row["method"], row["shots"], row["seed"]) == (_SHOWN, most, options.seeds[0])
    }
    report.picture(test, names, given, options.folder / "predictions.png")
    print(f"The model is in {model}; open_clip loads it as local-dir:{model}")
    print(f"results.jsonl, table.txt, shots.png and predictions.png are in {options.folder}")
    return 0


def _runs(options: argparse.Namespace, settings: Settings, model: Path, images: Path) -> Iterator[Row]:
    """The lines of all runs, each written into results.jsonl as soon as it is there."""
    path = options.folder / "results.jsonl"
    # Methods innermost: what else the machine does in the meantime then slows them alike.
    wanted = [(options.seeds[0], 0, ZERO_SHOT), *product(options.seeds, options.shots, METHODS)]
    for number, (seed, shots, method) in enumerate(wanted, 1):
        row = finished(path, key(method, shots, seed, settings, model))
        if row is None:
            told = f", shots {shots}, seed {seed}" if shots else ""
            print(f"[{number}/{len(wanted)}] {method}{told}", flush=True)
            row = run(method, shots, seed, settings, model, images)
            append(path, row)
        yield row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.clip_demo",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs/clip_demo"), help="where everything lands")
    add("--shots", type=int, nargs="+", default=[1, 4, 16], help="images of each class to train on; 16 at most")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of shots, adapter and batches")
    add("--rho", type=float, default=Settings.rho, help="radius of the perturbation of EFMLoRA and FMLoRA")
    add("--iterations_per_shot", type=int, default=Settings.iterations_per_shot, help="optimizer steps for each shot")
    add(
        "--pretraining_steps", type=int, default=Pretraining.steps, help="optimizer steps of the small model's training"
    )
    told = "of all training; left out, what the folder began with, and at first what this device computes fast"
    add("--precision", choices=get_args(Precision), help=told)
    return parser


if __name__ == "__main__":
    sys.exit(main())
