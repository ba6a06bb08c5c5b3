"""One run of the demo: an adapter for each task, trained apart from one start, and merged by peft's functions."""

import gc
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import task_arithmetic, ties
from torch import Tensor

from recipes.demo.data import Batch, evaluation_batches
from recipes.demo.encoder import CutEncoder, UpperLayers, pooled
from recipes.demo.module import TaskClassifier, accuracy, linear_classifier
from recipes.demo.training import EFMLORA, LORA, Training, kept, trained
from recipes.language import texts
from recipes.shared.ledger import Row, commit

SMALL_WITH_DROPOUT = "LoRA, rank 2, dropout 0.9"
FROZEN = "linear classifier, frozen encoder"
ARMS: dict[str, dict[str, Any]] = {
    LORA: {"learning_rate": 5e-4, "dropout": 0.3},
    EFMLORA: {"learning_rate": 2e-3, "rho": 8.0},
    "LoRA, rank 2": {"learning_rate": 5e-4, "dropout": 0.3, "rank": 2},
    "LoRA, dropout 0.9": {"learning_rate": 1e-3, "dropout": 0.9},
    SMALL_WITH_DROPOUT: {"learning_rate": 1e-3, "dropout": 0.9, "rank": 2},
    FROZEN: {},
}
"""LoRA, EFMLoRA and changes of LoRA that cost nothing, with what the searches of docs/study.md have chosen."""

SEEDS = (20, 21, 22)
"""Which neither the searches nor the verdict of the study has used."""


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Everything that decides a run beside its method and its seed.

    Attributes:
        tasks: an adapter is trained for each, and all are merged.
        validation: examples at most on which the linear classifier's penalty is chosen.
        test: examples at most of a task.
    """

    tasks: Sequence[str] = ("sentiment", "privacy", "anatomy_surgery", "physiology_biochemistry")
    frozen_layers: int = 4
    shots: int = 64
    steps: int = 120
    batch_size: int = 16
    validation: int = 150
    test: int = 400


class Run(NamedTuple):
    """One method with one seed.

    Attributes:
        arm: one of :data:`ARMS`.
        seed: of the examples, the adapters' start, the order of the batches, and dropout.
        settings: of the demo.
    """

    arm: str
    seed: int
    settings: Settings

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    def key(self) -> Row:
        """The first entries of its row."""
        return {"arm": self.arm, "config": ARMS[self.arm], "seed": self.seed, "settings": asdict(self.settings)}


Merge = Callable[[list[Tensor]], Tensor]


def _task_arithmetic(updates: list[Tensor], weight: float) -> Tensor:
    total: Tensor = task_arithmetic(updates, updates[0].new_full((len(updates),), weight))
    return total


def _average(updates: list[Tensor]) -> Tensor:
    return _task_arithmetic(updates, 1 / len(updates))


def _ties(updates: list[Tensor]) -> Tensor:
    agreed: Tensor = ties(updates, updates[0].new_ones(len(updates)), density=0.5)
    return agreed


WAYS: dict[str, Merge] = {"average": _average, "task arithmetic": partial(_task_arithmetic, weight=0.4), "TIES": _ties}
"""What is made of the updates s B A (m, n) that several adapters add to one weight."""


def perform(run: Run) -> Row:
    """Train an adapter and a head for each task, merge the adapters, and judge them with the heads.

    Returns:
        A JSON line: the run's key; ``single``, the test accuracy of each adapter before merging by task; ``merged``,
        those of the merged adapter by way to merge and task, which the linear classifier does not have; and what the
        run took, where, and with which versions.
    """
    gc.collect()  # the last run's models: their parts point at each other
    began = time.perf_counter()
    encoder = kept(run.settings.frozen_layers, run.settings.length)
    found = _classified(run, encoder) if run.arm == FROZEN else _merged(run, encoder)
    return {
        **run.key(),
        **found,
        "seconds": time.perf_counter() - began,
        "device": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "commit": commit(),
    }


@torch.no_grad()
def merged(upper: UpperLayers, nets: Sequence[PeftModel], merge: Merge) -> UpperLayers:
    """Upper layers with the merged updates of several adapters in their weights.

    Args:
        upper: pretrained layers, which are changed in place.
        nets: layers with an adapter each, all on the same modules.
        merge: one of :data:`WAYS`.
    """
    layers = [net.get_base_model() for net in nets]
    for name, module in layers[0].named_modules():
        if isinstance(module, LoraLayer):
            updates = [one.get_submodule(name).get_delta_weight("default") for one in layers]
            upper.get_parameter(f"{name}.weight").add_(merge(updates))
    return upper


def _merged(run: Run, encoder: CutEncoder) -> Row:
    modules = {}
    for task in run.settings.tasks:
        modules[task] = trained(run.settings, encoder, task, run.seed, run.arm, ARMS[run.arm])
    single = {task: _judged(run, task, module, encoder) for task, module in modules.items()}
    # Put aside, since the modules are judged with the merged layers in place of their own.
    nets = [module.net for module in modules.values()]
    by_way: dict[str, dict[str, float]] = {}
    for way, merge in WAYS.items():
        net = merged(encoder.upper(), nets, merge)
        by_way[way] = {}
        for task, module in modules.items():
            module.net = net
            by_way[way][task] = _judged(run, task, module, encoder)
    return {"single": single, "merged": by_way}


def _judged(run: Run, task: str, module: TaskClassifier, encoder: CutEncoder) -> float:
    """In float32, so that the rounding of merged weights plays no part."""
    return module.accuracy(_held_out(encoder, task, "test", run.settings.test))


@cache
def _held_out(encoder: CutEncoder, task: str, part: str, most: int) -> list[Batch]:
    """So many examples of a part at most; the lower layers compute them once in a process."""
    return evaluation_batches(texts.parts(task)[part][:most], encoder.states)


def _classified(run: Run, encoder: CutEncoder) -> Row:
    """The linear classifier on the frozen encoder, in float32."""
    settings = run.settings
    upper = encoder.upper()

    @torch.no_grad()
    def features(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        means = [pooled(upper(b["hidden"], b["owners"]), b["owners"], len(b["labels"])) for b in batches]
        return torch.cat(means), torch.cat([batch["labels"] for batch in batches])

    single = {}
    for task in settings.tasks:
        train = features(evaluation_batches(texts.shots(task, settings.shots, run.seed), encoder.states))
        validation = features(_held_out(encoder, task, "validation", settings.validation))
        classifier = linear_classifier(*train, validation, len(texts.TASKS[task].classes))
        test = _held_out(encoder, task, "test", settings.test)
        single[task] = accuracy(classifier(features(test)[0]), test)
    return {"single": single}
