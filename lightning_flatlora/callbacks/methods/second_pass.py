"""The second pass of a step starts from what the first started from, and leaves what the first has left."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_flatlora.callbacks.methods.training_step import own_containers, tensors_in
from lightning_flatlora.callbacks.methods.written_tensors import WrittenTensors
from lightning_flatlora.callbacks.random_state import random_state
from lightning_flatlora.callbacks.reachable import GENERATORS, objects_in, state_restorer, variables_of_code
from lightning_flatlora.callbacks.tensor_writes import Marks


class SecondPass:
    """Lets a second pass over a batch follow the first as if there were one.

    Both passes draw the same random numbers, such as dropout masks, from PyTorch's, NumPy's and Python's generators,
    from those that the module keeps, and from those that its own code finds in its classes or in global variables. What
    a step writes into buffers and into parameters that no optimizer trains (BatchNorm's statistics, a queue, a momentum
    encoder), and the states of torchmetrics, are afterwards as the first pass left them. The second pass begins with
    the buffers and such parameters that the first began with, so that both see the same loss function, and the batch as
    it came. A tensor that no first pass has met yet is copied, the smallest first, up to 128 MB; from then on only
    those that a first pass has been seen to write. So in the step that is the first to write a tensor, if earlier steps
    have left it alone or it was not copied, the second pass begins with what the first has left. If such a tensor is
    written in place through ``.data``, it is not noticed at all. Parameters are not watched under FSDP.

    What else a step keeps in attributes may belong to a single pass, so it is left alone. If both passes change a whole
    number or the length of a collection of the module itself, a warning says so once.

    Attributes:
        parameters: those of the module, listed once: between forward and backward FSDP shows stand-ins for them.

    Args:
        pl_module: the module, not what a strategy has wrapped around it.
        optimizers: all that train it.
        is_sharded: whether ranks hold parts of its parameters.

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

    def __init__(self, pl_module: nn.Module, optimizers: Iterable[Optimizer] = (), is_sharded: bool = False) -> None:
        self.parameters = list(pl_module.parameters())
        self._pl_module = pl_module
        self._tensors = WrittenTensors(pl_module, optimizers, is_sharded)
        self._batch_marks = Marks()
        self._is_first_step = True
        self._writes_batch = False
        self._metrics_before: list[tuple[Metric, Any]] = []
        self._counts_before: dict[str, int] | None = None
        self._may_warn = True
        self._random_states: list[Callable[[], None]] = []
        self._to_look_at: Iterable[Optimizer] | None = None
        self._look()

    def look_again(self, optimizers: Iterable[Optimizer]) -> None:
        """At the next first pass, find again what may be written or drawn from.

        That takes a walk over all modules, so it is not for every step. And not now, at the start of an epoch, since
        the hooks of others may still change the module.
        """
        self._to_look_at = optimizers

    def _look(self) -> None:
        reachable = objects_in([self._pl_module, *variables_of_code(self._pl_module)], (Metric, *GENERATORS))
        self._generators = [found for found in reachable if isinstance(found, GENERATORS)]
        # Those among the modules, however many there are, and others, as in a plain list or dictionary, as far as the
        # search goes. By identity, since torchmetrics makes a new metric of "one == another".
        metrics: dict[int, Metric] = {}
        for found in (*self._pl_module.modules(), *reachable):
            if isinstance(found, Metric):
                metrics[id(found)] = found
        self._metrics = list(metrics.values())
        self._uncounted = _in_wrappers(self._metrics)

    def first_pass_starts(self, device: torch.device) -> None:
        """Record the current state, to see what the pass changes; the device is that on which it draws."""
        if self._to_look_at is not None:
            self._tensors.look(self._to_look_at)
            self._look()
            self._to_look_at = None
        self._random_states = [random_state(device), *map(state_restorer, self._generators)]
        self._tensors.first_pass_starts()
        self._metrics_before = [(metric, self._mark_of(metric)) for metric in self._metrics]
        self._counts_before = _counts(self._pl_module) if self._may_warn else None

    def kept_batch(self, batch: Any) -> Any:
        """What the second pass gets in a batch's place, to be called before the first.

        It has containers of its own. In the first step, and once a first pass has been seen to write into a batch's
        tensors, as one that masks tokens in place, the tensors are copies as well.
        """
        if not self._writes_batch:
            # Those made in inference mode have no version by which a write can be noticed.
            self._batch_marks = Marks(tensor for tensor in tensors_in(batch) if not tensor.is_inference())
        if self._writes_batch or self._is_first_step:
            return own_containers(batch, _clone)
        return own_containers(batch)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the module draws again what it drew, and may count freely; its counts stay those of the first."""
        self._writes_batch = self._writes_batch or bool(self._batch_marks.moved())
        # They hold the batch, which would otherwise stay in memory beside the next one.
        self._batch_marks = Marks()
        counts = _counts(self._pl_module) if self._counts_before is not None else {}
        metrics = []
        for metric, mark in self._metrics_before:
            if self._mark_of(metric) != mark:
                attributes = dict(metric.__dict__)
                metrics.append((metric, attributes))
                # The metric updates copies, so that its own states can be given back as the same objects.
                metric.__dict__.update({name: _copied(value) for name, value in attributes.items()})
        # What is drawn from them in the second pass may be less, where a step draws ahead.
        drawn = [state_restorer(generator) for generator in self._generators]
        for put_back in self._random_states:
            put_back()
        self._tensors.first_pass_ended()
        self._is_first_step = False
        try:
            yield
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                raise RuntimeError(
                    "the second pass of a step needs a graph that the first one's backward has freed, since it was "
                    "built outside of the step, as in a hook that prepares the batch: compute it inside the step, or "
                    "detach it, or use EFMLoRA, which takes one pass"
                ) from error
            raise
        finally:
            for metric, attributes in metrics:
                metric.__dict__.clear()
                metric.__dict__.update(attributes)
            self._tensors.second_pass_ended()
            for put_back in drawn:
                put_back()
        self._warn_of_counts(counts)

    def _mark_of(self, metric: Metric) -> Any:
        """What changes when a metric is updated."""
        return _StateMark(metric) if id(metric) in self._uncounted else metric.update_count

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


def leave_batch_out(trainer: Trainer, name: str) -> None:
    """Warn that a batch with a loss in its first pass has none in its second, and so leaves no gradient.

    A step that guards itself against losses which are not finite does so where E is large. Lightning leaves a batch
    without a loss out as well.

    Args:
        trainer: that runs the step.
        name: of the method that returned None.

    Raises:
        RuntimeError: other ranks would wait for this batch's gradient, or a loss scaler would refuse the step.
    """
    what = f"{name} returned None in the second pass of a step, and a loss in the first"
    remedy = "return a loss of zero that depends on the parameters, as 0 * output.sum()"
    if trainer.world_size > 1:
        raise RuntimeError(f"{what}, and the other ranks would wait for its gradient for ever: {remedy}")
    if trainer.lightning_module.automatic_optimization and getattr(trainer.precision_plugin, "scaler", None):
        raise RuntimeError(f"{what}, and the loss scaler refuses a step without gradients: {remedy}")
    rank_zero_warn(f"{what}: the batch is left out. If this comes often, rho may be too large")


class _StateMark:
    """What a metric holds, and how often each of it has been written: equal while nothing has changed."""

    def __init__(self, metric: Metric) -> None:
        # With the values themselves, so that no new one gets the identity of one that is gone.
        self._values = dict(vars(metric))
        self._writes = {}
        for name, value in self._values.items():
            if isinstance(value, Tensor):
                self._writes[name] = value._version
            elif isinstance(value, (list, dict)):
                self._writes[name] = len(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _StateMark) or self._writes != other._writes:
            return False
        if self._values.keys() != other._values.keys():
            return False
        return all(value is other._values[name] for name, value in self._values.items())

    __hash__ = None  # type: ignore[assignment]


def _in_wrappers(metrics: Iterable[Metric]) -> set[int]:
    """The identities of torchmetrics' wrappers and of what they wrap, whose counts of updates say nothing.

    A wrapper's own stays 0, and some reset the metric that they wrap in each step.
    """
    found: set[int] = set()
    for metric in metrics:
        if isinstance(metric, WrapperMetric):
            found.update(map(id, metric.modules()))
    return found


def _clone(tensor: Tensor) -> Tensor:
    """A copy of a batch's tensor, with the attributes that a user has put on it."""
    copy = tensor.clone()
    copy.__dict__.update(tensor.__dict__)
    return copy


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
