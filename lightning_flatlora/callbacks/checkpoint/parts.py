"""What a model consists of as a checkpoint sees it: adapters, the bases under them, and everything else."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cache
from itertools import chain
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_flatlora.pairs import bare


class Kind(Enum):
    """Where an entry of a state dict belongs."""

    ADAPTER = "adapter"
    """What peft has put in: always saved."""
    BASE = "base"
    """A parameter or buffer that its own loader gives again: saved once something has changed it."""
    DERIVED = "derived"
    """What a quantized layer of a base writes beside its weight: made again with the weight, never saved."""
    OWN = "own"
    """Everything else: always saved, as Lightning does."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One entry of a state dict; the value is the parameter or buffer itself, as this rank holds it."""

    value: Any
    kind: Kind


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
        kind = type(module).__bases__[-1] if isinstance(module, FSDPModule) else type(module)
        twin: Any = object.__new__(_without_end(kind))
        seen[id(module)] = twin
        vars(twin).update(vars(module))
        children = module._modules.items()
        vars(twin)["_modules"] = {name: child if child is None else _unwrapped(child, seen) for name, child in children}
    return seen[id(module)]


@cache
def _without_end(kind: type) -> type:
    """A module's class, whose ``__del__`` does nothing: a twin that goes must not close what the module holds."""
    if not hasattr(kind, "__del__"):
        return kind
    names = {"__del__": lambda self: None, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names)


@contextmanager
def kept_attributes(module: nn.Module, twin: nn.Module) -> Iterator[None]:
    """Give a module what is set as an attribute of its twin inside, as extra state and a metric's values are.

    Args:
        module: as it is.
        twin: what :func:`unwrapped` gave for it. Parameters and buffers are the module's own anyway.
    """
    before = [(own, other, dict(vars(other))) for own, other in _pairs_with_twins(module, twin, set())]
    yield
    for own, other, attributes in before:
        for name, value in vars(other).items():
            is_new = name not in attributes or value is not attributes[name]
            if is_new and name != "_modules":
                vars(own)[name] = value


def _pairs_with_twins(module: nn.Module, twin: nn.Module, seen: set[int]) -> Iterator[tuple[nn.Module, nn.Module]]:
    module = bare(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield module, twin
    for name, child in module._modules.items():
        other = twin._modules[name]
        if child is not None and other is not None:
            yield from _pairs_with_twins(child, other, seen)


def hosts(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that hold adapters, by the name of their place.

    These are peft models, and modules into which ``add_adapter`` of transformers or diffusers, or
    ``peft.inject_adapter_in_model``, has put peft's layers.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> list(hosts(nn.ModuleDict({"net": net, "head": nn.Linear(3, 2)})))
        ['net']
    """
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        inside_another = any(name.startswith(prefix_of(outer)) for outer in found)
        if not inside_another and (isinstance(part, PeftModel) or _is_injected(part)):
            found[name] = part
    return found


def prefix_of(name: str) -> str:
    """What the names of a module's parts begin with.

    Example:
        >>> prefix_of("net"), prefix_of("")
        ('net.', '')
    """
    return f"{name}." if name else ""


def _is_injected(part: nn.Module) -> bool:
    configs = vars(part).get("peft_config")
    if not isinstance(configs, dict) or not configs:
        return False
    return any(isinstance(layer, BaseTunerLayer) for layer in part.modules())


def entries_of(module: nn.Module) -> dict[str, Entry]:
    """Every entry of an unwrapped module's state dict, by its name.

    Args:
        module: what :func:`unwrapped` gives.
    """
    state = module.state_dict(keep_vars=True)  # first: under FSDP2 it brings back the sharded parameters
    adapters = _Group(_of_adapters(module))
    base = _Group(_of_bases(module))
    tensors = {name for name, _ in _named_tensors("", module)}
    prefixes = tuple(prefix_of(name) for name in _bases(module))
    entries = {}
    for name, value in state.items():
        kind = Kind.OWN
        if adapters.has(name, value):
            kind = Kind.ADAPTER
        elif base.has(name, value):
            kind = Kind.BASE
        elif name not in tensors and name.startswith(prefixes) and not name.endswith("_extra_state"):
            kind = Kind.DERIVED
        entries[name] = Entry(value, kind)
    return entries


class _Group:
    """Named tensors, which are known by their names or, where they are tied to others, by themselves.

    The names go first: peft's attention makes its parameters anew each time that somebody walks through the modules.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        held = dict(named)
        self._names, self._tensors = set(held), list(held.values())  # kept, so that no other gets the id of one
        self._ids = {id(tensor) for tensor in self._tensors}

    def has(self, name: str, value: Any) -> bool:
        return name in self._names or id(value) in self._ids


def _bases(module: nn.Module) -> dict[str, nn.Module]:
    return {**hosts(module), **_with_a_loader(module)}


def _of_bases(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, root in _bases(module).items():
        yield from _named_tensors(name, root)


def _with_a_loader(module: nn.Module) -> dict[str, nn.Module]:
    """Modules that ``from_pretrained`` gave and that know from where, as those of transformers and diffusers do."""
    found = {}
    for name, part in module.named_modules():
        if name and callable(getattr(type(part), "from_pretrained", None)):
            config = getattr(part, "config", None)
            sources = (vars(part).get("name_or_path"), getattr(config, "_name_or_path", None))
            if any(isinstance(source, str) and source for source in sources):
                found[name] = part
    return found


def _of_adapters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that adapters, active or not, have put into layers, and those of prompt encoders."""
    for name, part in module.named_modules(remove_duplicate=False):
        attributes: Iterable[str] = ()
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper):
            attributes = (*part.adapter_layer_names, *part.other_param_names)
        elif isinstance(part, PeftModel):
            attributes = ("prompt_encoder",)
        for attribute in attributes:
            held = getattr(part, attribute, None)
            own_name = f"{prefix_of(name)}{attribute}"
            if isinstance(held, nn.Module):
                yield from _named_tensors(own_name, held)
            elif isinstance(held, Tensor):
                yield own_name, held


def _named_tensors(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    prefix = prefix_of(name)
    both = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for inner, tensor in both:
        yield f"{prefix}{inner}", tensor
