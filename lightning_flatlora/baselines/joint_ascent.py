"""The perturbation along a gradient, as SAM takes it, and along both factors of every pair."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_flatlora import read_through
from lightning_flatlora.distributed import Layout
from lightning_flatlora.pairs import LoRAPair


def joint_ascent(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    r"""SAM's perturbation of several parameters at once.

    .. math:: E_i = \rho\, \frac{G_i}{\lVert (G_1, G_2, \dots) \rVert_F}

    Args:
        gradients: of any shapes.
        rho: radius of the ball over all of them, in the parameters' units.

    Returns:
        The perturbations, in float32 or wider; zero where the gradient is zero, and all zero where one is not finite.
        The host does not wait.

    Source: Foret et al., arXiv 2010.01412, Eq. 2 with p = 2.

    Example:
        >>> joint_ascent([torch.tensor([3.0]), torch.tensor([0.0, 4.0])], rho=0.5)
        [tensor([0.3000]), tensor([0.0000, 0.4000])]
    """
    wide = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
    norm = nn.utils.get_total_norm(wide)
    scale, finite = torch.where(norm > 0, rho / norm, 0.0), torch.isfinite(norm)
    return [(g * scale.to(g.device, g.dtype)).masked_fill_(~finite.to(g.device), 0.0) for g in wide]


class FactorPerturbation:
    """Perturbations of A and B of every pair, which the layers read through; the stored factors stay clean.

    Args:
        pairs: from :func:`~lightning_flatlora.pairs.find_pairs`; a frozen A stays where it is.
        layout: how the ranks share the factors.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_flatlora.pairs import find_pairs
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> perturbation = FactorPerturbation(find_pairs(model).pairs, Layout())
        >>> perturbation.install()
        >>> model(torch.ones(5, 4)).sum().backward()
        >>> perturbation.ascend(rho=0.5)
        >>> with perturbation.applied():
        ...     perturbed = model(torch.ones(5, 4)).sum()
        >>> bool(perturbed > model(torch.ones(5, 4)).sum())
        True
        >>> perturbation.uninstall()
    """

    def __init__(self, pairs: Sequence[LoRAPair], layout: Layout) -> None:
        self._layout = layout
        self._readers = {
            factor: readers
            for pair in pairs
            for factor, readers in ((pair.A, pair.A_readers), (pair.B, pair.readers))
            if factor.requires_grad
        }
        self._E: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def factors(self) -> list[nn.Parameter]:
        """What is perturbed: A, if it is trained, and B of each pair."""
        return list(self._readers)

    def install(self) -> None:
        """Make every reader able to read a perturbed factor."""
        for readers in self._readers.values():
            for reader in readers:
                read_through.install(reader, self._layout.only_views)

    def uninstall(self) -> None:
        """Give every reader its own class back."""
        for readers in self._readers.values():
            for reader in readers:
                read_through.uninstall(reader)

    @torch.no_grad()
    def ascend(self, rho: float) -> None:
        """Take the perturbation from the gradients that the factors hold now; a missing one counts as zero."""
        groups = self._alike()
        stacks = joint_ascent([self._layout.stack(group, gradients=True) for group in groups], rho)
        self._E = [
            (factor, E.view(self._layout.shape(factor)))
            for group, stack in zip(groups, stacks, strict=True)
            for factor, E in zip(group, stack.unbind(), strict=True)
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the layers read A + E_A and B + E_B; after it the clean ones, and E is forgotten."""
        try:
            for factor, E in self._E:
                for reader in self._readers[factor]:
                    read_through.perturb(reader, E)
            yield
        finally:
            for readers in self._readers.values():
                for reader in readers:
                    read_through.perturb(reader, None)
            self._E = []

    def _alike(self) -> list[list[nn.Parameter]]:
        """Factors that stack, in the same order on every rank."""
        groups: dict[object, list[nn.Parameter]] = {}
        for factor in self._readers:
            groups.setdefault((self._layout.shape(factor), factor.dtype, factor.device), []).append(factor)
        return list(groups.values())
