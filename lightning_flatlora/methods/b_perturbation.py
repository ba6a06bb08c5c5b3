"""The steps of FMLoRA (Algorithm 1) and EFMLoRA (Algorithm 2), which perturb only B."""

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.methods.checks import choice_problems
from lightning_flatlora.methods.step_method import OnePassStep, StepMethod, TwoPassStep
from lightning_flatlora.pairs.lora_pair import LoRAPair, trained_factors
from lightning_flatlora.perturbation.pair_stack import FreshPerturbation
from lightning_flatlora.perturbation.perturbation import Perturbation
from lightning_flatlora.schedules import is_size


@dataclass(eq=False, repr=False, kw_only=True)
class BPerturbationStep(StepMethod):
    """Base of the paper's two methods.

    Attributes:
        perturbation: of the current pairs, maybe none.
    """

    fixed = ("estimator", "norm_scope")

    perturbation: Perturbation = field(init=False)
    estimator: Estimator = "average"
    norm_scope: NormScope = "global"

    @override
    def argument_problems(self) -> list[str]:
        problems = choice_problems("estimator", self.estimator, Estimator)
        return problems + choice_problems("norm_scope", self.norm_scope, NormScope)

    @override
    def reset(self) -> None:
        super().reset()
        self.perturbation = Perturbation([], self.estimator, self.norm_scope)

    @override
    def take_pairs(self, pairs: list[LoRAPair], module: nn.Module, wrapped: nn.Module) -> None:
        super().take_pairs(pairs, module, wrapped)
        self.perturbation.take_pairs(pairs, self.sharding)

    @override
    def install(self) -> None:
        super().install()
        if self.pairs:
            self.perturbation.install()

    @override
    def close(self) -> None:
        self.perturbation.uninstall()

    @property
    def ascent_parameters(self) -> list[nn.Parameter]:
        """The trained factors whose gradients give E, in the same order on every rank."""
        return trained_factors([pair for pair in self.pairs if pair.B.requires_grad])


@dataclass(eq=False, repr=False, kw_only=True)
class FMLoRAStep(BPerturbationStep, TwoPassStep):
    """Two passes per step: E from the gradient of the first, at the clean B, and the step's gradient at B + E.

    Attributes:
        also_no_grad: whether what runs under ``no_grad`` in the second pass reads B + E, too.
    """

    also_no_grad: bool = field(default=False, init=False)

    @override
    def perturb(self) -> AbstractContextManager[None]:
        self.perturbation.assign(self.perturbation.ascend(self.current_rho, at_perturbed=False))
        return self.perturbation.applied(only_with_grad=not self.also_no_grad)


@dataclass(eq=False, repr=False, kw_only=True)
class EFMLoRAStep(BPerturbationStep, OnePassStep):
    """One pass per step, at B + Ê; the step's own gradient moves Ê.

    Next to an FMLoRAModule, which takes the passes, :meth:`perturb` computes the fresh E of each micro-batch, and Ê
    moves by the step's mean E.

    Attributes:
        beta: weight of the fresh perturbation in the average.
        schedules_module: whether an FMLoRAModule takes the passes.
    """

    takes_several_optimizers = True
    # Next to an FMLoRAModule.
    sync_ascent: ClassVar[bool] = True

    beta: float = 0.9

    @override
    def argument_problems(self) -> list[str]:
        problems = super().argument_problems()
        if not is_size(self.beta) or not 0 < self.beta <= 1:
            problems.append(
                f"beta must be in (0, 1], the weight of the fresh perturbation in the average, got {self.beta!r}"
            )
        return problems

    @override
    def reset(self) -> None:
        super().reset()
        self.schedules_module = False
        self.forget_gradients()

    @property
    @override
    def perturbs(self) -> bool:
        # With two passes, the first reads the clean B, and the second has its own perturbation, see perturb().
        if not self.perturbation.may_be_nonzero or (self.schedules_module and self.takes_ascent):
            return False
        # A frozen B is always read clean; it may be frozen for only a part of a step, as by toggle_optimizer. The views
        # that FSDP1's layers read don't know whether it is frozen.
        return any(pair.B.requires_grad for pair in self.pairs) or not self.sharding.only_views

    @override
    def on(self) -> None:
        self.perturbation.on()

    @override
    def off(self) -> None:
        self.perturbation.off()

    @override
    def use_gradients(self, also_finite: Iterable[nn.Parameter]) -> None:
        """Move Ê by the gradients of the coming step, which were taken at B + Ê."""
        if self.schedules_module:
            self._average_ascents(also_finite)
        elif self.perturbation.has_gradient and self.refreshes:
            fresh = self.perturbation.ascend(self.current_rho, at_perturbed=True, also_finite=also_finite)
            self.perturbation.average(fresh, self.beta)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "perturbation": self.perturbation.state_dict()}

    @override
    def restore(self, state: dict[str, Any], known: Collection[str]) -> None:
        saved = state["perturbation"]
        if saved["E"]:
            # If there is no pair yet, any saved one may still come.
            self.perturbation.load_state_dict(saved, known if self.pairs else saved["E"])

    # -- next to an FMLoRAModule

    @property
    def takes_ascent(self) -> bool:
        """Whether the module's coming step takes two passes."""
        # With rho = 0 the step is plain, unless there is an average, which the zero perturbation must move.
        return bool(self.pairs) and self.refreshes and (self.perturbation.may_be_nonzero or self.current_rho > 0)

    @override
    def forget_gradients(self) -> None:
        self._sum: FreshPerturbation | None = None
        self._ascents = 0

    def perturb(self) -> AbstractContextManager[None]:
        """Compute a micro-batch's E from the module's first pass, for its second."""
        fresh = self.perturbation.ascend(self.current_rho, at_perturbed=False)
        self._ascents += 1
        if self._sum is None:
            self._sum = fresh
        else:
            stacks = list(torch._foreach_add(self._sum.stacks, fresh.stacks))
            with_gradient = list(map(torch.logical_or, self._sum.with_gradient, fresh.with_gradient))
            self._sum = FreshPerturbation(stacks, self._sum.finite & fresh.finite, fresh.is_zero, with_gradient)
        return self.perturbation.applied(fresh.stacks, only_with_grad=True)

    def _average_ascents(self, also_finite: Iterable[nn.Parameter]) -> None:
        """Move Ê once, by the mean E of the window's micro-batches, unless the step will be skipped."""
        if self._sum is None:
            return
        finite = self.sharding.all_finite(also_finite, self.pairs[0].B.device) & self._sum.finite
        stacks = list(torch._foreach_div(self._sum.stacks, self._ascents))
        self.perturbation.average(self._sum._replace(stacks=stacks, finite=finite), self.beta)
        self.forget_gradients()
