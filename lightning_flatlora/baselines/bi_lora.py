"""Bi-LoRA: SAM's perturbation of the full weight as a second low-rank pair, which climbs while LoRA's pair descends."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_flatlora.baselines.one_pass import FullWeightStep
from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.full_weight.output_terms import OutputTerm
from lightning_flatlora.full_weight.weight_noise import derived_seed
from lightning_flatlora.functional import joint_ascent
from lightning_flatlora.methods.checks import integer_problems
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair
from lightning_flatlora.schedules import RhoSchedule, is_size
from lightning_flatlora.sharding import average_gradients


class BiLoRA(MethodCallback["BiLoRAStep"]):
    r"""Take each step's gradient at adapted weights that auxiliary pairs perturb (Bi-LoRA), in one pass.

    .. math:: \text{gradient at } W_0 + s B A + B_2 A_2, \qquad
        \max_{A_2, B_2} L \text{ subject to } \lVert B_2 A_2 \rVert_F \le \rho \text{ over all layers}

    The pass that gives the gradients of A and B also gives those of A2 and B2. When the step's gradients are complete,
    the auxiliary pairs take a step up, and are scaled back to the ball if they have left it:

    .. math:: (A_2, B_2) \leftarrow \sqrt c\, \left((A_2, B_2) + \eta\, \lVert (A_2, B_2) \rVert_F\,
        \frac{(G_{A_2}, G_{B_2})}{\lVert (G_{A_2}, G_{B_2}) \rVert_F}\right), \qquad
        c = \min\!\left(1, \frac{\rho}{\lVert B_2 A_2 \rVert_F}\right)

    The full text of the paper was not available; docs/baselines.md says what is taken from its abstract, what is a
    choice of this package, and how the pairs fare under accumulation, clipping and DDP. The first step is plain LoRA's.
    The auxiliary pairs are in no module, optimizer or state dict: this callback holds them, and saves them with its
    state. They are on in the forward and the backward pass (so the logged loss includes them), and off in validation
    and, under automatic optimization, in all hooks. Only Linear layers get a pair; others are named once.

    Args:
        rho: radius of the ball around the full weights, in the weights' units, >= 0; or a schedule over optimizer
            steps. With 0 the run is LoRA's, bit for bit.
        step_size: :math:`\eta`, the length of an ascent step relative to the norm of all A2 and B2, without a unit,
            > 0.
        rank: of the auxiliary pairs, >= 1; None takes that of the layer's adapters, their sum if it has several.
        seed: of all A2, >= 0.
        adapter_name: the peft adapter next to which the pairs are put; None takes the active ones.
        finder: says what the pairs are if the layers are not peft's, see :mod:`lightning_flatlora.pairs.finders`; of
            those, ``litgpt_pairs`` and a ``PairsByName`` with ``base`` know the weight that is perturbed.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work,
            such as FSDP (at the start of fit, before the first step).

    Source: Liu et al., arXiv 2508.19564 (ICLR 2026), the abstract.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[BiLoRA(rho=0.5)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        step_size: float = 0.1,
        rank: int | None = None,
        seed: int = 0,
        adapter_name: str | None = None,
        finder: Finder | None = None,
    ) -> None:
        super().__init__(
            BiLoRAStep(rho=rho, step_size=step_size, rank=rank, seed=seed, adapter_name=adapter_name, finder=finder)
        )


class _AuxiliaryPair(OutputTerm):
    """B2 A2 on one Linear: a term of its output while it is on."""

    A: nn.Parameter
    B: nn.Parameter

    @override
    def term(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


@dataclass(eq=False, repr=False, kw_only=True)
class BiLoRAStep(FullWeightStep):
    """The step of :class:`BiLoRA`, whose terms are the pairs that climb.

    A2 is drawn as LoRA's A is, and B2 starts at 0, both in float32 or wider. A layer that is left out for a while keeps
    its pair.

    Attributes:
        factors: every A2 and B2, in the order of the layers.
    """

    fixed = ("rank", "seed")
    kind = _AuxiliaryPair

    step_size: float
    rank: int | None

    @override
    def argument_problems(self) -> list[str]:
        problems = super().argument_problems()
        if not is_size(self.step_size) or self.step_size == 0:
            problems.append(f"step_size must be a finite number > 0, got {self.step_size!r}")
        if self.rank is not None:
            problems += integer_problems("rank", self.rank, least=1)
        return problems

    @override
    def reset(self) -> None:
        super().reset()
        # A2 and B2 by the layer's name, those of layers that are left out for a while included.
        self._by_name: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.factors: list[nn.Parameter] = []

    @override
    def take_pairs(self, pairs: list[LoRAPair], module: nn.Module, wrapped: nn.Module) -> None:
        super().take_pairs(pairs, module, wrapped)
        self._give_pairs()

    def _give_pairs(self) -> None:
        self.factors = []
        for term in self.terms:
            name = term.names[0]
            if name not in self._by_name:
                self._by_name[name] = self._drawn(term)
            for factor in self._by_name[name]:
                factor.data = factor.data.to(term.weight.device)
            term.A, term.B = self._by_name[name]
            self.factors += self._by_name[name]

    def _drawn(self, term: OutputTerm) -> tuple[nn.Parameter, nn.Parameter]:
        """Draw A2 (r, m) and B2 (n, r) of a new pair."""
        n, m = term.weight.shape
        rank = self.rank or len(term.factors()[0])
        dtype = torch.promote_types(term.weight.dtype, torch.float32)
        # By name, so that other layers may come or go; on the CPU, so that devices of every kind get the same.
        seed = derived_seed(self.seed, zlib.crc32(term.names[0].encode()))
        generator = torch.Generator().manual_seed(seed)
        A = nn.init.kaiming_uniform_(torch.empty(rank, m, dtype=dtype), a=5**0.5, generator=generator)
        B = torch.zeros(n, rank, dtype=dtype, device=term.weight.device)
        return nn.Parameter(A.to(B.device)), nn.Parameter(B)

    @override
    def forget_gradients(self) -> None:
        # A window that did not end in a step has left its gradients.
        for factor in self.factors:
            factor.grad = None

    @override
    @torch.no_grad()
    def use_gradients(self, also_finite: Iterable[nn.Parameter]) -> None:
        """Take one step up the gradient of this step's passes, and return to the ball; the host does not wait."""
        if not self.perturbs:
            return
        average_gradients(self.factors)
        happens = self.sharding.all_finite([*also_finite, *self.factors], self.factors[0].device)
        gradients = [torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in self.factors]
        length = nn.utils.get_total_norm(self.factors) * self.step_size * happens
        for factor, direction in zip(self.factors, joint_ascent(gradients, 1.0), strict=True):
            factor.addcmul_(direction, length.to(factor.device, factor.dtype))
        # Not even rounded, if the step is skipped.
        shrinkage = torch.where(happens, (self.current_rho / self.norm()).clamp_max(1).sqrt(), 1.0)
        for factor in self.factors:
            factor.mul_(shrinkage.to(factor.device, factor.dtype))
        self.forget_gradients()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Compute the Frobenius norm of B2 A2 over all layers, shape (), from r x r matrices."""
        squares = []
        # A manual training_step may be inside of autocast, which would round the products to 16 bits.
        with torch.autocast(self.factors[0].device.type, enabled=False):
            for term in self.terms:
                squares.append(((term.B.mT @ term.B) * (term.A @ term.A.mT)).sum().to(self.factors[0].device))
        return torch.stack(squares).sum().clamp_min(0).sqrt()

    @override
    def state_dict(self) -> dict[str, Any]:
        auxiliary = {}
        for name, (A, B) in self._by_name.items():
            auxiliary[name] = {"A": A.detach().clone(), "B": B.detach().clone()}
        return {**super().state_dict(), "auxiliary": auxiliary}

    @override
    def restore(self, state: dict[str, Any], known: Iterable[str]) -> None:
        for name, saved in state["auxiliary"].items():
            self._by_name[name] = nn.Parameter(saved["A"].clone()), nn.Parameter(saved["B"].clone())
        self._give_pairs()
