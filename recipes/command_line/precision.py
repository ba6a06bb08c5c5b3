"""Choose the precision that is fast on a device, in one place for recipes, demos, studies and tests."""

import os
from typing import Literal, cast, get_args

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
SETTING = "FLATLORA_PRECISION"


def fast_precision(accelerator: str = "auto") -> Precision:
    """Return Lightning's ``precision`` for training a float32 adapter on this machine.

    ====================================================  ==============
    a GPU with bfloat16 (Ampere and later)                "bf16-mixed"
    a GPU with tensor cores for float16 only              "16-mixed"
    a CPU with instructions for bfloat16 (AVX512_BF16)    "bf16-mixed"
    anything else                                         "32-true"
    ====================================================  ==============

    The device is asked, not timed: on a busy machine timings differ from run to run, and between the processes of a
    run. With AVX512_BF16 a product of bfloat16 took half of float32's time (an AMD EPYC, 192 and 512 rows); without it
    PyTorch computes bfloat16 up to 50 times slower than float32. On ARM nothing was measured.
    The environment variable ``FLATLORA_PRECISION`` overrides the choice everywhere.

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
        # By default PyTorch also says yes for cards that only emulate bfloat16.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed"
        # Volta, 7.0, was the first generation with tensor cores.
        return "16-mixed" if torch.cuda.get_device_capability() >= (7, 0) else "32-true"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true"
    return "bf16-mixed" if _has_fast_bfloat16() else "32-true"


def _checked(value: str, where: str) -> Precision:
    allowed = get_args(Precision)
    if value not in allowed:
        raise MisconfigurationException(f"{where} must hold one of {', '.join(allowed)}, or be absent, got {value!r}")
    return cast("Precision", value)


def _has_fast_bfloat16() -> bool:
    """Return whether this CPU has instructions that multiply bfloat16, as every CPU with AMX has."""
    # The name is private. mkldnn's _is_mkldnn_bf16_supported() says yes to AVX-512 without these instructions.
    has_instructions = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(has_instructions())
