"""What all methods share, baselines too: settings, the start, the step count, the end, and the state."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora.callbacks.checks import message, strategy_problems, value_problems, wrapping_problems
from lightning_flatlora.callbacks.two_passes import nothing
from lightning_flatlora.callbacks.value_clipping import skip_clipping_without_gradients
from lightning_flatlora.lightning_names import MisconfigurationException, is_lightning
from lightning_flatlora.pairs import NoPairsError, PairSearch, find_pairs
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import ConstantRho, RhoSchedule


class FlatLoRACallback(Callback):
    """Base of the callbacks that train LoRA pairs in a way of their own: it knows the pairs and the step, they the way.

    Attributes:
        rho: the size that may change over the run, which some methods call otherwise.
        size_name: what the method calls it.
        search: the pairs, and what was left out, when training starts.
        perturbation: of B, for the methods that keep one; it stays after the end, for checkpoints.
        step: optimizer steps taken in this fit, from 0; steps that a loss scaler skipped count.
        is_module_driver: whether it drives an FMLoRAModule, which then takes the passes itself.
        window: batches of an optimizer step where an FMLoRAModule accumulates them; None where the Trainer does.
        sync_ascent: whether the ascent's gradient is averaged over the ranks.
        works_sharded: whether it can work where each rank holds a part of a parameter (FSDP).
    """

    size_name: ClassVar[str] = "rho"
    is_module_driver: ClassVar[bool] = False
    works_sharded: ClassVar[bool] = True
    window: int | None = None
    sync_ascent: bool = True

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        start_step: int = 0,
        every_n_steps: int = 1,
        adapter_name: str | None = None,
        more_problems: Sequence[str] = (),
    ) -> None:
        problems = value_problems(self.size_name, rho, start_step, every_n_steps, adapter_name)
        problems += more_problems
        if problems:
            raise MisconfigurationException(message(self, problems))
        self.rho: RhoSchedule = rho if isinstance(rho, RhoSchedule) else ConstantRho(float(rho))
        self.start_step = start_step
        self.every_n_steps = every_n_steps
        self.adapter_name = adapter_name
        self.search = PairSearch([], [])
        self.perturbation: Perturbation | None = None
        self.step = 0
        self._horizon = math.inf
        self._optimizer_index = 0
        self._initial_lr: float | None = None
        self._loaded: dict[str, Any] | None = None
        self._is_training = False
        self._put_back_clipping: Callable[[], None] = nothing

    # -- the start: everything that is wrong, in one message, before anything is touched

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # a fit is a new run of the method, as of the optimizer; a checkpoint is loaded after this
            self.uninstall()
            self.search, self.perturbation = PairSearch([], []), None
            self.step, self._initial_lr, self._loaded = 0, None, None
            if problems := wrapping_problems(trainer):
                raise MisconfigurationException(message(self, problems))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        problems = self.configuration_problems(trainer, pl_module)
        problems += self.find(trainer, pl_module)
        if self._lacks_horizon:
            problems += self._horizon_problems(trainer, pl_module)
        if problems:
            raise MisconfigurationException(message(self, problems))
        if self.search.left_out:
            rank_zero_info(f"{type(self).__name__} leaves unperturbed: " + "; ".join(self.search.left_out))
        self.install(trainer, pl_module)
        if is_lightning(trainer.strategy, FSDPStrategy):
            self._put_back_clipping = skip_clipping_without_gradients(trainer)

    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """What about the trainer and its other callbacks can't work, one line each; subclasses add theirs."""
        problems = strategy_problems(trainer, _window(trainer), self.sync_ascent, self.works_sharded)
        others = [
            type(callback).__name__
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, FlatLoRACallback) and callback is not self and not self.works_beside(callback)
        ]
        if others:
            problems.append(f"it perturbs the same weights as {', '.join(others)} beside it: keep one")
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            problems.append("LBFGS takes several gradients a step, the perturbation knows one: use AdamW or SGD")
        return problems

    def works_beside(self, other: "FlatLoRACallback") -> bool:
        """Whether another of these callbacks may run in the same trainer."""
        return False

    def find(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Find what the method is about, and say what can't work with it, one line each."""
        try:
            self.search = find_pairs(pl_module, self.adapter_name)
        except (NoPairsError, ValueError) as error:
            return [str(error)]
        return self._optimizer_problems(trainer) + self._rate_problems(trainer)

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make ready what was found, after all checks and before the first step."""

    def _optimizer_problems(self, trainer: Trainer) -> list[str]:
        """The pairs must be learnt by one optimizer."""
        owners = [
            {id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in trainer.optimizers
        ]
        factors = [p for pair in self.search.pairs for p in (pair.A, pair.B) if p.requires_grad]
        used = {tuple(i for i, owner in enumerate(owners) if id(p) in owner) for p in factors}
        problems = []
        if () in used:
            orphans = [pair.name for pair in self.search.pairs if not any(id(pair.B) in owner for owner in owners)]
            example = f", as {orphans[0]}" if orphans else ""
            problems.append(f"trainable LoRA factors are in no optimizer{example}: give them to it, or freeze them")
        elif len(used) > 1 or any(len(where) > 1 for where in used):
            problems.append(
                f"the pairs are spread over optimizers {sorted({i for where in used for i in where})}: "
                "one optimizer must hold A and B of all of them"
            )
        self._optimizer_index = min((i for where in used for i in where), default=0)
        return problems

    def _rate_problems(self, trainer: Trainer) -> list[str]:
        """A size that follows the learning rate needs one, known to the host."""
        groups = self._groups(trainer) if self.rho.needs_learning_rate else []
        problems = []
        if any(isinstance(group["lr"], Tensor) for group in groups):
            problems.append(
                f"{self._sized} follows the learning rate, a tensor here: reading it would make the host wait. "
                "Give the optimizer a float, or choose another schedule"
            )
        if len(groups) > 1:
            problems.append(
                f"{self._sized} follows the learning rate, but what it moves is in several parameter groups: "
                "put it into one, or choose another schedule"
            )
        return problems

    @property
    def followed(self) -> list[nn.Parameter]:
        """The parameters whose learning rate a schedule may follow."""
        return [pair.B for pair in self.search.pairs]

    @property
    def _sized(self) -> str:
        return f"{self.size_name}={self.rho}"

    def _groups(self, trainer: Trainer) -> list[dict[str, Any]]:
        followed = {id(p) for p in self.followed}
        groups = trainer.optimizers[self._optimizer_index].param_groups if trainer.optimizers else []
        return [group for group in groups if any(id(p) in followed for p in group["params"])]

    @property
    def _lacks_horizon(self) -> bool:
        return self.rho.needs_horizon and getattr(self.rho, "total_steps", None) is None

    def _horizon_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Why the number of optimizer steps can't be foretold, as far as is known before the loaders are set up."""
        if trainer.max_steps == -1 and trainer.max_epochs == -1:
            return [self._no_end()]
        own_steps = not pl_module.automatic_optimization and not module_drivers(trainer)
        changing = any(is_lightning(c, GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if own_steps or changing:
            cause = "this module steps its optimizer itself" if own_steps else "the accumulation changes"
            return [f"{self._sized} spreads over the run, whose steps are not known as {cause}: set its total_steps"]
        return []

    def _no_end(self) -> str:
        return (
            f"{self._sized} spreads over the whole run, and this run has no end: "
            "set its total_steps, or the Trainer's max_steps, or max_epochs with a loader of known length"
        )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._horizon = _optimizer_steps(trainer)
        if self._lacks_horizon and math.isinf(self._horizon):
            raise MisconfigurationException(message(self, [self._no_end()]))
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self._restore(loaded)
        self._is_training = True

    # -- which steps, which rho

    @property
    def is_refresh_step(self) -> bool:
        """Whether the coming optimizer step takes a fresh perturbation."""
        return self.step >= self.start_step and (self.step - self.start_step) % self.every_n_steps == 0

    def current_rho(self, trainer: Trainer) -> float:
        """The size (rho, or what the method calls it) of the coming optimizer step."""
        if not self.rho.needs_learning_rate:
            return self._checked(self.rho(self.step, self._horizon))
        group = self._groups(trainer)[0]
        if not self._initial_lr:  # a warm-up written by hand may start at 0
            self._initial_lr = float(group.get("initial_lr", group["lr"]))
        share = group["lr"] / self._initial_lr if self._initial_lr else 0.0
        return self._checked(self.rho(self.step, self._horizon, share))

    def _checked(self, rho: float) -> float:
        if not 0 <= rho < math.inf:  # a schedule of the user's own
            raise MisconfigurationException(
                message(self, [f"{self._sized} must give a finite number >= 0, and gave {rho} at step {self.step}"])
            )
        return rho

    def holds_pairs(self, trainer: Trainer, optimizer: Any) -> bool:
        """Whether an optimizer, as a hook is given it, is the one that learns the pairs."""
        if is_lightning(optimizer, LightningOptimizer):  # others that keep one inside are themselves what is stepped
            optimizer = optimizer.optimizer
        return optimizer is trainer.optimizers[self._optimizer_index]

    # -- the end

    def uninstall(self) -> None:
        """Leave no trace on the model and the trainer; what a checkpoint needs stays."""
        self._is_training = False
        self._put_back_clipping()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.uninstall()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.uninstall()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.uninstall()

    # -- the state

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        return {"step": self.step, "initial_lr": self._initial_lr, "settings": self.settings()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._is_training:  # a tuner goes back to where it began, in the middle of a fit
            self._restore(state_dict)
        else:  # the pairs are not known yet
            self._loaded = state_dict

    def settings(self) -> dict[str, Any]:
        """What a resumed run must not change, as arguments by name."""
        return {}

    def _restore(self, state: dict[str, Any]) -> None:
        problems = [
            f"{name} must be {state['settings'][name]!r} as in the checkpoint, got {value!r}: "
            "change it back, or start anew from the weights alone"
            for name, value in self.settings().items()
            if state["settings"][name] != value
        ]
        if problems:
            raise MisconfigurationException(message(self, problems))
        self.step = state["step"]
        self._initial_lr = state["initial_lr"]


def watched_parameters(trainer: Trainer, optimizer_index: int) -> list[nn.Parameter]:
    """The parameters whose overflow makes a loss scaler skip the step; none where there is no scaler."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return []
    return [p for group in trainer.optimizers[optimizer_index].param_groups for p in group["params"]]


def _window(trainer: Trainer) -> int:
    """Batches of an optimizer step, as the trainer or an FMLoRAModule accumulates them."""
    return next((driver.window for driver in module_drivers(trainer) if driver.window), trainer.accumulate_grad_batches)


def module_drivers(trainer: Trainer) -> list[FlatLoRACallback]:
    """The driver of an FMLoRAModule among the callbacks, if the model is one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, FlatLoRACallback) and callback.is_module_driver]


def _optimizer_steps(trainer: Trainer) -> float:
    """Optimizer steps of the whole run, infinite where nothing ends it or a loader does not know its length.

    Not ``trainer.estimated_stepping_batches``: before training it sets the loaders up too early for a resumed one to
    take its state, and under manual optimization it counts batches.
    """
    steps = math.inf
    if trainer.max_epochs not in (None, -1) and math.isfinite(trainer.num_training_batches):
        steps = math.ceil(trainer.num_training_batches / _window(trainer)) * max(trainer.max_epochs or 1, 1)
    return min(steps, trainer.max_steps) if trainer.max_steps != -1 else steps
