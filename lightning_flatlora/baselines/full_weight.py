"""What the baselines share that perturb the whole weight of each adapted Linear, by a term of its output."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_flatlora.methods.checks import integer_problems
from lightning_flatlora.methods.step_method import StepMethod
from lightning_flatlora.output_terms import AdaptedLinear, adapted_linears
from lightning_flatlora.pairs.lora_pair import LoRAPair


@dataclass(eq=False, repr=False, kw_only=True)
class FullWeightStep(StepMethod):
    """Base of methods whose terms are on in each pass; subclasses make them.

    Attributes:
        terms: one for each layer that is adapted now.
    """

    works_sharded = False

    seed: int

    @override
    def argument_problems(self) -> list[str]:
        return integer_problems("seed", self.seed, least=0)

    @override
    def reset(self) -> None:
        super().reset()
        self.terms: list[Any] = []

    @override
    def follow(self, pairs: list[LoRAPair], module: nn.Module, wrapped: nn.Module) -> None:
        super().follow(pairs, module, wrapped)
        self.off()
        self.terms = []
        # Nothing is searched if no pair is trained now.
        if any(pair.B.requires_grad for pair in pairs):
            linears, self.left_out = adapted_linears(module, self.adapter_name, self.finder)
            self.terms = self.terms_of(linears)

    def terms_of(self, linears: list[AdaptedLinear]) -> list[Any]:
        """Make a term for each of the layers."""
        raise NotImplementedError

    @property
    @override
    def perturbs(self) -> bool:
        return len(self.terms) > 0 and self.current_rho > 0

    @override
    def on(self) -> None:
        for term in self.terms:
            term.on()

    @override
    def off(self) -> None:
        for term in self.terms:
            term.off()
