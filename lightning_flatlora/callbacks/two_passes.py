"""The tools of a step with two passes: set gradients aside, draw the same dropout masks again, log once."""

import copy
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer


def gradient_holders(parameters: Iterable[nn.Parameter], optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """The parameters whose gradients a pass may change and a step may read, each once, as they are at this moment.

    Args:
        parameters: the module's, as the fit started: FSDP shows stand-ins for them between forward and backward.
        optimizers: the trainer's. They also hold what the module's own list lacks: parameters in a plain list or a loss
            object, and those that have joined in mid-fit.
    """
    holders = dict.fromkeys(parameters)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            holders.update(dict.fromkeys(group["params"]))
    return list(holders)


def take_gradients(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Copy the gradients accumulated so far and set them to zero, so that the ascent's gradient stands alone.

    In place: DDP's ``gradient_as_bucket_view`` and FSDP1 own the memory of ``p.grad``.
    """
    taken = []
    for parameter in parameters:
        if parameter.grad is not None:
            taken.append((parameter, parameter.grad.clone()))
            parameter.grad.zero_()
    return taken


def put_back_gradients(parameters: Iterable[nn.Parameter], taken: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Drop the ascent's gradients and restore those set aside by :func:`take_gradients`."""
    accumulated = {id(parameter): grad for parameter, grad in taken}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if id(parameter) in accumulated:
            parameter.grad.copy_(accumulated[id(parameter)])
        else:
            parameter.grad = None


def own_containers(batch: Any) -> Any:
    """The same tensors in dicts, lists and tuples of its own: a pass that pops a key takes nothing from the next one.

    What a pass writes into a tensor, the next one sees.

    Example:
        >>> batch = {"x": 1, "more": [2]}
        >>> own = own_containers(batch)
        >>> batch.pop("x"), batch["more"].pop(), own
        (1, 2, {'x': 1, 'more': [2]})
    """
    if type(batch) in (list, tuple):
        return type(batch)(map(own_containers, batch))
    if type(batch) is dict:
        return {key: own_containers(value) for key, value in batch.items()}
    return copy.copy(batch) if isinstance(batch, MutableMapping) else batch  # as transformers' BatchEncoding


def random_state(device: torch.device) -> Callable[[], None]:
    """Remember the random generators (Python, NumPy, PyTorch on the CPU and the device).

    Returns:
        A function that puts them back.

    Example:
        >>> put_back = random_state(torch.device("cpu"))
        >>> first = torch.rand(3); put_back(); bool((torch.rand(3) == first).all())
        True
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    own = accelerator.get_rng_state(device) if accelerator else None

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerator:
            accelerator.set_rng_state(own, device)

    return put_back


class _OnInstance:
    """A method that one object has for a while; copies and pickles of the object have their class's own."""

    def __init__(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        self.owner, self.name, self.method = owner, name, method
        self.beneath = owner.__dict__.get(name)
        self.is_over = False
        if hasattr(method, "__wrapped__"):
            self.__wrapped__ = method.__wrapped__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)  # of the copy, which has no attributes of its own at that moment


def put_on_instance(module: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Give one object a method of its own, over its class's or one that it had.

    Returns:
        A function that puts back what was there; calling it again does nothing. Where another method has been put over
        this one, that happens when the other goes.
    """
    own = module.__dict__
    put = own[name] = _OnInstance(module, name, method)

    def put_back() -> None:
        put.is_over = True
        while isinstance(top := own.get(name), _OnInstance) and top.is_over:
            del own[name]
            if top.beneath is not None:
                own[name] = top.beneath

    return put_back


def at_training_step(pl_module: LightningModule, action: Callable[[], None]) -> Callable[[], None]:
    """Call an action once, when the module's next training_step starts: after every hook before it.

    Returns:
        A function that cancels it, if it has not happened yet.
    """
    original = pl_module.training_step
    waiting = [action]

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        due = list(waiting)
        cancel()
        for each in due:
            each()
        return original(*args, **kwargs)

    # Lightning looks one layer below a decorator for the arguments: there must be as many as in the original.
    training_step.__wrapped__ = getattr(original, "__wrapped__", original)
    put_back = put_on_instance(pl_module, "training_step", training_step)

    def cancel() -> None:
        waiting.clear()
        put_back()

    return cancel


@contextmanager
def silenced_log(pl_module: LightningModule) -> Iterator[None]:
    """Inside, ``self.log`` and ``self.log_dict`` of the module do nothing: the clean pass has logged already."""
    put_back = put_on_instance(pl_module, "log", lambda *args, **kwargs: None)
    try:
        yield
    finally:
        put_back()


def loss_of(output: Any, source: str) -> Tensor | None:
    """The loss in what a step returned: a tensor, a mapping with "loss", or None for a skipped batch.

    Args:
        output: what the step returned.
        source: the method's name, for the error.

    Raises:
        TypeError: anything else came.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None and not isinstance(output, Mapping):
        return None
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{source} must return the loss as a tensor, a dict with the key 'loss', or None to skip the batch; "
            f"got {type(output).__name__}"
        )
    return loss


def ends_window(trainer: Trainer, batch_idx: int, accumulate_grad_batches: int) -> bool:
    """Whether a batch is the last of its accumulation window, the shorter one at the end of an epoch included."""
    return (batch_idx + 1) % accumulate_grad_batches == 0 or trainer.is_last_batch


def nothing() -> None:
    """There is nothing to put back, or nothing is waited for."""
