"""What learns in a model, whole, under every strategy: gathered for a checkpoint, and given back to every rank.

The frozen base is never gathered: only adapters and trained parameters, and what the optimizer keeps of them, travel.
"""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_flatlora.callbacks.two_passes import put_on_instance
from lightning_flatlora.distributed import Layout, layout_of
from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.pairs import bare

_MARK = "lightning_flatlora_adapter"


@contextmanager
def written_as_adapter(trainer: Trainer, write: Callable[[dict[str, Any], Path], None]) -> Iterator[None]:
    """Inside, a checkpoint that the trainer saves holds whole values of what learns, whatever the strategy.

    Args:
        trainer: in a fit.
        write: is given the checkpoint and its path on rank zero alone; every rank takes part in the gathering.
    """
    strategy = trainer.strategy

    def save_checkpoint(checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        if strategy.is_global_zero:
            write({**checkpoint, _MARK: 1}, Path(filepath))

    methods = {
        "lightning_module_state_dict": lambda: _weights(trainer),
        "optimizer_state": lambda optimizer: _optimizer_state(trainer, optimizer),
        "save_checkpoint": save_checkpoint,
    }
    put_back = _put_on(strategy, methods)
    try:
        yield
    finally:
        put_back()


def read_adapters(trainer: Trainer) -> Callable[[], None]:
    """Let a trainer's strategy load such checkpoints too; others are loaded as ever.

    Returns:
        A function that undoes it.
    """
    strategy = trainer.strategy
    load_checkpoint, load_model_state_dict = strategy.load_checkpoint, strategy.load_model_state_dict

    def load(checkpoint_path: Any, **options: Any) -> dict[str, Any]:
        # A strategy that restores after its setup would load the file into a gathered model at once.
        if strategy.restore_checkpoint_after_setup and _is_ours(checkpoint_path):
            return strategy.checkpoint_io.load_checkpoint(checkpoint_path, **options)
        return load_checkpoint(checkpoint_path, **options)

    def load_state(checkpoint: dict[str, Any], strict: bool = True) -> None:
        if _MARK not in checkpoint:
            load_model_state_dict(checkpoint, strict=strict)
            return
        _load_weights(trainer, checkpoint["state_dict"], strict)
        if not strategy.lightning_restore_optimizer and trainer.state.fn == TrainerFn.FITTING:
            _load_optimizers(trainer, checkpoint)

    return _put_on(strategy, {"load_checkpoint": load, "load_model_state_dict": load_state})


def _put_on(strategy: Strategy, methods: dict[str, Any]) -> Callable[[], None]:
    puts_back = [put_on_instance(cast(Any, strategy), name, method) for name, method in methods.items()]

    def put_back() -> None:
        for each in puts_back:
            each()

    return put_back


def _is_ours(path: Any) -> bool:
    """Whether a file has our mark, without unpickling what may be of anybody, or as large as a model."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return any(_MARK.encode() in archive.read(name) for name in pickles)


def unwrapped(module: nn.Module) -> Any:
    """A second set of modules around the same parameters, without those that wrappers have put in between.

    Its names are clean, peft finds its layers by them, and FSDP1's hooks, which would gather the model, are not on it.

    Example:
        >>> from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
        >>> model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
        >>> list(dict(unwrapped(model).named_parameters()))
        ['0.weight', '0.bias']
    """
    return _unwrapped(module, {})


def _unwrapped(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    module = bare(module)
    if id(module) not in seen:
        twin: Any = object.__new__(type(module).__bases__[-1] if isinstance(module, FSDPModule) else type(module))
        seen[id(module)] = twin
        vars(twin).update(vars(module))
        children = module._modules.items()
        vars(twin)["_modules"] = {name: child if child is None else _unwrapped(child, seen) for name, child in children}
    return seen[id(module)]


def peft_models(module: nn.Module) -> dict[str, PeftModel]:
    """The outermost peft models of a module, by the name of their place."""
    found: dict[str, PeftModel] = {}
    for name, part in module.named_modules():
        if isinstance(part, PeftModel) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = part
    return found


def _learning(module: nn.Module) -> dict[str, Any]:
    """The entries of an unwrapped module's state dict that training changes, parameters as they are on this rank.

    Frozen parameters of the base are left out, and buffers inside peft models but for the running statistics of norms.
    Those of adapters are drawn anew in another process, as LoRA-FA's A, so they stay.
    """
    of_adapters = {id(p) for part in module.modules() for p in _adapter_parameters(part)}
    frozen = {
        name
        for name, p in module.named_parameters(remove_duplicate=False)
        if not p.requires_grad and id(p) not in of_adapters
    }
    for outer, model in peft_models(module).items():
        for name, part in model.named_modules(remove_duplicate=False):
            if not isinstance(part, _NormBase):
                buffers = part.named_buffers(recurse=False)
                frozen |= {".".join(filter(None, (outer, name, buffer))) for buffer, _ in buffers}
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if name not in frozen}


def _adapter_parameters(part: nn.Module) -> Iterator[nn.Parameter]:
    """What adapters, active or not, have put into one of peft's layers."""
    if isinstance(part, BaseTunerLayer):
        for name in part.adapter_layer_names:
            held = getattr(part, name, None)
            if isinstance(held, nn.Module):
                yield from held.parameters()
    elif isinstance(part, ModulesToSaveWrapper):
        yield from part.modules_to_save.parameters()


def _layout(trainer: Trainer, entries: dict[str, Any]) -> Layout:
    return layout_of(trainer.strategy.model, [p for p in entries.values() if isinstance(p, nn.Parameter)])


def _weights(trainer: Trainer) -> dict[str, Any]:
    """What learns, whole, on the CPU, by clean names."""
    entries = _learning(unwrapped(trainer.lightning_module))
    layout = _layout(trainer, entries)
    return {
        name: layout.gather(value, value).cpu() if isinstance(value, Tensor) else value  # type: ignore[arg-type]
        for name, value in entries.items()
    }


def _load_weights(trainer: Trainer, state: dict[str, Any], strict: bool) -> None:
    module = unwrapped(trainer.lightning_module)
    entries = _learning(module)
    lacking = [name for name, p in entries.items() if isinstance(p, nn.Parameter) and name not in state]
    surplus = [name for name in state if name not in entries] if strict else []
    for names, which in ((lacking, "lacks"), (surplus, "has")):
        if names:
            raise MisconfigurationException(
                f"AdapterCheckpoint: the checkpoint {which} {len(names)} adapter or trained weights, as {names[0]}: "
                "it is of another model or adapter"
            )
    layout = _layout(trainer, entries)
    parts = dict(state)
    for name, parameter in entries.items():
        if isinstance(parameter, nn.Parameter):
            if state[name].shape != layout.shape(parameter):
                raise MisconfigurationException(
                    f"AdapterCheckpoint: {name} has the shape {tuple(layout.shape(parameter))}, "
                    f"in the checkpoint {tuple(state[name].shape)}: it is of another model or adapter"
                )
            parts[name] = layout.part(state[name], parameter)
    module.load_state_dict(parts, strict=False)


def _optimizer_state(trainer: Trainer, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state in its own format, with whole values on the CPU."""
    layout = _layout(trainer, _learning(unwrapped(trainer.lightning_module)))
    packed, parameters = optimizer.state_dict(), _parameters(optimizer)
    own = {(index, key): value for index, state in packed["state"].items() for key, value in state.items()}
    outline = {
        (index, key): _outlined(key, value, parameters[index], layout)
        for (index, key), value in own.items()
        if parameters[index].numel()
    }
    # Under FSDP1 a rank without a part of a parameter has no state for it: all ranks agree on what there is.
    table = layout.merged(outline)
    _refuse_odd(table)
    whole: dict[int, dict[str, Any]] = {}
    for (index, key), value in table.items():
        if isinstance(value, torch.dtype):
            parameter = parameters[index]
            mine = own.get((index, key), parameter.detach().new_empty(0, dtype=value))
            value = layout.gather(mine, parameter).cpu()
        whole.setdefault(index, {})[key] = value
    return {**packed, "state": whole}


def _refuse_odd(table: dict[tuple[int, str], Any]) -> None:
    """Raise on every rank, so that none waits for another, if a value is split and not as its parameter is."""
    for (_, key), value in table.items():
        if isinstance(value, torch.Size):
            raise MisconfigurationException(
                f"AdapterCheckpoint: the optimizer keeps {key!r} of the shape {tuple(value)} for a parameter that is "
                "sharded, and nothing tells how to make it whole: use another optimizer, or Lightning's ModelCheckpoint"
            )


def _load_optimizers(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Give the optimizers of a sharded model the parts of their states; the others are loaded by Lightning."""
    if "optimizer_states" not in checkpoint:  # weights alone, which Lightning refuses or not as it likes
        return
    optimizers, states = trainer.strategy.optimizers, checkpoint["optimizer_states"]
    if len(optimizers) != len(states):
        raise MisconfigurationException(
            f"AdapterCheckpoint: the checkpoint has {len(states)} optimizers, the module {len(optimizers)}"
        )
    layout = _layout(trainer, _learning(unwrapped(trainer.lightning_module)))
    for optimizer, saved in zip(optimizers, states, strict=True):
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        parameters = dict(zip(indices, _parameters(optimizer), strict=False))
        state = {
            index: {key: _part(layout, key, value, parameters[index]) for key, value in values.items()}
            for index, values in saved["state"].items()
            if index in parameters and parameters[index].numel()  # no part, no state: it would keep its old step
        }
        optimizer.load_state_dict({**saved, "state": state})


def _part(layout: Layout, key: str, value: Any, parameter: nn.Parameter) -> Any:
    return layout.part(value, parameter) if _is_split(key, value, layout.shape(parameter)) else value


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_split(key: str, value: Any, shape: torch.Size) -> bool:
    """Whether an optimizer's value is as large as the parameter, and split as it is."""
    return isinstance(value, Tensor) and key != "step" and value.shape == shape


def _outlined(key: str, value: Any, parameter: nn.Parameter, layout: Layout) -> Any:
    """The dtype of a value that is split as the parameter is, the shape of one split in another way, or the value."""
    if not isinstance(value, Tensor):
        return value
    if _is_split(key, value, parameter.shape):
        return value.dtype
    return value.shape if value.numel() > 1 and layout.splits(parameter) else value.cpu()
