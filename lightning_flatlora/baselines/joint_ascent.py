"""SAM's perturbation along a gradient, of any parameters and of both factors of every pair."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_flatlora import read_through
from lightning_flatlora.distributed import Layout
from lightning_flatlora.pairs.lora_pair import LoRAPair


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
    wide = []
    for gradient in gradients:
        # An embedding's may be sparse.
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        # In float32 at least, since the squares of a 16-bit gradient may over- or underflow.
        wide.append(dense.to(torch.promote_types(dense.dtype, torch.float32)))
    norm = nn.utils.get_total_norm(wide)
    scale = torch.where(norm > 0, rho / norm, 0.0)
    finite = torch.isfinite(norm)
    perturbations = []
    for gradient in wide:
        E = gradient * scale.to(gradient.device, gradient.dtype)
        perturbations.append(E.masked_fill_(~finite.to(gradient.device), 0.0))
    return perturbations


class FactorPerturbation:
    """Perturbations of A and B of every pair that only the layers read; the stored factors stay clean.

    Args:
        pairs: from :func:`~lightning_flatlora.pairs.find_pairs`; a frozen factor stays where it is.
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
        self._readers: dict[nn.Parameter, list[read_through.AnyReader]] = {}
        for pair in pairs:
            for factor, readers in ((pair.A, pair.A_readers), (pair.B, pair.readers)):
                # Pairs that are rows of one parameter may be read by different modules.
                known = self._readers.setdefault(factor, [])
                known += [reader for reader in _of_whole(readers) if reader not in known]
        self._all_readers = list(chain.from_iterable(self._readers.values()))
        self._E: list[tuple[nn.Parameter, Tensor]] = []
        self._is_installed = False

    @property
    def factors(self) -> list[nn.Parameter]:
        """What is perturbed: the factors of each pair that are trained now."""
        return [factor for factor in self._readers if factor.requires_grad]

    def install(self) -> None:
        """Make every reader able to read a perturbed factor; calling it again does nothing."""
        if not self._is_installed:
            for reader in self._all_readers:
                read_through.install(reader, self._layout.only_views)
        self._is_installed = True

    def uninstall(self) -> None:
        """Give every reader its own class back; calling it again does nothing."""
        if self._is_installed:
            for reader in self._all_readers:
                read_through.uninstall(reader)
        self._is_installed = False

    @torch.no_grad()
    def ascend(self, rho: float) -> None:
        """Take the perturbation from the gradients that the factors hold now; a missing one counts as zero."""
        groups = self._alike()
        stacks = joint_ascent([self._layout.stack(group, gradients=True) for group in groups], rho)
        self._E = []
        for group, stack in zip(groups, stacks, strict=True):
            for factor, E in zip(group, stack.unbind(), strict=True):
                self._E.append((factor, E.view(self._layout.shape(factor))))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the layers read A + E_A and B + E_B; afterwards they read the clean factors, and E is forgotten."""
        perturbations, self._E = self._E, []
        with read_through.restored(self._all_readers):
            for factor, E in perturbations:
                for reader in self._readers[factor]:
                    read_through.perturb(reader, E)
            yield

    def _alike(self) -> list[list[nn.Parameter]]:
        """Factors that stack, in the same order on every rank."""
        groups: dict[object, list[nn.Parameter]] = {}
        for factor in self.factors:
            groups.setdefault((self._layout.shape(factor), factor.dtype, factor.device), []).append(factor)
        return list(groups.values())


def _of_whole(readers: Sequence[read_through.AnyReader]) -> list[read_through.AnyReader]:
    """The readers of a whole parameter, of which a pair may be some rows."""
    whole: list[read_through.AnyReader] = []
    for each in readers:
        reader = read_through.as_reader(each)
        whole.append(read_through.Reader(reader.module, reader.attribute))
    return whole
