"""The radius rho as a function of the optimizer step.

A schedule is a pure function of the step, the horizon and the learning rate, so checkpoints need no state of it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

import torch


class RhoSchedule(ABC):
    """A schedule of rho: for your own, subclass this and define :meth:`__call__`.

    A schedule may be among the hyper-parameters that a module saves (``save_hyperparameters()``), and so in its
    checkpoints. ``torch.load`` accepts only classes that it knows, and every subclass of RhoSchedule is registered when
    it is defined. So import the module that defines yours before you load such a file, define the class at that
    module's top level, and use only numbers, strings, and lists or dicts of them as attributes. Dataclasses work well,
    but not frozen ones: if omegaconf is installed, Lightning's loggers refuse them.

    Attributes:
        needs_horizon: whether the schedule spreads over the whole run; training without an end is then refused.
        needs_learning_rate: whether it follows the learning rate of the parameter group that holds the pairs.

    Example:
        >>> @dataclass
        ... class WarmupRho(RhoSchedule):
        ...     rho: float
        ...     steps: int
        ...     def __call__(self, step, horizon=math.inf, learning_rate=1.0):
        ...         return self.rho * min(step / self.steps, 1.0)
        >>> WarmupRho(0.1, steps=100)(step=50)
        0.05
    """

    needs_horizon: ClassVar[bool] = False
    needs_learning_rate: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # So that torch.load(weights_only=True) accepts checkpoints with a schedule among their hyper-parameters.
        torch.serialization.add_safe_globals([cls])

    @abstractmethod
    def __call__(self, step: int, horizon: float = math.inf, learning_rate: float = 1.0) -> float:
        """Return rho at one optimizer step.

        Args:
            step: optimizer steps taken so far, from 0; steps that a loss scaler skipped count.
            horizon: optimizer steps of the whole run.
            learning_rate: the group's learning rate divided by its initial value, without a unit.

        Returns:
            The radius of the ball in the full weight space, >= 0.
        """


def is_size(value: object) -> bool:
    """Tell whether a value can be a radius, or another size: a finite number >= 0.

    Example:
        >>> is_size(0.5), is_size(-1), is_size(float("nan")), is_size(True), is_size("1")
        (True, False, False, False, False)
    """
    # Accepts NumPy's numbers, of which only float64 is a float.
    number = not isinstance(value, bool) and isinstance(value, Real)
    return number and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]


def is_integer(value: object, least: int) -> bool:
    """Tell whether a value is an integer >= ``least``.

    Example:
        >>> is_integer(1, least=1), is_integer(0, least=1), is_integer(True, least=1), is_integer(1.0, least=1)
        (True, False, False, False)
    """
    # Accepts NumPy's integers, which are not of class int.
    number = not isinstance(value, bool) and isinstance(value, Integral)
    return number and value >= least  # type: ignore[operator]


def _check_fields(schedule: Any) -> None:
    """Check a schedule's fields, all radii except ``total_steps``, and report all problems in one error."""
    problems = []
    for field in fields(schedule):
        value = getattr(schedule, field.name)
        if field.name != "total_steps" and not is_size(value):
            problems.append(f"{field.name} must be a finite number >= 0, got {value!r}")
        if field.name == "total_steps" and not (value is None or is_integer(value, least=1)):
            problems.append(f"total_steps must be an integer >= 1 or None (the run's length), got {value!r}")
    if problems:
        raise ValueError(f"{type(schedule).__name__}: " + "; ".join(problems))


# Not frozen, see RhoSchedule; without unsafe_hash such a dataclass has no hash.
@dataclass(unsafe_hash=True)
class _FromStartToEnd(RhoSchedule):
    """Base of the schedules between two radii."""

    start: float
    end: float
    total_steps: int | None = None
    needs_horizon: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_fields(self)

    def _fraction(self, step: int, horizon: float) -> float:
        """Return how much of the run is over: 0 at step 0, 1 at its end and after, as in PyTorch's schedulers."""
        return min(step / (self.total_steps or horizon), 1.0)


@dataclass(unsafe_hash=True)
class _FromOneRadius(RhoSchedule):
    """Base of the schedules with one radius."""

    rho: float

    def __post_init__(self) -> None:
        _check_fields(self)


class ConstantRho(_FromOneRadius):
    """A constant rho, like a plain number.

    Example:
        >>> ConstantRho(2.0)(step=100)
        2.0
    """

    def __call__(self, step: int, horizon: float = math.inf, learning_rate: float = 1.0) -> float:
        return self.rho

    def __str__(self) -> str:
        return str(self.rho)


class LinearRho(_FromStartToEnd):
    """Rho changes from ``start`` to ``end`` in a straight line.

    Args:
        start: rho at step 0.
        end: rho at step ``total_steps`` and after.
        total_steps: horizon in optimizer steps; None takes the trainer's estimate.

    Example:
        >>> LinearRho(2.0, 1.0, total_steps=10)(step=5)
        1.5
    """

    def __call__(self, step: int, horizon: float = math.inf, learning_rate: float = 1.0) -> float:
        return self.start + (self.end - self.start) * self._fraction(step, horizon)


class CosineRho(_FromStartToEnd):
    """Rho changes from ``start`` to ``end`` along half a cosine wave.

    Args:
        start: rho at step 0.
        end: rho at step ``total_steps`` and after.
        total_steps: horizon in optimizer steps; None takes the trainer's estimate.

    Example:
        >>> CosineRho(2.0, 0.0, total_steps=10)(step=5)
        1.0
    """

    def __call__(self, step: int, horizon: float = math.inf, learning_rate: float = 1.0) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * self._fraction(step, horizon))) / 2


class InverseSqrtRho(_FromOneRadius):
    """rho / sqrt(step + 1), the schedule of Theorem 2, under which the EMA's gap to SAM shrinks.

    Example:
        >>> InverseSqrtRho(2.0)(step=3)
        1.0
    """

    def __call__(self, step: int, horizon: float = math.inf, learning_rate: float = 1.0) -> float:
        return self.rho / math.sqrt(step + 1)


class LearningRateRho(_FromOneRadius):
    """Rho in proportion to the learning rate of the pairs' parameter group, ``rho`` at the rate's initial value.

    The initial value is the group's ``initial_lr``, which every PyTorch scheduler sets (so warm-up starts small), or
    the first learning rate above 0 if there is no scheduler. OneCycleLR sets ``initial_lr`` to the low rate at its
    start, so ``rho`` applies there and is multiplied by ``div_factor`` at the top: divide rho by that factor. A
    LearningRateFinder changes neither ``initial_lr`` nor a scheduler's base rates: with a scheduler, configure the rate
    that it finds in a new run.

    Example:
        >>> LearningRateRho(2.0)(step=7, learning_rate=0.25)
        0.5
    """

    needs_learning_rate: ClassVar[bool] = True

    def __call__(self, step: int, horizon: float = math.inf, learning_rate: float = 1.0) -> float:
        return self.rho * learning_rate
