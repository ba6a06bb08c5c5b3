"""Auxiliary pairs (A2, B2) next to the LoRA pairs, which climb the loss inside a ball and are in no module."""

import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_flatlora.baselines.joint_ascent import joint_ascent
from lightning_flatlora.distributed import Layout, average_gradients
from lightning_flatlora.output_terms import OutputTerm
from lightning_flatlora.pairs import bare
from lightning_flatlora.weight_noise import AdaptedLinear, derived_seed


class _AuxiliaryPair(OutputTerm):
    """B2 A2 on one Linear: a term of its output while it is on."""

    def __init__(self, linear: AdaptedLinear, A: nn.Parameter, B: nn.Parameter) -> None:
        super().__init__(linear.base, linear.layer)
        self.A, self.B = A, B

    @override
    def term(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class AuxiliaryPairs:
    r"""A pair (A2, B2) for every adapted Linear layer, which adds :math:`B_2 A_2` to its weight while it is on.

    A2 is drawn as LoRA's A is, from its own generator with a seed for each layer's name, and B2 starts at 0. They
    are in float32 or wider, and belong to no module. A layer that is left out for a while keeps its pair.

    Args:
        rank: of every pair; None takes that of the layer's adapters, their sum if it has several.
        seed: of all A2, >= 0.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora.weight_noise import adapted_linears
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> pairs, x = AuxiliaryPairs(rank=None, seed=0), torch.ones(5, 4)
        >>> pairs.follow(adapted_linears(model, None, None)[0])
        >>> pairs.on()
        >>> clean = model(x).sum()
        >>> clean.backward()
        >>> pairs.ascend(rho=0.1, step_size=0.5)
        >>> bool(model(x).sum() > clean), round(float(pairs.norm()), 4)
        (True, 0.1)
        >>> pairs.off()
    """

    def __init__(self, rank: int | None, seed: int) -> None:
        self._rank, self._seed = rank, seed
        self._pairs: list[_AuxiliaryPair] = []
        # A2 and B2 by the layer's name, those of layers that are left out for a while included.
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """The number of layers that have a pair now."""
        return len(self._pairs)

    def follow(self, linears: Iterable[AdaptedLinear]) -> None:
        """Take the layers that are adapted now: new ones get a pair, and known ones keep theirs."""
        self.off()
        self._pairs = []
        for linear in linears:
            name, device = linear.names[0], bare(linear.base).weight.device
            A, B = self._factors.get(name) or self._drawn(linear)
            factors = nn.Parameter(A.detach().to(device)), nn.Parameter(B.detach().to(device))
            self._factors[name] = factors
            self._pairs.append(_AuxiliaryPair(linear, *factors))

    def _drawn(self, linear: AdaptedLinear) -> tuple[Tensor, Tensor]:
        """Draw A2 (r, m) and B2 (n, r) of a new pair."""
        n, m = linear.shape
        rank = self._rank or len(linear.factors()[0])
        dtype = torch.promote_types(bare(linear.base).weight.dtype, torch.float32)
        # By name, so that other layers may come or go; on the CPU, so that devices of every kind get the same.
        seed = derived_seed(self._seed, zlib.crc32(linear.names[0].encode()))
        generator = torch.Generator().manual_seed(seed)
        A = nn.init.kaiming_uniform_(torch.empty(rank, m, dtype=dtype), a=5**0.5, generator=generator)
        return A, torch.zeros(n, rank, dtype=dtype)

    def on(self) -> None:
        """Let the layers compute with B2 A2 until :meth:`off`."""
        for pair in self._pairs:
            pair.on()

    def off(self) -> None:
        """Let the layers compute without the pairs."""
        for pair in self._pairs:
            pair.off()

    @property
    def factors(self) -> list[nn.Parameter]:
        """Every A2 and B2, in the order of the layers."""
        factors = []
        for pair in self._pairs:
            factors += [pair.A, pair.B]
        return factors

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Compute the Frobenius norm of B2 A2 over all layers, shape (), from r x r matrices."""
        device = self.factors[0].device
        squares = []
        # A manual training_step may be inside of autocast, which would round the products to 16 bits.
        with torch.autocast(device.type, enabled=False):
            for pair in self._pairs:
                squares.append(((pair.B.mT @ pair.B) * (pair.A @ pair.A.mT)).sum().to(device))
        return torch.stack(squares).sum().clamp_min(0).sqrt()

    @torch.no_grad()
    def ascend(self, rho: float, step_size: float, also_finite: Iterable[nn.Parameter] = ()) -> None:
        r"""Take one step up the gradient that the factors hold, and return to the ball.

        .. math:: (A_2, B_2) \leftarrow \sqrt c\, \left((A_2, B_2) + \eta\, \lVert (A_2, B_2) \rVert_F\,
            \frac{(G_{A_2}, G_{B_2})}{\lVert (G_{A_2}, G_{B_2}) \rVert_F}\right), \qquad
            c = \min\!\left(1, \frac{\rho}{\lVert B_2 A_2 \rVert_F}\right)

        All norms are over all layers. The gradients are first averaged over the ranks, each of which must call this.
        If a gradient is not finite, nothing moves. The host does not wait.

        Args:
            rho: radius of the ball around the weights, in their units, > 0.
            step_size: :math:`\eta`, the length of the step relative to the factors' norm, without a unit.
            also_finite: if a gradient of these is not finite, nothing moves either.
        """
        factors = self.factors
        average_gradients(factors)
        happens = Layout().all_finite([*also_finite, *factors], factors[0].device)
        gradients = [torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in factors]
        length = nn.utils.get_total_norm(factors) * step_size * happens
        for factor, direction in zip(factors, joint_ascent(gradients, 1.0), strict=True):
            factor.addcmul_(direction, length.to(factor.device, factor.dtype))
        shrinkage = (rho / self.norm()).clamp_max(1).sqrt()
        # Not even rounded, where the step is skipped.
        shrinkage = torch.where(happens, shrinkage, 1.0)
        for factor in factors:
            factor.mul_(shrinkage.to(factor.device, factor.dtype))

    def forget_gradients(self) -> None:
        """Let the next backward pass begin a new sum."""
        for factor in self.factors:
            factor.grad = None

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return A2 and B2 by the layer's name, those of layers that are left out for a while included."""
        state = {}
        for name, (A, B) in self._factors.items():
            state[name] = {"A": A.detach().clone(), "B": B.detach().clone()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what :meth:`state_dict` returned; layers that it does not name keep what they have."""
        for name, saved in state.items():
            if name in self._factors:
                A, B = self._factors[name]
                A.copy_(saved["A"])
                B.copy_(saved["B"])
            else:
                self._factors[name] = (saved["A"], saved["B"])
