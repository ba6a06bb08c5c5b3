"""Notice which buffers a pass writes, replaces or registers, and put them back."""

from collections.abc import Container, Iterable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from lightning_flatlora.methods.put_back import PutBack

_MOST_BYTES = 2**26
"""Of buffers that are copied in a module's first step, while nobody knows yet whether the step writes them."""

Mark = tuple[int, int]


def mark_of(tensor: Tensor) -> Mark:
    """Give what changes when a tensor is written: the version that torch counts, and the place of its memory.

    A write in place through ``.data``, as ``key.data.mul_(0.9)``, leaves no mark.

    Example:
        >>> weight = torch.ones(2)
        >>> mark = mark_of(weight)
        >>> _ = weight.add_(1)
        >>> mark_of(weight) == mark
        False
    """
    # A sparse tensor has several pieces of memory, and its version is enough.
    return tensor._version, tensor.data_ptr() if tensor.layout == torch.strided else 0


class Buffers:
    """Gives the buffers of some modules what they held before a first pass, and afterwards what it has left.

    Of a module that has been seen to write one of its buffers, all are copied before each first pass. To see it from
    the first step on, the others are copied once after each :meth:`look`, the smallest first and up to 64 MB in all. So
    a larger buffer that a step writes in place begins that one second pass with what the first has left.

    Args:
        modules: that may have buffers.

    Example:
        >>> module = nn.Module()
        >>> module.register_buffer("count", torch.zeros(()))
        >>> buffers = Buffers([module])
        >>> buffers.first_pass_starts()
        >>> _ = module.count.add_(1)
        >>> put_back = buffers.first_pass_ended()
        >>> print(int(module.count)); put_back(); print(int(module.count))
        0
        1
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._modules: list[nn.Module] = []
        # By identity, since a torchmetric has a hash that changes with its state.
        self._known: set[int] = set()
        self._writers: set[int] = set()
        self._before = _Held(())
        self.look(modules)

    def look(self, modules: Iterable[nn.Module]) -> None:
        """Take other modules, and remember which of those that stay write their buffers."""
        before = set(map(id, self._modules))
        self._modules = list(modules)
        self._known = set()
        # What is new may have the identity of what is gone, so only those of both lists are the same.
        self._writers &= before.intersection(map(id, self._modules))
        # The kernel of InstanceNorm leaves no mark on its statistics.
        self._writers |= {id(module) for module in self._modules if isinstance(module, _NormBase)}

    def first_pass_starts(self) -> None:
        """Keep the values that the second pass may have to begin with."""
        self._before = _Held(self._modules)
        of_writers, unknown = [], []
        for owner, buffer in self._before.writable:
            if id(owner) in self._writers:
                of_writers.append((owner, buffer))
            elif id(owner) not in self._known:
                unknown.append((owner, buffer))
        self._before.keep_values(of_writers)
        self._before.keep_values(_that_fit(unknown))

    def first_pass_ended(self) -> PutBack:
        """Let the buffers be as they were before the first pass.

        Returns:
            A function that lets them be as the first pass has left them.
        """
        before, after = self._before, _Held(self._modules)
        self._writers |= before.changed(self._writers)
        # Where the pass has registered a buffer, or put another tensor in its place.
        self._writers |= {id(owner) for owner, buffer in after.writable if not before.has(buffer)}
        self._known.update(map(id, after.owners))
        after.keep_values([(owner, buffer) for owner, buffer in after.writable if id(owner) in self._writers])
        before.put_back(self._writers, after.owners)
        self._before = _Held(())  # its copies are not needed any more
        return lambda: after.put_back(self._writers, before.owners)


class _Held:
    """The buffers of some modules at one moment, and the values of those that are named.

    Args:
        modules: of which the few that have buffers now are the owners: any may register some in a step.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.owners = [module for module in modules if module._buffers]
        self._bound = {id(owner): dict(owner._buffers) for owner in self.owners}
        self.writable: list[tuple[nn.Module, Tensor]] = []
        self._marks: dict[int, Mark] = {}
        for owner in self.owners:
            for buffer in self._bound[id(owner)].values():
                if _is_writable(buffer):
                    self.writable.append((owner, buffer))
                    self._marks[id(buffer)] = mark_of(buffer)
        self._values: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []

    def has(self, buffer: Tensor) -> bool:
        """Say whether the very tensor was there."""
        return id(buffer) in self._marks

    def keep_values(self, buffers: Iterable[tuple[nn.Module, Tensor]]) -> None:
        """Copy the values of some buffers."""
        for owner, buffer in buffers:
            self._values.append((owner, buffer, buffer.data, buffer.detach().clone()))

    def changed(self, known: set[int]) -> set[int]:
        """Find the owners of buffers that have been written since; of known ones only by their marks."""
        owners = {id(owner) for owner, buffer in self.writable if mark_of(buffer) != self._marks[id(buffer)]}
        for owner, buffer, _, value in self._values:
            # Not every write leaves a mark. Where there is one, the tensors may not even be of one kind.
            # Comparing values waits for the device, so it is done only as long as it may tell something.
            if id(owner) not in owners | known and not torch.equal(buffer, value):
                owners.add(id(owner))
        return owners

    @torch.no_grad()
    def put_back(self, writers: Container[int], others: Iterable[nn.Module]) -> None:
        """Bind the buffers again, and give those of writers their values.

        Args:
            writers: the identities of the modules that write. The memory of others may be read-only, as a file's.
            others: modules that may have buffers now, and had none at that moment.
        """
        for owner in [*self.owners, *others]:
            # A scripted module has its buffers in C++, and its steps write them in place.
            if isinstance(owner, ScriptModule):
                continue
            bound = self._bound.get(id(owner), {})
            if owner._buffers.keys() != bound.keys():
                owner._buffers.clear()
            owner._buffers.update(bound)
        for owner, buffer, data, value in self._values:
            if id(owner) in writers:
                # In the memory that it had, which DDP and compiled graphs hold.
                if buffer.data_ptr() != data.data_ptr():
                    buffer.data = data
                buffer.copy_(value)


def _is_writable(buffer: Tensor | None) -> TypeGuard[Tensor]:
    """Say whether a buffer has values in memory of its own: not a sparse or an expanded one."""
    # One of a lazy module has no values before the first forward pass.
    if buffer is None or is_lazy(buffer) or buffer.is_inference() or buffer.is_meta:
        return False
    if buffer.layout != torch.strided:
        return False
    # Of an expanded one several entries are one place in memory, which PyTorch refuses to write.
    return not any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def _that_fit(buffers: Iterable[tuple[nn.Module, Tensor]]) -> list[tuple[nn.Module, Tensor]]:
    """Choose the smallest buffers, up to what may be copied while nobody knows which are written."""
    room = _MOST_BYTES
    fitting = []
    for owner, buffer in sorted(buffers, key=lambda pair: pair[1].nbytes):
        room -= buffer.nbytes
        if room < 0:
            break
        fitting.append((owner, buffer))
    return fitting
