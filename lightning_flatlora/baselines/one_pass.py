"""Baselines of one pass: Flat-LoRA's random perturbation, and SAM's implicit regularizer on LoRA, made explicit."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from typing_extensions import override

from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.full_weight.output_terms import OutputTerm, output_terms
from lightning_flatlora.full_weight.weight_noise import NoisyLayer, derived_seed, draw_noise
from lightning_flatlora.methods.checks import choice_problems, integer_problems
from lightning_flatlora.methods.step_method import OnePassStep
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair, rows_of, trained_factors
from lightning_flatlora.schedules import RhoSchedule

Kind = Literal["nBAR", "oBAR"]


class RandomPerturbation(MethodCallback["RandomPerturbationStep"]):
    r"""Take each step's gradient at adapted weights with fresh Gaussian noise (Flat-LoRA), in one pass.

    .. math:: \text{gradient at } W' + \varepsilon, \qquad
        \varepsilon_{ij} \sim \mathcal N\!\left(0,\; \frac{\sigma^2}{m}\,\lVert W'_{i,:}\rVert^2\right)

    The noise is a function of (seed, optimizer step, layer), see :class:`~lightning_flatlora.full_weight.WeightNoise`:
    all micro-batches of an accumulation window and all ranks share it, and a resumed run draws the noise of the
    uninterrupted one. It acts in the forward and the backward pass (so the logged loss includes it), but not in
    validation nor, under automatic optimization, in hooks. Only Linear layers get noise; other layers are named once.

    Args:
        sigma: size of the noise relative to the norms of the weights' rows, without a unit, >= 0; or a schedule over
            optimizer steps. The paper raises it, ``CosineRho(0, sigma)``, to 0.05 on language and 0.15 on CLIP.
        seed: random seed of all noise, >= 0.
        adapter_name: the peft adapter that enters W'; None takes the active ones.
        finder: finds the pairs of layers that are not peft's, see :mod:`lightning_flatlora.pairs.finders`. The weight
            that gets noise is known only to ``litgpt_pairs`` and to a ``PairsByName`` with ``base``.

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
        super().__init__(RandomPerturbationStep(rho=sigma, seed=seed, adapter_name=adapter_name, finder=finder))


@dataclass(eq=False, repr=False, kw_only=True)
class FullWeightStep(OnePassStep):
    """Base of methods that perturb whole weights, by adding terms to the layers' outputs.

    Attributes:
        kind: class of the terms.
        terms: one for each currently adapted layer.
        drawn_at: the step for which they were drawn, if they were.
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
    def take_pairs(self, pairs: list[LoRAPair], module: nn.Module, wrapped: nn.Module) -> None:
        super().take_pairs(pairs, module, wrapped)
        self.off()
        self.terms = []
        self.drawn_at: int | None = None
        # If no pair is trained now, there is nothing to search for.
        if any(pair.B.requires_grad for pair in pairs):
            self.terms, self.left_out = output_terms(self.kind, module, self.adapter_name, self.finder)
            perturbed = set(trained_factors(chain.from_iterable(term.pairs for term in self.terms)))
            sizes = {factor: factor.numel() for factor in trained_factors(pairs)}
            left = sum(size for factor, size in sizes.items() if factor not in perturbed)
            self.share_left_out = left / sum(sizes.values())

    @override
    def install(self) -> None:
        # Nothing to prepare: no parameter is changed, so nothing can be rounded away.
        pass

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

    rho_name = "sigma"
    fixed = ("seed",)
    kind = NoisyLayer

    @override
    def on(self) -> None:
        if self.drawn_at != self.step:
            # Derived from the step, so that a resumed run and every rank draw identical noise without any state.
            draw_noise(self.terms, self.current_rho, derived_seed(self.seed, self.step))
            self.drawn_at = self.step
        super().on()


class BalancednessRegularization(MethodCallback["BalancednessRegularizationStep"]):
    r"""Scale A against B of every layer before each optimizer step, as SAM does implicitly (BAR), in one pass.

    .. math:: B \leftarrow (1 + \sigma\alpha\eta)\, B, \qquad A \leftarrow (1 - \sigma\alpha\eta)\, A

    with the learning rate :math:`\eta` and, layer by layer,

    .. math:: \sigma_\text{nBAR} = \begin{cases} 1 & \lVert G_B \rVert \ge \lVert G_A \rVert \\ -1 & \text{else}
        \end{cases} \qquad
        \sigma_\text{oBAR} = \begin{cases} -1 & \lVert B \rVert \ge \lVert A \rVert \\ 1 & \text{else} \end{cases}

    oBAR always shrinks the balancedness :math:`|\lVert B \rVert^2 - \lVert A \rVert^2| / 2`, nBAR moves it as SAM's
    flow would. The scaling takes place when the gradients of the step are complete, averaged over the ranks and
    unscaled, but not yet clipped. Each factor takes the learning rate of its parameter group. A pair without gradients
    stays unchanged, and so do all pairs in a step that a loss scaler is about to skip.

    Args:
        alpha: strength, relative to the learning rate, without a unit, >= 0; or a schedule over optimizer steps. The
            paper lets it decrease: ``LinearRho(alpha, 0)`` or ``CosineRho(alpha, 0)``.
        kind: "nBAR" compares the norms of the gradients, "oBAR" those of the factors.
        adapter_name: the peft adapter to balance; None takes the active ones.
        finder: finds the pairs of layers that are not peft's, see :mod:`lightning_flatlora.pairs.finders`.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work,
            such as a frozen A or FSDP (at the start of fit, before the first step).

    Source: Li et al., arXiv 2410.14802, Algorithms 2 (nBAR) and 3 (oBAR).

    Example:
        >>> import lightning as L
        >>> from lightning_flatlora import LinearRho
        >>> regularizer = BalancednessRegularization(LinearRho(1.0, 0.0), kind="oBAR")
        >>> trainer = L.Trainer(callbacks=[regularizer], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        alpha: float | RhoSchedule,
        kind: Kind = "nBAR",
        *,
        adapter_name: str | None = None,
        finder: Finder | None = None,
    ) -> None:
        super().__init__(BalancednessRegularizationStep(rho=alpha, kind=kind, adapter_name=adapter_name, finder=finder))


@dataclass(eq=False, repr=False, kw_only=True)
class BalancednessRegularizationStep(OnePassStep):
    """The step of :class:`BalancednessRegularization`: the factors are scaled before it, and no pass is perturbed."""

    rho_name = "alpha"
    works_sharded = False
    fixed = ("kind",)

    kind: Kind

    @override
    def argument_problems(self) -> list[str]:
        return choice_problems("kind", self.kind, Kind)

    @override
    def pair_problems(self) -> list[str]:
        problems = super().pair_problems()
        frozen = [pair.name for pair in self.pairs if pair.B.requires_grad and not pair.learns_A]
        if frozen:
            problems.append(f"A of {len(frozen)} pairs is frozen, as in {frozen[0]}, and can't be scaled: train it")
        if any(pair.experts > 1 for pair in self.pairs):
            problems.append("a pair holds the factors of several experts: leave experts out of the adapter")
        return problems

    @override
    @torch.no_grad()
    def use_gradients(self, also_finite: Iterable[nn.Parameter]) -> None:
        """Scale the factors, unless the step is about to be skipped."""
        alpha = self.current_rho
        if alpha == 0:
            return
        strength = {}
        for param_group in self.optimizer.param_groups:
            for parameter in param_group["params"]:
                strength[id(parameter)] = alpha * param_group["lr"]
        happens = self.sharding.all_finite(also_finite, self.pairs[0].B.device)
        norm = torch.linalg.vector_norm
        for pair in self.pairs:
            if pair.A.grad is None or pair.B.grad is None:
                continue
            A, B = rows_of(pair.A, pair.A_rows), rows_of(pair.B, pair.B_rows)
            if self.kind == "nBAR":
                B_grows = norm(rows_of(pair.B.grad, pair.B_rows)) >= norm(rows_of(pair.A.grad, pair.A_rows))
            else:
                B_grows = norm(B) < norm(A)
            # If the scaler is about to skip the step, the sign is 0, which changes nothing: the host need not wait.
            sign = torch.where(B_grows, 1.0, -1.0).to(B.dtype) * happens.to(B.device)
            B.mul_(1 + strength[id(pair.B)] * sign)
            A.mul_(1 - strength[id(pair.A)] * sign)
