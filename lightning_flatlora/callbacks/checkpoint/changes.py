"""Which weights of a base differ from what its own loader gives: by their values, not by ``requires_grad``.

At the start of a fit every tensor of the base is summed up, bit by bit, and at each save once more. So it doesn't
matter who has written to it or how: an optimizer, ``tensor.data``, a layer that merges its adapter and takes it out
again. What has differed once is in every file from then on, also after it was frozen, and so is what a loaded file
held.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_flatlora.callbacks.checkpoint.parts import Entry, Kind

_WIDTH = 1021
"""Words whose order a sum tells; no power of two, so that rows of a weight don't fall upon each other."""
_SAMPLES = 8
_WORD = 8
"""Bytes that are read as one integer."""
_ROWS = {"cpu": 256}
_ROWS_ELSEWHERE = 2**14
"""Rows of words that are read at once: 2 MB, which stay in a CPU's cache, or 134 MB, for a GPU few kernels."""
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
        self._whole = True
        self._local_shapes: dict[str, torch.Size] = {}
        self._names: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()

    def start(self, entries: Mapping[str, Entry], whole: bool) -> None:
        """Take the prints; what differs from those of an earlier fit counts as changed.

        Args:
            entries: of the unwrapped module.
            whole: whether this rank holds whole tensors. If not, the prints tell changes of its part, and no more.
        """
        base = _base(entries)
        self._follow(base)
        shapes = {name: _local(tensor).shape for name, tensor in base.items()}
        before, self.prints = self.prints, prints_of(base, whole)
        for name, old in before.items():
            new = self.prints.get(name)
            # A part's sum tells nothing of the whole's, nor of a part that begins elsewhere.
            comparable = whole == self._whole and shapes.get(name) == self._local_shapes.get(name)
            if new and comparable and old["dtype"] == new["dtype"] and old["sum"] != new["sum"]:
                self.changed.add(name)
        self._whole, self._local_shapes = whole, shapes

    def add(self, names: Iterable[str], entries: Mapping[str, Entry]) -> None:
        """Count tensors as changed, whatever they are called later.

        Args:
            names: of tensors of the base.
            entries: of the unwrapped module.
        """
        self._follow(_base(entries))
        self.changed.update(names)

    def _follow(self, base: Mapping[str, Tensor]) -> None:
        """An adapter that is added later renames what it wraps: what is known of a tensor goes to its new name."""
        for name, tensor in base.items():
            old = self._names.get(tensor)
            self._names[tensor] = name
            if old in (None, name) or name in self.prints:
                continue
            if old in self.prints:
                self.prints[name] = self.prints[old]
                self._local_shapes[name] = self._local_shapes[old]
            if old in self.changed:
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
        self._follow(base)
        sums = sums_of(base)
        differs = []
        for name, tensor in base.items():
            known = self.prints.get(name)
            has_changed = known is None or known["sum"] != sums[name]
            # What a rank has found before is asked for again: the others may not know of it.
            differs.append(has_changed or tensor.requires_grad or name in self.changed)
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
    def compared(self, entries: Mapping[str, Entry]) -> Iterator[None]:
        """What somebody else's checkpoint changes, loaded inside, counts as changed."""
        base = _base(entries)
        before = sums_of(base)
        yield
        after = sums_of(base)
        self.add([name for name in base if before[name] != after[name]], entries)


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
    local = _local(tensor)
    if local.is_meta:
        return None
    try:
        octets = local.detach().contiguous().view(-1).view(torch.uint8)
        if octets.storage_offset() % _WORD:  # a slice of another tensor, which can't be read in words where it lies
            octets = octets.clone()
        inside = octets.numel() // (_WORD * _WIDTH) * (_WORD * _WIDTH)
        # Odd ones alone: a product with an even one, which wraps around, would lose the highest bits of a change.
        weights = 2 * torch.arange(_WORD * _WIDTH, device=octets.device) + 1
        body = torch.zeros(_WIDTH, dtype=torch.int64, device=octets.device)
        rows = _ROWS.get(octets.device.type, _ROWS_ELSEWHERE)
        for words in torch.split(octets[:inside].view(torch.int64).view(-1, _WIDTH), rows):
            # The upper half once more at the bottom: changes of an even number of highest bits would add up to nothing.
            # Three times, because once would undo what a change of both halves' signs does.
            upper = words >> 32
            body += torch.add(words, upper, alpha=3, out=upper).sum(0)
        tail = octets[inside:].to(torch.int64)
        return (body * weights[:_WIDTH]).sum() + 31 * (tail * weights[: tail.numel()]).sum()
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError, TypeError):
        return None  # a tensor of a kind of its own, as packed weights of a quantizer: nothing writes to them


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sample(tensor: Tensor) -> Tensor | None:
    """A few elements, evenly from the first to the last: new rows of an embedding stand at its end."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return None
    last = tensor.numel() - 1
    places = torch.tensor([i * last // (_SAMPLES - 1) for i in range(_SAMPLES)], device=tensor.device)
    try:
        return tensor.detach().reshape(-1)[places].to(torch.float32)
    except torch.OutOfMemoryError:
        raise
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

    A tensor of another dtype may differ by its rounding, and one that is quantized, in the file or in the model, is not
    compared.

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
    """Whether two samples are equal up to rounding to the coarser of two dtypes, or to what another machine computes.

    What is frozen isn't rounded anew. So in one dtype the next number of bfloat16 is another value: a chat model's
    weights differ so from those of its base.
    """
    tolerance = 1e-4
    if old["dtype"] != new["dtype"]:
        eps = max(torch.finfo(getattr(torch, each["dtype"])).eps for each in (old, new))
        tolerance = max(tolerance, eps)
    one, other = torch.tensor(old["sample"]), torch.tensor(new["sample"])
    size = float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0
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
