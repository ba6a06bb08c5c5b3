"""Recognize a base by the shapes of its parameters and a few of their values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SAMPLES = 8
# Of a parameter: "shape", "dtype", and a "sample" of its values; None if these can't be compared.
Identity = dict[str, Any] | None


def identities_of(parameters: Mapping[str, Tensor | None], sharded: bool = False) -> dict[str, Identity]:
    """Describe the parameters of a base, so that another base is recognized as another one.

    Args:
        parameters: by name; None for what is not compared.
        sharded: whether this rank holds parts of them, whose samples would say nothing.

    Example:
        >>> identities_of({"w": torch.ones(2, 3)})["w"]["sample"]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    return {name: None if sharded else _identity(tensor) for name, tensor in parameters.items()}


def _identity(tensor: Tensor | None) -> Identity:
    """Read a few elements, evenly spaced from the first to the last, since new rows of an embedding are at its end."""
    # Packed weights of 4 or 8 bits are of integers, and change with the way in which they are packed.
    if tensor is None or not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return None
    places = torch.linspace(0, tensor.numel() - 1, _SAMPLES, dtype=torch.float64, device=tensor.device).long()
    try:
        # Not reshape(-1), which would copy a weight that is transposed.
        values = tensor.detach()[torch.unravel_index(places, tensor.shape)]
        sample = values.to(torch.float32).tolist()
    except (NotImplementedError, RuntimeError, TypeError):  # a quantizer's own kind of tensor
        return None
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "sample": sample}


def differing(expected: Mapping[str, Identity], found: Mapping[str, Identity]) -> list[str]:
    """Name the parameters that are not as a checkpoint describes them, or that only one side has.

    A parameter of another dtype may differ by its rounding. What can't be read on one side is not compared.
    """
    names = dict.fromkeys([*expected, *found])
    return [name for name in names if not _same(expected.get(name, {}), found.get(name, {}))]


def _same(old: Identity, new: Identity) -> bool:
    """Compare two samples up to rounding to the coarser of two dtypes, or to what another machine computes.

    Frozen weights are not rounded again. So within one dtype even the next number of bfloat16 is another value: the
    weights of a chat model differ that little from those of its base.
    """
    if old is None or new is None:
        return True
    if old.get("shape") != new.get("shape"):
        return False
    tolerance = 1e-4
    if old["dtype"] != new["dtype"]:
        # One of them was rounded to the coarser dtype.
        tolerance = max(tolerance, *(torch.finfo(getattr(torch, each["dtype"])).eps for each in (old, new)))
    one, other = torch.tensor(old["sample"]), torch.tensor(new["sample"])
    size = one.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)
