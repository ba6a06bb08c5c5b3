"""Load a checkpoint of adapters into a model, under any strategy, and compare the model's base with the saved run's."""

import json
import math
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_flatlora.callbacks.checkpoint.changes import (
    BaseRecord,
    Fingerprint,
    differing,
    fingerprints_of,
    listed,
    record_of,
)
from lightning_flatlora.callbacks.checkpoint.optimizer_states import load_optimizers
from lightning_flatlora.callbacks.checkpoint.parts import (
    Entry,
    Kind,
    hosts,
    kept_attributes,
    scalings_of,
    state_entries,
    twin_of,
)
from lightning_flatlora.callbacks.checkpoint.saving import MARK, changed_at
from lightning_flatlora.callbacks.patches import put_on
from lightning_flatlora.distributed import layout_of
from lightning_flatlora.lightning_names import MisconfigurationException, is_lightning
from lightning_flatlora.lora_pair import Finder
from lightning_flatlora.pairs import clean_name


def load_adapter_checkpoint(
    module: nn.Module,
    path: str | Path | IO[bytes],
    strict: bool = True,
    weights_only: bool = True,
    finder: Finder | None = None,
) -> nn.Module:
    """Load the weights of a checkpoint that AdapterCheckpoint has written, without a Trainer.

    Lightning's ``load_from_checkpoint`` and a Trainer without an AdapterCheckpoint expect the frozen base in the file.
    This function expects that the module has its base already, from the same source as in training, or makes it in
    ``configure_model``, which is called first.

    Args:
        module: the LightningModule, with the base and the adapter in place once ``configure_model`` has been called.
        path: the file, or its name; one of Lightning's own is loaded too.
        strict: refuse a file that lacks an adapter's weight or has one that the module doesn't know.
        weights_only: let the file create only tensors and plain values. Turn this off for a file that you trust and
            whose hyper-parameters are of other classes.
        finder: the one that the AdapterCheckpoint had.

    Returns:
        The module.

    Raises:
        MisconfigurationException: the file is of another model or adapter, or no checkpoint.

    Example:
        >>> from io import BytesIO
        >>> file = BytesIO()
        >>> torch.save({"state_dict": {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}}, file)
        >>> load_adapter_checkpoint(nn.Linear(2, 1), BytesIO(file.getvalue())).weight.data
        tensor([[1., 1.]])
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise MisconfigurationException(
            f"{path} has no state_dict: give a .ckpt of AdapterCheckpoint or ModelCheckpoint. An adapter that peft has "
            "saved is loaded by peft.PeftModel.from_pretrained"
        )
    if is_lightning(module, LightningModule):
        # As load_from_checkpoint does. Lightning calls it before each fit and test too, so it may be called again.
        module.configure_model()
    record_of(module).finder = finder
    if MARK not in checkpoint:
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
        return module
    load_weights(module, checkpoint, strict)
    compare_base(record_of(module), fingerprints_of(_base_of(module)), refuse=False)
    return module


def _base_of(module: nn.Module) -> dict[str, Tensor]:
    entries = state_entries(twin_of(module), record_of(module).finder)
    return {name: entry.value for name, entry in entries.items() if entry.kind is Kind.BASE}


def read_adapters(trainer: Trainer) -> ExitStack:
    """Let a trainer's strategy load such checkpoints, too, until the stack that is returned is closed.

    Other checkpoints are loaded as before.
    """
    strategy = trainer.strategy
    load_checkpoint, load_model_state_dict = strategy.load_checkpoint, strategy.load_model_state_dict

    def load(checkpoint_path: Any, **options: Any) -> dict[str, Any]:
        # A strategy that restores after its setup would load the file into a gathered model at once.
        if strategy.restore_checkpoint_after_setup and is_ours(checkpoint_path):
            return strategy.checkpoint_io.load_checkpoint(checkpoint_path, **options)
        return load_checkpoint(checkpoint_path, **options)

    def load_state(checkpoint: dict[str, Any], strict: bool = True) -> None:
        module = trainer.lightning_module
        record, after_setup = record_of(module), strategy.restore_checkpoint_after_setup
        if MARK not in checkpoint:
            # Without an adapter, or with parts of tensors, there is no base to compare with.
            if after_setup or not (hosts(module) or record.finder):
                load_model_state_dict(checkpoint, strict=strict)
                return
            with record.compared(state_entries(twin_of(module), record.finder)):
                load_model_state_dict(checkpoint, strict=strict)
            return
        load_weights(module, checkpoint, strict, strategy.model)
        _complete(module, checkpoint)
        if after_setup:
            # Ranks hold parts, which can't be compared with the whole.
            record.expected = {}
        elif trainer.state.fn != "fit":
            compare_base(record, fingerprints_of(_base_of(module)), refuse=False)
        # Such strategies restore optimizers from files of their own format.
        if not strategy.lightning_restore_optimizer and trainer.state.fn == "fit":
            load_optimizers(trainer, checkpoint)

    return put_on(strategy, {"load_checkpoint": load, "load_model_state_dict": load_state})


def is_ours(path: Any) -> bool:
    """Whether a file has our mark, found without unpickling a file that may be untrusted or as large as a model."""
    return MARK.encode() in _pickled(path)


def is_of_first_release(path: Any) -> bool:
    """Whether a file has our mark, but not yet the list of what is left out of it."""
    pickled = _pickled(path)
    return MARK.encode() in pickled and b"left_out" not in pickled


def _pickled(path: Any) -> bytes:
    """A file of torch.save without the values of its tensors; nothing if it is another file."""
    if not zipfile.is_zipfile(path):
        return b""
    # torch.save writes a zip archive in which the pickle and each tensor's values are separate files.
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))


def load_weights(module: nn.Module, checkpoint: dict[str, Any], strict: bool, wrapped: nn.Module | None = None) -> None:
    """Copy a file's weights into a module, whether they are trained at the moment or not.

    Lightning calls this before ``configure_optimizers`` and ``on_fit_start``, in which modules may freeze and unfreeze.

    Args:
        module: a LightningModule, or a part of one.
        checkpoint: with our mark.
        strict: whether what is missing or unknown is an error.
        wrapped: the module as a strategy has wrapped it, which may have split the parameters.
    """
    twin, state, mark = twin_of(module), checkpoint["state_dict"], checkpoint[MARK]
    entries = state_entries(twin, record_of(module).finder)
    left_out: dict[str, Fingerprint] | None = json.loads(mark["left_out"]) if isinstance(mark, dict) else None
    _check_names(entries, state, left_out, strict)
    known = {name: value for name, value in state.items() if name in entries}
    layout = layout_of(wrapped)
    parts = {}
    for name, value in known.items():
        parameter = entries[name].value
        if isinstance(parameter, nn.Parameter):
            if value.shape != layout.shape(parameter):
                raise MisconfigurationException(
                    f"AdapterCheckpoint: {name} has the shape {tuple(layout.shape(parameter))}, "
                    f"in the checkpoint {tuple(value.shape)}: it is of another model or adapter"
                )
            value = layout.part(value, parameter)
        parts[name] = value
    with kept_attributes(module, twin):
        # Not strict, since the base is not in the file; _check_names has found what is missing.
        twin.load_state_dict(parts, strict=False)
    record = record_of(module)
    if isinstance(mark, dict) and "scalings" in mark:
        _compare_scalings(json.loads(mark["scalings"]), scalings_of(twin, record.finder))
    # A module's on_load_checkpoint may have completed the state dict by itself.
    not_in_the_file = left_out or {}
    of_base = [name for name in known if entries[name].kind is Kind.BASE]
    record.add([name for name in of_base if name not in not_in_the_file], entries)
    record.expected = not_in_the_file


def _check_names(
    entries: Mapping[str, Entry], state: Mapping[str, Any], left_out: Mapping[str, Fingerprint] | None, strict: bool
) -> None:
    """Refuse a file that lacks what the module can't get elsewhere, or that holds what the module does not have."""
    lacking = []
    for name, entry in entries.items():
        # An old file, which does not say what was left out of it.
        if left_out is None:
            needed = entry.kind is Kind.ADAPTER and isinstance(entry.value, nn.Parameter)
        else:
            needed = entry.kind in (Kind.ADAPTER, Kind.OWN) and name not in left_out
        if needed and name not in state:
            lacking.append(name)
    surplus = [name for name in state if name not in entries]
    cases = (
        (lacking, f"lacks {len(lacking)} weights that the module has"),
        (surplus, f"has {len(surplus)} weights that the module lacks"),
    )
    for names, what in cases:
        if not names:
            continue
        text = f"AdapterCheckpoint: the checkpoint {what}, such as {names[0]}: "
        if strict:
            raise MisconfigurationException(
                f"{text}it is of another model or adapter. To load what fits, set the module's strict_loading to False"
            )
        rank_zero_warn(f"{text}they are left as they are")


def _compare_scalings(saved: Mapping[str, float], own: Mapping[str, float]) -> None:
    """Warn of the same weights under another scaling, which are another model.

    Not refused, as a callback that sets the scaling while a fit runs may be about to set it again.
    """
    others = []
    for name, scaling in own.items():
        if not math.isclose(scaling, saved.get(name, scaling), rel_tol=1e-5):
            others.append(name)
    if others:
        first = others[0]
        rank_zero_warn(
            f"AdapterCheckpoint: {len(others)} layers scale their adapter otherwise than in the run that was saved, as "
            f"{first} does by {own[first]:g} and not by {saved[first]:g}: the results are not that run's. The scaling "
            "comes from lora_alpha, r and use_rslora of the LoraConfig"
        )


def compare_base(record: BaseRecord, found: Mapping[str, Fingerprint], refuse: bool) -> None:
    """Report a base that is not the one of the run that was saved.

    To continue a run on another base is refused, since it would not be the same run. To evaluate on a base that was
    quantized, or is newer, may be intended, which the file can't know: there it is a warning.

    Args:
        record: of the module, with what the loaded file expects.
        found: the base as it is.
        refuse: raise an error if tensors differ by more than rounding.
    """
    expected, record.expected = record.expected, {}
    if not expected:
        return
    compared = {name: each for name, each in found.items() if name in expected or name not in record.changed}
    others, nearly = differing(expected, compared)
    if others:
        text = (
            f"AdapterCheckpoint: {len(others)} tensors of the base, which the checkpoint leaves out, are not those of "
            f"the run that was saved: {listed(others)}. Was it another base, or are these layers that are initialized "
            "at random each time the base is loaded? "
        )
        if refuse:
            raise MisconfigurationException(
                f"{text}Load the same base (and save such layers by training them or by peft's modules_to_save), or "
                "set the module's strict_loading to False to continue with this one"
            )
        rank_zero_warn(f"{text}What follows is of the base that the module has now")
    elif nearly:
        rank_zero_warn(
            f"AdapterCheckpoint: the base differs a little from that of the run that was saved, in {listed(nearly)}: "
            "results will not be equal to the last bit"
        )


def _complete(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add the base to the state dicts that callbacks which average weights load by themselves, strictly."""
    mark = checkpoint[MARK]
    places: list[list[Any]] = list(mark["shortened"]) if isinstance(mark, dict) else []
    if "current_model_state" in checkpoint:
        places.append(["current_model_state"])
    own = module.state_dict() if places else {}

    def completed(saved: dict[str, Any]) -> dict[str, Any]:
        return {name: saved.get(clean_name(name), value) for name, value in own.items()}

    for place in places:
        checkpoint[place[0]] = changed_at(checkpoint, place, completed)[place[0]]
