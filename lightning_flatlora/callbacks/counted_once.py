"""A module counts each batch once: what a step's first pass has counted, the second one leaves as it is."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric


class CountedOnce:
    """The buffers and torchmetrics of a module, which a step's second pass gives back as the first has left them.

    The first pass shows which of them a step writes (BatchNorm's statistics, a queue, an accuracy), and only these are
    copied. Numbers and collections that a step keeps on the module itself may belong to a single pass, so they are left
    alone; if both passes change one of them, a warning says so once.

    Args:
        pl_module: the module, not what a strategy has wrapped around it.

    Example:
        >>> module = LightningModule()
        >>> module.norm = nn.BatchNorm1d(2)
        >>> counted = CountedOnce(module)
        >>> counted.first_pass_starts()
        >>> _ = module.norm(torch.ones(3, 2))
        >>> with counted.second_pass():
        ...     _ = module.norm(torch.ones(3, 2))
        >>> int(module.norm.num_batches_tracked)
        1
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._pl_module = pl_module
        self._owners: list[nn.Module] = []
        self._metrics: list[Metric] = []
        self._buffers_before: list[tuple[Tensor, int]] = []
        self._updates_before: list[int] = []
        self._counts_before: dict[str, int] | None = None
        self._asks_for_counts = True
        self.look_again()

    def look_again(self) -> None:
        """Find the parts that hold buffers or are metrics anew; a walk over all modules, so not for each step."""
        parts = list(self._pl_module.modules())
        self._owners = [part for part in parts if part._buffers]
        self._metrics = [part for part in parts if isinstance(part, Metric)]

    def first_pass_starts(self) -> None:
        """Note what there is, to see what the pass changes."""
        buffers = [buffer for owner in self._owners for buffer in _changing_buffers(owner)]
        self._buffers_before = [(buffer, buffer._version) for buffer in buffers]
        self._updates_before = [metric.update_count for metric in self._metrics]
        self._counts_before = _counts(self._pl_module) if self._asks_for_counts else None

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Inside, the module may count as it likes; afterwards what it has counted is that of the first pass."""
        counts = _counts(self._pl_module) if self._counts_before is not None else {}
        references = [(owner, dict(owner._buffers)) for owner in self._owners]
        values = [(buffer, buffer.clone()) for buffer in self._written_buffers()]
        metrics = [(metric, dict(metric.__dict__)) for metric in self._updated_metrics()]
        for metric, attributes in metrics:
            metric.__dict__.update({name: _copied(value) for name, value in attributes.items()})
        try:
            yield
        finally:
            for metric, attributes in metrics:
                metric.__dict__.clear()
                metric.__dict__.update(attributes)
            # In place: DDP and compiled graphs know the buffers themselves.
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)
            for owner, buffers in references:
                owner._buffers.update(buffers)
        self._warn_of_counts(counts)

    def _written_buffers(self) -> list[Tensor]:
        """All buffers of the parts in which the first pass has written one: not every kernel counts its writes."""
        versions = {id(buffer): version for buffer, version in self._buffers_before}
        written = []
        for owner in self._owners:
            buffers = _changing_buffers(owner)
            tracks = isinstance(owner, _NormBase) and owner.training  # InstanceNorm's statistics alone tell nothing
            if tracks or any(versions.get(id(buffer)) != buffer._version for buffer in buffers):
                written += buffers
        return written

    def _updated_metrics(self) -> list[Metric]:
        before = zip(self._metrics, self._updates_before, strict=True)
        return [metric for metric, updates in before if metric.update_count != updates]

    def _warn_of_counts(self, between: dict[str, int]) -> None:
        if self._counts_before is None:
            return
        self._asks_for_counts = False
        twice = []
        for name, after in _counts(self._pl_module).items():
            first = between.get(name, 0) - self._counts_before.get(name, 0)
            if first != 0 and after - between.get(name, 0) == first:
                twice.append(f"self.{name}")
        if twice:
            more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
            rank_zero_warn(
                f"{type(self._pl_module).__name__} counts each batch twice in {', '.join(twice[:3])}{more}, which both "
                "passes of a step change: count in on_train_batch_end, which comes once for a batch. Buffers, "
                "torchmetrics and self.log count it once already"
            )


def _changing_buffers(owner: nn.Module) -> list[Tensor]:
    """A part's buffers, but those made in inference mode, which can't change and have no version."""
    return [buffer for buffer in owner._buffers.values() if buffer is not None and not buffer.is_inference()]


def _counts(pl_module: LightningModule) -> dict[str, int]:
    """Whole numbers and lengths of collections among a module's own attributes, by name."""
    counts = {}
    for name, value in vars(pl_module).items():
        if name.startswith("_"):  # Lightning's, and torch's
            continue
        if type(value) is int:
            counts[name] = value
        elif isinstance(value, (list, dict, set, deque)):
            counts[name] = len(value)
    return counts


def _copied(value: Any) -> Any:
    """A metric's state, a tensor or a list of tensors, as an object of its own; anything else as it is."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.clone()
    return list(value) if type(value) is list else value
