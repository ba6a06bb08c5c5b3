"""FlatnessMonitor: flatness measured on held batches while a model trains, without disturbing the training."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.callbacks.efmlora import EFMLoRA
from lightning_flatlora.callbacks.fmlora import FMLoRA
from lightning_flatlora.callbacks.fmlora_module import FMLoRAModuleCallback
from lightning_flatlora.callbacks.methods_of_fit import unfreezes_later
from lightning_flatlora.callbacks.monitor.held_batches import HeldBatches, curvature_problems, loss_problems
from lightning_flatlora.callbacks.monitor.snapshots import undisturbed
from lightning_flatlora.callbacks.patches import without_logging
from lightning_flatlora.callbacks.strategies import monitor_problems
from lightning_flatlora.callbacks.tensor_writes import Marks, untrained_parameters
from lightning_flatlora.flatness import DEFAULT_MEASURES, Point, measure
from lightning_flatlora.flatness.losses import ReentrantCheckpointError
from lightning_flatlora.flatness.measures import measure_problems
from lightning_flatlora.lightning_names import callback_of, callbacks_of
from lightning_flatlora.methods.checks import choice_problems, finder_problems, integer_problems, refuse
from lightning_flatlora.pairs import find_pairs
from lightning_flatlora.pairs.lora_pair import Finder, NoPairsError, pairs_from
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import is_size
from lightning_flatlora.weight_noise import WeightNoise

Data = Literal["train", "val"]


class FlatnessMonitor(Callback):
    """Measure how flat the loss is around the weights, every few steps or epochs, on the same held batches.

    The loss is the module's own ``training_step`` (``compute_loss`` of an :class:`~lightning_flatlora.FMLoRAModule`) in
    eval mode, at the clean weights, with the same random draws in every pass. Weights, gradients, random generators,
    modes, buffers, torchmetrics objects and what ``self.log`` collects stay exactly as they are. So does what a step
    keeps in attributes of its modules (tensors, arrays, numbers, counters, containers of up to 100,000 of them,
    dataclasses, and objects of the module's own package), but not what it writes elsewhere, such as a logger's
    experiment or a file. The numbers go to every logger of the trainer and into ``trainer.callback_metrics`` as
    ``flatness/sharpness`` and so on; docs/flatness.md lists them.

    The monitor works alone under plain LoRA, and beside EFMLoRA, FMLoRA or FMLoRAModule. Under DDP each rank measures
    on its own batches, and losses and gradients are averaged, so that all ranks log the same.

    Cost of a measurement, in passes over the held batches: 4 with the default measures (forward, backward, two
    forwards), 6 beside EFMLoRA, where "ema" (Theorem 2) is measured too; for the others see
    :func:`~lightning_flatlora.flatness.measure`. Memory: one batch's graph, as in training, and a copy of the buffers.

    Where EFMLoRA has several average perturbations, as several callbacks or optimizers give, the first one is measured,
    with a warning.

    Args:
        rho: radius of the ball that is searched, in the weights' units, > 0; the estimate is then the "average" one
            under the global norm, so that runs of different methods can be compared. None takes the current rho, the
            estimator and the norm scope of the EFMLoRA, FMLoRA or FMLoRAModule beside it.
        every_n_steps: optimizer steps between measurements; None measures by epochs.
        every_n_epochs: epochs between measurements, at their ends; None, without every_n_steps, means 1. A run that is
            too short for one measurement ends with a warning.
        batches: how many batches are held on each rank, the same at every measurement: the first that a copy of the
            loader gives as training starts (where it shuffles, in an order of the copy's own).
        data: "train" or "val", the loader that gives them; a validation batch has to be of the form that training_step
            takes.
        measures: names in :data:`~lightning_flatlora.flatness.MEASURES`; None takes DEFAULT_MEASURES, and beside
            EFMLoRA "ema".
        per_layer: also log balancedness, condition numbers, radius and residual of each pair.
        sigma: size of the noise of "expected_sharpness", relative to the rows' norms.
        samples: draws of noise, and of vectors for "hessian_trace".
        finder: says what the pairs are where the layers are not peft's; None takes that of the method beside it.

    Raises:
        MisconfigurationException: values out of range (here), or a model or strategy that can't be measured (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> monitor = FlatnessMonitor(rho=0.5, every_n_steps=100)
        >>> trainer = L.Trainer(callbacks=[monitor], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        rho: float | None = None,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        batches: int = 4,
        data: Data = "train",
        measures: Sequence[str] | None = None,
        per_layer: bool = False,
        sigma: float = 0.05,
        samples: int = 8,
        finder: Finder | None = None,
    ) -> None:
        problems = []
        if rho is not None and not (is_size(rho) and rho):
            problems.append(
                f"rho must be a finite number > 0, or None to take that of the method beside it, got {rho!r}"
            )
        problems += _interval_problems(every_n_steps, every_n_epochs)
        problems += integer_problems("batches", batches, least=1)
        problems += integer_problems("samples", samples, least=2)
        problems += choice_problems("data", data, Data)
        if not (is_size(sigma) and sigma):
            problems.append(f"sigma must be a finite number > 0, got {sigma!r}")
        problems += measure_problems(measures)
        problems += finder_problems(finder, None)
        refuse(self, problems)
        self.rho = rho
        self.every_n_steps = every_n_steps
        self.every_n_epochs = 1 if every_n_steps is None and every_n_epochs is None else every_n_epochs
        self.batches = batches
        self.data: Data = data
        self.measures = measures
        self.per_layer = per_layer
        self.sigma = sigma
        self.samples = samples
        self.finder = finder
        self.begin()

    def begin(self) -> None:
        """Set everything that belongs to one fit to what it is before the fit."""
        self._held: HeldBatches | None = None
        self._marks = Marks()
        self._written: dict[int, Tensor] = {}
        self._measured_at = 0
        self._has_measured = False
        self._has_failed = False

    def __getstate__(self) -> dict[str, Any]:
        """The settings: a copy or pickle that is made in the middle of a fit has no part in that fit."""
        blank = object.__new__(type(self))
        blank.__dict__.update(self.__dict__)
        blank.begin()
        return without_logging(blank)

    # -- the start

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By itself: what follows takes weights to be whole, and would report a sharded model as another problem.
        refuse(self, monitor_problems(trainer.strategy))
        method = _method_of(trainer)
        problems = self._configuration_problems(method)
        try:
            problems += self._base_problems(pl_module, method)
            self._targets(pl_module, method)
        except ValueError as error:
            if not unfreezes_later(trainer):
                problems.append(str(error))
        problems += loss_problems(pl_module) + curvature_problems(pl_module, self.measures or ())
        refuse(self, problems)

    def _configuration_problems(self, method: MethodCallback | None) -> list[str]:
        """What the arguments need of the method beside the monitor, one line for each problem."""
        problems = []
        if method is None and self.rho is None:
            problems.append(
                "rho must be given where no EFMLoRA, FMLoRA or FMLoRAModule has one to take over: rho=0.5, for example"
            )
        if "ema" in (self.measures or ()) and not isinstance(method, EFMLoRA):
            problems.append("the measure 'ema' needs an EFMLoRA callback, whose average it is: leave it out")
        return problems

    def _base_problems(self, pl_module: LightningModule, method: MethodCallback | None) -> list[str]:
        """Why noise can't be put on the whole weight of what a finder finds, whether it is trained now or later."""
        finder = self._finder(method)
        if finder is None or "expected_sharpness" not in (self.measures or ()):
            return []
        if any(pair.base is not None for pair in pairs_from(finder, pl_module)):
            return []
        return ["the measure 'expected_sharpness' needs the pairs' base, which the finder does not name: leave it out"]

    def _finder(self, method: MethodCallback | None) -> Finder | None:
        return self.finder or (method.finder if method else None)

    def _targets(
        self, pl_module: LightningModule, method: MethodCallback | None
    ) -> tuple[Perturbation, WeightNoise | None]:
        """What is perturbed: the pairs that the model trains now and, where noise is measured, their weights.

        Raises:
            ValueError: there is none.
        """
        finder = self._finder(method)
        adapter_name = method.adapter_name if method is not None and finder is None else None
        perturbation = Perturbation(find_pairs(pl_module, adapter_name, finder=finder).pairs)
        if "expected_sharpness" not in (self.measures or ()):
            return perturbation, None
        return perturbation, WeightNoise(pl_module, adapter_name, finder=finder)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_at = self._count(trainer)
        self._has_measured = False
        self._marks = Marks(untrained_parameters(pl_module, trainer.optimizers))
        self._warn_of_other_averages(trainer)
        self._held = HeldBatches(trainer, pl_module, self.data, self.batches)
        if not self._held:
            refuse(self, [f"data={self.data!r} gives no batch to hold: choose the other, or give the loader"])

    def _warn_of_other_averages(self, trainer: Trainer) -> None:
        averages = 0
        for callback in callbacks_of(trainer):
            if isinstance(callback, EFMLoRA):
                averages += sum(bool(method.pairs) for method in callback.methods)
        if averages > 1:
            rank_zero_warn(
                f"{type(self).__name__}: EFMLoRA has {averages} average perturbations in this run, one for each "
                "adapter and optimizer, and the first alone is measured"
            )

    # -- when

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        every, step = self.every_n_steps, trainer.global_step
        # Multiples are counted, since step % every == 0 would hold in every batch of an accumulation window, and
        # several optimizers skip numbers.
        if every is not None and step // every > self._measured_at // every:
            self._measured_at = step
            self._measure(trainer, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_measured or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        unit, every = ("epoch", self.every_n_epochs) if self.every_n_steps is None else ("step", self.every_n_steps)
        rank_zero_warn(
            f"{type(self).__name__}: nothing was measured: every_n_{unit}s is {every}, and training went from {unit} "
            f"{self._measured_at} to {self._count(trainer)}"
        )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning does not call teardown after an error, and the held batches would keep the module alive.
        self.begin()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.begin()

    def _count(self, trainer: Trainer) -> int:
        """Steps or epochs trained so far, whichever unit the measurements go by."""
        return trainer.current_epoch if self.every_n_steps is None else trainer.global_step

    # -- what

    def _measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Measure, and log at the step at which Lightning logs what self.log collected.

        Lightning counts the batches that stepped, minus one at the end of an epoch. ``global_step`` would count each of
        several optimizers.
        """
        if self._has_failed:
            return
        method = _method_of(trainer)
        try:
            perturbation, noise = self._targets(pl_module, method)
        except NoPairsError:  # none is trained now
            return
        except ValueError as error:
            rank_zero_warn(f"{type(self).__name__}: a measurement was left out: {error}")
            return
        if method is not None and method.perturbation is None:
            return
        is_first = not self._has_measured
        self._has_measured = True
        measures = self.measures
        if measures is None:
            measures = (*DEFAULT_MEASURES, "ema") if isinstance(method, EFMLoRA) else DEFAULT_MEASURES
        # What the training has written since the last measurement, a measurement's passes are going to write, too.
        untrained = untrained_parameters(pl_module, trainer.optimizers)
        moved = {id(parameter) for parameter in self._marks.moved()} | self._written.keys()
        # Others have joined an optimizer since, whose steps have written them.
        self._written = {id(parameter): parameter for parameter in untrained if id(parameter) in moved}
        with undisturbed(pl_module, self._written.values()):
            # No error in what follows, which may come hours after the start: the training itself is right.
            if is_first and self._fails(trainer):
                return
            try:
                numbers = measure(self._point(trainer, method, perturbation, noise), measures, self.per_layer)
            except ReentrantCheckpointError as error:
                rank_zero_warn(f"{type(self).__name__}: a measurement was left out: {error}")
                numbers = {}
            except Exception as error:
                # Other ranks may be waiting for this one's loss.
                if trainer.world_size > 1:
                    raise
                rank_zero_warn(f"{type(self).__name__}: a measurement was left out: {type(error).__name__}: {error}")
                numbers = {}
        # Anew, since noise on the weights has moved them and put them back.
        self._marks = Marks(untrained_parameters(pl_module, trainer.optimizers))
        if not numbers:
            return
        values = {f"flatness/{name}": value.detach().cpu() for name, value in numbers.items()}
        # Not by the property trainer.callback_metrics: reading it would compute the module's own metrics too early.
        trainer._logger_connector._callback_metrics.update(values)
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    def _fails(self, trainer: Trainer) -> bool:
        """Whether the module's step can't be measured, on this rank or another one; a warning says why."""
        assert self._held is not None
        problem = self._held.try_out()
        self._has_failed = trainer.strategy.reduce_boolean_decision(problem is not None, all=False)
        if self._has_failed:
            reason = problem or "the step of another rank fails in eval mode, in which it measures"
            rank_zero_warn(f"{type(self).__name__}: nothing is measured in this run: {reason}")
        return self._has_failed

    def _point(
        self, trainer: Trainer, method: MethodCallback | None, perturbation: Perturbation, noise: WeightNoise | None
    ) -> Point:
        current = method.current_rho if method else None
        if self.rho is None and method is not None:
            assert method.perturbation is not None
            perturbation = method.perturbation
        rho = current if self.rho is None else self.rho
        assert rho is not None
        assert self._held is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return Point(
            self._held.loss,
            perturbation,
            rho,
            average=method.perturbation if isinstance(method, EFMLoRA) else None,
            average_rho=current,
            noise=noise,
            sigma=self.sigma,
            samples=self.samples,
            loss_scale=scaler.get_scale() if scaler else 1.0,
        )


def _method_of(trainer: Trainer) -> MethodCallback | None:
    """The paper's method in this trainer; EFMLoRA, which also schedules an FMLoRAModule, comes before the others."""
    first = callback_of(trainer, EFMLoRA) or callback_of(trainer, FMLoRA)
    return first or callback_of(trainer, FMLoRAModuleCallback)


def _interval_problems(every_n_steps: object, every_n_epochs: object) -> list[str]:
    problems = []
    if every_n_steps is not None and every_n_epochs is not None:
        problems.append("every_n_steps and every_n_epochs can't both be given: leave one out")
    for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
        if value is not None:
            problems += integer_problems(name, value, least=1)
    return problems
