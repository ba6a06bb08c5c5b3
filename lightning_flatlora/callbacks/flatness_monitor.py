"""FlatnessMonitor: flatness measured on held batches while a model trains, without disturbing the training."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_flatlora.callbacks.base import FlatLoRACallback, without_logging
from lightning_flatlora.callbacks.checks import foreign_problems, message
from lightning_flatlora.callbacks.efmlora import EFMLoRA
from lightning_flatlora.callbacks.finds_pairs import unfreezes_later
from lightning_flatlora.callbacks.fmlora import FMLoRA
from lightning_flatlora.callbacks.held_batches import HeldBatches, loss_method
from lightning_flatlora.callbacks.module_driver import FMLoRAModuleDriver
from lightning_flatlora.callbacks.one_pass import OnePass
from lightning_flatlora.callbacks.undisturbed import undisturbed
from lightning_flatlora.flatness import DEFAULT_MEASURES, MEASURES, Point, measure
from lightning_flatlora.lightning_names import MisconfigurationException, callbacks_of, is_lightning
from lightning_flatlora.pair_watch import PairWatch
from lightning_flatlora.pairs import NoPairsError, find_pairs
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import is_radius
from lightning_flatlora.weight_noise import WeightNoise

Data = Literal["train", "val"]


class FlatnessMonitor(Callback):
    """Measure how flat the loss is around the weights, every few steps or epochs, on the same held batches.

    The loss is the module's own ``training_step`` (``compute_loss`` of an :class:`~lightning_flatlora.FMLoRAModule`) in
    eval mode, at the clean weights, with the same random draws in every pass. Weights, gradients, random generators,
    modes, buffers, torchmetrics objects and what ``self.log`` collects stay as they are, to the bit; so does what a
    step keeps in attributes of its modules (tensors, arrays, numbers, counters, containers of up to 100,000 of them,
    dataclasses, and objects of the module's own package), but not what it writes elsewhere, as into a logger's
    experiment or a file. The numbers go to every logger of the trainer and into ``trainer.callback_metrics`` as
    ``flatness/sharpness`` and so on; docs/flatness.md lists them.

    It works alone under plain LoRA, and beside EFMLoRA, FMLoRA or FMLoRAModule. Under DDP each rank measures on its own
    batches; losses and gradients are averaged, so that all ranks log the same.

    Cost of a measurement, in passes over the held batches: 4 with the default measures (forward, backward, two
    forwards), 6 beside EFMLoRA, where "ema" (Theorem 2) is measured too; for the others see
    :func:`~lightning_flatlora.flatness.measure`. Memory: one batch's graph, as in training, and a copy of the buffers.

    Args:
        rho: radius of the ball that is searched, in the weights' units, > 0; the estimate is then the "average" one
            under the global norm, so that runs of different methods can be compared. None takes rho, estimator and norm
            scope of the EFMLoRA, FMLoRA or FMLoRAModule beside it, at every moment.
        every_n_steps: optimizer steps between measurements; None measures by epochs.
        every_n_epochs: epochs between measurements, at their ends; None, without every_n_steps, means 1. A run that is
            too short for one measurement ends with a warning.
        batches: how many batches are held on each rank, the same at every measurement: the first that a copy of the
            loader gives as training starts (where it shuffles, in an order of the copy's own).
        data: "train" or "val", the loader that gives them; a validation batch has to be of the form that training_step
            takes.
        measures: names in :data:`~lightning_flatlora.flatness.MEASURES`; None takes DEFAULT_MEASURES, and beside
            EFMLoRA "ema".
        per_layer: log balancedness, condition numbers, radius and residual for each pair too.
        sigma: size of the noise of "expected_sharpness", relative to the rows' norms.
        samples: draws of noise, and of vectors for "hessian_trace".

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
    ) -> None:
        problems = _value_problems(rho, every_n_steps, every_n_epochs, batches, data, measures, sigma, samples)
        if problems:
            raise MisconfigurationException(message(self, problems))
        self.rho = rho
        self.every_n_steps = every_n_steps
        self.every_n_epochs = 1 if every_n_steps is None and every_n_epochs is None else every_n_epochs
        self.batches = batches
        self.data: Data = data
        self.measures = measures
        self.per_layer = per_layer
        self.sigma = sigma
        self.samples = samples
        self.begin()

    def begin(self) -> None:
        """Set all that belongs to one fit to what it is before the fit."""
        self._held: HeldBatches | None = None
        self._step: Callable[..., Any] | None = None
        self._watch: PairWatch | None = None
        self._perturbation: Perturbation | None = None
        self._noise: WeightNoise | None = None
        self._measured_at = 0
        self._measured = False

    def __getstate__(self) -> dict[str, Any]:
        """The settings: a copy or pickle that is made in the middle of a fit has no part in that fit."""
        blank = object.__new__(type(self))
        blank.__dict__.update(self.__dict__)
        blank.begin()
        return without_logging(blank)

    # -- the start

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        problems = _strategy_problems(trainer) or self._problems(trainer, pl_module)
        if problems:
            raise MisconfigurationException(message(self, problems))

    def _problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Find what is measured, and say what about it can't work, one line each."""
        driver, named = _driver(trainer), self.measures or ()
        problems = []
        if driver is None and self.rho is None:
            problems.append(
                "rho must be given where no EFMLoRA, FMLoRA or FMLoRAModule has one to take over: rho=0.5, for example"
            )
        if "ema" in named and not isinstance(driver, EFMLoRA):
            problems.append("the measure 'ema' needs an EFMLoRA callback, whose average it is: leave it out")
        # Bound here, before the other callbacks put their own methods in its place for a step.
        self._step, step_problems = loss_method(pl_module)
        nothing_found = self._find(pl_module, driver)
        if not unfreezes_later(trainer):
            problems += nothing_found
        return problems + step_problems

    def _find(self, pl_module: LightningModule, driver: FlatLoRACallback | None) -> list[str]:
        """Take the pairs as the model trains them now; says why there is none."""
        adapter_name = driver.adapter_name if driver else None
        self._perturbation, self._noise = None, None
        try:
            self._watch = PairWatch(pl_module, adapter_name)
            self._watch.search([])
            perturbation = Perturbation(find_pairs(pl_module, adapter_name).pairs)
            if "expected_sharpness" in (self.measures or ()):
                self._noise = WeightNoise(pl_module, adapter_name)
        except (NoPairsError, ValueError) as error:
            return [str(error)]
        self._perturbation = perturbation
        return []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured_at, self._measured = self._count(trainer), False
        assert self._step is not None
        self._held = HeldBatches(trainer, pl_module, self._step, self.data, self.batches)
        if not self._held:
            raise MisconfigurationException(
                message(self, [f"data={self.data!r} gives no batch to hold: choose the other, or give the loader"])
            )

    # -- when

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            self._watch.is_stale = True  # layers may have been put in

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        every, step = self.every_n_steps, trainer.global_step
        # step % every == 0 would hold in every batch of an accumulation window, and several optimizers skip numbers.
        if every is not None and step // every > self._measured_at // every:
            self._measured_at = step
            self._measure(trainer, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self._measured or trainer.fast_dev_run):  # type: ignore[attr-defined]
            unit, every = ("epoch", self.every_n_epochs) if self.every_n_steps is None else ("step", self.every_n_steps)
            course = f"training went from {unit} {self._measured_at} to {self._count(trainer)}"
            rank_zero_warn(message(self, [f"nothing was measured: every_n_{unit}s is {every}, and {course}"]))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.begin()

    def _count(self, trainer: Trainer) -> int:
        """How many steps or epochs training is old, whichever measurements go by."""
        return trainer.current_epoch if self.every_n_steps is None else trainer.global_step

    # -- what

    def _measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Log what is measured at the step that Lightning gives to what self.log got.

        It counts batches that stepped, less one at the end of an epoch; global_step counts each optimizer of several.
        """
        driver = _driver(trainer)
        if self._watch is None or self._watch.changed([]):
            self._find(pl_module, driver)
        if self._perturbation is None or (driver is not None and driver.perturbation is None):
            return  # no pair is trained yet
        self._measured = True
        for callback in callbacks_of(trainer):
            if isinstance(callback, OnePass):
                callback.off()  # as its own hook does, whichever of the two comes first
        with undisturbed(pl_module):
            found = measure(self._point(trainer, driver), self._measures(driver), self.per_layer)
        values = {f"flatness/{name}": value.detach().cpu() for name, value in found.items()}
        # Reading the property trainer.callback_metrics would compute the module's own metrics, before their time.
        trainer._logger_connector._callback_metrics.update(values)
        for logger in trainer.loggers:
            scalars = {name: float(value) for name, value in values.items()}
            logger.log_metrics(scalars, step=step)

    def _measures(self, driver: FlatLoRACallback | None) -> Sequence[str]:
        if self.measures is not None:
            return self.measures
        return (*DEFAULT_MEASURES, "ema") if isinstance(driver, EFMLoRA) else DEFAULT_MEASURES

    def _point(self, trainer: Trainer, driver: FlatLoRACallback | None) -> Point:
        perturbation, rho = self._perturbation, self.rho
        current = driver.current_rho(trainer) if driver else None
        if rho is None:
            assert driver is not None
            perturbation, rho = driver.perturbation, current
        assert perturbation is not None
        assert rho is not None
        assert self._held is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return Point(
            self._held.loss,
            perturbation,
            rho,
            average=driver.perturbation if isinstance(driver, EFMLoRA) else None,
            average_rho=current,
            noise=self._noise,
            sigma=self.sigma,
            samples=self.samples,
            loss_scale=scaler.get_scale() if scaler else 1.0,
        )


def _driver(trainer: Trainer) -> FlatLoRACallback | None:
    """The front end that this trainer has: EFMLoRA, which also schedules an FMLoRAModule, before others."""
    for kind in (EFMLoRA, FMLoRA, FMLoRAModuleDriver):
        for callback in callbacks_of(trainer):
            if isinstance(callback, kind):
                return callback
    return None


def _strategy_problems(trainer: Trainer) -> list[str]:
    strategy = trainer.strategy
    untested = is_lightning(strategy, DeepSpeedStrategy, SingleDeviceXLAStrategy, XLAStrategy)
    if is_lightning(strategy, DDPStrategy) and not untested:
        return foreign_problems(strategy)
    if is_lightning(strategy, SingleDeviceStrategy) and not untested:
        return []
    return [
        f"the strategy {type(strategy).__name__} is not supported, as one that shards a model has no whole weights to "
        "perturb: use one device or strategy='ddp', or measure the saved adapter afterwards"
    ]


def _value_problems(
    rho: object,
    every_n_steps: object,
    every_n_epochs: object,
    batches: object,
    data: object,
    measures: object,
    sigma: object,
    samples: object,
) -> list[str]:
    """What is wrong with the arguments, one line each: argument, what is allowed, what came."""
    problems = []
    if rho is not None and not (is_radius(rho) and rho):
        problems.append(f"rho must be a finite number > 0, or None to take that of the method beside it, got {rho!r}")
    if every_n_steps is not None and every_n_epochs is not None:
        problems.append("every_n_steps and every_n_epochs can't both be given: leave one out")
    for name, value, least in (
        ("every_n_steps", every_n_steps, 1),
        ("every_n_epochs", every_n_epochs, 1),
        ("batches", batches, 1),
        ("samples", samples, 2),
    ):
        optional = name.startswith("every") and value is None
        if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            problems.append(f"{name} must be an integer >= {least}, got {value!r}")
    if data not in get_args(Data):
        problems.append(f"data must be 'train' or 'val', got {data!r}")
    if not (is_radius(sigma) and sigma):
        problems.append(f"sigma must be a finite number > 0, got {sigma!r}")
    return problems + _measure_problems(measures)


def _measure_problems(measures: object) -> list[str]:
    if measures is None:
        return []
    if isinstance(measures, str) or not isinstance(measures, Sequence) or not measures:
        return [f"measures must be None or a list of names among {', '.join(MEASURES)}, got {measures!r}"]
    problems = [
        f"measures holds {name!r}, which is none of {', '.join(MEASURES)}" for name in measures if name not in MEASURES
    ]
    if "top_eigenvalue" in measures and find_spec("scipy") is None:
        problems.append("the measure 'top_eigenvalue' needs scipy: pip install 'lightning-flatlora[flatness]'")
    return problems
