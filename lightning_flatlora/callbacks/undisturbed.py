"""Run a module's passes beside training, and leave training as it was to the bit."""

import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_flatlora.callbacks.two_passes import random_state, silenced_log

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator)


@contextmanager
def undisturbed(pl_module: LightningModule) -> Iterator[None]:
    """Inside, a module is in eval mode, logs nothing, and works on copies of all that its parts keep but parameters.

    So buffers (BatchNorm's), torchmetrics' states, modes, and lists or counters that a step keeps on any of its modules
    are afterwards the very objects that they were, whatever happens inside; the random generators (Python, NumPy,
    PyTorch on the CPU and the module's device) are put back. Memory: a copy of the buffers.

    Args:
        pl_module: the module, not what a strategy has wrapped around it.
    """
    put_back_random_state = random_state(pl_module.device)
    kept = [(module, dict(module.__dict__)) for module in pl_module.modules()]
    copies: dict[int, Any] = {}
    try:
        for module, attributes in kept:
            module.__dict__.update({name: _copied(value, copies) for name, value in attributes.items()})
            module.__dict__["training"] = False  # not eval(), which a module may have overridden
        with silenced_log(pl_module):
            yield
    finally:
        for module, attributes in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        put_back_random_state()


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """What a step may write into, as an object of its own, however deep it lies; anything else as it is.

    Args:
        value: a module's attribute, or something in it.
        copies: what was copied so far, by the identity of the original: shared things stay shared, and cycles end.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        copies[id(value)] = value.clone()
    elif isinstance(value, _GENERATORS):
        copies[id(value)] = copy.deepcopy(value)
    elif type(value) in _CONTAINERS:
        own = copies[id(value)] = copy.copy(value)
        if isinstance(own, dict):
            own.update({key: _copied(item, copies) for key, item in value.items()})
        elif isinstance(own, (list, deque)):
            for place, item in enumerate(value):
                own[place] = _copied(item, copies)
    elif type(value) is tuple:
        return tuple(_copied(item, copies) for item in value)
    return copies.get(id(value), value)
