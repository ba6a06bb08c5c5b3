"""One run: a task's model trained by one method, judged on a part it has not seen, and measured."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora import Perturbation, find_pairs
from lightning_flatlora.flatness import MeanLoss, Point, base_norm, joint_ascent, loss_gradient, measure, moved
from lightning_flatlora.weight_noise import WeightNoise
from recipes.comparison.task import Batch, Task
from recipes.shared.ledger import Row, commit
from recipes.shared.memory import Watch
from recipes.shared.methods import METHODS
from recipes.shared.step_times import StepTimes
from recipes.shared.training import BARE
from recipes.studies.plan import Run as StudyRun

_NOISE_SAMPLES = 2
_WARM_UP = 2  # steps


@dataclass(frozen=True)
class Run(StudyRun):
    """A training that is judged on a part of a task.

    Attributes:
        on: the task itself.
    """

    on: Task

    @override
    def key(self) -> Row:
        return {**super().key(), "settings": self.on.settings}


def perform(run: Run) -> Row:
    """Train, judge and measure.

    Returns:
        A JSON line: the run's key, and what was found: ``accuracy``, ``correct``, ``examples`` and ``loss`` (nats) on
        the part; ``seconds`` of the whole run, ``seconds_per_step`` (mean, as a method may take longer in some of its
        steps; without two of warm-up), ``processor_seconds_per_step`` (of all training, which other processes disturb
        less), ``peak_mib``; with the part "test" also what :func:`flatness` measures.
    """
    gc.collect()  # the last run's model: its parts point at each other
    task = run.on
    task.prepare()
    L.seed_everything(run.seed, verbose=False)
    method = METHODS[run.method]
    began, processor = time.perf_counter(), time.process_time()
    module = task.module(run.config, method.full)
    times, watch = StepTimes(), Watch()
    # Watch reads /proc.
    memory: list[L.Callback] = [watch] if platform.system() == "Linux" else []
    method_callbacks = method.callbacks(**run.config, seed=run.seed)
    trainer = _trainer(task, [times, *memory, *method_callbacks])
    trainer.fit(module, datamodule=task.data(run.seed))
    processor = time.process_time() - processor
    module.eval()
    row = run.key() | _judged(task, module, trainer, run.part)
    if run.part == "test":
        row |= flatness(task, module, task.batches(trainer, "train"), method.full)
    return row | {
        "seconds": time.perf_counter() - began,
        "seconds_per_step": statistics.mean(times.seconds[_WARM_UP:] or times.seconds),
        "processor_seconds_per_step": processor / trainer.global_step,
        "peak_mib": round(watch.peak / 2**20) or None,  # resident, of a process that has done other runs before
        "device": torch.cuda.get_device_name() if module.device.type == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "commit": commit(),
    }


def _trainer(task: Task, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        accelerator="auto",
        devices=1,
        precision=task.precision,
        max_epochs=task.settings["epochs"],
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=callbacks,
        enable_progress_bar=False,
        **BARE,
    )


@torch.no_grad()
def _judged(task: Task, module: L.LightningModule, trainer: L.Trainer, part: str) -> Row:
    with trainer.precision_plugin.forward_context():
        judged = [task.judge(module, _on(module, batch)) for batch in task.batches(trainer, part)]
    examples = sum(each.examples for each in judged)
    correct, loss, terms = (float(sum(each)) for each in list(zip(*judged, strict=True))[:3])
    return {"accuracy": correct / examples, "correct": int(correct), "examples": examples, "loss": loss / terms}


def flatness(task: Task, module: Any, batches: Sequence[Batch], full: bool) -> Row:
    """How flat the loss of the training examples is around the trained weights, without dropout.

    Args:
        task: which gives the radius, the same for every method.
        module: trained, in evaluation mode.
        batches: the training examples.
        full: whether all weights were trained.

    Returns:
        ``train_loss`` L(w) in nats, and what two kinds of perturbation add to it. Where an adapter was trained:
        ``sharpness``, by E of Eqs. 10-15 over the adapted layers, ``expected_sharpness`` by filter-wise noise on them,
        and ``adapted_norm``, the Frobenius norm of their frozen weights. Full fine-tuning has no pairs: there it is
        ``full_sharpness`` by SAM's perturbation of all weights, which must not be compared with the others.
    """
    loss = MeanLoss([_loss_of(task, module, _on(module, batch)) for batch in batches])
    rho = task.settings["sharpness_rho"]
    if full:
        clean, perturbed = sam_loss(loss, [p for p in module.parameters() if p.requires_grad], rho)
        return {"train_loss": clean, "full_sharpness": perturbed - clean}
    pairs = find_pairs(module).pairs
    sigma = task.settings["noise"]
    point = Point(loss, Perturbation(pairs), rho, noise=WeightNoise(module), sigma=sigma, samples=_NOISE_SAMPLES)
    numbers = measure(point, ["sharpness", "expected_sharpness"])
    return {
        "train_loss": float(numbers["loss"]),
        "sharpness": float(numbers["sharpness"]),
        "expected_sharpness": float(numbers["expected_sharpness"]),
        "adapted_norm": base_norm(module, pairs),
    }


def _loss_of(task: Task, module: Any, batch: Batch) -> Callable[[], Tensor]:
    # Made in a function of its own, so that each loss keeps its own batch.
    def loss() -> Tensor:
        with module.trainer.precision_plugin.forward_context():  # as in training
            return task.loss(module, batch)

    return loss


def sam_loss(loss: MeanLoss, parameters: list[nn.Parameter], rho: float) -> tuple[float, float]:
    """L(w) and L(w + rho g / ||g||) of SAM over all these parameters (arXiv 2010.01412)."""
    at = loss_gradient(loss, parameters)
    with moved(parameters, joint_ascent(at.gradients, rho)), torch.no_grad():
        perturbed = loss()
    return float(at.loss), float(perturbed)


def _on(module: L.LightningModule, batch: Batch) -> Batch:
    return {name: v.to(module.device) if isinstance(v, Tensor) else v for name, v in batch.items()}
