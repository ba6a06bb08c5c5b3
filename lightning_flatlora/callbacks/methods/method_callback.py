"""What all methods share, baselines included: settings, the start, the end, and the state in checkpoints."""

import weakref
from contextlib import ExitStack
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks import strategies
from lightning_flatlora.callbacks.methods.checks import (
    SEVERAL_GRADIENTS,
    changed_settings,
    message,
    optimizer_problems,
    refuse,
    value_problems,
    written_name,
)
from lightning_flatlora.callbacks.methods.gradients import parameters_of
from lightning_flatlora.callbacks.methods.hidden_steps import refuse_hidden_steps
from lightning_flatlora.callbacks.methods.module_passes import window_of
from lightning_flatlora.callbacks.methods.pair_groups import PairGroup
from lightning_flatlora.callbacks.methods.scheduled_size import ScheduledSize
from lightning_flatlora.callbacks.patches import without_logging
from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.lightning_names import MisconfigurationException, callbacks_of
from lightning_flatlora.lora_pair import Finder
from lightning_flatlora.schedules import ConstantRho, RhoSchedule


class MethodCallback(ScheduledSize):
    """Base of the callbacks that train LoRA pairs by some method: subclasses say how a step's gradient is taken.

    Attributes:
        sync_ascent: whether the ascent's gradient is averaged over the ranks.
        averages: whether the perturbation lasts from step to step, so that a checkpoint must hold it.
        works_sharded: whether the method can work where each rank holds a part of a parameter (FSDP).
    """

    averages: ClassVar[bool] = False
    works_sharded: ClassVar[bool] = True

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        start_step: int = 0,
        every_n_steps: int = 1,
        adapter_name: str | None = None,
        finder: Finder | None = None,
        sync_ascent: bool = True,
    ) -> None:
        problems = value_problems(self.size_name, rho, start_step, every_n_steps, adapter_name, finder)
        problems += self.argument_problems()
        refuse(self, problems)
        self.rho = rho
        self.start_step = start_step
        self.every_n_steps = every_n_steps
        self.adapter_name = adapter_name
        self.finder = finder
        self.sync_ascent = sync_ascent
        # None where no Trainer is known: Lightning and users read state_key before a fit, too.
        self._is_alone: bool | None = None
        self._last_trainer: weakref.ref[Trainer] | None = None
        self.begin()

    def argument_problems(self) -> list[str]:
        """What is wrong with a subclass's own arguments, which it has stored before this class's ``__init__``."""
        return []

    @property
    def rho(self) -> RhoSchedule:
        """The size under the name that most methods give it. A number that is assigned becomes a constant schedule."""
        return self.size

    @rho.setter
    def rho(self, size: float | RhoSchedule) -> None:
        self.size = size if isinstance(size, RhoSchedule) else ConstantRho(float(size))

    @override
    def begin(self) -> None:
        super().begin()
        self._loaded: dict[str, Any] | None = None
        self._is_training = False
        self._has_gradient = False
        self._patches = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """Settings and state: a copy or pickle that is made in the middle of a fit has no part in that fit."""
        blank = object.__new__(type(self))
        blank.__dict__.update(self.__dict__)
        blank.begin()
        blank._loaded = self.state_dict()
        blank._last_trainer = None
        blank._is_alone = None
        return without_logging(blank)

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """What transformers' Trainer calls first: refuse it, since its callbacks have other hooks."""
        problem = (
            "this is a callback of Lightning's Trainer: that of transformers takes "
            "lightning_flatlora.transformers_trainer.EFMLoRA, and docs/other_loops.md shows a trainer for FMLoRA"
        )
        refuse(self, [problem])

    # -- the start: everything that is wrong is reported in one message, before anything is changed

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_alone = self.is_alone_in(trainer)
        if stage != "fit":
            return
        # A fit that was killed between hooks, as in a notebook, may have left something behind.
        self.uninstall()
        previous = self.pair_groups
        self.begin()
        if self._continues(trainer):
            # The optimizers are new, and Ê starts anew with them, but schedules continue from the old count.
            self.pair_groups = [PairGroup(each.index, each.step, each.initial_lr) for each in previous]
        refuse(self, strategies.problems_before_wrapping(trainer))

    def _continues(self, trainer: Trainer) -> bool:
        """Whether this fit continues the last one of the same Trainer."""
        # Not by trainer.ckpt_path, which is still that of the last run here: a checkpoint is restored after the setup.
        last = self._last_trainer() if self._last_trainer else None
        return last is trainer and trainer.global_step > 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Groups of the last fit keep their counts, and an optimizer that is new gets a group that starts at 0.
        known = {pair_group.index: pair_group for pair_group in self.pair_groups}
        count = max(len(trainer.optimizers), 1)
        self.pair_groups = [known.get(index, PairGroup(index)) for index in range(count)]
        self._is_sharded = is_sharded(trainer.strategy.model)
        problems = self.configuration_problems(trainer, pl_module)
        try:
            self.find(trainer, pl_module)
        except ValueError as error:
            problems.append(str(error))
        else:
            problems += self.pair_problems(trainer)
        problems += self.horizon_problems(trainer, pl_module)
        refuse(self, problems)
        if self.search.left_out:
            rank_zero_info(f"{written_name(self)} leaves unperturbed: " + "; ".join(self.search.left_out))
        self.install(trainer, pl_module)
        self._patches.callback(strategies.skip_clipping_without_gradients(trainer))

    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """What can't work about the trainer and its other callbacks, one line each; subclasses add their own."""
        problems = strategies.strategy_problems(trainer, window_of(trainer), self.sync_ascent, self.works_sharded)
        rivals = []
        for callback in callbacks_of(trainer):
            if isinstance(callback, MethodCallback) and callback is not self and not self.works_beside(callback):
                rivals.append(type(callback).__name__)
        if rivals:
            problems.append(f"it perturbs the same weights as {', '.join(rivals)} beside it: keep one")
        return problems + optimizer_problems(trainer.optimizers)

    def works_beside(self, other: "MethodCallback") -> bool:
        """Whether another of these callbacks may run in the same trainer."""
        return False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.set_horizon(trainer)
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self._restore(state)
        self.warn_of_late_start(trainer)
        # Not earlier: to restore an optimizer of FSDP2, PyTorch takes a step that changes nothing.
        self._patches.push(refuse_hidden_steps(trainer, lambda optimizer: self.refuse_step(trainer, optimizer)))
        self._is_training = True
        # Weakly, so that a callback kept for its results does not keep the trainer and the model alive.
        self._last_trainer = weakref.ref(trainer)

    # -- a batch

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Here and not at the end of the last batch, which an error may have taken away.
        self._has_gradient = False

    def check_gradient_is_first(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Refuse an optimizer that calls its closure again within a step, as SAM and other searches along a line do.

        To be called in on_before_optimizer_step. No class says it of itself except LBFGS. In manual optimization a
        training_step may take as many steps as it likes.
        """
        if self._has_gradient and pl_module.automatic_optimization:
            refuse(self, [f"{type(optimizer).__name__} {SEVERAL_GRADIENTS}"])
        self._has_gradient = True

    # -- the end of a batch, however it comes, and of the fit

    def end_batch(self) -> None:
        """Leave no trace of the batch: it may have ended early, and there may have been none."""

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.end_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end_batch()
        super().on_train_epoch_end(trainer, pl_module)

    def uninstall(self) -> None:
        """Leave no trace on the model and the trainer; what a checkpoint needs stays."""
        self.end_batch()
        self._is_training = False
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
        """The class's name, and the adapter's where callbacks of one class share a Trainer with an adapter each."""
        if self.adapter_name is None or self._is_alone:
            return type(self).__qualname__
        return self._generate_state_key(adapter_name=self.adapter_name)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store a state that is saved after the fit under the key of the fit, where a resumed run looks for it."""
        states = checkpoint.get("callbacks", {})
        if self._is_alone is None and self.state_key in states and self.is_alone_in(trainer):
            states[type(self).__qualname__] = states.pop(self.state_key)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Forget how far the last fit came: the checkpoint brings its own count, or none if it is another method's."""
        # Called in an evaluation too, after which a fit may go on from where the last one was.
        if trainer.state.fn != "fit":
            return
        for pair_group in self.pair_groups:
            pair_group.step, pair_group.initial_lr = 0, None

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        several = len(self.pair_groups) > 1
        # The main group's state lies at the top level, where it also is in a run with one optimizer.
        state = self.main_group.state_dict(self.averages and not several)
        state["settings"] = self.settings()
        if several:
            state["optimizers"] = [each.state_dict(self.averages) for each in self.pair_groups]
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A tuner restores the state that it began with in the middle of a fit.
        if self._is_training:
            self._restore(state_dict)
        else:  # the pairs are not known yet
            self._loaded = state_dict

    def settings(self) -> dict[str, Any]:
        """What a resumed run must not change, as arguments by name."""
        return {}

    def _restore(self, state: dict[str, Any]) -> None:
        refuse(self, self._state_problems(state))
        several = state.get("optimizers")
        pair_groups = self.pair_groups if several else [self.main_group]
        try:
            for pair_group, group_state in zip(pair_groups, several or [state], strict=True):
                pair_group.load_state_dict(group_state, self.search.resting)
        except ValueError as error:
            raise MisconfigurationException(message(self, [str(error)])) from error

    def _state_problems(self, state: dict[str, Any]) -> list[str]:
        """Why a checkpoint's state does not fit this run, one line for each reason."""
        problems = changed_settings(self.settings(), state["settings"])
        states = state.get("optimizers", [])
        if len(states) not in (0, len(self.pair_groups)):
            problems.append(
                f"the checkpoint holds the state of {len(states)} optimizers, and this run has "
                f"{len(self.pair_groups)}: configure as many as it had, or start anew from the weights alone"
            )
        return problems


def watched_parameters(trainer: Trainer, optimizer_index: int) -> list[nn.Parameter]:
    """The parameters whose overflow makes a loss scaler skip the step; none where there is no scaler."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return []
    return parameters_of(trainer.optimizers[optimizer_index])
