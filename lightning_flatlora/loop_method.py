"""What EFMLoRA and FMLoRA share in a training loop without a Trainer: the pairs, rho, the step count and the state."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_flatlora.callbacks.methods import checks, sizes
from lightning_flatlora.callbacks.methods.pair_groups import PairGroup, assign_pairs
from lightning_flatlora.deepspeed_engine import EngineOptimizer, is_engine, window_is_complete
from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.lora_pair import Finder, LoRAPair, NoPairsError, PairSearch
from lightning_flatlora.pair_watch import PairWatch
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import ConstantRho, RhoSchedule
from lightning_flatlora.wrappers import unwrapped, wrapping_problems

_STEP_HOOKS: MutableMapping[Optimizer, RemovableHandle] = WeakKeyDictionary()
"""The hook of the latest object on each optimizer: one that an interrupted cell of a notebook left has no more say."""


class LoopMethod(ABC):
    """Base of EFMLoRA and FMLoRA for loops: the pairs of one optimizer, rho, the step count, and the state.

    Attributes:
        step: optimizer steps taken so far, from 0; steps that a loss scaler skipped count.
        perturbation: of the pairs' B.
        takes_two_passes: whether a gradient is taken twice.
    """

    takes_two_passes: ClassVar[bool] = False
    # What to do about a step that nothing announced; whoever drives this object says it in other words.
    remedy_of_steps = (
        "run forward and backward inside of flat.training_passes(), and call flat.before_step() between backward and "
        "optimizer.step(). To go on without the method, call flat.close()"
    )
    # Set before __init__ by the method that takes it as an argument, so that the other one refuses it.
    beta: float = 1.0
    sync_ascent: bool = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rho: float | RhoSchedule,
        *,
        estimator: Estimator = "average",
        norm_scope: NormScope = "global",
        start_step: int = 0,
        every_n_steps: int = 1,
        adapter_name: str | None = None,
        finder: Finder | None = None,
        total_steps: int | None = None,
    ) -> None:
        problems = checks.value_problems("rho", rho, start_step, every_n_steps, adapter_name, finder)
        problems += checks.perturbation_problems(self.beta, estimator, norm_scope)
        problems += [] if total_steps is None else checks.integer_problems("total_steps", total_steps, 1)
        # A DeepSpeed engine brings its own optimizer.
        is_optimizer = hasattr(optimizer, "param_groups") or is_engine(model)
        if not isinstance(model, nn.Module) or not is_optimizer:
            given = f"{type(model).__name__} and {type(optimizer).__name__}"
            checks.refuse(self, [*problems, f"the first two arguments must be a model and its optimizer, got {given}"])
        problems += wrapping_problems(model, takes_two_passes=self.takes_two_passes)
        problems += checks.optimizer_problems([optimizer])
        if not self.sync_ascent and self.takes_two_passes and is_sharded(model):
            problems.append("sync_ascent=False needs each rank's own gradient, which FSDP does not keep")
        checks.refuse(self, problems)
        self.rho = rho if isinstance(rho, RhoSchedule) else ConstantRho(float(rho))
        self.estimator: Estimator = estimator
        self.norm_scope: NormScope = norm_scope
        self.start_step, self.every_n_steps = start_step, every_n_steps
        self._model = model
        self._optimizer = EngineOptimizer(model) if is_engine(model) else optimizer
        self._horizon = math.inf if total_steps is None else total_steps
        self._group = PairGroup(0)
        self._begins_window = True
        self._may_step = False
        self._is_closed = False
        self._start(PairWatch(unwrapped(model), adapter_name, finder))

    def _start(self, watch: PairWatch) -> None:
        """Find the pairs, and refuse what can't work with them before anything is changed."""
        self._watch = watch
        search = watch.search([self._optimizer])
        if not search.pairs:
            raise NoPairsError(watch.refusal(search))
        assignment = assign_pairs(search.pairs, [self._optimizer])
        problems = watch.merge_problems()
        if assignment.orphans:
            problems.append(
                f"trainable LoRA factors, such as {assignment.orphans[0].name}, are not in the optimizer: give them to "
                "it, or freeze them"
            )
        if sizes.lacks_horizon(self.rho) and math.isinf(self._horizon):
            problems.append(f"rho={self.rho} spreads over the run, whose length a loop does not say: set total_steps")
        if self.rho.needs_learning_rate:
            problems += sizes.rate_problems(f"rho={self.rho}", self._followed_groups())
        checks.refuse(self, problems)
        if search.left_out:
            rank_zero_info(f"{type(self).__name__} leaves unperturbed: " + "; ".join(search.left_out))
        checks.warn_of_rounding(self, "B", [pair.B for pair in search.pairs])
        self._install(assignment.pairs[0])
        self._watch_steps()

    def _install(self, pairs: list[LoRAPair]) -> None:
        self._group.pairs = pairs
        self._group.install(self.estimator, self.norm_scope, self._model)

    # -- what a loop calls

    @abstractmethod
    def training_passes(self) -> Iterator[AbstractContextManager[None]]:
        """The passes over one batch, or over one micro-batch of an accumulation window.

        Run forward and backward inside each of them, with the same batch. Under DDP and Fabric put
        ``no_backward_sync`` and ``no_sync`` inside.
        """

    def before_step(self) -> None:
        """To be called once before each step of the optimizer, when the gradients are complete, and before clipping.

        Under DeepSpeed it stands before ``engine.step()``, also in an accumulation window: both then wait for its end.

        Raises:
            RuntimeError: no pass came since the last call, so the gradients are of no use.
        """
        if self._begins_window:
            raise RuntimeError(
                f"{type(self).__name__}.before_step came without a pass since the last one: run forward and backward "
                "inside of flat.training_pass(), or of each of flat.training_passes(), and call it once for each step"
            )
        if is_engine(self._model) and not window_is_complete(self._model):
            return
        if self._watch.meets_others():
            self._take_over(self._watch.search([self._optimizer], with_gradient=True))
        self._move_average()
        self._group.step += 1
        self._begins_window = True
        self._may_step = True

    @abstractmethod
    def _move_average(self) -> None:
        """What the method does with the gradients that the coming step uses."""

    def close(self) -> None:
        """Leave no trace on the model's layers and the optimizer, after the loop or an exception; the state stays."""
        self._is_closed = True
        self._group.uninstall()
        if self._step_hook is not None:
            self._step_hook.remove()

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self._group.step

    @property
    def perturbation(self) -> Perturbation | None:
        """Of the pairs' B; None while no pair is in the optimizer."""
        return self._group.perturbation

    @property
    def current_rho(self) -> float:
        """The radius of the coming optimizer step."""
        param_groups = self._followed_groups() if self.rho.needs_learning_rate else []
        rho = sizes.size_at(self.rho, self._group, self._horizon, param_groups)
        checks.refuse(self, sizes.size_problems(f"rho={self.rho}", rho, self.step))
        return rho

    @property
    def is_refresh_step(self) -> bool:
        """Whether the coming optimizer step takes a fresh perturbation."""
        return sizes.refreshes(self.step, self.start_step, self.every_n_steps)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of CPU tensors and numbers; ``fabric.save`` and ``fabric.load`` call it."""
        state = self._group.state_dict(with_perturbation=not self.takes_two_passes)
        return {**state, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict`, or that of the callback of this name, returned.

        Raises:
            MisconfigurationException: the state belongs to other pairs or settings.
        """
        problems = checks.changed_settings(self._settings(), state["settings"])
        if "optimizers" in state:
            problems.append(f"the state is of {len(state['optimizers'])} optimizers, and a loop's object follows one")
        checks.refuse(self, problems)
        try:
            self._group.load_state_dict(state, self._watch.resting)
        except ValueError as error:
            raise MisconfigurationException(checks.message(self, [str(error)])) from error

    def _settings(self) -> dict[str, Any]:
        return {"estimator": self.estimator, "norm_scope": self.norm_scope}

    # -- the order of the loop

    def _watch_steps(self) -> None:
        """Notice a step of the optimizer that before_step did not announce, in which nothing would be perturbed."""
        optimizer, inner = self._optimizer, getattr(self._optimizer, "optimizer", None)
        while isinstance(inner, Optimizer):  # what Fabric or accelerate has wrapped
            optimizer, inner = inner, getattr(inner, "optimizer", None)
        self._step_hook: RemovableHandle | None = None
        # A wrapper may inherit from Optimizer without calling its constructor, which creates this table.
        if "_optimizer_step_pre_hooks" in vars(optimizer):
            if optimizer in _STEP_HOOKS:
                _STEP_HOOKS[optimizer].remove()
            self._step_hook = _STEP_HOOKS[optimizer] = optimizer.register_step_pre_hook(self._check_step)

    def _check_step(self, *args: Any) -> None:
        if not self._may_step:
            raise RuntimeError(
                f"the optimizer was about to step without {type(self).__name__}'s before_step: {self.remedy_of_steps}"
            )
        self._may_step = False

    # -- the model may change

    def _begin_pass(self) -> None:
        """Take over what has changed about the pairs, which nearly always is nothing."""
        if self._is_closed:
            raise RuntimeError(f"close() has ended this {type(self).__name__}: make a new one for another run")
        if self._begins_window and self._watch.changed([self._optimizer]):
            self._take_over(self._watch.search([self._optimizer]))
        self._begins_window = False
        self._follow_scaling()

    def _take_over(self, search: PairSearch) -> None:
        self._install(assign_pairs(search.pairs, [self._optimizer]).pairs[0])

    def _follow_scaling(self) -> None:
        if self._watch.rescaled() and self.perturbation is not None:
            self.perturbation.rescale(self._watch.scalings())

    def _followed_groups(self) -> list[dict[str, Any]]:
        return sizes.followed_groups(self._optimizer, [pair.B for pair in self._watch.pairs])
