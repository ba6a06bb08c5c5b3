"""The part of a training step that all methods share, in any loop: one optimizer's pairs, rho, and the step count."""

import copy
import math
from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.amp import GradScaler
from typing_extensions import override

from lightning_flatlora.methods import checks
from lightning_flatlora.methods.optimizers import groups_of, parameters_of
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair
from lightning_flatlora.perturbation.perturbation import Perturbation
from lightning_flatlora.rank_zero import WarningCache
from lightning_flatlora.schedules import ConstantRho, RhoSchedule, is_size
from lightning_flatlora.sharding import Sharding, sharding_of

STEPS_UNTIL_WARNING = 100
"""Optimizer steps without any gradient of a pair after which the method warns that it had no effect."""


# Compared by identity; subclasses are such dataclasses too, with their own settings as fields.
@dataclass(eq=False, repr=False)
class StepMethod:
    """A method for the LoRA pairs of one optimizer; subclasses determine what is perturbed, and when.

    The training loop gives it the pairs (:meth:`take_pairs`), runs the passes of a step as described by
    :class:`OnePassStep` or :class:`TwoPassStep`, and calls :meth:`before_step` when a step's gradients are complete.

    Attributes:
        rho: the size of the perturbation as it was given: a number, or a schedule over optimizer steps.
        optimizer: the one that trains the pairs; only its groups are read.
        place: names the optimizer in messages, if there are several.
        pairs: those whose factors the optimizer holds. A pair takes part in a step if its B has a gradient.
        left_out: lines about the layers that the method leaves out; None if they are the search's.
        share_left_out: these layers' share of the pairs' trained parameters, from 0 to 1.
        step: optimizer steps taken so far, from 0.
        horizon: optimizer steps of the whole run, infinite if unknown.
        sharding: how the ranks share the pairs' factors.
        loss_scaler: skips a step with a gradient that is not finite; None if there is none. A loop's is unknown, and a
            disabled one stands for it.
        perturbation: that of the pairs' B; None for a method without one.

    The arguments are those of the callbacks, such as :class:`lightning_flatlora.FMLoRA`; the size is called rho here,
    even if users write ``rho_name``. Values out of range are refused, in one error together with the caller's
    ``more_problems``.
    """

    rho_name: ClassVar[str] = "rho"
    needs_pairs: ClassVar[bool] = True
    takes_several_optimizers: ClassVar[bool] = False
    works_sharded: ClassVar[bool] = True
    fixed: ClassVar[tuple[str, ...]] = ()

    rho: float | RhoSchedule | None
    _: KW_ONLY
    more_problems: InitVar[Sequence[str]] = ()
    start_step: int = 0
    every_n_steps: int = 1
    adapter_name: str | None = None
    finder: Finder | None = None
    perturbation: Perturbation | None = field(default=None, init=False)

    def __post_init__(self, more_problems: Sequence[str]) -> None:
        # All problems are collected, so that users see them in one run.
        problems = self.rho_problems(self.rho)
        problems += checks.integer_problems("start_step", self.start_step, least=0)
        problems += checks.integer_problems("every_n_steps", self.every_n_steps, least=1)
        checks.refuse(self, [*problems, *self.argument_problems(), *more_problems])
        self.reset()

    def rho_problems(self, rho: object) -> list[str]:
        """List what is wrong with a value of rho."""
        if rho is None and self.rho_name == "rho":
            return ["rho must be given: start from rho=0.05, and see the documentation's page 'Choosing rho'"]
        if isinstance(rho, RhoSchedule) or is_size(rho):
            return []
        return [f"{self.rho_name} must be a finite number >= 0 or a RhoSchedule, got {rho!r}"]

    @property
    def title(self) -> str:
        """The name of the method as users write it, for messages."""
        return type(self).__name__.removesuffix("Step")

    def argument_problems(self) -> list[str]:
        """List what is wrong with a subclass's own settings."""
        return []

    def reset(self) -> None:
        """Forget the pairs and the count of the last run; subclasses add their own."""
        self.optimizer: Any = None
        self.place = ""
        self.pairs: list[LoRAPair] = []
        self.left_out: list[str] | None = None
        self.share_left_out = 0.0
        self.step = 0
        self.horizon = math.inf
        self.loss_scaler: GradScaler | None = None
        self.initial_lr: float | None = None
        self.sharding = Sharding()
        # None as soon as a pair has had a gradient.
        self._steps_without_gradient: int | None = 0
        self._warnings = WarningCache()

    def for_another_optimizer(self) -> Self:
        """Make a method with these settings but without pairs."""
        other = copy.copy(self)
        other.reset()
        return other

    # -- the pairs

    def take_pairs(self, pairs: list[LoRAPair], module: nn.Module, wrapped: nn.Module) -> None:
        """Take the pairs that the optimizer holds now, maybe none; pairs that stay keep their state.

        ``wrapped`` is the module as wrapped by a strategy or a loop, which determines how ranks share factors. A
        ValueError means that the method can't work with any of these layers.
        """
        self.pairs = pairs
        self.sharding = sharding_of(wrapped)

    def install(self) -> None:
        """Prepare the layers to read perturbed weights, after all checks, and warn if changes may be rounded away."""
        self.warn(*checks.rounding_problems(self.rate_parameters))

    def close(self) -> None:
        """Leave no trace on the layers, but keep the state that a checkpoint needs."""

    # -- rho

    @property
    def schedule(self) -> RhoSchedule:
        """rho over optimizer steps."""
        # None was refused.
        return self.rho if isinstance(self.rho, RhoSchedule) else ConstantRho(float(self.rho))  # type: ignore[arg-type]

    @property
    def refreshes(self) -> bool:
        """Whether the coming step takes a fresh perturbation."""
        # Counted from start_step, so that it is the first step to perturb for any every_n_steps.
        since_start = self.step - self.start_step
        return since_start >= 0 and since_start % self.every_n_steps == 0

    @property
    def current_rho(self) -> float:
        """The value of rho in the coming step."""
        share = 1.0
        groups = self._rate_groups()
        if groups:
            # Not only for None: a hand-written warm-up may start at 0.
            if not self.initial_lr:
                self.initial_lr = float(groups[0].get("initial_lr", groups[0]["lr"]))
            # Relative to the initial value, so that a schedule starts at the given size.
            share = groups[0]["lr"] / self.initial_lr if self.initial_lr else 0.0
        rho = self.schedule(self.step, self.horizon, share)
        # The package's own schedules are checked when they are made; a user's may return anything.
        if not 0 <= rho < math.inf:
            checks.refuse(self, [f"{self.argument} must give a finite number >= 0, got {rho} at step {self.step}"])
        return rho

    @property
    def argument(self) -> str:
        """rho as a user would write it."""
        return f"{self.rho_name}={self.schedule}"

    @property
    def lacks_horizon(self) -> bool:
        """Whether the schedule spreads over a run whose length its arguments do not give."""
        return self.schedule.needs_horizon and getattr(self.schedule, "total_steps", None) is None

    @property
    def rate_parameters(self) -> list[nn.Parameter]:
        """The parameters whose learning rate a schedule may follow."""
        return [pair.B for pair in self.pairs]

    def _rate_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups whose learning rate rho follows."""
        if not self.schedule.needs_learning_rate or self.optimizer is None:
            return []
        identities = {id(parameter) for parameter in self.rate_parameters}
        # ZeRO-3 cuts a group into several, so that it may come more than once.
        groups = [group for group, held in groups_of(self.optimizer) if not identities.isdisjoint(map(id, held))]
        return list({id(group): group for group in groups}.values())

    def rate_problems(self) -> list[str]:
        """List why rho can't follow the learning rate, if it should."""
        groups, problems = self._rate_groups(), []
        follows = f"{self.argument} follows the learning rate"
        if any(isinstance(group["lr"], Tensor) for group in groups):
            problems.append(f"{follows}, a tensor here: give the optimizer a float, or choose another schedule")
        if len(groups) > 1:
            problems.append(f"{follows} of several parameter groups: use one group, or choose another schedule")
        return problems

    def pair_problems(self) -> list[str]:
        """List why the method can't work with the pairs that were found; subclasses add their reasons."""
        return self.rate_problems()

    # -- a step

    def before_step(self) -> None:
        """Use the gradients of the coming optimizer step, and count it."""
        self._look_for_gradients()
        if self.pairs:
            self.use_gradients(parameters_of(self.optimizer) if self.loss_scaler is not None else [])
        if self.perturbation is not None:
            self.perturbation.note_reads(was_perturbed=False)
        self.step += 1

    def use_gradients(self, also_finite: Iterable[nn.Parameter]) -> None:
        """Use the gradients of a step, which is skipped if a gradient of ``also_finite`` is not finite."""

    def forget_gradients(self) -> None:
        """Drop the method's own gradients, when a loop clears the model's."""

    def _look_for_gradients(self) -> None:
        """Warn once if the pairs had no gradient in many steps, so that the method has no effect."""
        if self._steps_without_gradient is None:
            return
        trained = [pair.B for pair in self.pairs if pair.B.requires_grad]
        # No gradient is expected while all pairs are frozen.
        if trained and any(self.sharding.have_gradients(trained)):
            self._steps_without_gradient = None
        elif trained:
            self._steps_without_gradient += 1
            if self._steps_without_gradient == STEPS_UNTIL_WARNING:
                self.warn_without_gradient()

    def warn_without_gradient(self) -> None:
        """Warn once if no pair has had a gradient in the steps so far."""
        if self._steps_without_gradient:
            self.warn(
                f"no pair's B{self.place} has had a gradient so far, so the method had no effect there: the loss must "
                "depend on the adapted layers (not under torch.no_grad, not detached), and the gradients must last "
                "until on_before_optimizer_step, which they don't if an optimizer steps inside backward"
            )

    def warn(self, *problems: str) -> None:
        """Warn of problems, of each only once in a run."""
        for problem in problems:
            self._warnings.warn(checks.message(self, [problem]))

    # -- the state

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as CPU tensors and numbers."""
        settings = {name: getattr(self, name) for name in self.fixed}
        return {"step": self.step, "initial_lr": self.initial_lr, "settings": settings}

    def load_state_dict(self, state: dict[str, Any], known: Collection[str]) -> None:
        """Continue from a :meth:`state_dict`.

        It may hold perturbations of pairs that are in no optimizer yet. ``known`` names all pairs of the model.

        Raises:
            MisconfigurationException: the state belongs to other pairs or settings; then nothing has changed.
        """
        try:
            step, initial_lr = state["step"], state["initial_lr"]
            problems = checks.integer_problems("the saved step", step, least=0)
            problems += checks.changed_problems(self, state["settings"])
            if not problems:
                self.restore(state, known)
        except ValueError as error:
            problems = [str(error)]
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            problems = [f"the state was not saved by {self.title}, or it is damaged: {error!r}"]
        checks.refuse(self, problems)
        self.step, self.initial_lr = step, initial_lr

    def restore(self, state: dict[str, Any], known: Collection[str]) -> None:
        """Restore a subclass's part of the state; a ValueError means that it belongs to other pairs."""


@dataclass(eq=False, repr=False, kw_only=True)
class OnePassStep(StepMethod):
    """A method whose one pass may read perturbed weights; by default it reads the clean ones."""

    @property
    def perturbs(self) -> bool:
        """Whether the coming pass reads perturbed weights."""
        return False

    def on(self) -> None:
        """Let the layers read perturbed weights."""

    def off(self) -> None:
        """Let the layers read the clean weights."""

    @override
    def close(self) -> None:
        self.off()


@dataclass(eq=False, repr=False, kw_only=True)
class TwoPassStep(StepMethod):
    """A method that takes its perturbation from a first pass's gradients, and the step's gradients from a second.

    Attributes:
        sync_ascent: whether the first pass's gradients are averaged over the ranks.
    """

    sync_ascent: bool = True

    @property
    def takes_ascent(self) -> bool:
        """Whether the coming step takes two passes; with a rho of 0 it is a plain step."""
        # Only from flags, since it is asked in each step.
        return any(each.requires_grad for each in self.rate_parameters) and self.refreshes and self.current_rho > 0

    @property
    @abstractmethod
    def ascent_parameters(self) -> list[nn.Parameter]:
        """The trained parameters whose gradients give the perturbation, in the same order on every rank."""

    @abstractmethod
    def perturb(self) -> AbstractContextManager[None]:
        """Compute the perturbation from the first pass's gradients; it is zero if one of them is not finite.

        The layers read perturbed weights inside the context and clean ones after it, even after an error.
        """
