"""In which precision a device computes fast: one choice for recipes, demos, studies and tests."""

import os
import time
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from recipes.shared.files import write_whole

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
SETTING = "FLATLORA_PRECISION"
_ROUNDS = 5
_SIZE = 192  # rows and columns: two tenths of a second in all where bfloat16 is emulated at 0.6 GFLOP/s
_GAIN = 1.3
"""How much faster than float32 bfloat16 has to be. CPUs with instructions for it reach 2 and more, those without 0.4 at
most and often 0.02: nothing lies near this value, so that one machine always gets one answer."""


def fast_precision(accelerator: str = "auto") -> Precision:
    """Lightning's ``precision`` for training a float32 adapter on this machine.

    ====================================================  ==============
    a GPU with bfloat16 (Ampere and later)                "bf16-mixed"
    a GPU with tensor cores for float16 only              "16-mixed"
    a CPU that multiplies bfloat16 faster than float32    "bf16-mixed"
    anything else                                         "32-true"
    ====================================================  ==============

    Most CPUs have no instructions for bfloat16 and multiply it 5 to 50 times slower than float32. A CPU is not asked
    but timed, once in a process and in milliseconds: what it has and what PyTorch's libraries use of it are two things.
    The environment variable ``FLATLORA_PRECISION`` overrides the choice, for all that asks here.

    Args:
        accelerator: as the Trainer takes it, "auto", "cpu", "gpu", "cuda" or "mps".

    Returns:
        The precision. Runs that are compared, or resumed from a checkpoint, must keep it rather than ask again: the
        device may have changed.

    Raises:
        MisconfigurationException: the environment variable holds something else.

    Example:
        >>> fast_precision("cpu") in ("32-true", "bf16-mixed")
        True
    """
    setting = os.environ.get(SETTING)
    if setting:
        return _checked(setting, SETTING)
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return _of_gpu()
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true"
    return "bf16-mixed" if _has_fast_bfloat16() else "32-true"


def precision_of_runs(folder: Path) -> Precision:
    """One precision for all runs whose results land in a folder, which are compared with each other.

    Args:
        folder: of the runs; the precision is written into its ``precision.txt``.

    Returns:
        What the folder began with, and at first :func:`fast_precision`. The environment variable overrides both.

    Raises:
        MisconfigurationException: ``precision.txt`` or the environment variable holds something else.
    """
    path = folder / "precision.txt"
    if not os.environ.get(SETTING) and path.exists():
        return _checked(path.read_text().strip(), str(path))
    precision = fast_precision()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{precision}\n")
    return precision


def _checked(value: str, where: str) -> Precision:
    for precision in get_args(Precision):
        if value == precision:
            return precision  # type: ignore[no-any-return]
    raise MisconfigurationException(
        f"{where} must hold one of {', '.join(get_args(Precision))}, or be absent, got {value!r}"
    )


def _of_gpu() -> Precision:
    # By default PyTorch also says yes for cards that only emulate bfloat16.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed"
    # Volta, 7.0, was the first generation with tensor cores.
    has_tensor_cores = torch.cuda.get_device_capability() >= (7, 0)
    return "16-mixed" if has_tensor_cores else "32-true"


@cache
def _has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 clearly faster than float32."""
    return _product_seconds(torch.float32) > _GAIN * _product_seconds(torch.bfloat16)


def _product_seconds(dtype: torch.dtype) -> float:
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)  # ones, so that nobody's random state changes
    # The time of one thread, which other processes do not change.
    timer = Timer("linear(matrix, matrix)", globals={"linear": linear, "matrix": matrix}, timer=time.thread_time)
    return timer.timeit(_ROUNDS).mean
