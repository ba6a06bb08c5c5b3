"""Flat-LoRA's random perturbation, fresh Gaussian noise on the whole weight in each step; and Bi-LoRA's base class."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.methods.checks import integer_problems
from lightning_flatlora.methods.step_method import StepMethod
from lightning_flatlora.output_terms import OutputTerm, output_terms
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair
from lightning_flatlora.schedules import RhoSchedule
from lightning_flatlora.weight_noise import NoisyLayer, derived_seed, draw_noise


class RandomPerturbation(MethodCallback):
    r"""Take each step's gradient at adapted weights with fresh Gaussian noise (Flat-LoRA), in one pass.

    .. math:: \text{gradient at } W' + \varepsilon, \qquad
        \varepsilon_{ij} \sim \mathcal N\!\left(0,\; \frac{\sigma^2}{m}\,\lVert W'_{i,:}\rVert^2\right)

    The noise is a function of (seed, optimizer step, layer), see :class:`~lightning_flatlora.weight_noise.WeightNoise`:
    all micro-batches of an accumulation window and all ranks share it, and a resumed run draws what the uninterrupted
    one would have drawn. It is on in the forward and the backward pass (so the logged loss includes it), and off in
    validation and, under automatic optimization, in all hooks. Only Linear layers get noise; others are named once.

    Args:
        sigma: size of the noise relative to the norms of the weights' rows, without a unit, >= 0; or a schedule over
            optimizer steps. The paper raises it, ``CosineRho(0, sigma)``, to 0.05 on language and 0.15 on CLIP.
        seed: of all noise, >= 0.
        adapter_name: the peft adapter that enters W'; None takes the active ones.
        finder: says what the pairs are if the layers are not peft's, see :mod:`lightning_flatlora.pairs.finders`; of
            those, ``litgpt_pairs`` and a ``PairsByName`` with ``base`` know the weight that gets noise.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work,
            such as FSDP (at the start of fit, before the first step).

    Source: Li et al., arXiv 2409.14396, Eq. 7 and Algorithm 1.

    Example:
        >>> import lightning as L
        >>> from lightning_flatlora import CosineRho
        >>> trainer = L.Trainer(callbacks=[RandomPerturbation(CosineRho(0, 0.05))], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        sigma: float | RhoSchedule,
        seed: int = 0,
        *,
        adapter_name: str | None = None,
        finder: Finder | None = None,
    ) -> None:
        super().__init__(RandomPerturbationStep(sigma, seed=seed, adapter_name=adapter_name, finder=finder))


@dataclass(eq=False, repr=False, kw_only=True)
class FullWeightStep(StepMethod):
    """Base of methods that perturb whole weights, by terms of the layers' outputs.

    Attributes:
        kind: of the terms.
        terms: one for each layer that is adapted now.
        drawn_at: the step for which they have been drawn, if so.
    """

    works_sharded = False
    kind: ClassVar[type[OutputTerm]]

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
        self.drawn_at: int | None = None
        # Nothing is searched if no pair is trained now.
        if any(pair.B.requires_grad for pair in pairs):
            self.terms, self.left_out = output_terms(self.kind, module, self.adapter_name, self.finder)

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


@dataclass(eq=False, repr=False, kw_only=True)
class RandomPerturbationStep(FullWeightStep):
    """The step of :class:`RandomPerturbation`, whose terms are the noise of each layer."""

    title = "RandomPerturbation"
    size_name = "sigma"
    fixed = ("seed",)
    kind = NoisyLayer

    @override
    def on(self) -> None:
        if self.drawn_at != self.step:
            # From the step, so that a resumed run and every rank draw the same noise without any state.
            draw_noise(self.terms, self.current_rho, derived_seed(self.seed, self.step))
            self.drawn_at = self.step
        super().on()
