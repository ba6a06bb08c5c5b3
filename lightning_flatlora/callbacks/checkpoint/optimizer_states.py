"""The state of optimizers in a checkpoint: whole values in the file, and each rank's parts in the run."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_flatlora.distributed import Layout, layout_of
from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.methods.gradients import parameters_of


def optimizer_state(trainer: Trainer, optimizer: Optimizer) -> dict[str, Any]:
    """A sharded optimizer's state in its own format, with whole values on the CPU."""
    parameters = parameters_of(optimizer)
    layout = layout_of(trainer.strategy.model)
    packed = optimizer.state_dict()
    check_form(optimizer, packed)
    of_this_rank, outline = {}, {}
    for index, state in packed["state"].items():
        parameter = parameters[index] if index in range(len(parameters)) else None
        for key, value in state.items():
            of_this_rank[index, key] = value
            if parameter is None or parameter.numel():
                outline[index, key] = _outlined(key, value, parameter, layout)
    # Under FSDP1 a rank without a part of a parameter has no state for it, so all ranks agree on what there is.
    table = layout.merged(outline)
    _refuse_odd(table)
    whole: dict[Any, dict[str, Any]] = {}
    for (index, key), value in table.items():
        if isinstance(value, torch.dtype):
            parameter = parameters[index]
            part = of_this_rank.get((index, key), parameter.detach().new_empty(0, dtype=value))
            value = layout.gather(part, parameter).cpu()
        whole.setdefault(index, {})[key] = value
    return {**packed, "state": whole}


def load_optimizers(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Load each rank's parts into the optimizers of a sharded model; Lightning loads all other optimizers."""
    # Weights alone: whether that is an error is for Lightning to say.
    if "optimizer_states" not in checkpoint:
        return
    optimizers, states = trainer.strategy.optimizers, checkpoint["optimizer_states"]
    if len(optimizers) != len(states):
        raise MisconfigurationException(
            f"AdapterCheckpoint: the checkpoint has {len(states)} optimizers, the module {len(optimizers)}"
        )
    layout = layout_of(trainer.strategy.model)
    for optimizer, saved in zip(optimizers, states, strict=True):
        numbers: list[int] = []
        for param_group in saved["param_groups"]:
            numbers += param_group["params"]
        # Not strict: a state of more or fewer parameters is refused by the optimizer itself, with its own message.
        parameters = dict(zip(numbers, parameters_of(optimizer), strict=False))
        state = {}
        for number, values in saved["state"].items():
            parameter = parameters.get(number)
            if parameter is None:
                state[number] = values
            elif parameter.numel():  # a rank without a part has no state for it, which would keep its old step
                state[number] = _parts(layout, values, parameter)
        optimizer.load_state_dict({**saved, "state": state})


def _parts(layout: Layout, values: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """What this rank keeps of an optimizer's values for one parameter."""
    parts = {}
    for key, value in values.items():
        parts[key] = layout.part(value, parameter) if is_split(key, value, layout.shape(parameter)) else value
    return parts


def check_form(optimizer: Optimizer, packed: dict[str, Any]) -> None:
    """Raise an error if the state of a sharded optimizer isn't of the form that PyTorch's optimizers have."""
    if set(packed) != {"state", "param_groups"}:
        raise MisconfigurationException(
            f"AdapterCheckpoint: the state of {type(optimizer).__name__} has the entries {sorted(map(str, packed))}, "
            "and it can't be known which of them are split over the ranks: use an optimizer that keeps its state as "
            "PyTorch's do, or train on one device or under DDP"
        )


def _refuse_odd(table: dict[tuple[Any, str], Any]) -> None:
    """Raise on every rank, so that none waits for another, if a value is not split in the way of its parameter."""
    for (_, key), value in table.items():
        if isinstance(value, torch.Size):
            raise MisconfigurationException(
                f"AdapterCheckpoint: the optimizer keeps {key!r} of the shape {tuple(value)} for a parameter that is "
                "sharded, and it can't be known how to make it whole: use another optimizer, or Lightning's "
                "ModelCheckpoint"
            )


def _outlined(key: str, value: Any, parameter: nn.Parameter | None, layout: Layout) -> Any:
    """The dtype of a value that is split as the parameter is, the shape of one split in another way, or the value.

    The optimizer may also keep state that belongs to no parameter. How a tensor in that is split can't be known.
    """
    if not isinstance(value, Tensor):
        return value
    if parameter is not None and is_split(key, value, parameter.shape):
        return value.dtype
    split = parameter is None or layout.splits(parameter)
    return value.shape if value.numel() > 1 and split else value.cpu()


def is_split(key: str, value: Any, shape: torch.Size) -> bool:
    """Whether an optimizer's value has the shape of the parameter, so that it is split in the same way."""
    # The count of steps is a tensor of shape (), which is a scalar parameter's shape, too, and is whole on every rank.
    return isinstance(value, Tensor) and key != "step" and value.shape == shape
