"""The trained weights of a run: written beside its row, and put back into a module."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from recipes.evidence.module import trained_parameters
from recipes.shared.ledger import Row

FOLDER = "weights"


def keep(module: nn.Module, key: Row, folder: Path) -> str:
    """Write the adapters and the heads of a finished run.

    Args:
        module: with its trained weights.
        key: of the run, which names the file and is written into it.
        folder: of the ledger.

    Returns:
        The file's path relative to the folder.
    """
    text = json.dumps(key, sort_keys=True)
    # With a hash, since a configuration can have more settings than a file name should.
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    name = f"{FOLDER}/{key['workload']}_{key['arm']}_seed{key['seed']}_{digest}.safetensors"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under its own name only once it is whole, whenever the process is stopped.
    unfinished = path.with_suffix(f".{os.getpid()}")
    weights = {name: parameter.detach().contiguous() for name, parameter in trained_parameters(module).items()}
    save_file(weights, unfinished, metadata={"run": text})
    unfinished.replace(path)
    return name


@torch.no_grad()
def restore(module: nn.Module, path: Path) -> None:
    """Put the weights of a file into a module of the same configuration.

    Raises:
        ValueError: the file holds other weights than the module has.
    """
    weights, parameters = load_file(path), trained_parameters(module)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        raise ValueError(f"{path} does not hold the weights of this configuration: it has {shapes}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
