"""The callback under every method: when its hooks are called, the method does its work."""

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

    Every product s B A that the model holds is known, and a pair takes part in a step if its B has a gradient. The
    model is searched at the start of a fit and of each epoch: a scaling or an adapter that changes inside an epoch acts
    from the next one.

    Settings other than rho are those of :attr:`method`, as ``callback.method.every_n_steps``; here they are refused.

    Attributes:
        per_optimizer: the methods of the optimizers, and the pairs that they train.
        passes: what wraps the strategy's methods; None outside of a fit.
        patches: end with the fit what is put on the trainer for it.

    Args:
        method: with its settings.
    """

    def __init__(self, method: S) -> None:
        self.per_optimizer = MethodsOfFit(method)
        self._begin()

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse what is the method's, such as ``beta``, and would change nothing here."""
        owner = vars(self).get("per_optimizer")
        if owner is not None and hasattr(owner.first, name) and not hasattr(type(self), name):
            raise AttributeError(f"{name} belongs to the method: assign to callback.method.{name}")
        super().__setattr__(name, value)

    def _begin(self) -> None:
        """Set everything that belongs to one fit to what it is before the fit."""
        self._loaded: dict[str, Any] | None = None
        self.passes: Any = None
        self.patches = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """Give settings and state: a copy or pickle that is made in the middle of a fit has no part in that fit."""
        blank = object.__new__(type(self))
        blank.__dict__.update(self.__dict__)
        blank._begin()
        blank.per_optimizer = MethodsOfFit(self.method.for_another_optimizer())
        blank._loaded = self.state_dict()
        return without_logging(blank)

    @property
    def methods(self) -> list[S]:
        """For each optimizer, what trains its pairs; nearly every run has one."""
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
        """The size of the perturbation as it was given; one that is assigned acts from the next step on."""
        return self.method.rho

    @rho.setter
    def rho(self, rho: float | RhoSchedule) -> None:
        refuse(self.method, self.method.rho_problems(rho))
        for method in self.methods:
            method.rho = rho

    @property
    def current_rho(self) -> float:
        """The number that rho is in the coming optimizer step."""
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
        """Refuse transformers' Trainer, which calls this first and has other hooks."""
        problem = (
            "this is a callback of Lightning's Trainer. With that of transformers write, after the Trainer is made and "
            "before train(): lightning_flatlora.loops.EFMLoRA(trainer.model, trainer.create_optimizer(), rho=...)"
        )
        refuse(self.method, [problem])

    # -- the start: everything that is wrong is reported in one message, before anything is changed

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End, when a fit or an evaluation begins, what an interrupted fit has left, and start a new one."""
        if self._visits(trainer):
            return
        # A fit that was killed between hooks, as in a notebook, may have left something behind.
        self.uninstall()
        if stage != "fit":
            return
        self._begin()
        # A further fit of the same Trainer continues. A checkpoint comes later, and brings its own count.
        self.per_optimizer.begin(continues=trainer.global_step > 0)
        refuse(self.method, strategies.problems_before_wrapping(trainer))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the pairs when a fit starts, report all problems in one error, and prepare the layers."""
        self.per_optimizer.take_optimizers(trainer.optimizers)
        alike = [each for each in callbacks_of(trainer) if type(each) is type(self)]
        # Adapters that have a callback each may be activated in turn.
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
            method.is_skipped_on_overflow = getattr(trainer.precision_plugin, "scaler", None) is not None
            method.install()
        kind = TwoPasses if isinstance(self.method, TwoPassStep) else OnePass
        self.passes = kind(self, trainer)
        self.patches.callback(strategies.skip_clipping_without_gradients(trainer))

    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """List what can't work about the trainer and its other callbacks; subclasses add their own."""
        method = self.methods[0]
        takes_two_passes = isinstance(method, TwoPassStep)
        sync_ascent = not isinstance(method, TwoPassStep) or method.sync_ascent
        problems = strategies.strategy_problems(trainer, sync_ascent, method.works_sharded)
        others = [each for each in callbacks_of(trainer) if isinstance(each, MethodCallback) and each is not self]
        rivals = [type(each).__name__ for each in others if not (self.works_beside(each) or each.works_beside(self))]
        if rivals:
            problems.append(f"it perturbs the weights that {', '.join(rivals)} perturbs too: keep one")
        if takes_two_passes and not takes_passes_itself(pl_module):
            problems += two_pass_problems(pl_module)
        return problems + optimizer_problems(trainer.optimizers)

    def works_beside(self, other: "MethodCallback[Any]") -> bool:
        """Say whether another of these callbacks may run in the same trainer; one of the two must say so."""
        return False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take a checkpoint's state and the length of the run when training starts, with loaders set up."""
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self.per_optimizer.load_state_dict(state)
        self.per_optimizer.set_horizon(trainer)
        # Not earlier: to restore an optimizer of FSDP2, PyTorch takes a step that changes nothing.
        self.passes.watch_steps()

    # -- the pairs

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the model searched again in the first batch of an epoch that starts."""
        # Searched at the first pass, since hooks of others may still change the model.
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
        """Let the method use and count the gradients, which are complete, before an optimizer steps."""
        self.passes.check_gradient_is_first(optimizer)
        method = self.methods[trainer.optimizers.index(optimizer)]
        is_used = method is self.method or method.takes_several_optimizers
        # Counted here, since no later hook says that the step was taken: steps that a scaler skips count, too.
        if is_used and not takes_no_step(trainer):
            method.before_step()

    # -- the end

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn, when an epoch ends, if nothing was perturbed."""
        self.per_optimizer.warn_without_effect()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn, when training ends, of pairs that came into no optimizer."""
        # What another callback was to give to an optimizer.
        left = [pair.name for pair in self.per_optimizer.assignment.orphans]
        if left and self.per_optimizer.may_come and self.method.pairs:
            self.method.warn(f"{len(left)} pairs, {left[0]} among them, came into no optimizer and were not perturbed")

    def uninstall(self) -> None:
        """Leave no trace on the model and the trainer; what a checkpoint needs stays."""
        self.patches.close()
        # They hold the trainer, and with it the model and a batch.
        self.passes = None
        for method in self.methods:
            method.close()

    def _visits(self, trainer: Trainer) -> bool:
        """Say whether another Trainer evaluates the module in the middle of this fit, as from one of its hooks."""
        return self.passes is not None and self.passes.trainer is not trainer and trainer.state.fn != "fit"

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no trace on the model and the trainer when an error or Ctrl-C ends a run."""
        if not self._visits(trainer):
            self.uninstall()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no trace on the model and the trainer when a run ends."""
        if not self._visits(trainer):
            self.uninstall()

    # -- the state

    @property
    @override
    def state_key(self) -> str:
        """The class's name, with that of the adapter if one was named: callbacks of one class may share a Trainer."""
        adapter_name = self.methods[0].adapter_name
        if adapter_name is None:
            return type(self).__qualname__
        return self._generate_state_key(adapter_name=adapter_name)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget how far the last fit came: the checkpoint brings its own count, or none if it is another method's."""
        # Called in an evaluation too, after which a fit may go on from where the last one was.
        if trainer.state.fn != "fit":
            return
        for method in self.methods:
            method.step, method.initial_lr = 0, None
        saved = {key for key in checkpoint.get("callbacks", {}) if key.split("{")[0] == type(self).__qualname__}
        unclaimed = saved.difference(each.state_key for each in callbacks_of(trainer))
        if unclaimed and self.state_key not in saved:
            problem = (
                f"the checkpoint holds the state of {min(unclaimed)}, and this is {self.state_key}: give the "
                "adapter_name that it had, or start a new run from the weights"
            )
            refuse(self.method, [problem])

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of all methods when a checkpoint is saved."""
        return self.per_optimizer.state_dict() if self._loaded is None else self._loaded

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint that is loaded until training starts."""
        # The pairs are known in a fit only, in the middle of which a tuner restores the state that it began with.
        if self.passes is not None:
            self.per_optimizer.load_state_dict(state_dict)
        else:
            self._loaded = state_dict
