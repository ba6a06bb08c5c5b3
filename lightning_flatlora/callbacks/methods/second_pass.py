"""The second pass of a step starts from what the first started from, and leaves what the first has left."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric

from lightning_flatlora.callbacks.patches import nothing
from lightning_flatlora.callbacks.random_state import random_state


class SecondPass:
    """Lets a second pass over a batch follow the first as if there were one.

    Both passes draw the same random numbers, such as dropout masks, so that they see the same loss function. Buffers
    and torchmetrics count the batch once: the first pass shows which of them a step writes (BatchNorm's statistics, a
    queue, an accuracy), and only these are copied. Numbers and collections that a step keeps on the module itself may
    belong to a single pass, so they are left alone. If both passes change one of them, a warning says so once.

    Attributes:
        parameters: those of the module, listed once: between forward and backward FSDP shows stand-ins for them.

    Args:
        pl_module: the module, not what a strategy has wrapped around it.

    Example:
        >>> module = nn.Module()
        >>> module.norm = nn.BatchNorm1d(2)
        >>> second_pass = SecondPass(module)
        >>> second_pass.first_pass_starts(torch.device("cpu"))
        >>> _ = module.norm(torch.ones(3, 2))
        >>> with second_pass.running():
        ...     _ = module.norm(torch.ones(3, 2))
        >>> int(module.norm.num_batches_tracked)
        1
    """

    def __init__(self, pl_module: nn.Module) -> None:
        self.parameters = list(pl_module.parameters())
        self._pl_module = pl_module
        self._buffers_before: list[tuple[Tensor, int]] = []
        self._updates_before: list[tuple[Metric, int]] = []
        self._counts_before: dict[str, int] | None = None
        self._may_warn = True
        self._put_back_random_state: Callable[[], None] = nothing
        self.look_again()

    def look_again(self) -> None:
        """Find again the parts that hold buffers or are metrics; a walk over all modules, so not for every step."""
        parts = list(self._pl_module.modules())
        self._owners = [part for part in parts if part._buffers]
        self._metrics = [part for part in parts if isinstance(part, Metric)]

    def first_pass_starts(self, device: torch.device) -> None:
        """Record the current state, to see what the pass changes; the device is that on which it draws."""
        self._put_back_random_state = random_state(device)
        self._buffers_before = []
        for owner in self._owners:
            for buffer in _changing_buffers(owner):
                self._buffers_before.append((buffer, buffer._version))
        self._updates_before = [(metric, metric.update_count) for metric in self._metrics]
        self._counts_before = _counts(self._pl_module) if self._may_warn else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the module draws again what it drew, and may count freely; its counts stay those of the first."""
        self._put_back_random_state()
        counts = _counts(self._pl_module) if self._counts_before is not None else {}
        references = [(owner, dict(owner._buffers)) for owner in self._owners]
        values = [(buffer, buffer.clone()) for buffer in self._written_buffers()]
        metrics = []
        for metric, updates in self._updates_before:
            if metric.update_count != updates:
                attributes = dict(metric.__dict__)
                metrics.append((metric, attributes))
                # The metric updates copies, so that its own states can be given back as the same objects.
                metric.__dict__.update({name: _copied(value) for name, value in attributes.items()})
        try:
            yield
        finally:
            for metric, attributes in metrics:
                metric.__dict__.clear()
                metric.__dict__.update(attributes)
            # In place, because DDP and compiled graphs hold the buffers themselves.
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)
            for owner, buffers in references:
                owner._buffers.update(buffers)
        self._warn_of_counts(counts)

    def _written_buffers(self) -> list[Tensor]:
        """All buffers of the parts in which the first pass has written one, as not every kernel counts its writes."""
        versions = {id(buffer): version for buffer, version in self._buffers_before}
        written = []
        for owner in self._owners:
            buffers = _changing_buffers(owner)
            # Among the norms is InstanceNorm, whose kernel leaves no mark on the buffers that it writes.
            tracks = isinstance(owner, _NormBase) and owner.training
            if tracks or any(versions.get(id(buffer)) != buffer._version for buffer in buffers):
                written += buffers
        return written

    def _warn_of_counts(self, between: dict[str, int]) -> None:
        if self._counts_before is None:
            return
        # Once is enough, and comparing the counts of every step would cost time.
        self._may_warn = False
        twice = []
        for name, after in _counts(self._pl_module).items():
            first = between.get(name, 0) - self._counts_before.get(name, 0)
            if first != 0 and after - between.get(name, 0) == first:
                twice.append(f"self.{name}")
        if twice:
            more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
            rank_zero_warn(
                f"{type(self._pl_module).__name__} counts each batch twice in {', '.join(twice[:3])}{more}, which both "
                "passes of a step change: count outside of them, as in on_train_batch_end. Buffers, torchmetrics and "
                "self.log count a batch once already"
            )


def _changing_buffers(owner: nn.Module) -> list[Tensor]:
    """A part's buffers, except those made in inference mode, which can't change and have no version."""
    return [buffer for buffer in owner._buffers.values() if buffer is not None and not buffer.is_inference()]


def _counts(pl_module: nn.Module) -> dict[str, int]:
    """Whole numbers and lengths of collections among a module's own attributes, by name."""
    counts = {}
    for name, value in vars(pl_module).items():
        # These belong to Lightning and to torch.
        if name.startswith("_"):
            continue
        if type(value) is int:
            counts[name] = value
        elif isinstance(value, (list, dict, set, deque)):
            counts[name] = len(value)
    return counts


def _copied(value: Any) -> Any:
    """A copy of a metric's state, a tensor or a list of tensors; anything else as it is."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.clone()
    if type(value) is list:
        return list(value)
    return value
