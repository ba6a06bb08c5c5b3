"""Bi-LoRA: SAM's perturbation of the full weight as a second low-rank pair, which climbs while LoRA's pair descends."""

import copy
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from typing_extensions import override

from lightning_flatlora.baselines.one_pass import FullWeightStep
from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.full_weight.output_terms import OutputTerm
from lightning_flatlora.full_weight.weight_noise import derived_seed
from lightning_flatlora.methods.checks import integer_problems
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair
from lightning_flatlora.schedules import RhoSchedule
from lightning_flatlora.sharding import average_gradients


class BiLoRA(MethodCallback["BiLoRAStep"]):
    r"""Take each step's gradient at adapted weights that auxiliary pairs perturb (Bi-LoRA), in one pass.

    .. math:: \text{gradient at } W_0 + s B A + B_2 A_2, \qquad
        \max_{A_2, B_2} L \text{ subject to } \lVert B_2 A_2 \rVert_F \le \rho \text{ over all layers}

    One backward pass gives the gradients of A, B, A2 and B2. When they are complete, the auxiliary pairs take an Adam
    step uphill (Eq. 9), with B's current learning rate, betas and eps, and are scaled back into the ball if they have
    left it (Eq. 10):

    .. math:: (A_2, B_2) \leftarrow \sqrt c\, (A_2, B_2), \qquad
        c = \min\!\left(1, \frac{\rho}{\lVert B_2 A_2 \rVert_F}\right)

    docs/baselines.md lists the choices that this package makes. The first step is plain LoRA's. The auxiliary pairs
    belong to this callback, which saves them with its state, not to a module, optimizer or state dict. They act in the
    forward and the backward pass (so the logged loss includes them), but not in validation nor, under automatic
    optimization, in hooks. Only Linear layers get a pair; other layers are named once. In manual optimization they
    climb the sum of all losses since the last step, even if you clear the other gradients between two losses.

    Args:
        rho: radius of the ball around the full weights, in the weights' units, >= 0; or a schedule over optimizer
            steps. With 0 the run equals LoRA bit for bit. The paper searches 0.005 to 0.5.
        rank: rank of the auxiliary pairs, >= 1.
        seed: random seed of all A2, >= 0.
        adapter_name: the peft adapter next to which the pairs are put; None takes the active ones.
        finder: finds the pairs of layers that are not peft's, see :mod:`lightning_flatlora.pairs.finders`. The
            perturbed weight is known only to ``litgpt_pairs`` and to a ``PairsByName`` with ``base``.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work,
            such as FSDP (at the start of fit, before the first step).

    Source: Liu et al., arXiv 2508.19564 (ICLR 2026), Eqs. 9 and 10.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[BiLoRA(rho=0.05)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        rank: int = 8,
        seed: int = 0,
        adapter_name: str | None = None,
        finder: Finder | None = None,
    ) -> None:
        super().__init__(BiLoRAStep(rho=rho, rank=rank, seed=seed, adapter_name=adapter_name, finder=finder))


class _AuxiliaryPair(OutputTerm):
    """B2 A2 on one Linear: a term of its output while it is on."""

    A: nn.Parameter
    B: nn.Parameter

    @override
    def term(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


@dataclass(eq=False, repr=False, kw_only=True)
class BiLoRAStep(FullWeightStep):
    """The step of :class:`BiLoRA`, whose terms are the auxiliary pairs.

    A2 is drawn as LoRA's A is, and B2 starts at 0, both in float32 or wider. A layer that is left out for a while keeps
    its pair.

    Attributes:
        factors: every A2 and B2, in the order of the layers.
    """

    fixed = ("rank", "seed")
    kind = _AuxiliaryPair

    rank: int

    @override
    def argument_problems(self) -> list[str]:
        return super().argument_problems() + integer_problems("rank", self.rank, least=1)

    @override
    def reset(self) -> None:
        super().reset()
        # The optimizers of A2 and B2 by layer name, also of layers that are left out for a while.
        self._ascents: dict[str, Adam] = {}
        self.factors: list[nn.Parameter] = []

    @override
    def take_pairs(self, pairs: list[LoRAPair], module: nn.Module, wrapped: nn.Module) -> None:
        super().take_pairs(pairs, module, wrapped)
        self._give_pairs()

    def _give_pairs(self) -> None:
        self.factors = []
        for term in self.terms:
            name = term.names[0]
            if name not in self._ascents:
                self._ascents[name] = _ascent(*self._drawn(term))
            ascent = self._ascents[name]
            term.A, term.B = ascent.param_groups[0]["params"]
            if term.A.device != term.weight.device:
                for factor in (term.A, term.B):
                    factor.data = factor.data.to(term.weight.device)
                ascent.load_state_dict(ascent.state_dict())  # moves its moments, too
            self.factors += [term.A, term.B]

    def _drawn(self, term: OutputTerm) -> tuple[Tensor, Tensor]:
        """Draw A2 (r, m) and B2 (n, r) of a new pair."""
        n, m = term.weight.shape
        dtype = torch.promote_types(term.weight.dtype, torch.float32)
        # Seeded by name, so that other layers may come or go; drawn on the CPU, so that all devices agree.
        generator = torch.Generator().manual_seed(derived_seed(self.seed, zlib.crc32(term.names[0].encode())))
        A = nn.init.kaiming_uniform_(torch.empty(self.rank, m, dtype=dtype), a=5**0.5, generator=generator)
        return A.to(term.weight.device), torch.zeros(n, self.rank, dtype=dtype, device=term.weight.device)

    @override
    def forget_gradients(self) -> None:
        # An accumulation window that did not end in a step has left its gradients.
        for factor in self.factors:
            factor.grad = None

    @override
    @torch.no_grad()
    def use_gradients(self, also_finite: Iterable[nn.Parameter]) -> None:
        """Take one step up the gradient of this step's passes, then return to the ball; the host does not wait."""
        if not self.perturbs:
            return
        average_gradients(self.factors)
        happens = self.sharding.all_finite([*also_finite, *self.factors], self.factors[0].device)
        settings: dict[int, dict[str, Any]] = {}  # of the optimizer that is about to step, as far as Adam has them too
        for group in self.optimizer.param_groups:
            own = {name: group[name] for name in ("lr", "betas", "eps") if name in group}
            settings.update(dict.fromkeys(map(id, group["params"]), own))
        for term in self.terms:
            ascent: Any = self._ascents[term.names[0]]
            # Next to a pair that is in no optimizer, nothing climbs.
            ascent.param_groups[0].update(settings.get(id(term.pairs[0].B), {"lr": 0.0}))
            # As a loss scaler does: the kernel then changes nothing. It also divides by the scale.
            ascent.found_inf = 1.0 - happens.to(term.weight.device, torch.float32)
            if self.loss_scaler is not None:
                ascent.grad_scale = self.loss_scaler.scale(torch.ones((), device=term.weight.device))
            ascent.step()
        # If the step is skipped, values are not even rounded.
        shrinkage = torch.where(happens, (self.current_rho / self.norm()).clamp_max(1).sqrt(), 1.0)
        for factor in self.factors:
            factor.mul_(shrinkage.to(factor.device, factor.dtype))
        self.forget_gradients()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Compute the Frobenius norm of B2 A2 over all layers, shape (), from r x r matrices."""
        squares = []
        # A manual training_step may run inside autocast, which would round the products to 16 bits.
        with torch.autocast(self.factors[0].device.type, enabled=False):
            for term in self.terms:
                squares.append(((term.B.mT @ term.B) * (term.A @ term.A.mT)).sum().to(self.factors[0].device))
        return torch.stack(squares).sum().clamp_min(0).sqrt()

    @override
    def state_dict(self) -> dict[str, Any]:
        auxiliary = {}
        for name, ascent in self._ascents.items():
            A, B = (factor.detach().clone() for factor in ascent.param_groups[0]["params"])
            auxiliary[name] = {"A": A, "B": B, "ascent": copy.deepcopy(ascent.state_dict())}
        return {**super().state_dict(), "auxiliary": auxiliary}

    @override
    def restore(self, state: dict[str, Any], known: Iterable[str]) -> None:
        for name, saved in state["auxiliary"].items():
            self._ascents[name] = _ascent(saved["A"], saved["B"])
            self._ascents[name].load_state_dict(saved["ascent"])
        self._give_pairs()


def _ascent(A: Tensor, B: Tensor) -> Adam:
    """Return an Adam that moves copies of A2 and B2 uphill."""
    return Adam([nn.Parameter(A.clone()), nn.Parameter(B.clone())], maximize=True, fused=True)
