"""LoRA-SAM: SAM on A and B at once."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora import read_through
from lightning_flatlora.baselines.joint_ascent import joint_ascent
from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.lora_pair import Finder, LoRAPair
from lightning_flatlora.methods.step_method import StepMethod
from lightning_flatlora.schedules import RhoSchedule


class LoRASAM(MethodCallback):
    r"""Take each step's gradient where A and B are moved along their joint gradient (SAM in LoRA's space): two passes.

    .. math:: (E_A, E_B) = \rho\, \frac{(G_A, G_B)}{\lVert (G_A, G_B) \rVert_F},
        \qquad \text{gradient at } (A + E_A,\; B + E_B)

    The norm is over all pairs. The product s (B + E_B)(A + E_A) has cross terms, so this is no ball around W: the
    perturbation of W changes under (B M, M⁻¹ A). Only the layers read the moved factors; the stored ones are clean at
    every moment. In all other respects (dropout, logging, accumulation, ranks) the passes are those of
    :class:`~lightning_flatlora.FMLoRA`.

    Args:
        rho: radius of the ball over all A and B, in the factors' units, >= 0; or a schedule over optimizer steps.
        start_step: optimizer steps of plain LoRA before the first ascent.
        every_n_steps: optimizer steps between ascents; the others are plain LoRA steps.
        adapter_name: the peft adapter to perturb; None takes the active ones.
        finder: says what the pairs are where the layers are not peft's, see :mod:`lightning_flatlora.finders`.
        sync_ascent: average the ascent's gradient over the ranks; False leaves each rank its own E and sends nothing.

    Raises:
        MisconfigurationException: values out of range (here), or a model, optimizer or strategy that can't work (at the
            start of fit, before the first step).

    Source: Foret et al., arXiv 2010.01412; on LoRA, Eq. 7 of arXiv 2508.00522.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[LoRASAM(rho=0.1)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        start_step: int = 0,
        every_n_steps: int = 1,
        adapter_name: str | None = None,
        finder: Finder | None = None,
        sync_ascent: bool = True,
    ) -> None:
        super().__init__(
            LoRASAMStep(
                rho,
                start_step=start_step,
                every_n_steps=every_n_steps,
                adapter_name=adapter_name,
                finder=finder,
                sync_ascent=sync_ascent,
            )
        )


class LoRASAMStep(StepMethod):
    """The step of :class:`LoRASAM`."""

    title = "LoRASAM"
    takes_two_passes = True

    @override
    def reset(self) -> None:
        super().reset()
        self._readers: dict[nn.Parameter, list[read_through.AnyReader]] = {}
        self._installed = ExitStack()

    @override
    def follow(self, pairs: list[LoRAPair], module: nn.Module, wrapped: nn.Module) -> None:
        super().follow(pairs, module, wrapped)
        self.close()
        self._readers = {}
        for pair in pairs:
            for factor, readers in ((pair.A, pair.A_readers), (pair.B, pair.readers)):
                # Pairs that are rows of one parameter may be read by different modules.
                known = self._readers.setdefault(factor, [])
                known += [reader for reader in _of_whole(readers) if reader not in known]

    @override
    def install(self) -> None:
        self.warn_of_rounding("B", [pair.B for pair in self.pairs])
        self.close()
        for reader in chain.from_iterable(self._readers.values()):
            read_through.install(reader, self._layout.only_views)
            self._installed.callback(read_through.uninstall, reader)

    @override
    def close(self) -> None:
        self._installed.close()

    @property
    @override
    def ascending(self) -> list[nn.Parameter]:
        return [factor for factor in self._readers if factor.requires_grad]

    @override
    def ascend(self) -> AbstractContextManager[None]:
        # Factors that stack, in the same order on every rank.
        groups: dict[object, list[nn.Parameter]] = defaultdict(list)
        for factor in self.ascending:
            groups[self._layout.shape(factor), factor.dtype, factor.device].append(factor)
        with torch.no_grad():
            # A gradient that is missing counts as zero.
            gradients = [self._layout.stack(group, gradients=True) for group in groups.values()]
            stacks = joint_ascent(gradients, self.current_rho)
        E: dict[nn.Parameter, Tensor] = {}
        for group, stack in zip(groups.values(), stacks, strict=True):
            E.update(zip(group, stack, strict=True))
        return self._applied(E)

    @contextmanager
    def _applied(self, perturbations: dict[nn.Parameter, Tensor]) -> Iterator[None]:
        """Inside, the layers read A + E_A and B + E_B; afterwards they read the clean factors."""
        with read_through.restored(list(chain.from_iterable(self._readers.values()))):
            for factor, E in perturbations.items():
                for reader in self._readers[factor]:
                    read_through.perturb(reader, E.view(self._layout.shape(factor)))
            yield


def _of_whole(readers: Sequence[read_through.AnyReader]) -> list[read_through.AnyReader]:
    """Give the readers of a whole parameter, of which a pair may be some rows."""
    whole: list[read_through.AnyReader] = []
    for each in readers:
        reader = read_through.as_reader(each)
        whole.append(read_through.Reader(reader.module, reader.attribute))
    return whole
