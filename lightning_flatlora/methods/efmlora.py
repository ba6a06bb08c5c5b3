"""EFMLoRA's step: E from the gradient that the step uses, averaged over steps (Algorithm 2)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_flatlora.methods.b_perturbation import BPerturbationStep
from lightning_flatlora.perturbation import FreshPerturbation


@dataclass(eq=False, repr=False, kw_only=True)
class EFMLoRAStep(BPerturbationStep):
    """One pass per step, at B + Ê; the step's own gradient moves Ê.

    Next to an FMLoRAModule, which takes the passes, :meth:`ascend` gives the fresh E of a micro-batch, and Ê moves by
    the mean of those of the step.

    Attributes:
        schedules_module: whether an FMLoRAModule takes the passes.
    """

    title = "EFMLoRA"
    takes_several_optimizers = True

    beta: float = 0.9
    # No argument: the step's own gradient is averaged over the ranks already.
    sync_ascent: bool = field(default=True, init=False)

    @override
    def reset(self) -> None:
        super().reset()
        self.schedules_module = False
        self.forget_gradients()

    @property
    @override
    def perturbs(self) -> bool:
        perturbation = self.perturbation
        if perturbation is None or not perturbation.may_be_nonzero:
            return False
        # The first of two passes reads the clean B, and the second has its own perturbation, see ascend().
        if self.schedules_module and self.ascends:
            return False
        # A frozen B is read clean in any case, and may be frozen for a part of a step only, as by toggle_optimizer. The
        # views that FSDP1's layers read don't know whether it is frozen.
        return perturbation.learns or not self._sharding.only_views

    @override
    def on(self) -> None:
        assert self.perturbation is not None
        self.perturbation.on()

    @override
    def off(self) -> None:
        if self.perturbation is not None:
            self.perturbation.off()

    @override
    def use_gradients(self, also_finite: Iterable[nn.Parameter]) -> None:
        """Move Ê by the gradients of the coming step, which were taken at B + Ê."""
        perturbation = self.perturbation
        assert perturbation is not None
        if self.schedules_module:
            self._average_ascents(also_finite)
            return
        if perturbation.has_gradient and self.refreshes:
            fresh = perturbation.ascend(self.current_rho, at_perturbed=True, also_finite=also_finite)
            perturbation.average(fresh, self.beta)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.perturbation is not None:
            state["perturbation"] = self.perturbation.state_dict()
        elif self.awaited is not None:
            state["perturbation"] = self.awaited
        return state

    # -- next to an FMLoRAModule

    @property
    @override
    def ascends(self) -> bool:
        if self.perturbation is None or not self.refreshes:
            return False
        # With rho = 0 the step is plain, unless there is an average, which the zero perturbation must move.
        return self.perturbation.may_be_nonzero or self.current_rho > 0

    @property
    @override
    def ascending(self) -> list[nn.Parameter]:
        return self.trained_factors()

    @override
    def forget_gradients(self) -> None:
        self._sum: FreshPerturbation | None = None
        self._ascents = 0

    @override
    def ascend(self) -> AbstractContextManager[None]:
        assert self.perturbation is not None
        fresh = self.perturbation.ascend(self.current_rho, at_perturbed=False)
        self._ascents += 1
        if self._sum is None:
            self._sum = fresh
        else:
            stacks = list(torch._foreach_add(self._sum.stacks, fresh.stacks))
            self._sum = FreshPerturbation(stacks, self._sum.finite & fresh.finite, fresh.is_zero)
        return self.perturbation.applied(fresh.stacks)

    def _average_ascents(self, also_finite: Iterable[nn.Parameter]) -> None:
        """Move Ê once, by the mean E of the window's micro-batches, unless the step itself will be skipped."""
        if self._sum is None:
            return
        assert self.perturbation is not None
        finite = self.perturbation.all_finite(also_finite) & self._sum.finite
        stacks = list(torch._foreach_div(self._sum.stacks, self._ascents))
        self.perturbation.average(FreshPerturbation(stacks, finite, self._sum.is_zero), self.beta)
        self.forget_gradients()
