"""Column A of protocol_matrix.md: disturbances of a finished adapter.

From the root of a clone: ``PYTHONPATH=.:docs/results python docs/results/matrix_a.py FOLDER``. When all runs are done,
the rows are in ``FOLDER/results.jsonl`` and the tables in ``FOLDER/table.md``. The same command resumes, and several
processes may share the runs. With ``--dry`` in place of the folder it does a tiny run, and prints the number of runs
and the time that they would take.
"""

import gc
import json
import sys
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matrix_choice import (  # in this folder
    BI_LORA,
    EFMLORA,
    FINAL_SEEDS,
    FMLORA,
    POINTS,
    QAT,
    RANDOM,
    SEARCH_SEEDS,
    STAGES,
    STRENGTHS,
    Run,
    searched,
)
from matrix_disturbances import CLEAN, Evaluation, linear_weights
from matrix_table import tables
from peft import LoraConfig, get_peft_model
from shared_runs import queue_of, work_in_stages
from torch import nn
from torch.optim import Optimizer

from lightning_flatlora import AdapterAveraging, EFMLoRA, FMLoRA
from lightning_flatlora.baselines import BiLoRA, RandomPerturbation
from recipes.command_line.progress import quiet
from recipes.demo.data import training_batches
from recipes.demo.encoder import CutEncoder
from recipes.demo.module import TaskClassifier
from recipes.demo.training import kept, on_one_thread
from recipes.offline import texts
from recipes.report.rounding import rounded
from recipes.studies.process import commit
from recipes.studies.rows import Row
from recipes.training.module import BARE, RecipeModule

TASK = "all_subjects"
CLASSES = len(texts.TASKS[TASK].classes)
FROZEN_LAYERS, LENGTH = 5, 32
SHOTS, STEPS, BATCH = 16, 600, 8

GUESSED = {
    "search": POINTS,
    "extension": 6,
    "repeats": 24 * len(SEARCH_SEEDS[1:]),
    "final": 6 * len(FINAL_SEEDS),
}
"""Runs of an arm in each stage; the first number is known."""


class Classifier(TaskClassifier):
    """The demo's module with LoRA of any rank on all linear layers, maybe a rounded base, and a rate for the head.

    Args:
        encoder: LoRA is added to its upper layers.
        run: has the settings.
    """

    def __init__(self, encoder: CutEncoder, run: Run) -> None:
        settings = run.settings
        RecipeModule.__init__(self, settings["rate"], warmup_share=0.06)  # TaskClassifier's own adapter differs
        self.head_rate = self.learning_rate if settings["head_rate"] == "same" else settings["head_rate"]
        upper, rank = encoder.upper(), settings["rank"]
        if run.arm == QAT:
            # As the base is frozen, the straight-through estimator amounts to training on the rounded base.
            for weight in linear_weights(upper).values():
                weight.copy_(rounded(weight, int(run.strength)))
        targets = ["query", "key", "value", "dense"]
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=settings["dropout"], target_modules=targets)
        self.net = get_peft_model(upper, lora)
        self.head = nn.Linear(encoder.width, CLASSES)

    def new_optimizer(self) -> Optimizer:
        """Return AdamW with two rates."""
        adapter = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        groups = [{"params": adapter}, {"params": list(self.head.parameters()), "lr": self.head_rate}]
        return torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=0.0, fused=True)


def callbacks_of(run: Run) -> list[L.Callback]:
    """Return the callbacks of the method and of averaging, if any."""
    strength: Any = run.strength
    methods = {
        EFMLORA: lambda: EFMLoRA(strength),
        FMLORA: lambda: FMLoRA(strength),
        RANDOM: lambda: RandomPerturbation(strength, seed=run.seed),
        BI_LORA: lambda: BiLoRA(strength, seed=run.seed),
    }
    averages = {
        "none": list,
        "0.99": lambda: [AdapterAveraging(0.99)],
        "from step 300": lambda: [AdapterAveraging(None, start_step=300)],
    }
    own = [methods[run.arm]()] if run.arm in methods else []
    return [*own, *averages[run.settings["averaging"]]()]


def trained(run: Run, encoder: CutEncoder, steps: int = STEPS) -> Classifier:
    """Train a new adapter and head."""
    L.seed_everything(run.seed, verbose=False)
    module = Classifier(encoder, run)
    examples = texts.shots(TASK, SHOTS, run.seed)
    trainer = L.Trainer(
        accelerator="cpu",
        precision="32-true",
        max_epochs=1,
        limit_val_batches=0,
        callbacks=callbacks_of(run),
        enable_progress_bar=False,
        **BARE,
    )
    trainer.fit(module, training_batches(examples, encoder.states, BATCH, steps, run.seed))
    return module.eval()


@cache
def evaluation(part: str) -> Evaluation:
    """Return the evaluation on a part, which all runs share."""
    return Evaluation(kept(FROZEN_LAYERS, LENGTH), texts.parts(TASK)[part])


def perform(run: Run, steps: int = STEPS) -> Row:
    """Train and evaluate.

    Returns:
        A JSON line without the run's key: ``validation`` or ``test``, the loss and the accuracy under each disturbance,
        and seconds of processor time.
    """
    gc.collect()  # frees the last run's models, which contain cycles
    part = "test" if run.stage == "final" else "validation"
    evaluated = evaluation(part)
    began = time.process_time()
    module = trained(run, kept(FROZEN_LAYERS, LENGTH), steps)
    middle = time.process_time()
    draws = run.seed if run.stage == "final" else SEARCH_SEEDS[0]
    found = evaluated.measure(module.net, module.head, run.disturbances, draws)
    ended = time.process_time()
    return {
        "value": found[CLEAN]["loss"],
        part: found,
        "seconds": {"training": middle - began, "evaluation": ended - middle},
        "torch": torch.__version__,
        "commit": commit(),
    }


def dry() -> None:
    """Do a tiny run, and print the number of runs and the time that they would take."""
    first = searched()[: len(STRENGTHS)]  # one per arm
    print(json.dumps(perform(first[0]._replace(disturbances=[CLEAN]), steps=2)))
    evaluated = evaluation("validation")
    encoder = kept(FROZEN_LAYERS, LENGTH)
    module = trained(first[0], encoder, steps=2)
    began = time.process_time()
    evaluated.measure(module.net, module.head, first[0].disturbances)
    seconds = time.process_time() - began
    print(f"evaluation on validation: {seconds:.1f} s")
    for example in texts.shots(TASK, SHOTS, SEARCH_SEEDS[0]):
        encoder.states(example.text)  # done once per process, so not counted for a run
    hours: dict[str, float] = defaultdict(float)
    for run in first:
        began = time.process_time()
        trained(run, encoder, steps=STEPS // 20)
        training = 20 * (time.process_time() - began)
        print(f"{run.arm}: training about {training:.0f} s")
        for stage, runs in GUESSED.items():
            # A final run's setting is chosen for about two disturbances, and evaluated on ten times as many texts.
            hours[stage] += runs * (training + seconds * (2 if stage == "final" else 1)) / 3600
    for stage, runs in GUESSED.items():
        print(f"{stage}: {runs * len(first)} runs{'' if stage == 'search' else ', guessed'}, {hours[stage]:.1f} hours")
    print(f"together {sum(hours.values()):.1f} hours of one core")


def main(folder: Path) -> None:
    """Do all runs, and write the rows and tables."""
    shared = {"task": TASK, "shots": SHOTS, "steps": STEPS, "batch": BATCH}
    work_in_stages(queue_of(folder, "matrix_a", Run, shared), STAGES, perform, folder, tables)


if __name__ == "__main__":
    quiet()
    on_one_thread()
    if sys.argv[1:] == ["--dry"]:
        dry()
    else:
        main(Path(sys.argv[1]))
