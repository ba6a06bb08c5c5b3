"""Notice which tensors a pass writes, and give them back what they held."""

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer


class Marks:
    """Of some tensors, what changes when they are written: the version that PyTorch counts, and their memory.

    A write in place through ``.data``, as ``key.data.mul_(0.9)``, leaves no mark.

    Args:
        tensors: made outside of inference mode.

    Example:
        >>> weight, other = torch.ones(2), torch.ones(2)
        >>> marks = Marks([weight, other])
        >>> _ = weight.add_(1)
        >>> marks.moved() == [weight]
        True
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        # With the tensors themselves, so that no new one gets the identity of one that is gone.
        self._marks = {id(tensor): (tensor, _mark(tensor)) for tensor in tensors}

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor, the object itself, was there."""
        return id(tensor) in self._marks

    def has_moved(self, tensor: Tensor) -> bool:
        """Whether a tensor has been written since, or was not there."""
        return not self.knows(tensor) or self._marks[id(tensor)][1] != _mark(tensor)

    def moved(self) -> list[Tensor]:
        """Those that have been written since."""
        return [tensor for tensor, mark in self._marks.values() if mark != _mark(tensor)]


class KeptValues:
    """Values that tensors get back, whatever has been written into them or put in their place.

    Args:
        tensors: whose values are kept, in a copy of each.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._kept = [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors]

    def changed(self) -> list[Tensor]:
        """Those that hold other values now, however these were written."""
        return [tensor for tensor, _, value in self._kept if not _is_equal(tensor.detach(), value)]

    @torch.no_grad()
    def put_back(self, among: Container[int] | None = None) -> None:
        """Write the values into the memory that the tensors had, which DDP and compiled graphs hold.

        Args:
            among: the identities of the tensors that are written; None writes all. The others are not touched, since
                their memory may be read-only, as that of a file.
        """
        for tensor, data, value in self._kept:
            if among is None or id(tensor) in among:
                put_memory_back(tensor, data)
                tensor.copy_(value)


def that_fit(tensors: Iterable[Tensor], room: int) -> list[Tensor]:
    """Those of some tensors that fit into a number of bytes, the smallest first.

    Example:
        >>> small, large, other = torch.ones(1), torch.ones(100), torch.ones(2)
        >>> [tensor.numel() for tensor in that_fit([large, other, small], room=12)]
        [1, 2]
    """
    # Only tensors of memory of their own are copied: sparse ones, and those on "meta", have none to count.
    dense = [tensor for tensor in tensors if tensor.layout == torch.strided and not tensor.is_meta]
    fitting = []
    for tensor in sorted(dense, key=lambda each: each.nbytes):
        room -= tensor.nbytes
        if room < 0:
            break
        fitting.append(tensor)
    return fitting


def put_memory_back(tensor: Tensor, data: Tensor) -> None:
    """Let a tensor hold the memory again that it had, where another one has been put in its place.

    Args:
        tensor: whose ``data`` may have been replaced.
        data: the former one.
    """
    if _memory(tensor) != _memory(data):
        tensor.data = data


def untrained_parameters(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """The parameters that no optimizer trains, but a step may write: a momentum encoder's, an average's, a codebook's.

    Not all of them are frozen: a copy of a module, as ``torch.optim.swa_utils.AveragedModel`` makes it, has parameters
    that require gradients and get none. Those of other classes, such as quantized weights and DTensors, are not here.

    Args:
        module: that owns them.
        optimizers: all that train it.
    """
    trained: set[int] = set()
    for optimizer in optimizers:
        for param_group in optimizer.param_groups:
            trained.update(map(id, param_group["params"]))
    found = []
    for parameter in module.parameters():
        # Without a shape, or without a version, nothing can be noticed.
        if id(parameter) in trained or is_lazy(parameter) or parameter.is_inference():
            continue
        # The class of a quantized weight may be that of the parameter alone, as bitsandbytes' Params4bit, whose values
        # mean nothing without what the library keeps beside them and changes with them.
        if type(parameter) is nn.Parameter and type(parameter.data) is Tensor:
            found.append(parameter)
    return found


def writable_buffers(owner: nn.Module) -> dict[str, Tensor]:
    """A part's own buffers that can be written, by name: not those made in inference mode or by ``expand``."""
    found = {}
    for name, buffer in owner._buffers.items():
        # One of a lazy module has no values before the first forward pass.
        if buffer is None or is_lazy(buffer):
            continue
        if not buffer.is_inference() and not _is_expanded(buffer):
            found[name] = buffer
    return found


def _is_expanded(tensor: Tensor) -> bool:
    """Whether several entries are one place in memory, which PyTorch refuses to write."""
    if tensor.layout != torch.strided:
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _is_equal(tensor: Tensor, other: Tensor) -> bool:
    if tensor.device != other.device or tensor.dtype != other.dtype:
        return False
    # PyTorch compares no numbers of four bits, of which a byte holds two.
    if tensor.element_size() == 1:
        tensor, other = tensor.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(tensor, other)


def _mark(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, _memory(tensor)


def _memory(tensor: Tensor) -> int:
    # A sparse tensor has several pieces, and its version is enough.
    return tensor.data_ptr() if tensor.layout == torch.strided else 0
