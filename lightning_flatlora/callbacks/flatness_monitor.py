"""FlatnessMonitor: flatness measured on probe batches while a model trains, without disturbing the training."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_flatlora.callbacks.both_lightnings import callback_of
from lightning_flatlora.callbacks.fmlora import EFMLoRA, FMLoRA, FMLoRAModuleCallback
from lightning_flatlora.callbacks.logging import without_logging
from lightning_flatlora.callbacks.methods_of_fit import unfreezes_later
from lightning_flatlora.callbacks.probe_batches import ProbeBatches
from lightning_flatlora.callbacks.strategies import monitor_problems
from lightning_flatlora.flatness.measures import DEFAULT_MEASURES, Point, measure, measure_problems
from lightning_flatlora.full_weight import WeightNoise
from lightning_flatlora.methods.b_perturbation import EFMLoRAStep
from lightning_flatlora.methods.checks import choice_problems, integer_problems, refuse
from lightning_flatlora.methods.optimizers import parameters_of
from lightning_flatlora.pairs import find_pairs
from lightning_flatlora.pairs.lora_pair import Finder, NoPairsError
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import is_size

Data = Literal["train", "val"]


# Compared by identity, as all callbacks are.
@dataclass(eq=False, repr=False)
class FlatnessMonitor(Callback):
    """Measure how flat the loss is around the weights, every few steps or epochs, on the same probe batches.

    The loss is the module's own ``training_step`` (``compute_loss`` of an :class:`~lightning_flatlora.FMLoRAModule`) in
    eval mode, at the clean weights, with the same random draws in every pass. Training continues as if nothing had been
    measured, see docs/flatness.md. Other side effects of a step belong behind ``if self.training``. The numbers go to
    every logger of the trainer and into ``trainer.callback_metrics``, as ``flatness/sharpness``.

    The monitor works under plain LoRA, and next to EFMLoRA, FMLoRA or FMLoRAModule. Under DDP each rank measures on its
    own batches, and losses and gradients are averaged, so that all ranks log the same numbers.

    A measurement costs 4 passes over the probe batches with the default measures (forward, backward, two forwards), and
    6 next to EFMLoRA, where "ema" (Theorem 2) is measured too, of the first average if there are several; for other
    measures see :func:`~lightning_flatlora.flatness.measure`. It needs memory for one batch's graph, the probe batches,
    and a copy of the buffers, of 64 MB at most.

    Args:
        rho: radius of the ball that is searched, in the weights' units, > 0, with the "average" estimator and the
            global norm, so that runs of different methods can be compared. None takes the current rho, the estimator
            and the norm scope of the run's EFMLoRA, FMLoRA or FMLoRAModule.
        every_n_steps: optimizer steps between measurements; None measures by epochs.
        every_n_epochs: epochs between measurements, at their ends; None, without every_n_steps, means 1. A run that is
            too short for one measurement ends with a warning.
        batches: how many batches are kept on each rank: the first ones of an epoch, for all measurements of the fit. An
            early measurement uses those seen so far, and a resumed run keeps new ones.
        data: whether these are "train" or "val" batches; training_step has to accept the latter. With "val" nothing is
            measured before the first validation batch, which may be the sanity check's.
        measures: names in :data:`~lightning_flatlora.flatness.MEASURES`; None takes DEFAULT_MEASURES, and next to
            EFMLoRA also "ema".
        per_layer: also log balancedness, condition numbers, radius and residual of each pair.
        sigma: size of the noise of "expected_sharpness", relative to the rows' norms.
        samples: draws of noise, and of vectors for "hessian_trace".
        finder: finds the pairs of layers that are not peft's; None takes the finder of the run's method.

    Raises:
        MisconfigurationException: values out of range (here), or a model or strategy that can't be measured (at the
            start of fit, before the first step).

    Example:
        >>> import lightning as L
        >>> monitor = FlatnessMonitor(rho=0.05, every_n_steps=100)
        >>> trainer = L.Trainer(callbacks=[monitor], accelerator="cpu", logger=False)
    """

    rho: float | None = None
    _: KW_ONLY
    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    batches: int = 4
    data: Data = "train"
    measures: Sequence[str] | None = None
    per_layer: bool = False
    sigma: float = 0.05
    samples: int = 8
    finder: Finder | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.rho is not None and not (is_size(self.rho) and self.rho):
            problems.append(
                f"rho must be a finite number > 0, or None to take that of the training method, got {self.rho!r}"
            )
        if self.every_n_steps is not None and self.every_n_epochs is not None:
            problems.append("every_n_steps and every_n_epochs can't both be given: leave one out")
        for name, value in (("every_n_steps", self.every_n_steps), ("every_n_epochs", self.every_n_epochs)):
            if value is not None:
                problems += integer_problems(name, value, least=1)
        problems += integer_problems("batches", self.batches, least=1)
        problems += integer_problems("samples", self.samples, least=2)
        problems += choice_problems("data", self.data, Data)
        if not (is_size(self.sigma) and self.sigma):
            problems.append(f"sigma must be a finite number > 0, got {self.sigma!r}")
        problems += measure_problems(self.measures)
        refuse(self, problems)
        if self.every_n_steps is None and self.every_n_epochs is None:
            self.every_n_epochs = 1
        # None outside of a fit, and once a step can't be measured.
        self._held: ProbeBatches | None = None
        # The step or epoch of the last measurement; at first, of the start of training.
        self._measured_at = 0
        self._has_measured = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings without the fit: a copy or pickle made in mid-fit takes no part in that fit."""
        return without_logging(self) | {"_held": None}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Refused first: the checks below expect whole weights, and would report a sharded model as another problem.
        refuse(self, monitor_problems(trainer.strategy))
        method, measures, problems = _method_of(trainer), self.measures or (), []
        if method is None and self.rho is None:
            problems.append("rho must be given without an EFMLoRA, FMLoRA or FMLoRAModule: for example rho=0.05")
        if "ema" in measures and not isinstance(method, EFMLoRAStep):
            problems.append("the measure 'ema' needs an EFMLoRA callback, whose average it measures: leave it out")
        if self.data == "val" and not trainer.enable_validation:
            problems.append("data='val', but this fit has no validation: give a validation loader, or choose 'train'")
        try:
            self._targets(trainer, pl_module, method)
        except ValueError as error:
            # An error only if no pair may come later in the fit.
            if not isinstance(error, NoPairsError) or not unfreezes_later(trainer):
                problems.append(str(error))
        try:
            self._held = ProbeBatches(trainer, pl_module, self.batches)
        except ValueError as error:
            problems.append(str(error))
        refuse(self, problems)

    def _targets(
        self, trainer: Trainer, pl_module: LightningModule, method: Any
    ) -> tuple[Perturbation, WeightNoise | None]:
        """Find the pairs that the model trains now and, if noise is measured, their weights.

        Raises:
            ValueError: there are none.
        """
        finder = self.finder or (method.finder if method else None)
        adapter_name = method.adapter_name if method is not None and finder is None else None
        pairs = find_pairs(pl_module, adapter_name, finder=finder).pairs
        learned = set(parameters_of(*trainer.optimizers))
        # Only the optimizers know whether A is trained, since a reference pass lets a fixed one require a gradient.
        perturbation = Perturbation([replace(pair, A_is_fixed=pair.A not in learned) for pair in pairs])
        if "expected_sharpness" not in (self.measures or ()):
            return perturbation, None
        return perturbation, WeightNoise(pl_module, adapter_name, finder=finder)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_at, self._has_measured = self._count(trainer), False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._held is not None and self.data == "train":
            self._held.pass_by(batch, batch_idx)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._held is not None and self.data == "val" and dataloader_idx == 0:
            self._held.pass_by(batch, batch_idx)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        held = self._held
        if held and held.tried == 0:
            # At once, so that the user learns at the start if the step can't be measured.
            with held.undisturbed():
                can_measure = held.try_out()
            self._held = held if can_measure else None
        if self.every_n_steps is not None:
            # Lightning's own count, minus one at the end of an epoch: global_step counts each of several optimizers.
            self._measure(trainer, pl_module, trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_steps is None:
            steps = trainer.fit_loop.epoch_loop._batches_that_stepped
            self._measure(trainer, pl_module, trainer.current_epoch + 1, steps - 1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held = self._held
        # If the step can't be measured, the user has been warned already.
        if held is None or self._has_measured or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        unit, every = ("epoch", self.every_n_epochs) if self.every_n_steps is None else ("step", self.every_n_steps)
        rank_zero_warn(
            f"FlatnessMonitor: nothing was measured: every_n_{unit}s is {every}, but training only went from {unit} "
            f"{self._measured_at} to {self._count(trainer)}"
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._held = None

    # Lightning does not call teardown after an error, and the probe batches would keep the module alive.
    on_exception = teardown

    def _count(self, trainer: Trainer) -> int:
        """Return the steps or epochs trained so far, in the unit of the measurements."""
        return trainer.current_epoch if self.every_n_steps is None else trainer.global_step

    def _measure(self, trainer: Trainer, pl_module: LightningModule, count: int, step: int) -> None:
        """Measure if enough steps or epochs have passed, and log under the step that Lightning logs under."""
        held, every = self._held, self.every_n_steps or self.every_n_epochs or 1
        method = _method_of(trainer)
        if not held or (method is not None and not method.pairs):
            return
        # Multiples are compared, since count % every == 0 would hold in every batch of an accumulation window, and
        # several optimizers skip numbers.
        if count // every == self._measured_at // every:
            return
        self._measured_at = count
        measures = self.measures or (*DEFAULT_MEASURES, *(["ema"] if isinstance(method, EFMLoRAStep) else []))
        with held.undisturbed():
            if not held.try_out():
                self._held = None
                return
            try:
                point = self._point(trainer, pl_module, method, held)
                self._has_measured = True
                numbers = measure(point, measures, self.per_layer)
            except NoPairsError:  # none is trained now
                return
            except Exception as error:
                # This may be hours after the start, and the training itself is fine. But other ranks may be waiting for
                # this one's loss.
                if trainer.world_size > 1:
                    raise
                rank_zero_warn(f"FlatnessMonitor: skipped a measurement: {type(error).__name__}: {error}")
                return
        values = {f"flatness/{name}": value.detach().cpu() for name, value in numbers.items()}
        # Not through trainer.callback_metrics: reading that property would compute the module's own metrics too early.
        trainer._logger_connector._callback_metrics.update(values)
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in values.items()}, step=step)

    def _point(self, trainer: Trainer, pl_module: LightningModule, method: Any, held: ProbeBatches) -> Point:
        perturbation, noise = self._targets(trainer, pl_module, method)
        size = method.current_rho if method else None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return Point(
            held.loss,
            # If the monitor has no rho, it takes the method's estimator and scope too.
            method.perturbation if self.rho is None else perturbation,
            size if self.rho is None else self.rho,  # type: ignore[arg-type]
            average=method.perturbation if isinstance(method, EFMLoRAStep) else None,
            average_rho=size,
            noise=noise,
            sigma=self.sigma,
            samples=self.samples,
            loss_scale=scaler.get_scale() if scaler else 1.0,
        )


def _method_of(trainer: Trainer) -> Any:
    """Find the method whose settings apply, or None. EFMLoRA comes first, since it also schedules an FMLoRAModule."""
    found: Any = [callback_of(trainer, kind) for kind in (EFMLoRA, FMLoRA, FMLoRAModuleCallback)]
    callback = next(filter(None, found), None)
    return callback.method if callback else None
