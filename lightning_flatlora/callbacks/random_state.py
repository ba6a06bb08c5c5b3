"""The state of the random number generators, remembered and put back."""

import random
from collections.abc import Callable

import numpy as np
import torch


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
    # Dropout on an accelerator draws from the device's own generator.
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    accelerator_state = accelerator.get_rng_state(device) if accelerator else None

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerator:
            accelerator.set_rng_state(accelerator_state, device)

    return put_back
