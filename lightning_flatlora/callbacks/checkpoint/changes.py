"""Which weights of a base differ from what its own loader gives: by their values, not by ``requires_grad``.

At the start of a fit every tensor of the base is summed up, bit by bit, and at each save once more. So it doesn't
matter who has written to it or how: an optimizer, ``tensor.data``, a layer that merges its adapter and takes it out
again. What has differed once is in every file from then on, also after it was frozen, and so is what a loaded file
held.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_flatlora.callbacks.checkpoint.parts import Entry, Kind

_WIDTH = 1021
"""Words whose order a sum tells; no power of two, so that rows of a weight don't fall upon each other."""
_SAMPLES = 8
_WORD = 8
"""Bytes that are read as one integer."""
Print = dict[str, Any]
"""A tensor of the base as a checkpoint describes it: "shape", "dtype", "sum" of its bits, and a "sample" of it.

All of them are None where ranks hold parts.
"""


class BaseRecord:
    """What is known of the base of one module.

    Attributes:
        changed: names of the tensors that differ, or have ever been trained.
        prints: of all tensors at the start of the fit, by name.
        expected: the prints of a file that was loaded, to compare with those of the start.
    """

    def __init__(self) -> None:
        self.changed: set[str] = set()
        self.prints: dict[str, Print] = {}
        self.expected: dict[str, Print] = {}

    def start(self, entries: Mapping[str, Entry], whole: bool) -> None:
        """Take the prints; what differs from those of an earlier fit counts as changed.

        Args:
            entries: of the unwrapped module.
            whole: whether this rank holds whole tensors. If not, the prints tell changes of its part, and no more.
        """
        before, self.prints = self.prints, prints_of(_base(entries), whole)
        for name, old in before.items():
            new = self.prints.get(name)
            if new and old["dtype"] == new["dtype"] and old["shape"] == new["shape"] and old["sum"] != new["sum"]:
                self.changed.add(name)

    def look(self, entries: Mapping[str, Entry], agree: Callable[[list[bool]], list[bool]]) -> list[str]:
        """Find what differs now or is trained.

        Args:
            entries: of the unwrapped module.
            agree: makes one answer of those of all ranks that hold parts.

        Returns:
            The names that are new among the changed ones.
        """
        base = _base(entries)
        sums = sums_of(base)
        differs = []
        for name, tensor in base.items():
            known = self.prints.get(name)
            differs.append(tensor.requires_grad or known is None or known["sum"] != sums[name])
        found = [name for name, changed in zip(base, agree(differs), strict=True) if changed]
        new = [name for name in found if name not in self.changed]
        self.changed.update(new)
        return new

    def saves(self, name: str, entry: Entry) -> bool:
        """Whether an entry belongs into a checkpoint."""
        if entry.kind is Kind.BASE:
            return name in self.changed
        return entry.kind is not Kind.DERIVED

    @contextmanager
    def compared(self, entries: Mapping[str, Entry]) -> Any:
        """What somebody else's checkpoint changes, loaded inside, counts as changed."""
        base = _base(entries)
        before = sums_of(base)
        yield
        after = sums_of(base)
        self.changed.update(name for name in base if before[name] != after[name])


_RECORDS: "WeakKeyDictionary[nn.Module, BaseRecord]" = WeakKeyDictionary()


def record_of(module: nn.Module) -> BaseRecord:
    """The record of a LightningModule, one for all callbacks and fits."""
    return _RECORDS.setdefault(module, BaseRecord())


def _base(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    return {name: entry.value for name, entry in entries.items() if entry.kind is Kind.BASE}


def prints_of(tensors: Mapping[str, Tensor], whole: bool = True) -> dict[str, Print]:
    """Describe tensors.

    Args:
        tensors: by name.
        whole: whether they are; of a part no sample is taken.

    Example:
        >>> prints_of({"w": torch.ones(2, 3)})["w"]["sample"]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    sums = sums_of(tensors)
    samples = _fetched({name: _sample(tensor) for name, tensor in tensors.items()}) if whole else {}
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sum": sums[name],
            "sample": samples.get(name),
        }
        for name, tensor in tensors.items()
    }


def sums_of(tensors: Mapping[str, Tensor]) -> dict[str, int | None]:
    """A number for the bits of each tensor, or of this rank's part of it, in their order; None if it has none to read.

    Example:
        >>> sums = sums_of({"a": torch.tensor([3, 5]), "b": torch.tensor([5, 3]), "c": torch.tensor([3, 5])})
        >>> sums["a"] == sums["b"], sums["a"] == sums["c"]
        (False, True)
    """
    return _fetched({name: _sum(tensor) for name, tensor in tensors.items()})


def _sum(tensor: Tensor) -> Tensor | None:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.is_meta:
        return None
    try:
        octets = local.detach().contiguous().view(-1).view(torch.uint8)
        if octets.storage_offset() % _WORD:  # a slice of another tensor, which can't be read in words where it lies
            octets = octets.clone()
        inside = octets.numel() // (_WORD * _WIDTH) * (_WORD * _WIDTH)
        weights = torch.arange(1, _WORD * _WIDTH + 1, device=octets.device)
        body = octets[:inside].view(torch.int64).view(-1, _WIDTH).sum(0)
        tail = octets[inside:].to(torch.int64)
        return (body * weights[:_WIDTH]).sum() + 31 * (tail * weights[: tail.numel()]).sum()
    except (NotImplementedError, RuntimeError, TypeError):
        return None  # a tensor of a kind of its own, as packed weights of a quantizer: nothing writes to them


def _sample(tensor: Tensor) -> Tensor | None:
    """A few elements, evenly from the first to the last: new rows of an embedding stand at its end."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return None
    last = tensor.numel() - 1
    places = torch.tensor([i * last // (_SAMPLES - 1) for i in range(_SAMPLES)], device=tensor.device)
    try:
        return tensor.detach().reshape(-1)[places].to(torch.float32)
    except (NotImplementedError, RuntimeError, TypeError):
        return None


def _fetched(results: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Small results as numbers, with one copy for each device."""
    values: dict[str, Any] = dict.fromkeys(results)
    names_on: dict[torch.device, list[str]] = {}
    for name, result in results.items():
        if result is not None:
            names_on.setdefault(result.device, []).append(name)
    for names in names_on.values():
        together = torch.stack([result for name in names if (result := results[name]) is not None])
        values.update(zip(names, together.tolist(), strict=True))
    return values


def differing(expected: Mapping[str, Print], found: Mapping[str, Print]) -> tuple[list[str], list[str]]:
    """The tensors of a base that are not as a checkpoint describes them.

    A tensor of another dtype may differ by its rounding, and one that is packed in few bits, there or here, is not
    compared at all.

    Returns:
        Names of tensors that are others altogether, and of those that differ in few bits or few elements.
    """
    others, nearly = [], []
    for name in [*expected, *(name for name in found if name not in expected)]:
        old, new = expected.get(name), found.get(name)
        if old is None or new is None:
            others.append(name)
        elif old["sample"] is not None and new["sample"] is not None:
            same_dtype = old["dtype"] == new["dtype"]
            if old["shape"] != new["shape"] or not _close(old, new):
                others.append(name)
            elif same_dtype and None not in (old["sum"], new["sum"]) and old["sum"] != new["sum"]:
                nearly.append(name)
    return others, nearly


def _close(old: Print, new: Print) -> bool:
    """Whether two samples are equal up to rounding to the coarser dtype, or to what another machine computes."""
    eps = max(torch.finfo(getattr(torch, each["dtype"])).eps for each in (old, new))
    one, other = torch.tensor(old["sample"]), torch.tensor(new["sample"])
    size = float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0
    tolerance = max(eps, 1e-4)
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names of many.

    Example:
        >>> listed(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
