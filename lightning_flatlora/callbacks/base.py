"""What EFMLoRA, FMLoRA and FMLoRAModule share: settings, the start, the step count, the end, and the state."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora.callbacks.checks import message, strategy_problems, value_problems, wrapping_problems
from lightning_flatlora.callbacks.two_passes import nothing
from lightning_flatlora.callbacks.value_clipping import skip_clipping_without_gradients
from lightning_flatlora.distributed import layout_of
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.pairs import NoPairsError, PairSearch, find_pairs
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import ConstantRho, RhoSchedule


class FlatLoRACallback(Callback):
    """Base of the callbacks that perturb LoRA pairs: it knows what to perturb and at which step, they know when.

    Attributes:
        perturbation: set when training starts; it stays after the end, for checkpoints.
        step: optimizer steps taken in this fit, from 0; steps that a loss scaler skipped count.
        is_module_driver: whether it drives an FMLoRAModule, which then takes the passes itself.
        window: batches of an optimizer step where an FMLoRAModule accumulates them; None where the Trainer does.
        sync_ascent: whether the ascent's gradient is averaged over the ranks.
        averages: whether the perturbation lasts from step to step, so that a checkpoint must hold it.
    """

    is_module_driver: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    window: int | None = None
    sync_ascent: bool = True

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        estimator: Estimator,
        norm_scope: NormScope,
        start_step: int,
        every_n_steps: int,
        adapter_name: str | None,
        beta: float = 1.0,
        more_problems: Sequence[str] = (),
    ) -> None:
        problems = value_problems(rho, beta, estimator, norm_scope, start_step, every_n_steps, adapter_name)
        problems += more_problems
        if problems:
            raise MisconfigurationException(message(self, problems))
        self.rho: RhoSchedule = rho if isinstance(rho, RhoSchedule) else ConstantRho(float(rho))
        self.beta = beta
        self.estimator: Estimator = estimator
        self.norm_scope: NormScope = norm_scope
        self.start_step = start_step
        self.every_n_steps = every_n_steps
        self.adapter_name = adapter_name
        self.perturbation: Perturbation | None = None
        self.step = 0
        self._horizon = math.inf
        self._optimizer_index = 0
        self._initial_lr: float | None = None
        self._loaded: dict[str, Any] | None = None
        self._put_back_clipping: Callable[[], None] = nothing

    # -- the start: everything that is wrong, in one message, before anything is touched

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # a fit is a new run of the method, as of the optimizer; a checkpoint is loaded after this
            self.uninstall()
            self.perturbation, self.step, self._initial_lr, self._loaded = None, 0, None, None
            if problems := wrapping_problems(trainer):
                raise MisconfigurationException(message(self, problems))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        problems = self.configuration_problems(trainer, pl_module)
        search = self._search(pl_module, problems)
        if search:
            problems += self._optimizer_problems(trainer, search)
        if self._lacks_horizon:
            problems += self._horizon_problems(trainer, pl_module)
        if problems or not search:
            raise MisconfigurationException(message(self, problems))
        if search.left_out:
            rank_zero_info(f"{type(self).__name__} leaves unperturbed: " + "; ".join(search.left_out))
        if any(pair.B.dtype in (torch.bfloat16, torch.float16) for pair in search.pairs):
            rank_zero_warn(
                f"{type(self).__name__}: B is kept in {search.pairs[0].B.dtype}, so B + E is rounded to it and a small "
                "rho may be lost. Keep the adapter in float32, as with precision='bf16-mixed'."
            )
        layout = layout_of(trainer.strategy.model, [factor for pair in search.pairs for factor in (pair.A, pair.B)])
        self.perturbation = Perturbation(search.pairs, self.estimator, self.norm_scope, layout)
        self.perturbation.install()
        if isinstance(trainer.strategy, FSDPStrategy):
            self._put_back_clipping = skip_clipping_without_gradients(trainer)

    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """What about the trainer and its other callbacks can't work, one line each; subclasses add theirs."""
        problems = strategy_problems(trainer, _window(trainer), self.sync_ascent)
        others = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, FlatLoRACallback) and callback is not self and not self.works_beside(callback)
        ]
        if others:
            problems.append(
                f"it perturbs the same weights as {', '.join(type(other).__name__ for other in others)} "
                "in the Trainer's callbacks or in the module: keep one"
            )
        return problems

    def works_beside(self, other: "FlatLoRACallback") -> bool:
        """Whether another of these callbacks may run in the same trainer."""
        return False

    def _search(self, pl_module: LightningModule, problems: list[str]) -> PairSearch | None:
        try:
            return find_pairs(pl_module, self.adapter_name)
        except (NoPairsError, ValueError) as error:
            problems.append(str(error))
            return None

    def _optimizer_problems(self, trainer: Trainer, search: PairSearch) -> list[str]:
        """The pairs must be learnt by one optimizer, and for a rho that follows it, under one learning rate."""
        owners = [
            {id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in trainer.optimizers
        ]
        factors = [p for pair in search.pairs for p in (pair.A, pair.B) if p.requires_grad]
        used = {tuple(i for i, owner in enumerate(owners) if id(p) in owner) for p in factors}
        problems = []
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            problems.append("LBFGS takes several gradients a step, the perturbation knows one: use AdamW or SGD")
        if () in used:
            orphans = [pair.name for pair in search.pairs if not any(id(pair.B) in owner for owner in owners)]
            example = f", as {orphans[0]}" if orphans else ""
            problems.append(f"trainable LoRA factors are in no optimizer{example}: give them to it, or freeze them")
        elif len(used) > 1 or any(len(where) > 1 for where in used):
            problems.append(
                f"the pairs are spread over optimizers {sorted({i for where in used for i in where})}: "
                "one optimizer must hold A and B of all of them"
            )
        self._optimizer_index = min((i for where in used for i in where), default=0)
        groups = self._groups_of(trainer, search) if self.rho.needs_learning_rate else []
        if any(isinstance(group["lr"], Tensor) for group in groups):
            problems.append(
                f"rho={self.rho} follows the learning rate, a tensor here: reading it would make the host wait. "
                "Give the optimizer a float, or choose another schedule"
            )
        if len(groups) > 1:
            problems.append(
                f"rho={self.rho} follows the learning rate, but the B factors are in several parameter groups: "
                "put them into one, or choose another schedule"
            )
        return problems

    def _groups_of(self, trainer: Trainer, search: PairSearch) -> list[dict[str, Any]]:
        B = {id(pair.B) for pair in search.pairs}
        groups = trainer.optimizers[self._optimizer_index].param_groups if trainer.optimizers else []
        return [group for group in groups if any(id(p) in B for p in group["params"])]

    @property
    def _lacks_horizon(self) -> bool:
        return self.rho.needs_horizon and getattr(self.rho, "total_steps", None) is None

    def _horizon_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Why the number of optimizer steps can't be foretold, as far as is known before the loaders are set up."""
        if trainer.max_steps == -1 and trainer.max_epochs == -1:
            return [self._no_end()]
        own_steps = not pl_module.automatic_optimization and not module_drivers(trainer)
        changing = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if own_steps or changing:
            cause = "this module steps its optimizer itself" if own_steps else "the accumulation changes"
            return [f"rho={self.rho} spreads over the run, whose steps are not known as {cause}: set its total_steps"]
        return []

    def _no_end(self) -> str:
        return (
            f"rho={self.rho} spreads over the whole run, and this run has no end: "
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

    # -- which steps, which rho

    @property
    def is_refresh_step(self) -> bool:
        """Whether the coming optimizer step takes a fresh perturbation."""
        return self.step >= self.start_step and (self.step - self.start_step) % self.every_n_steps == 0

    def current_rho(self, trainer: Trainer) -> float:
        """rho of the coming optimizer step."""
        if not self.rho.needs_learning_rate:
            return self.rho(self.step, self._horizon)
        assert self.perturbation is not None
        group = self._groups_of(trainer, PairSearch(self.perturbation.pairs, []))[0]
        if not self._initial_lr:  # a warm-up written by hand may start at 0
            self._initial_lr = float(group.get("initial_lr", group["lr"]))
        return self.rho(self.step, self._horizon, group["lr"] / self._initial_lr if self._initial_lr else 0.0)

    def holds_pairs(self, trainer: Trainer, optimizer: Any) -> bool:
        """Whether an optimizer, as a hook is given it, is the one that learns the pairs."""
        return getattr(optimizer, "optimizer", optimizer) is trainer.optimizers[self._optimizer_index]

    # -- the end

    def uninstall(self) -> None:
        """Give the layers their own classes back; the perturbation stays for checkpoints."""
        if self.perturbation is not None:
            self.perturbation.uninstall()
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
        state: dict[str, Any] = {
            "step": self.step,
            "initial_lr": self._initial_lr,
            "settings": {"estimator": self.estimator, "norm_scope": self.norm_scope},
        }
        if self.perturbation is not None and self.averages:
            state["perturbation"] = self.perturbation.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _restore(self, state: dict[str, Any]) -> None:
        own = {"estimator": self.estimator, "norm_scope": self.norm_scope}
        problems = [
            f"{name} must be {state['settings'][name]!r} as in the checkpoint, got {value!r}: "
            "change it back, or start anew from the weights alone"
            for name, value in own.items()
            if state["settings"][name] != value
        ]
        if problems:
            raise MisconfigurationException(message(self, problems))
        if self.perturbation is not None and "perturbation" in state:
            try:
                self.perturbation.load_state_dict(state["perturbation"])
            except ValueError as error:
                raise MisconfigurationException(message(self, [str(error)])) from error
        self.step = state["step"]
        self._initial_lr = state["initial_lr"]


def ends_window(trainer: Trainer, batch_idx: int, accumulate_grad_batches: int) -> bool:
    """Whether a batch is the last of its accumulation window, the shorter one at the end of an epoch included."""
    return (batch_idx + 1) % accumulate_grad_batches == 0 or trainer.is_last_batch


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
