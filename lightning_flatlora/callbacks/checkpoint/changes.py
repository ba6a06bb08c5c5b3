"""Which weights of a base differ from what its own loader gives: by their values, not by ``requires_grad``.

At the start of a fit the bits of every tensor of the base are added up, and at each save once more. So it doesn't
matter what has written to it: an optimizer, ``tensor.data``, or a layer that merges its adapter and takes it out again.
What has differed once is in every file from then on, even after it was frozen, and so is what a loaded file held.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_flatlora.callbacks.checkpoint.parts import Entry, Kind
from lightning_flatlora.callbacks.checkpoint.sparse import dense_parts
from lightning_flatlora.lora_pair import Finder

_WIDTH = 1021
"""Words whose order a sum depends on; no power of two, so that rows of a weight don't coincide."""
_SAMPLES = 8
_WORD = 8
"""Bytes that are read as one integer."""
_ROWS = {"cpu": 256}
_ROWS_ELSEWHERE = 2**14
"""Rows of words read at once: 2 MB, which stay in a CPU's cache, or 134 MB, which keep a GPU's kernels few."""
Fingerprint = dict[str, Any]
"""A tensor of the base as a checkpoint describes it: "shape", "dtype", the "sum" of its bits, and a "sample" of it.

All of them are None where ranks hold parts.
"""


class BaseRecord:
    """What is known of the base of one module.

    Attributes:
        changed: names of the tensors that differ, or have ever been trained.
        fingerprints: of all tensors at the start of the fit, by name.
        expected: the fingerprints of a file that was loaded, to compare with those of the start.
        finder: of the adapter's factors, where they are not peft's.
    """

    def __init__(self) -> None:
        self.changed: set[str] = set()
        self.fingerprints: dict[str, Fingerprint] = {}
        self.expected: dict[str, Fingerprint] = {}
        self.finder: Finder | None = None
        self._held: dict[str, tuple[bool, torch.Size]] = {}
        # By the tensor's identity, since its name changes when an adapter wraps its layer. Not by a weak reference: a
        # tensor that has one can't be moved to another device where PyTorch swaps tensors, as for those of torchao.
        self._names: dict[int, str] = {}

    def start(self, entries: Mapping[str, Entry], whole: bool) -> None:
        """Take the fingerprints; what differs from those of an earlier fit counts as changed.

        Args:
            entries: of the unwrapped module.
            whole: whether this rank holds whole tensors. If not, the fingerprints show only changes of its own part.
        """
        base = _base(entries)
        self._follow(base)
        held = {name: (whole, _local(tensor).shape) for name, tensor in base.items()}
        before, self.fingerprints = self.fingerprints, fingerprints_of(base, whole)
        for name, old in before.items():
            # The sum of a part says nothing about the whole, nor about a part that begins elsewhere.
            if held.get(name) != self._held[name]:
                continue
            new = self.fingerprints[name]
            if old["dtype"] == new["dtype"] and old["sum"] != new["sum"]:
                self.changed.add(name)
        self._held = held

    def add(self, names: Iterable[str], entries: Mapping[str, Entry]) -> list[str]:
        """Count tensors as changed, even if an adapter renames them later.

        Args:
            names: of tensors of the base.
            entries: of the unwrapped module.

        Returns:
            Those that are new among the changed ones.
        """
        self._follow(_base(entries))
        new = [name for name in names if name not in self.changed]
        self.changed.update(new)
        return new

    def _follow(self, base: Mapping[str, Tensor]) -> None:
        """Carry what is known of a tensor to its new name: an adapter that is added later renames what it wraps."""
        before, self._names = self._names, {id(tensor): name for name, tensor in base.items()}
        for name, tensor in base.items():
            old = before.get(id(tensor))
            if old is None or name in self.fingerprints:
                continue
            # Another tensor has that name now, so this one only has the identity of one that is gone.
            if old in base and base[old] is not tensor:
                continue
            if old in self.fingerprints:
                self.fingerprints[name] = self.fingerprints[old]
                self._held[name] = self._held[old]
            if old in self.changed:
                self.changed.add(name)

    def differs(self, entries: Mapping[str, Entry]) -> dict[str, bool]:
        """Whether each tensor of the base, by name, is different now, or is trained, or is known to have changed.

        Args:
            entries: of the unwrapped module, as this rank holds them.
        """
        base = _base(entries)
        self._follow(base)
        sums = sums_of(base)
        differs = {}
        for name, tensor in base.items():
            known = self.fingerprints.get(name)
            has_changed = known is None or known["sum"] != sums[name]
            # What this rank has found before is reported again, since the others may not know of it.
            differs[name] = has_changed or tensor.requires_grad or name in self.changed
        return differs

    @contextmanager
    def compared(self, entries: Mapping[str, Entry]) -> Iterator[None]:
        """What another callback's checkpoint changes when it is loaded inside counts as changed."""
        base = _base(entries)
        before = sums_of(base)
        # Not in a finally: after a failed load there is nothing to compare.
        yield
        after = sums_of(base)
        self.add([name for name in base if before[name] != after[name]], entries)


_RECORDS: "WeakKeyDictionary[nn.Module, BaseRecord]" = WeakKeyDictionary()


def record_of(module: nn.Module) -> BaseRecord:
    """The record of a LightningModule, one for all callbacks and fits."""
    # Outside of the module, whose attributes belong to the user, and weakly, so that it goes with the module.
    return _RECORDS.setdefault(module, BaseRecord())


def _base(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    return {name: entry.value for name, entry in entries.items() if entry.kind is Kind.BASE}


def fingerprints_of(tensors: Mapping[str, Tensor], whole: bool = True) -> dict[str, Fingerprint]:
    """Describe tensors.

    Args:
        tensors: by name.
        whole: whether they are; of a part no sample is taken.

    Example:
        >>> fingerprints_of({"w": torch.ones(2, 3)})["w"]["sample"]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    sums = sums_of(tensors)
    samples = _fetched({name: _if_readable(_sample, tensor) for name, tensor in tensors.items()}) if whole else {}
    fingerprints = {}
    for name, tensor in tensors.items():
        fingerprints[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sum": sums[name],
            "sample": samples.get(name),
        }
    return fingerprints


def sums_of(tensors: Mapping[str, Tensor]) -> dict[str, int | None]:
    """A number for the bits of each tensor, or of this rank's part of it, in their order; None if they can't be read.

    Example:
        >>> sums = sums_of({"a": torch.tensor([3, 5]), "b": torch.tensor([5, 3]), "c": torch.tensor([3, 5])})
        >>> sums["a"] == sums["b"], sums["a"] == sums["c"]
        (False, True)
    """
    return _fetched({name: _if_readable(_sum, _local(tensor)) for name, tensor in tensors.items()})


def _if_readable(read: Callable[[Tensor], Tensor | None], tensor: Tensor) -> Tensor | None:
    """What can be read off a tensor; None without values, and for one of a special kind."""
    if tensor.is_meta:
        return None
    try:
        return read(tensor.detach())
    except torch.OutOfMemoryError:  # a RuntimeError too, but it says nothing about the tensor
        raise
    except (NotImplementedError, RuntimeError, TypeError):
        # Such as a quantizer's packed weights, to which nothing writes.
        return None


def _sum(tensor: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in dense_parts(tensor):
        # Times an odd number, so that it matters which part is which.
        total = 31 * total + _sum_of_dense(part)
    return total


def _sum_of_dense(tensor: Tensor) -> Tensor:
    octets = tensor.contiguous().view(-1).view(torch.uint8)
    # A slice of another tensor, which can't be read in words in place.
    if octets.storage_offset() % _WORD:
        octets = octets.clone()
    inside = octets.numel() // (_WORD * _WIDTH) * (_WORD * _WIDTH)
    # Odd ones alone: a product with an even one, which wraps around, would lose the highest bits of a change.
    weights = 2 * torch.arange(_WORD * _WIDTH, device=octets.device) + 1
    body = torch.zeros(_WIDTH, dtype=torch.int64, device=octets.device)
    rows = _ROWS.get(octets.device.type, _ROWS_ELSEWHERE)
    for words in torch.split(octets[:inside].view(torch.int64).view(-1, _WIDTH), rows):
        # The upper half is added once more at the bottom, since changes of an even number of highest bits would
        # cancel. It is added three times, because once would undo what a change of both halves' signs does.
        upper = words >> 32
        body += torch.add(words, upper, alpha=3, out=upper).sum(0)
    tail = octets[inside:].to(torch.int64)
    return (body * weights[:_WIDTH]).sum() + 31 * (tail * weights[: tail.numel()]).sum()


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sample(tensor: Tensor) -> Tensor | None:
    """A few elements, evenly spaced from the first to the last, since new rows of an embedding stand at its end."""
    values = dense_parts(tensor)[-1]
    if not values.is_floating_point() or values.numel() == 0:
        return None
    last = values.numel() - 1
    places = torch.tensor([i * last // (_SAMPLES - 1) for i in range(_SAMPLES)], device=values.device)
    return values.reshape(-1)[places].to(torch.float32)


def _fetched(results: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Small results as numbers, with one copy for each device."""
    values: dict[str, Any] = dict.fromkeys(results)
    on_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, result in results.items():
        if result is not None:
            on_device.setdefault(result.device, {})[name] = result
    for group in on_device.values():
        numbers = torch.stack(list(group.values())).tolist()
        values.update(zip(group, numbers, strict=True))
    return values


_EXACT = ("bool", "int16", "int32", "int64", "complex64", "complex128")
"""Dtypes without rounding or packing: quantized weights are in int8 and uint8."""


def differing(expected: Mapping[str, Fingerprint], found: Mapping[str, Fingerprint]) -> tuple[list[str], list[str]]:
    """The tensors of a base that are not as a checkpoint describes them.

    A tensor of another dtype may differ by its rounding, and one that is quantized, in the file or in the model, is not
    compared. Indices, masks and complex numbers are compared as a whole.

    Returns:
        Names of tensors that are others altogether, and of those that differ in few bits or few elements.
    """
    others, nearly = [], []
    for name in dict.fromkeys([*expected, *found]):
        old, new = expected.get(name), found.get(name)
        if old is None or new is None:
            others.append(name)
        elif old["sample"] is None and new["sample"] is None:
            if old["dtype"] == new["dtype"] in _EXACT and (old["shape"], old["sum"]) != (new["shape"], new["sum"]):
                others.append(name)
        elif old["sample"] is not None and new["sample"] is not None:
            same_dtype = old["dtype"] == new["dtype"]
            if old["shape"] != new["shape"] or not _close(old, new):
                others.append(name)
            elif same_dtype and None not in (old["sum"], new["sum"]) and old["sum"] != new["sum"]:
                nearly.append(name)
    return others, nearly


def _close(old: Fingerprint, new: Fingerprint) -> bool:
    """Whether two samples are equal up to rounding to the coarser of two dtypes, or to what another machine computes.

    Frozen weights are not rounded again. So within one dtype even the next number of bfloat16 is another value: the
    weights of a chat model differ that little from those of its base.
    """
    tolerance = 1e-4
    if old["dtype"] != new["dtype"]:
        eps = max(torch.finfo(getattr(torch, each["dtype"])).eps for each in (old, new))
        # One of them was rounded to the coarser dtype.
        tolerance = max(tolerance, eps)
    one, other = torch.tensor(old["sample"]), torch.tensor(new["sample"])
    size = float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def listed(names: Iterable[str]) -> str:
    """The first three names of many.

    Example:
        >>> listed(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    names = list(names)
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
