"""The loss around P1's winners and the control: increases of the loss, and critical sharpness.

From the root of a clone: ``PYTHONPATH=.:docs/results python docs/results/around.py FOLDER_OF_P1 ROWS``. It measures the
adapters of eight final seeds, which are still those of P1's rows, on the first 32 questions of the test part, in
float32. Existing rows are kept.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from calibrated import Calibration  # in this folder
from p2 import measure_all, runs_of_p1
from peft import PeftModel
from torch import Tensor, nn

from lightning_flatlora import Perturbation, find_pairs
from lightning_flatlora import flatness as flat
from lightning_flatlora.full_weight import WeightNoise
from lightning_flatlora.pairs.lora_pair import trained_factors
from recipes.language.batches import pad, padded
from recipes.studies.process import written
from recipes.studies.rows import Row
from recipes.tune.search import Run

SEEDS = range(103, 111)
QUESTIONS = 32
BATCH = 8
RHO = 0.2  # of the winner with EFMLoRA
SIGMA = 0.05  # as in `recipes.report`
SAMPLES = 4


def losses(net: nn.Module, rows: Any, padding: int) -> list[Callable[[], Tensor]]:
    """Return the loss of each batch of right answers; their mean is in nats per token."""
    right = [(row["input_ids"][row["gold"]], row["labels"][row["gold"]]) for row in rows]
    right.sort(key=lambda each: len(each[0]))  # similar lengths in a batch need little padding
    batches = [right[start : start + BATCH] for start in range(0, len(right), BATCH)]
    tokens = 0
    for _, labels in right:
        tokens += sum(label != -100 for label in labels[1:])

    def loss_of(batch: Any) -> Tensor:
        inputs = padded([ids for ids, _ in batch], padding)
        labels = pad([torch.tensor(each) for _, each in batch], -100)
        logits = net(**inputs, use_cache=False).logits[:, :-1]
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total * len(batches) / tokens

    return [partial(loss_of, batch) for batch in batches]


def measure(calibration: Calibration, folder: Path, run: Run) -> Row:
    """Return a run's loss, its increases in nats per token, and critical sharpness in nats per factor²."""
    folder = folder / run.name
    adapter = folder / "fit" / "checkpoints" / Path(written(folder / "fit.json")["best"]).stem
    net = PeftModel.from_pretrained(calibration.base, str(adapter), is_trainable=True).eval()
    pairs = find_pairs(net).pairs
    loss = flat.MeanLoss(losses(net, calibration.data.parts["test"].select(range(QUESTIONS)), calibration.padding))
    at = flat.loss_gradient(loss, trained_factors(pairs))
    row = {
        "loss": float(at.loss),
        "sam": float(flat.sam_sharpness(loss, Perturbation(pairs), RHO, at).sharpness),
        "lora": float(flat.lora_sharpness(loss, pairs, RHO, at).sharpness),
        "expected": float(flat.expected_sharpness(loss, WeightNoise(net), SIGMA, SAMPLES).sharpness),
        "critical": float(flat.critical_sharpness(loss, at)),
    }
    calibration.base = net.unload()
    return row


def main(folder: Path, path: Path) -> None:
    """Measure the final runs, seed by seed."""
    runs = [run for run in runs_of_p1() if run.stage == "final" and run.seed in SEEDS]
    runs.sort(key=lambda run: run.seed)
    measure_all(runs, partial(measure, Calibration(), folder), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
