"""What a model consists of as a checkpoint sees it: adapters, the bases under them, and everything else."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cache
from itertools import chain
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.lora_pair import Finder, all_factors, pairs_from
from lightning_flatlora.pairs import bare

_OF_PEFT = (PeftModel, BaseTuner)
"""Classes of peft's own around a model; with an adapter that is injected there is nothing around it."""


class Kind(Enum):
    """Where an entry of a state dict belongs."""

    ADAPTER = "adapter"
    """What peft has put in: always saved."""
    BASE = "base"
    """A parameter or buffer that the base's own loader gives again: saved once something has changed it."""
    DERIVED = "derived"
    """What a quantized layer of a base keeps beside its weight: created again with the weight, never saved."""
    OWN = "own"
    """Everything else: always saved, as Lightning does."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One entry of a state dict; the value is the parameter or buffer itself, as this rank holds it."""

    value: Any
    kind: Kind


def twin_of(module: nn.Module) -> Any:
    """A second set of modules around the same parameters, without those that wrappers have put in between.

    Its names are clean, so that peft finds its layers, and it is without FSDP1's hooks, which would gather the model.

    Example:
        >>> from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
        >>> model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
        >>> list(dict(twin_of(model).named_parameters()))
        ['0.weight', '0.bias']
    """
    return _twin_of(module, {})


def _twin_of(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    module = bare(module)
    if id(module) not in seen:
        # FSDP2 gives every unit a subclass of its own class; the twin is of the original class.
        kind = type(module).__bases__[-1] if isinstance(module, FSDPModule) else type(module)
        # Without __init__, which would build the layers again.
        twin: Any = object.__new__(_without_end(kind))
        seen[id(module)] = twin
        # With the module's own tables of parameters and buffers, so that loading into the twin loads into the module.
        vars(twin).update(vars(module))
        children: dict[str, nn.Module | None] = {}
        for name, child in module._modules.items():
            children[name] = None if child is None else _twin_of(child, seen)
        vars(twin)["_modules"] = children
    return seen[id(module)]


@cache
def _without_end(kind: type) -> type:
    """A module's class with an empty ``__del__``: a twin that is deleted must not close what the module holds."""
    if not hasattr(kind, "__del__"):
        return kind
    names = {"__del__": lambda self: None, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names)


@contextmanager
def kept_attributes(module: nn.Module, twin: nn.Module) -> Iterator[None]:
    """Copy to a module the attributes that are set on its twin inside, such as extra state and a metric's values.

    Args:
        module: the original.
        twin: what :func:`twin_of` returned for it. Parameters and buffers are the module's own in any case.
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
    """The outermost modules that hold adapters, by name.

    These are peft models, and modules into which ``add_adapter`` of transformers or diffusers, or
    ``peft.inject_adapter_in_model``, has put peft's layers.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> list(hosts(nn.ModuleDict({"net": net, "head": nn.Linear(3, 2)})))
        ['net']
    """
    candidates: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if isinstance(part, _OF_PEFT) or _has_configs(part):
            candidates[name] = part
    holding: dict[str, nn.Module] = {}
    for name, part in candidates.items():
        inner = [other for other in candidates.values() if _is_inside(other, part)]
        if isinstance(part, _OF_PEFT) or _has_layers_outside(part, inner):
            holding[name] = part
    outermost: dict[str, nn.Module] = {}
    for name, part in holding.items():
        # Of nested ones only the outermost counts, because peft saves everything inside of it. The names don't show
        # what is nested: the base of a peft model may be an attribute of the module too.
        if not any(_is_inside(part, other) for other in holding.values()):
            outermost[name] = part
    return outermost


def prefix_of(name: str) -> str:
    """What the names of a module's parts begin with.

    Example:
        >>> prefix_of("net"), prefix_of("")
        ('net.', '')
    """
    return f"{name}." if name else ""


def _has_configs(part: nn.Module) -> bool:
    """Whether a module has the attribute in which peft's injection leaves its configs; it may be a user's own."""
    configs = vars(part).get("peft_config")
    if not isinstance(configs, dict) or not configs:
        return False
    return all(isinstance(config, PeftConfig) for config in configs.values())


def _has_layers_outside(part: nn.Module, inner: Iterable[nn.Module]) -> bool:
    """Whether a module has peft's layers that are in none of those inside of it.

    If it has none, its configs are an attribute of the user's, such as those that the peft model inside was made with.
    """
    covered = _ids(inner)
    return any(isinstance(layer, BaseTunerLayer) and id(layer) not in covered for layer in part.modules())


def _is_inside(part: nn.Module, outer: nn.Module) -> bool:
    return part is not outer and any(inner is part for inner in outer.modules())


def _ids(roots: Iterable[nn.Module]) -> set[int]:
    """The ids of modules and of all that are inside of them."""
    ids: set[int] = set()
    for root in roots:
        ids.update(id(part) for part in root.modules())
    return ids


def found_hosts(module: nn.Module, finder: Finder | None) -> dict[str, nn.Module]:
    """The child modules in which a finder finds factors, by name."""
    return _holding(module, found_factors(module, finder))


def _holding(module: nn.Module, factors: Iterable[str]) -> dict[str, nn.Module]:
    """The child modules that hold parameters of these names, by name."""
    first_parts = {name.partition(".")[0] for name in factors}
    return {name: child for name, child in module.named_children() if name in first_parts}


def found_factors(module: nn.Module, finder: Finder | None) -> dict[str, nn.Parameter]:
    """The parameters that hold a finder's factors, by each of their names."""
    pairs = [] if finder is None else pairs_from(finder, module)
    factors = {id(factor) for factor in all_factors(pairs)}
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if id(parameter) in factors}


def _state_of(module: nn.Module) -> dict[str, Any]:
    try:
        return dict(module.state_dict(keep_vars=True))
    except TypeError as error:
        if "keep_vars" not in str(error):
            raise
        name = type(module).__name__
        raise MisconfigurationException(
            f"AdapterCheckpoint: {name}.state_dict must take PyTorch's arguments: write "
            "`def state_dict(self, *args, **kwargs)`, and hand them to super().state_dict"
        ) from error


def state_entries(module: nn.Module, finder: Finder | None = None) -> dict[str, Entry]:
    """Every entry of a module's state dict, by its name.

    Args:
        module: what :func:`twin_of` gives.
        finder: of the adapter's factors, where they are not peft's.
    """
    # Before all else, since under FSDP2 this call brings back the sharded parameters.
    state = _state_of(module)
    factors = found_factors(module, finder)
    roots = {**hosts(module), **_holding(module, factors), **_with_a_loader(module)}
    bases = _places(module, roots.values())
    adapters = _Group(chain(_of_adapters(module), factors.items()))
    base = _Group(chain.from_iterable(_named_tensors(name, root) for name, root in bases.items()))
    tensors = {name for name, _ in _named_tensors("", module)}
    prefixes = tuple(prefix_of(name) for name in bases)
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


def _places(module: nn.Module, roots: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The outermost names under which modules, or parts of them, stand: a part may be an attribute elsewhere too."""
    inside = _ids(roots)
    places: dict[str, nn.Module] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        is_covered = name.startswith(tuple(prefix_of(place) for place in places))
        if id(part) in inside and not is_covered:
            places[name] = part
    return places


class _Group:
    """Named tensors, recognized by their names or, where they are tied to others, by identity.

    Names come first, because peft's attention creates its parameters again with every walk through the modules.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        held = dict(named)
        self._names = set(held)
        # Held so that no other tensor gets the id of one of them.
        self._tensors = list(held.values())
        self._ids = {id(tensor) for tensor in self._tensors}

    def has(self, name: str, value: Any) -> bool:
        return name in self._names or id(value) in self._ids


def _with_a_loader(module: nn.Module) -> dict[str, nn.Module]:
    """Modules from ``from_pretrained`` that know their source, such as those of transformers and diffusers."""
    modules = {}
    for name, part in module.named_modules():
        if name and callable(getattr(type(part), "from_pretrained", None)):
            config = getattr(part, "config", None)
            sources = (vars(part).get("name_or_path"), getattr(config, "_name_or_path", None))
            if any(isinstance(source, str) and source for source in sources):
                modules[name] = part
    return modules


def _of_adapters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that adapters, active or not, have put into layers, and those of prompt encoders."""
    # With duplicates, since a tied layer has an entry in the state dict for each of its names.
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


def scalings_of(module: nn.Module, finder: Finder | None = None) -> dict[str, float]:
    """The scaling s by which a layer multiplies an adapter's product of factors, by names of both.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
        >>> scalings_of(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        {'base_model.model.0.default': 2.0}
    """
    if finder is not None:
        return {pair.name: float(pair.scaling) for pair in pairs_from(finder, module)}
    scalings = {}
    for name, layer in module.named_modules():
        of_adapters = getattr(layer, "scaling", None) if isinstance(layer, BaseTunerLayer) else None
        if isinstance(of_adapters, dict):
            for adapter, scaling in of_adapters.items():
                if isinstance(scaling, int | float | Tensor):  # another tuner may keep something else there
                    scalings[f"{name}.{adapter}"] = float(scaling)
    return scalings
