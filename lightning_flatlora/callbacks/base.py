"""The callback under every method: when its hooks are called, the method does its work."""

import math
import weakref
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import WarningCache, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks import strategies
from lightning_flatlora.callbacks.passes import OnePass, Passes, TwoPasses
from lightning_flatlora.callbacks.patches import without_logging
from lightning_flatlora.callbacks.training_step import (
    horizon_problems,
    module_window,
    no_end,
    optimizer_steps,
    takes_no_step,
    window_of,
)
from lightning_flatlora.lightning_names import callbacks_of, is_lightning
from lightning_flatlora.lora_pair import NoPairsError, PairSearch
from lightning_flatlora.methods.assignment import PairAssignment, assign_pairs
from lightning_flatlora.methods.checks import message, optimizer_problems, refuse
from lightning_flatlora.methods.gradients import parameters_of
from lightning_flatlora.methods.step_method import StepMethod
from lightning_flatlora.pairs import merge_problems, nothing_found, search_pairs
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import ConstantRho, RhoSchedule


class MethodCallback(Callback):
    """Train the LoRA pairs of a LightningModule by a method.

    Every product s B A that the model holds is known, and a pair takes part in a step if its B has a gradient. The
    model is searched at the start of a fit and of each epoch: a scaling or an adapter that changes inside an epoch acts
    from the next one.

    Attributes:
        methods: for each optimizer, what trains its pairs; nearly every run has one.
        search: the pairs, and what was left out, as they were at the last search.
        module_window: batches of an optimizer step, if this is the callback of a module that takes the passes itself.

    Args:
        method: with its settings.
    """

    module_window: int | None = None

    def __init__(self, method: StepMethod) -> None:
        self.methods = [method]
        # None while no Trainer is known: Lightning and users read state_key before a fit, too.
        self._is_alone: bool | None = None
        self._last_trainer: weakref.ref[Trainer] | None = None
        self._begin()

    def _begin(self) -> None:
        """Set everything that belongs to one fit to what it is before the fit."""
        self.search = PairSearch([], [])
        self._assignment = PairAssignment([], [], [], [])
        self._loaded: dict[str, Any] | None = None
        self._is_training = False
        self._is_stale = False
        self._passes: Passes | None = None
        self._patches = ExitStack()
        self._warnings = WarningCache()

    def __getstate__(self) -> dict[str, Any]:
        """Give settings and state: a copy or pickle that is made in the middle of a fit has no part in that fit."""
        blank = object.__new__(type(self))
        blank.__dict__.update(self.__dict__)
        blank._begin()
        blank.methods = [self.method.for_another_optimizer()]
        blank._loaded = self.state_dict()
        blank._last_trainer = None
        blank._is_alone = None
        return without_logging(blank)

    def __getattr__(self, name: str) -> Any:
        """Look up settings, such as ``beta``, in the method."""
        # Not while a copy is being made, which has no attributes at first.
        if name.startswith("_") or "methods" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.method, name)

    @property
    def method(self) -> StepMethod:
        """The method of the first optimizer that trains pairs."""
        return next((method for method in self.methods if method.pairs), self.methods[0])

    @property
    def title(self) -> str:
        """The name that users write, for messages."""
        return self.method.title

    @property
    def rho(self) -> RhoSchedule:
        """The size of the perturbation. A number that is assigned becomes a constant schedule."""
        return self.method.rho

    @rho.setter
    def rho(self, rho: float | RhoSchedule) -> None:
        for method in self.methods:
            method.rho = rho if isinstance(rho, RhoSchedule) else ConstantRho(float(rho))

    @property
    def step(self) -> int:
        """Steps that the pairs' optimizer has taken, from 0; steps that a loss scaler skipped count."""
        return self.method.step

    @property
    def perturbation(self) -> Perturbation | None:
        """The perturbation of B; None for a method without one, or while there is no pair."""
        return getattr(self.method, "perturbation", None)

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Refuse transformers' Trainer, which calls this first and has other hooks."""
        problem = (
            "this is a callback of Lightning's Trainer. With that of transformers write, after the Trainer is made and "
            "before train(): lightning_flatlora.loops.EFMLoRA(trainer.model, trainer.create_optimizer(), rho=...)"
        )
        refuse(self, [problem])

    # -- the start: everything that is wrong is reported in one message, before anything is changed

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_alone = self._is_alone_in(trainer)
        if stage != "fit":
            return
        # A fit that was killed between hooks, as in a notebook, may have left something behind.
        self.uninstall()
        # A further fit of the same Trainer continues. Not by trainer.ckpt_path, which is still that of the last run.
        last = self._last_trainer() if self._last_trainer else None
        continues = last is trainer and trainer.global_step > 0
        self._begin()
        before, self.methods = self.methods, [method.for_another_optimizer() for method in self.methods]
        if continues:
            # The optimizers are new, and Ê starts again with them, but schedules continue from the old count.
            for method, old in zip(self.methods, before, strict=True):
                method.step, method.initial_lr = old.step, old.initial_lr
        refuse(self, strategies.problems_before_wrapping(trainer))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while len(self.methods) < len(trainer.optimizers):
            self.methods.append(self.methods[0].for_another_optimizer())
        del self.methods[max(len(trainer.optimizers), 1) :]
        for method, optimizer in zip(self.methods, trainer.optimizers, strict=False):
            method.optimizer = optimizer
        problems = self.configuration_problems(trainer, pl_module)
        try:
            self._find(trainer, pl_module)
        except ValueError as error:
            problems.append(str(error))
        else:
            problems += self._pair_problems(trainer, pl_module)
        if self.method.lacks_horizon:
            problems += horizon_problems(self.method.argument, trainer, pl_module)
        refuse(self, problems)
        left_out = self.search.left_out if self.method.left_out is None else self.method.left_out
        if left_out:
            rank_zero_info(f"{self.title} leaves unperturbed: " + "; ".join(left_out))
        self.install(trainer, pl_module)
        self._patches.callback(strategies.skip_clipping_without_gradients(trainer))

    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """List what can't work about the trainer and its other callbacks; subclasses add their own."""
        method = self.methods[0]
        problems = strategies.strategy_problems(trainer, window_of(trainer), method.sync_ascent, method.works_sharded)
        rivals = []
        for callback in callbacks_of(trainer):
            if isinstance(callback, MethodCallback) and callback is not self and not self.works_beside(callback):
                rivals.append(type(callback).__name__)
        if rivals:
            problems.append(f"it perturbs the same weights as {', '.join(rivals)} beside it: keep one")
        if method.takes_two_passes and self.module_window is None:
            problems += _two_pass_problems(pl_module)
        return problems + optimizer_problems(trainer.optimizers)

    def works_beside(self, other: "MethodCallback") -> bool:
        """Say whether another of these callbacks may run in the same trainer."""
        return False

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare layers and strategy for the first step, after all checks."""
        for method in self.methods:
            method.install()
        kind: type[Passes] = TwoPasses if self.method.takes_two_passes else OnePass
        self._passes = kind(self, trainer, self.methods, lambda: self.look_again(trainer, pl_module))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for method in self.methods:
            method.horizon = optimizer_steps(trainer)
        if self.method.lacks_horizon and math.isinf(self.method.horizon):
            refuse(self, [no_end(self.method.argument)])
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self._restore(state)
        # Next to EFMLoRA an FMLoRAModule's callback has no pairs and no count.
        is_in_use = bool(self.search.names) or not self.method.needs_pairs
        if is_in_use and self.step == 0 and trainer.global_step > 0 and self.method.lacks_horizon:
            rank_zero_warn(
                f"{self.title} was not part of this run until now, at step {trainer.global_step} of "
                f"{self.method.horizon:g}. {self.method.argument} begins at its own step 0 and will not come to its "
                "end: set its total_steps to the steps that are left"
            )
        # Not earlier: to restore an optimizer of FSDP2, PyTorch takes a step that changes nothing.
        if self._passes is not None:
            self._passes.watch_steps()
        self._is_training = True
        # Weakly, so that a callback kept for its results does not keep the trainer and the model alive.
        self._last_trainer = weakref.ref(trainer)

    # -- the pairs

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search the model, and give each method the pairs whose factors its optimizer holds.

        Raises:
            ValueError: there is no pair, or no adapter of the given name.
        """
        if not self.method.needs_pairs:
            return
        # If pairs may be unfrozen or activated later, a start without any is no error.
        may_come = self._may_come(trainer)
        method = self.methods[0]
        self.search = search_pairs(pl_module, method.adapter_name, method.finder, must_be_active=not may_come)
        if not self.search.pairs and not (may_come and self.search.resting) and not self._is_training:
            raise NoPairsError(nothing_found(pl_module, method.adapter_name, method.finder, self.search))
        self._assignment = assign_pairs(self.search, trainer.optimizers)
        for method, pairs in zip(self.methods, self._assignment.pairs, strict=False):
            method.follow(pairs, pl_module, trainer.strategy.model or pl_module)
        if sum(bool(method.pairs) for method in self.methods) > 1:
            for index, method in enumerate(self.methods):
                method.place = f" of optimizer {index}"

    def _pair_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        problems = merge_problems(pl_module) + self._assignment_problems(trainer)
        for method in self.methods:
            problems += method.pair_problems()
        return problems

    def _assignment_problems(self, trainer: Trainer) -> list[str]:
        assignment = self._assignment
        problems = []
        if assignment.orphans and not self._may_come(trainer):
            problems.append(
                f"trainable LoRA factors, such as {assignment.orphans[0].name}, are in no optimizer: give them to it, "
                "or freeze them; if they join it later in the fit, let a BaseFinetuning callback do it"
            )
        several = [index for index, pairs in enumerate(assignment.pairs) if pairs]
        if assignment.spread:
            problems.append(
                f"the factors of pairs, {assignment.spread[0].name} among them, are spread over optimizers "
                f"{sorted(set(assignment.places))}: one optimizer must hold A and B of all of them"
            )
        elif len(several) > 1 and not self.method.takes_several_optimizers:
            problems.append(
                f"the pairs are spread over optimizers {several}: one optimizer must hold A and B of all of them, or "
                "use EFMLoRA, which follows the pairs of each optimizer"
            )
        return problems

    def _may_come(self, trainer: Trainer) -> bool:
        """Whether another callback has the task of unfreezing or activating pairs later."""
        return not self._is_alone_in(trainer) or unfreezes_later(trainer)

    def _is_alone_in(self, trainer: Trainer) -> bool:
        """Whether a Trainer has no other callback of this class."""
        return not any(type(other) is type(self) and other is not self for other in callbacks_of(trainer))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Searched at the first pass, since hooks of others may still change the model.
        self._is_stale = True

    def look_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search the model in the first batch of an epoch."""
        if not self._is_stale:
            return
        self._is_stale = False
        if not self.method.needs_pairs:
            return
        self._find(trainer, pl_module)
        for problem in self._assignment_problems(trainer):
            self._warn_once(f"{problem}. Until then these pairs are not perturbed")
        for method in self.methods:
            method.install()
            for problem in method.rate_problems():
                self._warn_once(f"{problem}. Until then the first group's is followed")

    def _warn_once(self, problem: str) -> None:
        # The same problem is found again in every epoch.
        self._warnings.warn(message(self, [problem]))

    # -- a step

    @override
    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for method in self.methods:
            method.forget_gradients()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._passes is not None:
            self._passes.check_gradient_is_first(pl_module, optimizer)
        method = self._method_of(trainer, optimizer)
        # Counted here, since no later hook says that the step was taken: steps that a scaler skips count, too.
        if method is not None and (method is self.method or method.takes_several_optimizers):
            method.before_step(watched_parameters(trainer, self.methods.index(method)))

    def _method_of(self, trainer: Trainer, optimizer: Any) -> StepMethod | None:
        """The method of an optimizer, as a hook receives it; None if it takes no real step."""
        if takes_no_step(trainer):
            return None
        # Only Lightning's wrapper is unpacked: with any other, the wrapper itself is in trainer.optimizers.
        if is_lightning(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        for method, own in zip(self.methods, trainer.optimizers, strict=False):
            if own is optimizer:
                return method
        return None

    # -- the end

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.method.needs_pairs:
            return
        if not self.method.pairs:
            what = "no pair is trained any more" if self.method.has_learned else "no pair has been trained so far"
            self._warn_once(
                f"{what}, so nothing is perturbed: every B is frozen, in no optimizer, or computed from other "
                "parameters, as by pruning. What is unfrozen and given to an optimizer later is perturbed from the "
                "next epoch on"
            )
        for method in self.methods:
            method.warn_without_gradient()
        steps_itself = not pl_module.automatic_optimization and module_window(trainer) is None
        steps = [method.step for method in self.methods if method.pairs]
        if steps and not any(steps) and steps_itself:
            rank_zero_warn(
                f"{type(self).__name__} has seen no optimizer step so far, so nothing was perturbed: step the "
                "optimizer that self.optimizers() gives, not the one inside it"
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        left = [pair.name for pair in self._assignment.orphans]
        if left and self._may_come(trainer) and self.method.pairs:
            self._warn_once(f"{len(left)} pairs, {left[0]} among them, came into no optimizer and were not perturbed")

    def uninstall(self) -> None:
        """Leave no trace on the model and the trainer; what a checkpoint needs stays."""
        self._is_training = False
        if self._passes is not None:
            self._passes.close()
            self._passes = None
        for method in self.methods:
            method.close()
        self._patches.close()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.uninstall()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.uninstall()
        self._is_alone = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.uninstall()
        # The next Trainer reads state_key before it calls any hook.
        self._is_alone = None

    # -- the state

    @property
    @override
    def state_key(self) -> str:
        """The class's name, and the adapter's if callbacks of one class share a Trainer with an adapter each."""
        adapter_name = self.methods[0].adapter_name
        if adapter_name is None or self._is_alone:
            return type(self).__qualname__
        return self._generate_state_key(adapter_name=adapter_name)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store a state that is saved after the fit under the key of the fit, where a resumed run looks for it."""
        states = checkpoint.get("callbacks", {})
        if self._is_alone is None and self.state_key in states and self._is_alone_in(trainer):
            states[type(self).__qualname__] = states.pop(self.state_key)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget how far the last fit came: the checkpoint brings its own count, or none if it is another method's."""
        # Called in an evaluation too, after which a fit may go on from where the last one was.
        if trainer.state.fn == "fit":
            for method in self.methods:
                method.step, method.initial_lr = 0, None

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        # The state lies at the top level in a run with one optimizer, as in a loop's.
        state = {**self.method.state_dict(), "settings": self.method.settings()}
        if len(self.methods) > 1:
            state = {"settings": self.method.settings(), "step": self.step}
            state["optimizers"] = [method.state_dict() for method in self.methods]
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A tuner restores the state that it began with in the middle of a fit.
        if self._is_training:
            self._restore(state_dict)
        else:  # the pairs are not known yet
            self._loaded = state_dict

    def _restore(self, state: dict[str, Any]) -> None:
        problems = self.method.settings_problems(state["settings"])
        states = state.get("optimizers", [state])
        if len(states) not in (1, len(self.methods)):
            problems.append(
                f"the checkpoint holds the state of {len(states)} optimizers, and this run has "
                f"{len(self.methods)}: configure as many as it had, or start a new run from the weights"
            )
        refuse(self, problems)
        methods = [self.method] if len(states) == 1 else self.methods
        for method, of_method in zip(methods, states, strict=True):
            # Another optimizer's pairs have a state of their own.
            names = set(self.search.names)
            for other in self.methods:
                if other is not method:
                    names -= {pair.name for pair in other.pairs}
            method.load_state_dict(of_method, names)


def watched_parameters(trainer: Trainer, optimizer_index: int) -> list[nn.Parameter]:
    """List the parameters whose overflow makes a loss scaler skip the step; none if there is no scaler."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return []
    return parameters_of(trainer.optimizers[optimizer_index])


def unfreezes_later(trainer: Trainer) -> bool:
    """Say whether a callback has the task of unfreezing parameters in the middle of a fit."""
    return any(is_lightning(each, BaseFinetuning) for each in callbacks_of(trainer))


def _two_pass_problems(pl_module: LightningModule) -> list[str]:
    problems = []
    if not pl_module.automatic_optimization:
        problems.append(
            "a second pass can't be put into a training_step with manual optimization: "
            "use automatic optimization, or subclass FMLoRAModule, or use EFMLoRA"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        problems.append(
            "training_step(dataloader_iter) takes batches itself, so a batch can't be passed twice: "
            "write training_step(batch, batch_idx), or use EFMLoRA"
        )
    return problems
