"""Load a checkpoint of adapters into a model, under any strategy, and compare the model's base with the saved run's."""

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_flatlora.callbacks.adapter_checkpoint import contents
from lightning_flatlora.callbacks.adapter_checkpoint.base_identity import differing, identities_of, listed
from lightning_flatlora.callbacks.adapter_checkpoint.saving import MARK, is_split
from lightning_flatlora.callbacks.patches import put_on
from lightning_flatlora.distributed import Layout, is_sharded, layout_of
from lightning_flatlora.lightning_names import MisconfigurationException, is_lightning
from lightning_flatlora.methods.gradients import parameters_of
from lightning_flatlora.pairs import clean_name
from lightning_flatlora.pairs.lora_pair import Finder


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
    if MARK in checkpoint:
        _load_weights(module, checkpoint, strict, finder)
    else:
        with _another_base_noted(module, finder):
            module.load_state_dict(checkpoint["state_dict"], strict=strict)
    return module


def read_adapters(trainer: Trainer, finder: Finder | None) -> ExitStack:
    """Let a trainer's strategy load such checkpoints, too, until the stack that is returned is closed.

    Other checkpoints are loaded as before.
    """
    strategy = trainer.strategy
    load_checkpoint, load_model_state_dict = strategy.load_checkpoint, strategy.load_model_state_dict

    def load(checkpoint_path: Any, **options: Any) -> dict[str, Any]:
        # A strategy that restores after its setup would load the file into a gathered model at once.
        if strategy.restore_checkpoint_after_setup and _is_ours(checkpoint_path):
            return strategy.checkpoint_io.load_checkpoint(checkpoint_path, **options)
        return load_checkpoint(checkpoint_path, **options)

    def load_state(checkpoint: dict[str, Any], strict: bool = True) -> None:
        module, is_fit = trainer.lightning_module, trainer.state.fn == "fit"
        if MARK not in checkpoint:
            with _another_base_noted(module, finder, strategy.model):
                load_model_state_dict(checkpoint, strict=strict)
            return
        _load_weights(module, checkpoint, strict, finder, strategy.model, is_fit)
        if "current_model_state" in checkpoint:
            # WeightAveraging loads both strictly, by the module's own names, and the base is in neither.
            for key in ("state_dict", "current_model_state"):
                saved, own = checkpoint[key], module.state_dict()
                checkpoint[key] = {name: saved.get(clean_name(name), value) for name, value in own.items()}
        # Such strategies restore optimizers from files of their own format.
        if is_fit and not strategy.lightning_restore_optimizer:
            _load_optimizers(trainer, checkpoint)

    return put_on(strategy, {"load_checkpoint": load, "load_model_state_dict": load_state})


def _is_ours(path: Any) -> bool:
    """Look for our mark, without unpickling a file that may be untrusted or as large as a model."""
    if not zipfile.is_zipfile(path):
        return False
    # torch.save writes a zip archive in which the pickle and each tensor's values are separate files.
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return any(MARK.encode() in archive.read(name) for name in pickles)


def _load_weights(
    module: nn.Module,
    checkpoint: dict[str, Any],
    strict: bool,
    finder: Finder | None,
    model: nn.Module | None = None,
    is_fit: bool = False,
) -> None:
    """Copy a file's weights into a module, whether they are trained at the moment or not.

    Lightning calls this before ``configure_optimizers`` and ``on_fit_start``, in which modules may freeze and unfreeze.

    Args:
        module: a LightningModule, or a part of one.
        checkpoint: with our mark.
        strict: whether what is missing or unknown is an error.
        finder: of the adapter's factors, if they are not peft's.
        model: the module as a strategy has wrapped it, which may have split the parameters.
        is_fit: whether the run goes on, which is refused on another base.
    """
    found, layout, mark = contents.contents_of(module, finder), layout_of(model), checkpoint[MARK]
    # A module's on_load_checkpoint may have completed the state dict by itself.
    left_out = found.derived.union(mark["left_out"])
    state = {name: value for name, value in checkpoint["state_dict"].items() if name not in left_out}
    own = {**found.adapters, **found.base, **found.others}
    lacking = [name for name in own if name not in state and name not in left_out and name not in found.base]
    _refuse_names(lacking, f"lacks {len(lacking)} weights that the module has", strict)
    surplus = [name for name in state if name not in own]
    _refuse_names(surplus, f"has {len(surplus)} weights that the module lacks", strict)
    parts = {name: _part_of(name, value, own[name], layout) for name, value in state.items() if name in own}
    contents.trained_names(module).update(contents.plain_name(name) for name in parts if name in found.base)
    with contents.unwrapped(module):
        # By PyTorch's method, as it was saved. Not strict, since the base is not in the file.
        nn.Module.load_state_dict(module, parts, strict=False)
    _compare_scalings(mark["scalings"], contents.scalings_of(module, finder))
    base = {name: parameter for name, parameter in found.base.items() if name not in parts}
    _compare_base(mark["left_out"], identities_of(base, whole=not is_sharded(model)), refuse=is_fit and strict)


def _part_of(name: str, value: Any, parameter: Any, layout: Layout) -> Any:
    """Cut out what this rank keeps of a value in a file."""
    if not isinstance(parameter, nn.Parameter):
        return value
    if value.shape != layout.shape(parameter):
        raise MisconfigurationException(
            f"AdapterCheckpoint: {name} has the shape {tuple(layout.shape(parameter))}, "
            f"in the checkpoint {tuple(value.shape)}: it is of another model or adapter"
        )
    return layout.part(value, parameter)


def _refuse_names(names: list[str], what: str, strict: bool) -> None:
    """Refuse a file that lacks what the module can't get elsewhere, or that holds what the module does not have."""
    text = f"AdapterCheckpoint: the checkpoint {what}, such as {''.join(names[:1])}: "
    if names and strict:
        raise MisconfigurationException(
            f"{text}it is of another model or adapter. To load what fits, set the module's strict_loading to False"
        )
    if names:
        rank_zero_warn(f"{text}they are left as they are")


def _compare_scalings(saved: Mapping[str, float], own: Mapping[str, float]) -> None:
    """Warn of the same weights under another scaling, which are another model.

    Not refused, as a callback that sets the scaling while a fit runs may be about to set it again.
    """
    others = [name for name, s in own.items() if not math.isclose(s, saved.get(name, s), rel_tol=1e-5)]
    if others:
        first = others[0]
        rank_zero_warn(
            f"AdapterCheckpoint: {len(others)} layers scale their adapter otherwise than in the run that was saved, as "
            f"{first} does by {own[first]:g} and not by {saved[first]:g}: the results are not that run's. The scaling "
            "comes from lora_alpha, r and use_rslora of the LoraConfig"
        )


def _compare_base(expected: Mapping[str, Any], found: Mapping[str, Any], refuse: bool) -> None:
    """Report a base that is not the one of the run that was saved.

    To continue a run on another base is refused, since it would not be the same run. To evaluate on a base that was
    quantized, or is newer, may be intended, which the file can't know: there it is a warning.
    """
    others = differing(expected, found)
    if not others:
        return
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


@contextmanager
def _another_base_noted(module: nn.Module, finder: Finder | None, model: nn.Module | None = None) -> Iterator[None]:
    """Count as trained what a checkpoint of Lightning's own, loaded inside, changes of the base."""
    base, whole = contents.contents_of(module, finder).base, not is_sharded(model)
    before = identities_of(base, whole)
    yield
    others = differing(before, identities_of(base, whole))
    contents.trained_names(module).update(contents.plain_name(name) for name in others)


def _load_optimizers(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Load each rank's parts into the optimizers of a sharded model; Lightning loads all other optimizers."""
    # Only weights: whether that is an error is for Lightning to say.
    if "optimizer_states" not in checkpoint:
        return
    optimizers, states = trainer.strategy.optimizers, checkpoint["optimizer_states"]
    if len(optimizers) != len(states):
        raise MisconfigurationException(
            f"AdapterCheckpoint: the checkpoint has {len(states)} optimizers, the module {len(optimizers)}"
        )
    layout = layout_of(trainer.strategy.model)
    for optimizer, saved in zip(optimizers, states, strict=True):
        parameters = dict(enumerate(parameters_of(optimizer)))
        state = {}
        for number, values in saved["state"].items():
            parameter = parameters.get(number)
            # A rank without a part of a parameter has no state for it, which would keep its old step. A state of an
            # unknown parameter is refused by the optimizer itself, with its own message.
            if parameter is None or parameter.numel():
                state[number] = values
            for key, value in state.get(number, {}).items():
                if parameter is not None and is_split(key, value, layout.shape(parameter)):
                    state[number] = {**state[number], key: layout.part(value, parameter)}
        # Not PyTorch's set_optimizer_state_dict, which takes a step to create the state of every parameter, also of
        # those that had none in the saved run.
        optimizer.load_state_dict({**saved, "state": state})
