"""Run a second pass over a batch as if there were only the first (rule R3 of extra passes)."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_flatlora.methods.optimizers import parameters_of
from lightning_flatlora.methods.put_back import PutBack, buffers_of, metrics_on_copies, own_attributes, random_state
from lightning_flatlora.sharding import average_gradients


class Replay:
    """Lets a second pass over a batch follow the first without side effects.

    The second pass starts from the same state as the first: the global random generators (Python's, NumPy's and
    torch's), the buffers, and the numbers, lists, dicts and sets among the module's own attributes. Afterwards these,
    and torchmetrics among the modules, are as the first pass left them. The caller copies the batch, see
    :func:`~lightning_flatlora.methods.put_back.copied_batch`.

    No parameter is copied. One that a step writes and no optimizer trains, such as a momentum encoder's, is refused.
    Under FSDP parameters are not watched. :meth:`undone` is for passes outside of any step.

    Attributes:
        at_perturbed_weights: context of the second pass, from the end of an ascent until that pass begins; else None.

    Args:
        module: the module, without a strategy's wrapper. Its parts are listed now and not in each step, since FSDP
            shows stand-ins for its parameters between forward and backward.
        optimizers: all that train it. They also hold parameters that the module's own list lacks: those in a plain list
            or a loss object, and those that joined in mid-fit.
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
        self._module = module
        self._modules = list(module.modules())
        self._parameters = list(module.parameters())
        self._optimizers = list(optimizers)
        self._watched = [] if is_sharded else _watchable(module)
        self.at_perturbed_weights: AbstractContextManager[None] | None = None

    def first_pass_starts(self, device: torch.device) -> None:
        """Note the state from which both passes start; ``device`` is where they draw random numbers."""
        self._device = device
        self.at_perturbed_weights = None
        self._at_start = self._noted()
        self._marks = list(map(_mark_of, self._watched))

    @contextmanager
    def ascent(self, method: Any, is_averaged: bool) -> Iterator[None]:
        """Let the first backward, inside, leave the gradient that determines the second pass's perturbation.

        Inside, gradients start from zero, so that only the ascent's are there; afterwards the former ones are restored.

        Args:
            method: computes the perturbation: a TwoPassStep, or an EFMLoRAStep next to an FMLoRAModule.
            is_averaged: whether the backward itself averages the gradient over the ranks.
        """
        taken = {}
        for parameter in self._holders():
            if parameter.grad is not None:
                taken[parameter] = parameter.grad.clone()
                # In place, not with a new tensor: DDP's gradient_as_bucket_view and FSDP1 own the memory of p.grad.
                parameter.grad.zero_()
        try:
            yield
            if method.sync_ascent and not is_averaged:
                average_gradients(method.ascent_parameters)
            self.at_perturbed_weights = method.perturb()
        finally:
            # Listed again, because hooks of the backward may have added parameters to the optimizer.
            for parameter in self._holders():
                if parameter.grad is not None and parameter in taken:
                    parameter.grad.copy_(taken[parameter])  # in place, as above
                else:
                    # None and not zeros: AdamW skips a parameter without a gradient, but decays one with a zero
                    # gradient.
                    parameter.grad = None

    def _holders(self) -> list[nn.Parameter]:
        """List the current parameters whose gradients a pass may change and a step may read, each once."""
        return list(dict.fromkeys([*self._parameters, *parameters_of(*self._optimizers)]))

    def _noted(self) -> list[PutBack]:
        return [random_state(self._device), own_attributes(self._module), buffers_of(self._modules)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the second pass, inside, start from the first one's state, at weights that :meth:`ascent` has perturbed.

        Afterwards everything is as the first pass left it.

        Raises:
            MisconfigurationException: the first pass has written a parameter that no optimizer trains.
        """
        # Asked now, before the perturbation moves weights in place.
        written = self.written_parameter()
        if written is not None:
            from lightning.pytorch.utilities.exceptions import MisconfigurationException

            raise MisconfigurationException(
                f"a step writes the parameter {written}, which no optimizer trains, as a momentum encoder's: a second "
                "pass would write it again. Update it in on_train_batch_end, or use EFMLoRA, which takes one pass"
            )
        of_first = [*self._noted(), metrics_on_copies(self._modules)]
        _put_back(self._at_start)
        self._at_start = []  # its copies are no longer needed
        perturbed, self.at_perturbed_weights = self.at_perturbed_weights or nullcontext(), None
        try:
            with perturbed:
                yield
        finally:
            _put_back(of_first)

    def written_parameter(self) -> str | None:
        """Name a parameter that the pass has written and no optimizer trains; None if there is none."""
        marks = list(map(_mark_of, self._watched))
        if marks == self._marks:
            return None
        trained = set(parameters_of(*self._optimizers))
        for parameter, mark, before in zip(self._watched, marks, self._marks, strict=True):
            if mark != before and parameter not in trained:
                names = [name for name, each in self._module.named_parameters() if each is parameter]
                return names[0] if names else "of a removed part"
        return None

    @contextmanager
    def undone(self, device: torch.device) -> Iterator[None]:
        """Let any passes run inside; afterwards restore everything except parameters.

        Args:
            device: the device on which they draw random numbers.
        """
        self.first_pass_starts(device)
        before = [*self._at_start, metrics_on_copies(self._modules)]
        try:
            yield
        finally:
            _put_back(before)


def _put_back(noted: Iterable[PutBack]) -> None:
    for put_back in noted:
        put_back()


def _mark_of(parameter: nn.Parameter) -> tuple[int, int]:
    """Return values that change when a parameter is written: torch's version count, and its memory address.

    A write in place through ``.data``, as ``key.data.mul_(0.9)``, leaves no mark.
    """
    return parameter._version, parameter.data_ptr()


def _watchable(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters whose marks say whether a step has written them.

    Others have no version or no shape yet, or are of other classes, such as quantized weights, which their library may
    move in the first forward pass.
    """
    watchable = []
    # peft parametrizes these in each forward, which counts as a write. Others may be tied to them.
    wrapped = {part.get_param() for part in module.modules() if isinstance(part, ParamWrapper)}
    for part in module.modules():
        # An RNN's flatten_parameters, often called in forward, moves them within a GPU's memory.
        if isinstance(part, nn.RNNBase):
            continue
        for parameter in part.parameters(recurse=False):
            if is_lazy(parameter) or parameter.is_inference() or parameter.layout != torch.strided:
                continue
            if parameter not in wrapped and type(parameter) is nn.Parameter and type(parameter.data) is Tensor:
                watchable.append(parameter)
    return watchable
