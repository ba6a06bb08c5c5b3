"""P1's losses after temperature scaling: one temperature for each adapter, fitted on validation.

From the root of a clone: ``PYTHONPATH=. python docs/results/calibrated.py FOLDER_OF_P1 ROWS``. It measures the adapters
in the folder: those of the trials with the first seed, on validation only, and those of the first ten final seeds (P2
has trained the trials and three of the seeds again). Existing rows are kept. The base model is in float32 here, but was
in bfloat16 in P1: at temperature 1 the losses differ by up to 0.004.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from p2 import measure_all, runs_of_p1  # in this folder
from peft import PeftModel
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from recipes.instruction_tuning.data import InstructionData
from recipes.language.batches import pad, padded, padding_id
from recipes.language.model import PACKAGED, load_base
from recipes.studies.process import written
from recipes.studies.rows import Row
from recipes.tune.search import SEARCH_SEEDS, Run

BATCH = 16
LAST_SEED = 110  # not included
LARGEST = 20.0  # temperature


def logits_and_targets(net: nn.Module, rows: Any, padding: int) -> tuple[Tensor, Tensor]:
    """Return the logits (tokens, vocabulary) and the ids (tokens,) of all tokens of the right answers."""
    right = [(row["input_ids"][row["gold"]], row["labels"][row["gold"]]) for row in rows]
    right.sort(key=lambda each: len(each[0]))  # similar lengths in a batch need little padding
    found, targets = [], []
    for start in range(0, len(right), BATCH):
        batch = right[start : start + BATCH]
        inputs = padded([ids for ids, _ in batch], padding)
        labels = pad([torch.tensor(each) for _, each in batch], -100)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = net(**inputs, use_cache=False).logits[:, :-1]
        is_answer = labels[:, 1:] != -100
        found.append(logits[is_answer].float())
        targets.append(labels[:, 1:][is_answer])
    return torch.cat(found), torch.cat(targets)


def loss_at(temperature: float, logits: Tensor, targets: Tensor) -> float:
    """Return the loss in nats per token."""
    return float(nn.functional.cross_entropy(logits / temperature, targets))


class Calibration:
    """The base model and the questions."""

    def __init__(self) -> None:
        # As in the recipe's packaged.yaml.
        self.data = InstructionData(
            dataset="packaged:commonsense_qa",
            tokenizer=PACKAGED,
            system_prompt="Answer briefly.",
            validation_share=0.15,
            test_share=0.25,
        )
        self.data.prepare_data()
        self.data.setup("fit")
        self.data.setup("test")
        self.padding = padding_id(self.data.encoder.tokenizer)
        self.base: Any = load_base(PACKAGED, "float32", None, {"attn_implementation": "eager"})

    def measure(self, run: Run, folder: Path) -> Row:
        """Return a run's temperature, and its losses at temperature 1 and at that one."""
        adapter = folder / "fit" / "checkpoints" / Path(written(folder / "fit.json")["best"]).stem
        net = PeftModel.from_pretrained(self.base, str(adapter)).eval()
        validation = logits_and_targets(net, self.data.parts["validation"], self.padding)
        fit = minimize_scalar(lambda T: loss_at(T, *validation), bounds=(1 / LARGEST, LARGEST), method="bounded")
        row = {"temperature": fit.x, "validation": [loss_at(1, *validation), fit.fun]}
        if run.stage == "final":
            test = logits_and_targets(net, self.data.parts["test"], self.padding)
            row["test"] = [loss_at(1, *test), loss_at(fit.x, *test)]
        self.base = net.unload()
        return row


def main(folder: Path, path: Path) -> None:
    """Measure the adapters in the folder."""
    runs = []
    for run in runs_of_p1():
        is_wanted = run.seed < LAST_SEED if run.stage == "final" else run.seed == SEARCH_SEEDS[0]
        if is_wanted and (folder / run.name / "fit.json").exists():
            runs.append(run)
    if not runs:
        raise SystemExit(f"{folder} has no runs whose folders are named as this version names them")
    calibration = Calibration()
    measure_all(runs, lambda run: calibration.measure(run, folder / run.name), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
