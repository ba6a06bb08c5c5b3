"""What all methods share, baselines too: settings, the start, the step count, the end, and the state."""

import math
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora.callbacks.checks import message, strategy_problems, value_problems, wrapping_problems
from lightning_flatlora.callbacks.courses import Course
from lightning_flatlora.callbacks.finds_pairs import FindsPairs
from lightning_flatlora.callbacks.hidden_steps import refuse_hidden_steps
from lightning_flatlora.callbacks.horizon import horizon_problems, no_end, optimizer_steps
from lightning_flatlora.callbacks.value_clipping import skip_clipping_without_gradients
from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.lightning_names import MisconfigurationException, callbacks_of, is_lightning
from lightning_flatlora.schedules import ConstantRho, RhoSchedule


class FlatLoRACallback(FindsPairs):
    """Base of the callbacks that train LoRA pairs in a way of their own: it knows the pairs and the step, they the way.

    Attributes:
        rho: the size of the perturbation, constant or scheduled; ``size_name`` is the method's own word for it.
        size_name: the word that arguments and messages use for it.
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
        self._is_alone: bool | None = None
        self._last_trainer: weakref.ref[Trainer] | None = None
        self.begin()

    @override
    def begin(self) -> None:
        super().begin()
        self._horizon = math.inf
        self._loaded: dict[str, Any] | None = None
        self._is_training = False
        self._running = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """Settings and state: a copy or pickle that is made in the middle of a fit has no part in that fit."""
        blank = object.__new__(type(self))
        blank.__dict__.update(self.__dict__)
        blank.begin()
        blank._loaded, blank._last_trainer, blank._is_alone = self.state_dict(), None, None
        return without_logging(blank)

    # -- the start: everything that is wrong, in one message, before anything is touched

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._is_alone = self._is_alone_in(trainer)
        if stage != "fit":
            return
        self.uninstall()
        before = self.courses
        self.begin()
        if self._goes_on(trainer):  # the optimizers are new, and Ê with them; the count is not
            self.courses = [Course(each.index, each.step, each.initial_lr) for each in before]
        if problems := wrapping_problems(trainer):
            raise MisconfigurationException(message(self, problems))

    def _is_alone_in(self, trainer: Trainer) -> bool:
        """Whether no other callback of this class is in a Trainer."""
        return not any(type(other) is type(self) and other is not self for other in callbacks_of(trainer))

    def _goes_on(self, trainer: Trainer) -> bool:
        """Whether this fit goes on where the last one of the same Trainer ended; a checkpoint brings its own count."""
        last = self._last_trainer() if self._last_trainer else None
        return last is trainer and trainer.global_step > 0 and trainer.ckpt_path is None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = {course.index: course for course in self.courses}
        self.courses = [known.get(i, Course(i)) for i in range(max(len(trainer.optimizers), 1))]
        self._is_sharded = is_sharded(trainer.strategy.model)
        problems = self.configuration_problems(trainer, pl_module)
        problems += self.find(trainer, pl_module)
        if self._lacks_horizon:
            problems += horizon_problems(self._sized, trainer, pl_module, bool(module_drivers(trainer)))
        if problems:
            raise MisconfigurationException(message(self, problems))
        if self.search.left_out:
            rank_zero_info(f"{type(self).__name__} leaves unperturbed: " + "; ".join(self.search.left_out))
        self.install(trainer, pl_module)
        if is_lightning(trainer.strategy, FSDPStrategy):
            self._running.callback(skip_clipping_without_gradients(trainer))

    def configuration_problems(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """What about the trainer and its other callbacks can't work, one line each; subclasses add theirs."""
        problems = strategy_problems(trainer, window_of(trainer), self.sync_ascent, self.works_sharded)
        others = [
            type(callback).__name__
            for callback in callbacks_of(trainer)
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

    @override
    def rate_problems(self, trainer: Trainer) -> list[str]:
        """A size that follows the learning rate needs one, known to the host."""
        problems = []
        for course in self.courses if self.rho.needs_learning_rate else []:
            groups = self._groups(trainer, course)
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

    def _groups(self, trainer: Trainer, course: Course) -> list[dict[str, Any]]:
        followed = {id(p) for p in self.followed}
        groups = trainer.optimizers[course.index].param_groups if trainer.optimizers else []
        return [group for group in groups if any(id(p) in followed for p in group["params"])]

    @property
    def _lacks_horizon(self) -> bool:
        return self.rho.needs_horizon and getattr(self.rho, "total_steps", None) is None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._horizon = optimizer_steps(trainer, window_of(trainer))
        if self._lacks_horizon and math.isinf(self._horizon):
            raise MisconfigurationException(message(self, [no_end(self._sized)]))
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self._restore(loaded)
        # Not before: to restore an optimizer of FSDP2, PyTorch takes a step without a change.
        self._running.push(refuse_hidden_steps(trainer, trainer.optimizers, lambda o: self.refuse_step(trainer, o)))
        self._is_training = True
        self._last_trainer = weakref.ref(trainer)

    # -- which steps, which rho

    @property
    def is_refresh_step(self) -> bool:
        """Whether the coming step of the main course takes a fresh perturbation."""
        return self.refreshes(self.main)

    def refreshes(self, course: Course) -> bool:
        """Whether the coming step of a course takes a fresh perturbation."""
        return course.step >= self.start_step and (course.step - self.start_step) % self.every_n_steps == 0

    def current_rho(self, trainer: Trainer, course: Course | None = None) -> float:
        """The size (rho, or what the method calls it) of the coming step of a course; None takes the main one."""
        course = course or self.main
        groups = self._groups(trainer, course) if self.rho.needs_learning_rate else []
        if not groups:
            return self._checked(self.rho(course.step, self._horizon))
        group = groups[0]
        if not course.initial_lr:  # a warm-up written by hand may start at 0
            course.initial_lr = float(group.get("initial_lr", group["lr"]))
        share = group["lr"] / course.initial_lr if course.initial_lr else 0.0
        return self._checked(self.rho(course.step, self._horizon, share))

    def _checked(self, rho: float) -> float:
        if not 0 <= rho < math.inf:  # a schedule of the user's own
            raise MisconfigurationException(
                message(self, [f"{self._sized} must give a finite number >= 0, and gave {rho} at step {self.step}"])
            )
        return rho

    # -- the end

    def uninstall(self) -> None:
        """Leave no trace on the model and the trainer; what a checkpoint needs stays."""
        self._is_training = False
        self._running.close()

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
        self._is_alone = None  # the next Trainer asks for the key before it calls any hook

    # -- the state

    @property
    @override
    def state_key(self) -> str:
        """The class's name; with the adapter's where callbacks of one class share a Trainer, an adapter each."""
        if self.adapter_name is None or self._is_alone:
            return type(self).__qualname__
        return self._generate_state_key(adapter_name=self.adapter_name)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What is saved after the fit lies under the key that it has during the fit, which a resumed run looks for."""
        states = checkpoint.get("callbacks", {})
        if self._is_alone is None and self.state_key in states and self._is_alone_in(trainer):
            states[type(self).__qualname__] = states.pop(self.state_key)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        several = len(self.courses) > 1
        state = self.main.state_dict(self._keeps_perturbation and not several) | {"settings": self.settings()}
        if several:
            state["optimizers"] = [course.state_dict(self._keeps_perturbation) for course in self.courses]
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._is_training:  # a tuner goes back to where it began, in the middle of a fit
            self._restore(state_dict)
        else:  # the pairs are not known yet
            self._loaded = state_dict

    def settings(self) -> dict[str, Any]:
        """What a resumed run must not change, as arguments by name."""
        return {}

    @property
    def _keeps_perturbation(self) -> bool:
        """Whether a resumed run needs the perturbation."""
        return False

    def _restore(self, state: dict[str, Any]) -> None:
        problems = [
            f"{name} must be {state['settings'][name]!r} as in the checkpoint, got {value!r}: "
            "change it back, or start anew from the weights alone"
            for name, value in self.settings().items()
            if state["settings"][name] != value
        ]
        states = state.get("optimizers", [])
        if len(states) not in (0, len(self.courses)):
            problems.append(
                f"the checkpoint holds the state of {len(states)} optimizers, and this run has {len(self.courses)}: "
                "configure as many as it had, or start anew from the weights alone"
            )
        if problems:
            raise MisconfigurationException(message(self, problems))
        resting = self._watch.resting if self._watch is not None else []
        try:
            if states:
                for course, each in zip(self.courses, states, strict=True):
                    course.load_state_dict(each, resting)
            else:
                self.main.load_state_dict(state, resting)
        except ValueError as error:
            raise MisconfigurationException(message(self, [str(error)])) from error


def watched_parameters(trainer: Trainer, optimizer_index: int) -> list[nn.Parameter]:
    """The parameters whose overflow makes a loss scaler skip the step; none where there is no scaler."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return []
    return [p for group in trainer.optimizers[optimizer_index].param_groups for p in group["params"]]


def window_of(trainer: Trainer) -> int:
    """Batches of an optimizer step, as the trainer or an FMLoRAModule accumulates them."""
    return next((driver.window for driver in module_drivers(trainer) if driver.window), trainer.accumulate_grad_batches)


def module_drivers(trainer: Trainer) -> list[FlatLoRACallback]:
    """The driver of an FMLoRAModule among the callbacks, if the model is one."""
    ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, FlatLoRACallback)]
    return [callback for callback in ours if callback.is_module_driver]


def without_logging(callback: Callback) -> dict[str, Any]:
    """A callback's attributes without the methods that Lightning lends it for a fit, which hold the whole module."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}
