"""Gather what goes into a checkpoint, whole and on the CPU under every strategy; the frozen base is never gathered."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_flatlora.callbacks.adapter_checkpoint import contents
from lightning_flatlora.callbacks.adapter_checkpoint.base_identity import identities_of
from lightning_flatlora.callbacks.patches import put_on
from lightning_flatlora.distributed import is_sharded, layout_of
from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.methods.gradients import parameters_of
from lightning_flatlora.pairs import clean_name
from lightning_flatlora.pairs.lora_pair import Finder

MARK = "lightning_flatlora_adapter"
"""The key under which a checkpoint says that it is one of ours.

There it has the identities of the parameters that are "left_out", and the "scalings" of the adapters, both by name.
"""


@dataclass(frozen=True)
class Selection:
    """Say what a checkpoint holds of a module.

    Attributes:
        saved: entries of the state dict, by clean name, as this rank holds them.
        left_out: the names of the others.
        mark: what the checkpoint says of those, see :data:`MARK`.
    """

    saved: dict[str, Any]
    left_out: set[str]
    mark: dict[str, Any]


def _select(trainer: Trainer, finder: Finder | None) -> Selection:
    module = trainer.lightning_module
    contents.note_trained(module)
    trained, found = contents.trained_names(module), contents.contents_of(module, finder)
    frozen = {name: value for name, value in found.base.items() if contents.plain_name(name) not in trained}
    learnt = {name: value for name, value in found.base.items() if name not in frozen}
    identities = identities_of(frozen, whole=not is_sharded(trainer.strategy.model))
    mark = {"left_out": identities, "scalings": contents.scalings_of(module, finder)}
    return Selection({**found.adapters, **learnt, **found.others}, found.derived.union(frozen), mark)


@contextmanager
def adapters_only(
    trainer: Trainer, finder: Finder | None, write: Callable[[dict[str, Any], Path], None]
) -> Iterator[None]:
    """Let the checkpoints that a trainer saves inside leave out the frozen base, under every strategy.

    Args:
        trainer: in a fit.
        finder: of the adapter's factors, if they are not peft's.
        write: called with the checkpoint and its path, on rank zero only; every rank takes part in the gathering.
    """
    strategy, selection = trainer.strategy, _select(trainer, finder)
    whole: dict[str, Any] = {}

    def lightning_module_state_dict() -> dict[str, Any]:
        # Kept, since callbacks may take weights out of the state dict before it is written.
        whole.update(_whole(selection.saved, strategy.model))
        return dict(whole)

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        if strategy.is_global_zero:
            write(_slim(checkpoint, whole, selection), Path(filepath))

    # The strategy's methods are replaced, because its own would gather the whole model, and no hook says what is saved.
    methods: dict[str, Any] = {
        "lightning_module_state_dict": lightning_module_state_dict,
        "save_checkpoint": save_checkpoint,
    }
    if is_sharded(strategy.model):
        methods["optimizer_state"] = lambda optimizer: _whole_optimizer_state(trainer, optimizer)
    with put_on(strategy, methods):
        yield


def _whole(values: dict[str, Any], model: nn.Module | None) -> dict[str, Any]:
    """Make values whole, on the CPU; a tensor with two names is gathered once, and stays one tensor."""
    layout = layout_of(model)
    whole: dict[int, Any] = {}
    for value in values.values():
        if id(value) not in whole:
            gathered = layout.gather(value, value) if isinstance(value, Tensor) else value  # type: ignore[arg-type]
            whole[id(value)] = _on_cpu(gathered)
    return {name: whole[id(value)] for name, value in values.items()}


def _slim(checkpoint: dict[str, Any], whole: dict[str, Any], selection: Selection) -> dict[str, Any]:
    """Give a checkpoint our mark, on the CPU, and a state dict with all that is selected and nothing that is left out.

    A module's ``on_save_checkpoint`` may have taken weights out, to make Lightning's own file smaller; without them no
    run could be resumed. WeightAveraging puts the averages of the whole model in place of the state dict. Those of
    weights that are left out differ from the weights by rounding only.
    """
    state = dict(whole)
    for name, value in checkpoint.get("state_dict", {}).items():
        if clean_name(name) not in selection.left_out:
            state[clean_name(name)] = value
    slim: dict[str, Any] = _on_cpu({**checkpoint, "state_dict": state, MARK: selection.mark})
    return slim


def _on_cpu(value: Any) -> Any:
    """Move the tensors in nested plain containers to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if type(value) is dict:
        return {key: _on_cpu(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(each) for each in value)
    return value


def _whole_optimizer_state(trainer: Trainer, optimizer: Optimizer) -> dict[str, Any]:
    """Give the state of a sharded optimizer in its own format, with whole values on the CPU."""
    # Not PyTorch's get_optimizer_state_dict, which steps an optimizer without state, as one is under FSDP1 on a rank
    # that has no part of what it trains.
    parameters, layout, packed = parameters_of(optimizer), layout_of(trainer.strategy.model), optimizer.state_dict()
    if set(packed) != {"state", "param_groups"}:
        raise MisconfigurationException(
            f"AdapterCheckpoint: the state of {type(optimizer).__name__} has the entries {sorted(map(str, packed))}, "
            "and it can't be known which of them are split over the ranks: use an optimizer that keeps its state as "
            "PyTorch's do, or train on one device or under DDP"
        )
    outline: dict[tuple[Any, str], Any] = {}
    for index, values in packed["state"].items():
        parameter = parameters[index] if index in range(len(parameters)) else None
        for key, value in values.items():
            if parameter is None or parameter.numel():
                outline[index, key] = _outlined(key, value, parameter)
    whole: dict[Any, dict[str, Any]] = {}
    # All ranks agree on what there is, since under FSDP1 a rank without a part of a parameter has no state for it.
    for (index, key), value in layout.merged(outline).items():
        if isinstance(value, torch.Size):
            raise MisconfigurationException(
                f"AdapterCheckpoint: the optimizer keeps {key!r} of the shape {tuple(value)} for a parameter that is "
                "sharded, and it can't be known how to make it whole: use another optimizer, or Lightning's "
                "ModelCheckpoint"
            )
        if isinstance(value, torch.dtype):
            parameter = parameters[index]
            part = packed["state"].get(index, {}).get(key, parameter.detach().new_empty(0, dtype=value))
            value = layout.gather(part, parameter)
        whole.setdefault(index, {})[key] = value
    return {**packed, "state": _on_cpu(whole)}


def _outlined(key: str, value: Any, parameter: nn.Parameter | None) -> Any:
    """Give the dtype of a value that is split as its parameter is, the shape of one split otherwise, or the value."""
    if parameter is not None and is_split(key, value, parameter.shape):
        return value.dtype
    return value.shape if isinstance(value, Tensor) and value.numel() > 1 else value


def is_split(key: str, value: Any, shape: torch.Size) -> bool:
    """Report whether an optimizer's value is split over the ranks as a parameter of some shape is."""
    # The count of steps is a tensor of shape (), which is a scalar parameter's shape, too, and is whole on every rank.
    return isinstance(value, Tensor) and value.shape == shape and key != "step"


def dry_run(trainer: Trainer, folder: Path, weights_only: bool, linked: bool) -> None:
    """Write a whole checkpoint into a temporary place and remove it; every rank must call this.

    Args:
        trainer: in a fit that is about to take its first step, inside of :func:`adapters_only`.
        folder: the checkpoint callback's.
        weights_only: as the checkpoint callback saves.
        linked: whether a link will be made, too.

    Raises:
        MisconfigurationException: on every rank, if one of them could not write.
    """
    problem: str | None = None
    cause: Exception | None = None
    checkpoint: dict[str, Any] = {}
    try:
        # On every rank, since the weights are gathered and a state_dict() may communicate.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
        if trainer.is_global_zero:
            _save_and_remove(trainer, checkpoint, folder, linked)
    except Exception as error:
        cause, problem = error, f"saving into {folder} would fail: {type(error).__name__}: {error}"
        culprit = _first_that_fails(checkpoint, _pickled)
        if culprit:
            problem = f"{culprit} can't be pickled, so no checkpoint could be written: {type(error).__name__}: {error}"
    # One rank may fail alone, for example by a callback's state. It ends the others, too, which would wait for it.
    fails = trainer.strategy.reduce_boolean_decision(problem is not None, all=False)
    of_rank_zero = trainer.strategy.broadcast(problem)
    if fails:
        elsewhere = f"saving into {folder} would fail on another rank, whose error says why"
        raise MisconfigurationException(f"AdapterCheckpoint: {problem or of_rank_zero or elsewhere}") from cause
    # Tensors are loaded in any case, and are the large part.
    settings = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    refused = _first_that_fails(settings, _loaded)
    if refused:
        rank_zero_warn(
            f"AdapterCheckpoint: PyTorch loads {refused} only from a file that you trust, and a module there is in "
            "every file whole. If it is a hyper-parameter, leave it out by self.save_hyperparameters(ignore=[...]), or "
            "give weights_only=False along with ckpt_path"
        )


def _save_and_remove(trainer: Trainer, checkpoint: dict[str, Any], folder: Path, linked: bool) -> None:
    # The folders that are missing are made at the first save.
    while not folder.exists():
        folder = folder.parent
    with TemporaryDirectory(prefix=".dry-run-", dir=folder) as name:
        trainer.strategy.save_checkpoint(checkpoint, Path(name) / "dry_run.ckpt")
        if linked:  # which some file systems can't
            os.symlink("dry_run.ckpt", Path(name) / "link")


def _first_that_fails(state: dict[Any, Any], use: Callable[[Any], Any], place: str = "checkpoint") -> str | None:
    """Find the place in nested dictionaries of the first value that a function can't use."""
    for key, value in state.items():
        try:
            use(value)
        except Exception:  # whatever PyTorch says of it
            inner = f"{place}[{key!r}]"
            return (_first_that_fails(value, use, inner) if isinstance(value, dict) else None) or inner
    return None


def _pickled(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def _loaded(value: Any) -> Any:
    return torch.load(_pickled(value), weights_only=True)
