"""The base callback of every method: its hooks let the method do its work."""

from contextlib import ExitStack
from itertools import chain
from typing import Any, Generic

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks import strategies
from lightning_flatlora.callbacks.both_lightnings import callbacks_of
from lightning_flatlora.callbacks.logging import without_logging
from lightning_flatlora.callbacks.methods_of_fit import MethodsOfFit, S, unfreezes_later
from lightning_flatlora.callbacks.passes import OnePass, TwoPasses, takes_no_step, two_pass_problems
from lightning_flatlora.callbacks.training_step import horizon_problems, takes_passes_itself
from lightning_flatlora.methods.checks import optimizer_problems, refuse, say_start
from lightning_flatlora.methods.step_method import StepMethod, TwoPassStep
from lightning_flatlora.pairs.peft_pairs import merge_problems
from lightning_flatlora.perturbation.perturbation import Perturbation
from lightning_flatlora.schedules import RhoSchedule


class MethodCallback(Callback, Generic[S]):
    """Train the LoRA pairs of a LightningModule by a method.

    A pair takes part in a step if its B has a gradient. The model is searched for pairs at the start of a fit and of
    each epoch, so a scaling or an adapter that changes within an epoch takes effect in the next one.

    Settings other than rho belong to :attr:`method`, as ``callback.method.every_n_steps``; assigning them here is
    refused.

    Attributes:
        per_optimizer: one method for each optimizer, with the pairs that it trains.
        passes: wraps the strategy's methods; None outside of a fit.
        patches: undo at the end of the fit everything that was put on the trainer for it.

    Args:
        method: the method, with its settings.
    """

    def __init__(self, method: S) -> None:
        self.per_optimizer = MethodsOfFit(method)
        self._begin()

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse settings of the method, such as ``beta``, which would change nothing here."""
        owner = vars(self).get("per_optimizer")
        if owner is not None and hasattr(owner.first, name) and not hasattr(type(self), name):
            raise AttributeError(f"{name} belongs to the method: assign to callback.method.{name}")
        super().__setattr__(name, value)

    def _begin(self) -> None:
        """Reset everything that belongs to one fit."""
        self._loaded: dict[str, Any] | None = None
        self.passes: Any = None
        self.patches = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """Return settings and state without the fit: a copy or pickle made in mid-fit takes no part in that fit."""
        blank = object.__new__(type(self))
        blank.__dict__.update(self.__dict__)
        blank._begin()
        blank.per_optimizer = MethodsOfFit(self.method.for_another_optimizer())
        blank._loaded = self.state_dict()
        return without_logging(blank)

    @property
    def methods(self) -> list[S]:
        """The method of each optimizer; nearly every run has only one."""
        return self.per_optimizer.methods

    @property
    def method(self) -> S:
        """The method of the first optimizer that trains pairs."""
        return self.per_optimizer.first

    @property
    def perturbing_method(self) -> StepMethod:
        """The method that gives the passes their perturbation."""
        return self.method

    @property
    def rho(self) -> float | RhoSchedule | None:
        """The size of the perturbation as it was given; a newly assigned one takes effect in the next step."""
        return self.method.rho

    @rho.setter
    def rho(self, rho: float | RhoSchedule) -> None:
        refuse(self.method, self.method.rho_problems(rho))
        for method in self.methods:
            method.rho = rho

    @property
    def current_rho(self) -> float:
        """The value of rho in the coming optimizer step."""
        return self.method.current_rho

    @property
    def step(self) -> int:
        """Steps that the pairs' optimizer has taken, from 0; steps that a loss scaler skipped count."""
        return self.method.step

    @property
    def perturbation(self) -> Perturbation | None:
        """The perturbation of the pairs' B; None for a method without one."""
        return self.method.perturbation

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Refuse transformers' Trainer, which calls this hook first and has different ones."""
        name = self.method.title
        problem = f"this is Lightning's: for transformers' Trainer, from lightning_flatlora.transformers import {name}"
        refuse(self.method, [problem])

    # -- the start: all problems are reported in one message, before anything is changed

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clean up after an interrupted fit when a fit or an evaluation begins, and start a new fit."""
        if self._visits(trainer):
            return
        # A fit that was interrupted between hooks, as in a notebook, may have left something behind.
        self.uninstall()
        if stage != "fit":
            return
        self._begin()
        # Another fit of the same Trainer continues the count. A checkpoint is loaded later, and brings its own.
        self.per_optimizer.begin(continues=trainer.global_step > 0)
        refuse(self.method, strategies.problems_before_wrapping(trainer))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the pairs when a fit starts, report all problems in one error, and prepare the layers."""
        self.per_optimizer.take_optimizers(trainer.optimizers)
        alike = [each for each in callbacks_of(trainer) if type(each) is type(self)]
        # If each adapter has its callback, they may be activated one after another.
        self.per_optimizer.may_come = len(alike) > 1 or unfreezes_later(trainer)
        problems = self.configuration_problems(trainer, pl_module)
        try:
            self.per_optimizer.find(trainer, pl_module, must_be_there=True)
        except ValueError as error:
            problems.append(str(error))
        else:
            problems += merge_problems(pl_module) + self.per_optimizer.assignment_problems()
            for method in self.methods:
                problems += method.pair_problems()
        if self.method.lacks_horizon:
            problems += horizon_problems(self.method.argument, trainer, pl_module)
        refuse(self.method, problems)
        pairs = list(chain.from_iterable(method.pairs for method in self.methods))
        say_start(self.method, pairs, self.per_optimizer.search)
        for method in self.methods:
            method.loss_scaler = strategies.loss_scaler_of(trainer)
            method.install()
        kind = TwoPasses if isinstance(self.method, TwoPassStep) else OnePass
        self.passes = kind(self, trainer)
        self.patches.callback(strategies.skip_clipping_without_gradients(trainer))

    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """List why the method can't work with the trainer and its other callbacks; subclasses add their reasons."""
        method = self.methods[0]
        takes_two_passes = isinstance(method, TwoPassStep)
        problems = strategies.strategy_problems(trainer, method, takes_two_passes)
        others = [each for each in callbacks_of(trainer) if isinstance(each, MethodCallback) and each is not self]
        rivals = [type(each).__name__ for each in others if not (self.works_beside(each) or each.works_beside(self))]
        if rivals:
            problems.append(f"it perturbs the same weights as {', '.join(rivals)}: keep one")
        if takes_two_passes and not takes_passes_itself(pl_module):
            problems += two_pass_problems(pl_module)
        return problems + optimizer_problems(trainer.optimizers)

    def works_beside(self, other: "MethodCallback[Any]") -> bool:
        """Say whether another method's callback may run in the same trainer; it suffices if one of the two says so."""
        return False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a checkpoint's state and the length of the run when training starts, once the loaders are set up."""
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self.per_optimizer.load_state_dict(state)
        self.per_optimizer.set_horizon(trainer)
        # Not earlier: to restore an optimizer of FSDP2, PyTorch takes a step that changes nothing.
        self.passes.watch_steps()

    # -- the pairs

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the first batch of the epoch search the model again."""
        # The search waits for the first pass, since other callbacks' hooks may still change the model.
        self.passes.is_stale = True

    def look_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search the model in the first batch of an epoch."""
        if self.passes.is_stale:
            self.passes.is_stale = False
            self.per_optimizer.find(trainer, pl_module)
            self.per_optimizer.install_again()
            self.passes.look_again()

    # -- a step

    @override
    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients that the methods hold, before gradients are cleared."""
        for method in self.methods:
            method.forget_gradients()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the method use the complete gradients, and count the step, before an optimizer steps."""
        self.passes.check_gradient_is_first(optimizer)
        if not strategies.completes_window(trainer.strategy):
            return
        method = self.methods[trainer.optimizers.index(optimizer)]
        is_used = method is self.method or method.takes_several_optimizers
        # Counted here, since no later hook says that the step was taken: steps that a scaler skips count too.
        if is_used and not takes_no_step(trainer):
            method.before_step()

    # -- the end

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn at the end of an epoch if nothing was perturbed."""
        self.per_optimizer.warn_without_effect()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn at the end of training about pairs that never came into an optimizer."""
        # Another callback was expected to give these to an optimizer.
        left = [pair.name for pair in self.per_optimizer.assignment.orphans]
        if left and self.per_optimizer.may_come and self.method.pairs:
            self.method.warn(f"{len(left)} pairs, such as {left[0]}, came into no optimizer and were not perturbed")

    def uninstall(self) -> None:
        """Leave no trace on the model and the trainer, but keep the state that a checkpoint needs."""
        self.patches.close()
        # The passes hold the trainer, and with it the model and a batch.
        self.passes = None
        for method in self.methods:
            method.close()

    def _visits(self, trainer: Trainer) -> bool:
        """Say whether another Trainer evaluates the module in the middle of this fit, such as from a hook."""
        return self.passes is not None and self.passes.trainer is not trainer and trainer.state.fn != "fit"

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Leave no trace on the model and the trainer when a run ends, also by an error or Ctrl-C."""
        if not self._visits(trainer):
            self.uninstall()

    on_exception = teardown

    # -- the state

    @property
    @override
    def state_key(self) -> str:
        """The class's name, and the adapter's if given, since several callbacks of one class may share a Trainer."""
        adapter_name = self.methods[0].adapter_name
        if adapter_name is None:
            return type(self).__qualname__
        return self._generate_state_key(adapter_name=adapter_name)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Reset the count of the last fit: the checkpoint brings its own, or none if it is of another method."""
        # Also called in an evaluation, after which a fit may continue from where the last one ended.
        if trainer.state.fn != "fit":
            return
        for method in self.methods:
            method.step, method.initial_lr = 0, None
        saved = {key for key in checkpoint.get("callbacks", {}) if key.split("{")[0] == type(self).__qualname__}
        unclaimed = saved.difference(each.state_key for each in callbacks_of(trainer))
        if unclaimed and self.state_key not in saved:
            problem = (
                f"the checkpoint holds the state of {min(unclaimed)}, but this is {self.state_key}: give that run's "
                "adapter_name, or start a new run from the weights"
            )
            refuse(self.method, [problem])

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of all methods when a checkpoint is saved."""
        return self.per_optimizer.state_dict() if self._loaded is None else self._loaded

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a loaded checkpoint's state until training starts."""
        # The pairs are known only in a fit. In the middle of one a tuner restores the state from before it began.
        if self.passes is not None:
            self.per_optimizer.load_state_dict(state_dict)
        else:
            self._loaded = state_dict
