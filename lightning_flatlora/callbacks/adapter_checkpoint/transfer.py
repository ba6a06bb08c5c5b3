"""Save checkpoints of adapters, and load them, under every strategy; the frozen base is never gathered."""

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from lightning_flatlora.callbacks.adapter_checkpoint import contents, export
from lightning_flatlora.callbacks.both_lightnings import is_lightning
from lightning_flatlora.methods.optimizers import parameters_of
from lightning_flatlora.pairs.lora_pair import Finder
from lightning_flatlora.pairs.peft_pairs import merge_problems
from lightning_flatlora.patching import put_on
from lightning_flatlora.sharding import Sharding, is_sharded, sharding_of
from lightning_flatlora.wrappers import clean_name

# The key under which a checkpoint says that it is one of ours. There it has the "format" of the file, the identities of
# what is "left_out", and the "scalings" of the adapters, both by name.
MARK = "lightning_flatlora_adapter"
# A key of the state dict, without a weight. Lightning's load_from_checkpoint, which misses the base, ends its error by
# the keys that it doesn't know.
HINT = "this file lacks the frozen base: train with AdapterCheckpoint, or call load_adapter_checkpoint(module, path)"


def adapters_only(trainer: Trainer, finder: Finder | None) -> ExitStack:
    """Leave the frozen base out of a trainer's checkpoints until the returned stack is closed.

    Every rank takes part in the gathering, and rank zero writes.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    contents.note_trained(module)
    contents.note_rewritten(module)
    merged = merge_problems(module)
    for problem in merged:
        rank_zero_warn(f"AdapterCheckpoint: at a save {problem}, or a load will report another base")
    kept, base = contents.divided_state(module, finder)
    sharding, sharded = sharding_of(strategy.model), is_sharded(strategy.model)
    identities = contents.identities_of(base, sharded)
    if not merged and contents.note_changed(module, identities):
        rank_zero_warn(
            "AdapterCheckpoint: the base has changed, as by ReLoRA. The .ckpt files hold it, the folders don't"
        )
        kept, base = contents.divided_state(module, finder)
    mark: dict[str, Any] = {"format": export.FORMAT, "left_out": {name: identities[name] for name in base}}
    mark["scalings"] = contents.scalings_of(module, finder)
    # A tensor with two names is gathered once, and stays one tensor.
    once = {id(value): value for value in kept.values()}
    gathered = tree_map_only(Tensor, lambda tensor: sharding.gather(tensor, tensor).cpu(), once)
    whole = {name: gathered[id(value)] for name, value in kept.items()}

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        # A module's on_save_checkpoint may have taken weights out, to make Lightning's own file smaller; without them
        # no run could be resumed. WeightAveraging puts the averages of the whole model in their place. Those of weights
        # that are left out differ from the weights by rounding only.
        changed = {clean_name(name): value for name, value in checkpoint.get("state_dict", {}).items()}
        if "current_model_state" in checkpoint and not whole.keys() <= changed.keys():
            raise MisconfigurationException(
                "AdapterCheckpoint: WeightAveraging gives averages under other names, or not all: leave state_dict and "
                "on_save_checkpoint as they are in Lightning, since the files hold no frozen base anyway"
            )
        state = {**whole, **{name: value for name, value in changed.items() if name not in base}}
        # peft may need more of the base, such as a resized embedding, where this rank has it whole.
        frozen = {} if sharded else {name: value for name, value in base.items() if value is not None}
        slim = {**checkpoint, "state_dict": {**state, HINT: torch.empty(0)}, MARK: mark}
        slim = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), slim)
        if strategy.is_global_zero:
            export.write(slim, frozen, Path(filepath), module, finder)

    # The strategy's methods are replaced, because its own would gather the whole model, and no hook says what is saved.
    methods: dict[str, Any] = {"lightning_module_state_dict": whole.copy, "save_checkpoint": save_checkpoint}
    if sharded:
        methods["optimizer_state"] = lambda optimizer: gather_state(optimizer, sharding)
    return put_on(strategy, methods)


# Not PyTorch's get_optimizer_state_dict and set_optimizer_state_dict, which take a step to create the state of every
# parameter, even of those without one: they have no part on this rank, or had no gradient.
def gather_state(optimizer: Optimizer, sharding: Sharding) -> dict[str, Any]:
    """Give a sharded optimizer's state in its own format, with whole values on the CPU; every rank must call this."""
    parameters, packed = parameters_of(optimizer), optimizer.state_dict()
    state = packed.get("state", {})
    odd = {*packed, *state} - {"state", "param_groups", *range(len(parameters))}
    outline: dict[tuple[int, str], Any] = {}
    for index, parameter in enumerate(parameters):
        # Under FSDP1 a rank may hold no part of a parameter, and then has no state for it, or an old one.
        values = state.get(index, {}) if parameter.numel() else {}
        for key, value in values.items():
            if is_split(key, value, parameter.shape):
                value = value.dtype
            elif isinstance(value, Tensor) and value.numel() > 1:
                value = value.shape
            outline[index, key] = value
    # Before anything is refused, since a single rank that failed would leave the others waiting.
    merged = sharding.merged(outline)
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
            value = sharding.gather(part, parameter).cpu()
        whole.setdefault(index, {})[key] = value
    return {**packed, "state": whole}


def scatter_state(optimizer: Optimizer, saved: dict[str, Any], sharding: Sharding) -> None:
    """Load what this rank keeps of a whole state into a sharded optimizer; the inverse of :func:`gather_state`."""
    state = dict(saved["state"])
    for index, parameter in enumerate(parameters_of(optimizer)):
        values, shape = state.pop(index, None), sharding.shape(parameter)
        if values is not None and parameter.numel():
            split = {key: sharding.part(each, parameter) for key, each in values.items() if is_split(key, each, shape)}
            state[index] = {**values, **split}
    optimizer.load_state_dict({**saved, "state": state})


def is_split(key: str, value: Any, shape: torch.Size) -> bool:
    """Tell whether a value of an optimizer's state is split over the ranks as its parameter of that shape is."""
    # The count of steps is a tensor of shape (), which is a scalar parameter's shape, too, and is whole on every rank.
    return isinstance(value, Tensor) and value.shape == shape and key != "step"


def load_adapter_checkpoint(
    module: nn.Module,
    path: str | Path | IO[bytes],
    strict: bool = True,
    weights_only: bool = True,
    finder: Finder | None = None,
) -> nn.Module:
    """Load the weights of a checkpoint that AdapterCheckpoint has written, without a Trainer.

    Lightning's ``load_from_checkpoint`` and a Trainer without an AdapterCheckpoint expect the frozen base in the file.
    Here the module must have its base already, from the same source as in training, or make it in
    ``configure_model``, which is called first.

    Args:
        module: the LightningModule, with the base and the adapter in place once ``configure_model`` has been called.
        path: the file, or its name; Lightning's own checkpoints work too.
        strict: refuse a file that lacks an adapter's weight or has one that the module doesn't know.
        weights_only: let the file create only tensors and plain values. Turn this off only for a file that you
            trust, if its hyper-parameters are of other classes.
        finder: that of the AdapterCheckpoint.

    Returns:
        The module.

    Raises:
        MisconfigurationException: the file is of another model or adapter, damaged, or no checkpoint.

    Example:
        >>> from io import BytesIO
        >>> file = BytesIO()
        >>> torch.save({"state_dict": {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}}, file)
        >>> load_adapter_checkpoint(nn.Linear(2, 1), BytesIO(file.getvalue())).weight.data
        tensor([[1., 1.]])
    """
    export.check(path)
    with _read(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise MisconfigurationException(f"{path} has no state_dict: give a .ckpt of AdapterCheckpoint or Lightning")
        if is_lightning(module, LightningModule):
            # As load_from_checkpoint does. Lightning calls it before each fit and test too, so it may be called again.
            module.configure_model()
        if MARK in checkpoint:
            export.check(path, checkpoint.get("global_step"))
            _load_weights(module, checkpoint, strict, finder)
        else:
            module.load_state_dict(checkpoint["state_dict"], strict=strict)
    return module


@contextmanager
def _read(path: Any) -> Iterator[None]:
    """Name the file in whatever error it causes, of which a damaged one may cause any."""
    try:
        yield
    except (FileNotFoundError, MisconfigurationException):
        raise
    except Exception as error:
        text = f"{path} can't be loaded. Is it damaged, or of a module with another rank, head or vocabulary? {error}"
        raise MisconfigurationException(f"AdapterCheckpoint: {text}") from error


def read_adapters(trainer: Trainer, finder: Finder | None) -> None:
    """Let a trainer's strategy load these checkpoints too; other checkpoints are loaded as before."""
    strategy, connector = trainer.strategy, trainer._checkpoint_connector
    load_checkpoint, load_model_state_dict = strategy.load_checkpoint, strategy.load_model_state_dict
    resume_start = connector.resume_start

    def start(path: Any = None, *args: Any, **options: Any) -> None:
        # Lightning loads such a file unasked, whichever run has left it in the folder.
        if os.path.basename(str(path)).startswith("hpc_ckpt_") and not int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            raise MisconfigurationException(
                f"AdapterCheckpoint: {path} is of another run, whose SLURM job Lightning has requeued: give the "
                "Trainer a default_root_dir without such a file, or rename it and pass it as ckpt_path to resume it"
            )
        export.check(path)
        exists = not path or "://" in str(path) or os.path.exists(path)
        if exists:
            resume_start(path, *args, **options)
        # All ranks come here, with or without a checkpoint, before any of them waits for the others to load one.
        step = connector._loaded_checkpoint.get("global_step", 0)
        steps = strategy.all_gather(torch.tensor(step, device=strategy.root_device)).flatten().tolist()
        if len(set(steps)) > 1:
            raise MisconfigurationException(
                f"AdapterCheckpoint: the ranks would continue from different steps, {steps} (0: found no checkpoint): "
                "save into a folder that all machines share, or copy the file to each before you resume"
            )
        if not exists:
            resume_start(path, *args, **options)  # for Lightning's error
        export.check(path, step)

    def load(checkpoint_path: Any, **options: Any) -> dict[str, Any]:
        # A strategy that restores after its setup would load the file into a gathered model at once.
        with _read(checkpoint_path):
            if strategy.restore_checkpoint_after_setup and _is_ours(checkpoint_path):
                return strategy.checkpoint_io.load_checkpoint(checkpoint_path, **options)
            return load_checkpoint(checkpoint_path, **options)

    def load_state(checkpoint: dict[str, Any], strict: bool = True) -> None:
        module = trainer.lightning_module
        if MARK not in checkpoint:
            load_model_state_dict(checkpoint, strict=strict)
            return
        with _read(trainer.ckpt_path):
            _load_weights(module, checkpoint, strict, finder, trainer)
        if "current_model_state" in checkpoint:
            # WeightAveraging loads both strictly, by the module's own names, and the base is in neither.
            for key in ("state_dict", "current_model_state"):
                saved, own = checkpoint[key], module.state_dict()
                checkpoint[key] = {name: saved.get(clean_name(name), value) for name, value in own.items()}
        # Such strategies restore optimizers from files of their own format.
        if trainer.state.fn == "fit" and not strategy.lightning_restore_optimizer:
            # None if only weights were saved: Lightning decides whether that is an error.
            states = checkpoint.get("optimizer_states", [])
            for optimizer, saved in zip(strategy.optimizers, states, strict=bool(states)):
                scatter_state(optimizer, saved, sharding_of(strategy.model))

    put_on(strategy, {"load_checkpoint": load, "load_model_state_dict": load_state})
    put_on(connector, {"resume_start": start})


def _is_ours(path: Any) -> bool:
    """Look for our mark, without unpickling a file that may be untrusted or as large as a model."""
    if not zipfile.is_zipfile(path):
        return False
    # torch.save writes a zip archive in which the pickle and each tensor's values are separate files.
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return any(MARK.encode() in archive.read(name) for name in pickles)


def _load_weights(
    module: nn.Module, checkpoint: dict[str, Any], strict: bool, finder: Finder | None, trainer: Trainer | None = None
) -> None:
    """Load a checkpoint's weights, and check that the base is the one that it leaves out.

    The trainer's strategy may have split the parameters. Weights that do not fit are refused if ``strict``.
    """
    model = trainer.strategy.model if trainer else None
    mark = export.checked(checkpoint[MARK])
    sharding, left_out = sharding_of(model), mark["left_out"]
    # A module's on_load_checkpoint may have completed the state dict by itself.
    without = {*left_out, HINT}
    state = {name: value for name, value in checkpoint["state_dict"].items() if name not in without}
    contents.trained_names(module).update(contents.plain_name(name) for name in state)
    kept, base = contents.divided_state(module, finder)
    for name, value in state.items():
        parameter: Any = kept.get(name)
        # A value of another shape stays whole, so that PyTorch refuses it by its name.
        if sharding.splits(parameter) and sharding.shape(parameter) == value.shape:
            state[name] = sharding.part(value, parameter)
    with contents.unwrapped(module):
        # By PyTorch's method, as it was saved. Not strict, since the base is not in the file.
        keys = nn.Module.load_state_dict(module, state, strict=False)
    lacking = [name for name in keys.missing_keys if name in kept and name not in left_out]
    _report(lacking, f"lacks {len(lacking)} weights that the module has", strict)
    _report(keys.unexpected_keys, f"has {len(keys.unexpected_keys)} weights that the module lacks", strict)
    saved, scalings = mark["scalings"], contents.scalings_of(module, finder)
    others = [name for name, s in scalings.items() if not math.isclose(s, saved.get(name, s), rel_tol=1e-5)]
    # Not refused, as a callback that sets the scaling while a fit runs may be about to set it again.
    _report(others, f"is of another lora_alpha, r or use_rslora in {len(others)} layers", refuse=False)
    # This module may already have trained a part of what the file leaves out.
    now = {name: kept[name] for name in left_out if name in kept}
    others = contents.differing(left_out, contents.identities_of({**base, **now}, is_sharded(model)))
    problem = f"leaves out {len(others)} tensors of the base, which are not those of the run that was saved"
    # A run continued on another base would be a different run. To evaluate on a base that was quantized, or is
    # newer, may be intended, which the file can't know.
    _report(others, problem, refuse=strict and trainer is not None and trainer.state.fn == "fit")


def _report(names: list[str], problem: str, refuse: bool) -> None:
    """Refuse what does not fit, or warn of it."""
    text = f"AdapterCheckpoint: the checkpoint {problem}, such as {', '.join(names[:3])}. Was it another model"
    if names and refuse:
        raise MisconfigurationException(
            f"{text}, was it elsewhere in its module, or are layers initialized at random? Build the same module, "
            "train such layers or put them in modules_to_save, or load what fits by module.strict_loading = False"
        )
    if names:
        rank_zero_warn(f"{text}? The results will be those of the model as it is now")
