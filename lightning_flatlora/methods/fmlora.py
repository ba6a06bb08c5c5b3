"""FMLoRA's step: E from a pass at the clean B, the step's gradient at B + E (Algorithm 1)."""

from contextlib import AbstractContextManager

from torch import nn
from typing_extensions import override

from lightning_flatlora.methods.b_perturbation import BPerturbationStep


class FMLoRAStep(BPerturbationStep):
    """Two passes per step; the gradient of the first gives E."""

    title = "FMLoRA"
    takes_two_passes = True

    @property
    @override
    def ascending(self) -> list[nn.Parameter]:
        return self.trained_factors()

    @override
    def ascend(self) -> AbstractContextManager[None]:
        assert self.perturbation is not None
        self.perturbation.assign(self.perturbation.ascend(self.current_rho, at_perturbed=False))
        return self.perturbation.applied()
