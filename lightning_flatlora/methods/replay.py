"""Run a second pass over a batch as if there were only the first (rule R3 of extra passes)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_flatlora.methods.gradients import parameters_of
from lightning_flatlora.methods.put_back import PutBack, buffers_of, metrics_on_copies, own_attributes, random_state


class Replay:
    """Lets a second pass over a batch follow the first as if there were none.

    The second pass starts from what the first one started from: the states of the global random generators (Python's,
    NumPy's and torch's), the buffers, and the numbers, lists, dicts and sets among the module's own attributes.
    Afterwards these, and torchmetrics among the modules, are as the first pass has left them. The batch is copied by
    whoever runs the passes, see :func:`~lightning_flatlora.methods.batches.copied_batch`.

    No parameter is copied. One that a step writes and no optimizer trains, such as a momentum encoder's, is refused.
    Parameters are not watched under FSDP. :meth:`undone` does the same for passes that stand outside of any step.

    Attributes:
        parameters: those of the module, listed once: between forward and backward FSDP shows stand-ins for them.

    Args:
        module: the module, not what a strategy has wrapped around it.
        optimizers: all that train it.
        is_sharded: whether ranks hold parts of its parameters.

    Example:
        >>> module = nn.Module()
        >>> module.norm = nn.BatchNorm1d(2)
        >>> replay = Replay(module)
        >>> replay.first_pass_starts(torch.device("cpu"))
        >>> _ = module.norm(torch.ones(3, 2))
        >>> with replay.running():
        ...     _ = module.norm(torch.ones(3, 2))
        >>> int(module.norm.num_batches_tracked)
        1
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer] = (), is_sharded: bool = False) -> None:
        self.parameters = list(module.parameters())
        self._module = module
        self._optimizers = list(optimizers)
        self._watched = [] if is_sharded else _watchable(module)
        self._modules: list[nn.Module] = []
        self._device = torch.device("cpu")
        self._at_start: list[PutBack] = []

    def look_again(self, optimizers: Iterable[Optimizer]) -> None:
        """At the next first pass, find the modules again, which takes too long for every step.

        Not now, at the start of an epoch, since the hooks of others may still change the module.
        """
        self._optimizers = list(optimizers)
        self._modules = []

    def first_pass_starts(self, device: torch.device) -> None:
        """Note the state from which both passes start; the device is that on which they draw random numbers."""
        self._modules = self._modules or list(self._module.modules())
        self._device = device
        self._at_start = self._noted()
        self._marks = list(map(_mark_of, self._watched))

    def _noted(self) -> list[PutBack]:
        return [random_state(self._device), own_attributes(self._module), buffers_of(self._modules)]

    def _metrics_on_copies(self) -> PutBack:
        return metrics_on_copies(module for module in self._modules if isinstance(module, Metric))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the second pass starts where the first one started; afterwards all is as the first has left it.

        Raises:
            MisconfigurationException: the first pass has written a parameter that no optimizer trains.
        """
        written = self.written_parameter()
        if written is not None:
            raise MisconfigurationException(
                f"a step writes the parameter {written}, which no optimizer trains, as a momentum encoder's: a second "
                "pass would write it again. Update it in on_train_batch_end, or use EFMLoRA, which takes one pass"
            )
        of_first = [*self._noted(), self._metrics_on_copies()]
        _put_back(self._at_start)
        self._at_start = []  # its copies are not needed any more
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
            _put_back(of_first)

    def written_parameter(self) -> str | None:
        """Name a parameter that the pass has written and no optimizer trains; None if there is none."""
        marks = list(map(_mark_of, self._watched))
        if marks == self._marks:
            return None
        trained: set[int] = set()
        for optimizer in self._optimizers:
            trained.update(map(id, parameters_of(optimizer)))
        for parameter, mark, before in zip(self._watched, marks, self._marks, strict=True):
            if mark != before and id(parameter) not in trained:
                names = [name for name, each in self._module.named_parameters() if each is parameter]
                return names[0] if names else "of a part that is gone"
        return None

    @contextmanager
    def undone(self, device: torch.device) -> Iterator[None]:
        """Inside, any passes may run, and afterwards all is as before them, except for parameters.

        Args:
            device: on which they draw random numbers.
        """
        self.first_pass_starts(device)
        before = [*self._at_start, self._metrics_on_copies()]
        try:
            yield
        finally:
            _put_back(before)


def _put_back(noted: Iterable[PutBack]) -> None:
    for put_back in noted:
        put_back()


def _mark_of(parameter: nn.Parameter) -> tuple[int, int]:
    """Give what changes when a parameter is written: the version that torch counts, and the place of its memory.

    A write in place through ``.data``, as ``key.data.mul_(0.9)``, leaves no mark.
    """
    return parameter._version, parameter.data_ptr()


def _watchable(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters whose marks say whether a step has written them.

    Others have no version or no shape yet, or are of other classes, such as quantized weights, which their library may
    put somewhere else in the first forward pass.
    """
    watchable = []
    for part in module.modules():
        # An RNN's flatten_parameters, which many call in forward, moves them in the memory of a GPU.
        if isinstance(part, nn.RNNBase):
            continue
        for parameter in part.parameters(recurse=False):
            if is_lazy(parameter) or parameter.is_inference() or parameter.layout != torch.strided:
                continue
            if type(parameter) is nn.Parameter and type(parameter.data) is Tensor:
                watchable.append(parameter)
    return watchable
