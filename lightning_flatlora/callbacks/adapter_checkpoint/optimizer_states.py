"""Make the state of a sharded optimizer whole, and split it again over any number of ranks."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_flatlora.compat import MisconfigurationException
from lightning_flatlora.methods.gradients import parameters_of
from lightning_flatlora.sharding import Sharding

# Not PyTorch's get_optimizer_state_dict and set_optimizer_state_dict, which take a step to create the state of every
# parameter, also of those that have none: because nothing of them lies on this rank, or because they had no gradient.


def gather_state(optimizer: Optimizer, sharding: Sharding) -> dict[str, Any]:
    """Give an optimizer's state in its own format, with whole values; every rank must call this."""
    parameters, packed = parameters_of(optimizer), optimizer.state_dict()
    state = packed.get("state", {})
    outline: dict[tuple[int, str], Any] = {}
    for index, parameter in enumerate(parameters):
        # Under FSDP1 a rank may have nothing of a parameter, and then has no state for it or an old one.
        values = state.get(index, {}) if parameter.numel() else {}
        for key, value in values.items():
            if _is_split(key, value, parameter.shape):
                outline[index, key] = value.dtype
            else:
                outline[index, key] = value.shape if isinstance(value, Tensor) and value.numel() > 1 else value
    # Before anything is refused, since a rank that failed alone would leave the others waiting.
    merged = sharding.merged(outline)
    odd = {*packed, *state} - {"state", "param_groups", *range(len(parameters))}
    odd.update(key for (_, key), value in merged.items() if isinstance(value, torch.Size))
    if odd:
        raise MisconfigurationException(
            f"AdapterCheckpoint: {type(optimizer).__name__} keeps {sorted(map(str, odd))}, and it can't be known how "
            "that is split over the ranks: use an optimizer whose state is like PyTorch's, or one device or DDP"
        )
    whole: dict[int, dict[str, Any]] = {}
    for (index, key), value in merged.items():
        if isinstance(value, torch.dtype):
            parameter = parameters[index]
            part = state.get(index, {}).get(key, parameter.detach().new_empty(0, dtype=value))
            value = sharding.gather(part, parameter)
        whole.setdefault(index, {})[key] = value
    return {**packed, "state": whole}


def scatter_state(optimizer: Optimizer, saved: dict[str, Any], sharding: Sharding) -> None:
    """Load what this rank keeps of a whole state into an optimizer; the inverse of :func:`gather_state`."""
    state = dict(saved["state"])
    for index, parameter in enumerate(parameters_of(optimizer)):
        values, shape = state.pop(index, None), sharding.shape(parameter)
        if values is not None and parameter.numel():
            split = {key: sharding.part(each, parameter) for key, each in values.items() if _is_split(key, each, shape)}
            state[index] = {**values, **split}
    optimizer.load_state_dict({**saved, "state": state})


def _is_split(key: str, value: Any, shape: torch.Size) -> bool:
    # The count of steps is a tensor of shape (), which is a scalar parameter's shape, too, and is whole on every rank.
    return isinstance(value, Tensor) and value.shape == shape and key != "step"
