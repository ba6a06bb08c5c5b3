"""Gather what goes into a checkpoint, whole and on the CPU under every strategy; the frozen base is never gathered."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.optim import Optimizer
from torch.serialization import get_unsafe_globals_in_checkpoint
from torch.utils._pytree import tree_map_only

from lightning_flatlora.callbacks.adapter_checkpoint import contents, export
from lightning_flatlora.callbacks.adapter_checkpoint.base_identity import identities_of
from lightning_flatlora.callbacks.patches import put_on
from lightning_flatlora.methods.gradients import parameters_of
from lightning_flatlora.pairs import clean_name
from lightning_flatlora.pairs.lora_pair import Finder
from lightning_flatlora.sharding import Sharding, is_sharded, sharding_of

# The key under which a checkpoint says that it is one of ours. There it has the identities of what is "left_out", and
# the "scalings" of the adapters, both by name.
MARK = "lightning_flatlora_adapter"


def adapters_only(trainer: Trainer, finder: Finder | None) -> ExitStack:
    """Let the checkpoints that a trainer saves leave out the frozen base, until the stack that is returned is closed.

    Every rank takes part in the gathering, and rank zero writes.

    Args:
        trainer: in a fit.
        finder: of the adapter's factors, if they are not peft's.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    contents.note_trained(module)
    contents.note_rewritten(module)
    layers = module.named_modules()
    merged = [name for name, layer in layers if isinstance(layer, BaseTunerLayer) and layer.merged]
    if merged:
        rank_zero_warn(
            f"AdapterCheckpoint: {merged[0]} is merged into its base at a save, so the base that a loader gives will "
            "seem to be another one: call unmerge_adapter() before, as in on_validation_epoch_end"
        )
    kept, base = contents.divided_state(module, finder)
    sharding, sharded = sharding_of(strategy.model), is_sharded(strategy.model)
    mark = {"left_out": identities_of(base, sharded), "scalings": contents.scalings_of(module, finder)}
    # A tensor with two names is gathered once, and stays one tensor.
    once = {id(value): value for value in kept.values()}
    gathered = tree_map_only(Tensor, lambda tensor: sharding.gather(tensor, tensor).cpu(), once)
    whole = {name: gathered[id(value)] for name, value in kept.items()}

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        # A module's on_save_checkpoint may have taken weights out, to make Lightning's own file smaller; without them
        # no run could be resumed. WeightAveraging puts the averages of the whole model in their place. Those of weights
        # that are left out differ from the weights by rounding only.
        changed = {clean_name(name): value for name, value in checkpoint.get("state_dict", {}).items()}
        state = {**whole, **{name: value for name, value in changed.items() if name not in base}}
        # peft may need more of the base, such as a resized embedding, where this rank has it whole.
        frozen = {} if sharded else {name: value for name, value in base.items() if value is not None}
        slim = {**checkpoint, "state_dict": state, MARK: mark}
        slim = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), slim)
        if strategy.is_global_zero:
            export.write(slim, frozen, Path(filepath), module, finder)

    # The strategy's methods are replaced, because its own would gather the whole model, and no hook says what is saved.
    methods: dict[str, Any] = {"lightning_module_state_dict": whole.copy, "save_checkpoint": save_checkpoint}
    if sharded:
        methods["optimizer_state"] = lambda optimizer: gather_state(optimizer, sharding)
    return put_on(strategy, methods)


# Not PyTorch's get_optimizer_state_dict and set_optimizer_state_dict, which take a step to create the state of every
# parameter, also of those that have none: because nothing of them lies on this rank, or because they had no gradient.
def gather_state(optimizer: Optimizer, sharding: Sharding) -> dict[str, Any]:
    """Give a sharded optimizer's state in its own format, with whole values on the CPU; every rank must call this."""
    parameters, packed = parameters_of(optimizer), optimizer.state_dict()
    state = packed.get("state", {})
    odd = {*packed, *state} - {"state", "param_groups", *range(len(parameters))}
    outline: dict[tuple[int, str], Any] = {}
    for index, parameter in enumerate(parameters):
        # Under FSDP1 a rank may have nothing of a parameter, and then has no state for it or an old one.
        values = state.get(index, {}) if parameter.numel() else {}
        for key, value in values.items():
            if is_split(key, value, parameter.shape):
                value = value.dtype
            elif isinstance(value, Tensor) and value.numel() > 1:
                value = value.shape
            outline[index, key] = value
    # Before anything is refused, since a rank that failed alone would leave the others waiting.
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


def is_split(key: str, value: Any, shape: torch.Size) -> bool:
    """Tell whether a value of an optimizer's state is split over the ranks as its parameter of that shape is."""
    # The count of steps is a tensor of shape (), which is a scalar parameter's shape, too, and is whole on every rank.
    return isinstance(value, Tensor) and value.shape == shape and key != "step"


def dry_run(trainer: Trainer, folder: Path, weights_only: bool) -> None:
    """Write a whole checkpoint into a temporary place and remove it; every rank must call this.

    Args:
        trainer: in a fit that is about to take its first step, inside of :func:`adapters_only`.
        folder: the checkpoint callback's.
        weights_only: as the checkpoint callback saves.

    Raises:
        MisconfigurationException: on every rank, if one of them could not write.
    """
    error: Exception | None = None
    try:
        # On every rank, since the weights are gathered and a state_dict() may communicate.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
        if trainer.is_global_zero:
            _save_and_remove(trainer, checkpoint, folder)
    except Exception as any_error:
        error = any_error
    # One rank may fail alone, for example by a callback's state. It ends the others, too, which would wait for it.
    if trainer.strategy.reduce_boolean_decision(error is not None, all=False):
        problem = f": {type(error).__name__}: {error}" if error else " on another rank, whose error says why"
        raise MisconfigurationException(f"AdapterCheckpoint: saving into {folder} would fail{problem}") from error


def _save_and_remove(trainer: Trainer, checkpoint: dict[str, Any], folder: Path) -> None:
    # The folders that are missing are made at the first save.
    while not folder.exists():
        folder = folder.parent
    with TemporaryDirectory(prefix=".dry-run-", dir=folder) as name:
        file = Path(name) / "dry_run.ckpt"
        trainer.strategy.save_checkpoint(checkpoint, file)
        unsafe = get_unsafe_globals_in_checkpoint(file)
    if unsafe:
        rank_zero_warn(
            f"AdapterCheckpoint: PyTorch loads {', '.join(sorted(unsafe)[:3])} only from a file that you trust. Leave "
            "such objects out by self.save_hyperparameters(ignore=[...]), or give weights_only=False with ckpt_path"
        )
