"""Note state that a pass may change, and put it back afterwards (the parts of rule R3).

Each function that returns a ``PutBack`` notes a state when called; the ``PutBack`` restores it, any number of times. A
batch is copied.
"""

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Number
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

PutBack = Callable[[], None]

# The attributes that every module has: its parts, hooks and mode.
_OF_TORCH = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
# Limit of the buffers that are copied, in total.
_MOST_BYTES = 2**26
# Limit of an integer buffer that is copied: larger ones are a quantizer's packed weights, or a mask.
_MOST_BYTES_OF_INTEGERS = 2**20


def random_state(device: torch.device) -> PutBack:
    """Note the states of the global random generators: Python's, NumPy's, and torch's on the CPU and the device.

    Example:
        >>> put_back = random_state(torch.device("cpu"))
        >>> first = torch.rand(3); put_back(); bool((torch.rand(3) == first).all())
        True
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Dropout on an accelerator draws from the device's own generator.
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    accelerator_state = accelerator.get_rng_state(device) if accelerator else None

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerator:
            accelerator.set_rng_state(accelerator_state, device)

    return put_back


def own_attributes(module: nn.Module) -> PutBack:
    """Note the numbers, lists, dicts and sets among a module's own attributes, one level deep.

    A container's items are put back, but not changes within an item: a list that was appended to is restored, but not a
    tensor in it that was written in place.

    Example:
        >>> module = nn.Module()
        >>> module.steps, module.losses = 1, [0.5]
        >>> put_back = own_attributes(module)
        >>> module.steps += 1; module.losses.append(0.25); put_back()
        >>> module.steps, module.losses
        (1, [0.5])
    """
    attributes = vars(module)
    kept: dict[str, tuple[Any, Any]] = {}
    for name, value in attributes.items():
        if name not in _OF_TORCH and (type(value) in _CONTAINERS or isinstance(value, Number)):
            kept[name] = value, copy.copy(value)

    def put_back() -> None:
        for name, (value, contents) in kept.items():
            # The very object, which others may hold as well.
            attributes[name] = value
            if isinstance(value, Number):
                continue
            value.clear()
            if isinstance(value, (list, deque)):
                value.extend(contents)
            else:
                value.update(contents)

    return put_back


@torch.no_grad()
def buffers_of(modules: Sequence[nn.Module]) -> PutBack:
    """Note which buffers some modules have, and their values: the smallest first, up to 64 MB in total.

    Integer buffers of more than 1 MB are left out. Values are written back into the same memory, which DDP and compiled
    graphs hold.

    Example:
        >>> module = nn.Module()
        >>> module.register_buffer("count", torch.zeros(()))
        >>> put_back = buffers_of([module])
        >>> module.count += 1; put_back(); int(module.count)
        0
    """
    bound: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    copyable: list[Tensor] = []
    for module in modules:
        held = dict(module._buffers)
        copyable += [buffer for buffer in held.values() if _is_copyable(buffer)]
        # A scripted module has its buffers in C++ and writes them in place.
        if not isinstance(module, ScriptModule):
            bound.append((module, held))
    room = _MOST_BYTES
    values: list[tuple[Tensor, Tensor, Tensor]] = []
    for buffer in sorted(copyable, key=lambda buffer: buffer.nbytes):
        room -= buffer.nbytes
        if room < 0:
            break
        values.append((buffer, buffer.data, buffer.clone()))

    @torch.no_grad()
    def put_back() -> None:
        for module, held in bound:
            if module._buffers.keys() != held.keys():
                module._buffers.clear()
            module._buffers.update(held)
        for buffer, data, value in values:
            if buffer.data_ptr() != data.data_ptr() or buffer.shape != data.shape:
                buffer.data = data
            # Host memory may be read-only, such as a mapped file's, and is written only if the pass has written it. On
            # a device the comparison would take time.
            if not buffer.is_cpu or not torch.equal(buffer, value):
                buffer.copy_(value)

    return put_back


def _is_copyable(buffer: Tensor | None) -> TypeGuard[Tensor]:
    """Say whether values can be copied back into a buffer: not into a lazy, a sparse or an expanded one."""
    if buffer is None or is_lazy(buffer) or buffer.is_inference() or buffer.is_meta:
        return False
    if buffer.layout != torch.strided:
        return False
    if not buffer.is_floating_point() and buffer.nbytes > _MOST_BYTES_OF_INTEGERS:
        return False
    # Several entries of an expanded one share one place in memory, which PyTorch refuses to write.
    return not any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))


def metrics_on_copies(modules: Iterable[nn.Module]) -> PutBack:
    """Let torchmetrics among modules work on copies of their states, until they get back their present objects."""
    kept = []
    for module in modules:
        if isinstance(module, Metric):
            attributes = dict(vars(module))
            kept.append((module, attributes))
            vars(module).update({name: _copied(value) for name, value in attributes.items()})

    def put_back() -> None:
        for metric, attributes in kept:
            vars(metric).clear()
            vars(metric).update(attributes)

    return put_back


def _copied(value: Any) -> Any:
    """Copy a metric's state, a tensor or a list of tensors; return anything else as it is."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.clone()
    if type(value) is list:
        return list(value)
    return value


@runtime_checkable
class _Movable(Protocol):
    """Objects that move to a device by their own method: tensors, and libraries' batches."""

    def to(self, device: Any) -> Any: ...


def copied_batch(batch: Any) -> Any:
    """Copy the tensors of a batch into new containers, so that no pass sees changes by another.

    Containers are those within which Lightning moves tensors to a device. An object with a method ``to`` is
    deep-copied.

    Args:
        batch: whatever a data loader gives.

    Raises:
        RuntimeError: the batch is or holds an iterator, which the first pass would exhaust.

    Example:
        >>> batch = {"x": 1, "more": [2]}
        >>> copied = copied_batch(batch)
        >>> batch.pop("x"), batch["more"].pop(), copied
        (1, 2, {'x': 1, 'more': [2]})
    """
    return apply_to_collection(batch, (Iterator, _Movable), _copied_part)


def _copied_part(part: Any) -> Any:
    if isinstance(part, Iterator):
        kind = type(part).__name__
        raise RuntimeError(f"a second pass can't read the batch, a {kind}, again: let the loader return lists")
    if not isinstance(part, Tensor):
        return copy.deepcopy(part)
    copied = part.clone()
    # A user may have put attributes on it.
    copied.__dict__.update(part.__dict__)
    return copied
