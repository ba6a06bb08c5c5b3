"""Say what a checkpoint holds: adapters, all that is outside of the base, buffers, and what has been trained."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lightning_flatlora.pairs import bare, clean_name
from lightning_flatlora.pairs.lora_pair import Finder, all_factors, pairs_from

# Drawn at random, or made from data or gradients. Plain PiSSA and OLoRA come out the same from the same base.
_DIFFER_EACH_TIME = ("pissa_niter", "corda", "lora_ga")
_PUT_AROUND = re.compile(r"\.(base_layer|original_module)(?=\.)")
_TRAINED: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Contents:
    """Divide the entries of a module's state dict, by clean names; values are as this rank holds them.

    Attributes:
        adapters: what peft has put in, or a finder has found.
        base: parameters that the base's own loader gives again.
        derived: names of what a quantized layer of the base keeps with its weight, and creates again with it.
        others: buffers, and everything outside of the base.
    """

    adapters: dict[str, Any]
    base: dict[str, nn.Parameter]
    derived: set[str]
    others: dict[str, Any]


@contextmanager
def unwrapped(module: nn.Module) -> Iterator[None]:
    """Take out, for a while, the modules that FSDP1, compilation and activation checkpointing have put in between.

    Inside, names are clean, so that peft finds its layers, and FSDP1's hooks, which would gather the model, rest.

    Example:
        >>> from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
        >>> model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
        >>> with unwrapped(model):
        ...     print(list(model.state_dict()))
        ['0.weight', '0.bias']
    """
    wrapped = []
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is not None and bare(child) is not child:
                wrapped.append((parent, name, child))
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = bare(child)
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def contents_of(module: nn.Module, finder: Finder | None = None) -> Contents:
    """Divide the entries of a module's state dict.

    Args:
        module: a LightningModule, or a part of one.
        finder: of the adapter's factors, if they are not peft's.
    """
    with unwrapped(module):
        # By PyTorch's method, since a module's own may leave entries out or rename them. And before all else, since
        # under FSDP2 this call brings back the sharded parameters.
        state: dict[str, Any] = nn.Module.state_dict(module, keep_vars=True)
        adapters = {*_adapter_places(module), *found_factors(module, finder)}
        in_base: set[int] = set()
        for host in hosts_of(module, finder).values():
            in_base.update(id(part) for part in host.modules())
        # With duplicates, since the base of a peft model may be an attribute of the module too.
        parts = dict(module.named_modules(remove_duplicate=False))
    contents = Contents({}, {}, set(), {})
    for name, value in state.items():
        outer = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
        # The innermost module with a part of this name: a quantized layer's entries may have a dot of their own.
        owner = next((place for place in reversed(outer) if place in parts), "")
        own_name = name.removeprefix(prefix_of(owner))
        is_buffer = own_name in parts[owner]._buffers or own_name == "_extra_state"
        if name in adapters or not adapters.isdisjoint(outer):
            contents.adapters[name] = value
        elif is_buffer or id(parts[owner]) not in in_base:
            contents.others[name] = value
        elif isinstance(value, nn.Parameter):
            contents.base[name] = value
        else:
            contents.derived.add(name)
    return contents


def _adapter_places(module: nn.Module) -> Iterator[str]:
    """Find the names under which adapters, active or not, keep modules and tensors, and those of prompt encoders."""
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for attribute in (*part.adapter_layer_names, *part.other_param_names):
                yield f"{prefix_of(name)}{attribute}"
        elif isinstance(part, PeftModel):
            yield f"{prefix_of(name)}prompt_encoder"


def hosts(module: nn.Module) -> dict[str, nn.Module]:
    """Find the outermost modules that hold peft's adapters, by name.

    These are peft models, and modules into which ``add_adapter`` of transformers or diffusers, or
    ``peft.inject_adapter_in_model``, has put peft's layers.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> list(hosts(nn.ModuleDict({"net": net, "head": nn.Linear(3, 2)})))
        ['net']
    """
    found: dict[str, nn.Module] = {}
    covered: set[int] = set()
    named = list(module.named_modules())
    of_peft = [(name, part) for name, part in named if isinstance(part, PeftModel | BaseTuner)]
    # The innermost first: peft leaves its configs in the module that it was given, and the attribute of a module around
    # that is a user's own.
    injected = [(name, part) for name, part in reversed(named) if "peft_config" in vars(part)]
    for name, part in [*of_peft, *injected]:
        # By identity, since the base of a peft model may be an attribute of the module too.
        inside = {id(inner): inner for inner in part.modules()}
        has_layers = any(isinstance(inner, BaseTunerLayer) and key not in covered for key, inner in inside.items())
        if id(part) not in covered and (has_layers or isinstance(part, PeftModel | BaseTuner)):
            found[name] = part
            covered.update(inside)
    nested: set[int] = set()
    for part in found.values():
        nested.update(id(inner) for inner in part.modules() if inner is not part)
    return {name: part for name, part in found.items() if id(part) not in nested}


def hosts_of(module: nn.Module, finder: Finder | None) -> dict[str, nn.Module]:
    """Find the modules that hold the base: peft's hosts, and the child modules in which a finder finds factors."""
    first_parts = {name.partition(".")[0] for name in found_factors(module, finder)}
    found = {name: child for name, child in module.named_children() if name in first_parts}
    return {**found, **hosts(module)}


def found_factors(module: nn.Module, finder: Finder | None) -> dict[str, nn.Parameter]:
    """Find the parameters that hold a finder's factors, by each of their names."""
    pairs = [] if finder is None else pairs_from(finder, module)
    factors = {id(factor) for factor in all_factors(pairs)}
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if id(parameter) in factors}


def prefix_of(name: str) -> str:
    """Give what the names of a module's parts begin with.

    Example:
        >>> prefix_of("net"), prefix_of("")
        ('net.', '')
    """
    return f"{name}." if name else ""


def scalings_of(module: nn.Module, finder: Finder | None = None) -> dict[str, float]:
    """Read the scaling s by which a layer multiplies an adapter's product of factors, by names of both.

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
        if isinstance(layer, LoraLayer):
            for adapter, scaling in layer.scaling.items():
                scalings[clean_name(f"{name}.{adapter}")] = float(scaling)
    return scalings


# -- what has been trained


def plain_name(name: str) -> str:
    """Give a parameter's name without the layers that peft has put around it, which may come in the middle of a fit.

    Example:
        >>> plain_name("net.head.base_layer.weight"), plain_name("net._orig_mod.head.original_module.bias")
        ('net.head.weight', 'net.head.bias')
    """
    return _PUT_AROUND.sub("", clean_name(name))


def trained_names(module: nn.Module) -> set[str]:
    """Give the plain names of what has ever required a gradient in a module, or was in a file that it has loaded."""
    # Outside of the module, whose attributes belong to the user, and weakly, so that it goes with the module.
    return _TRAINED.setdefault(bare(module), set())


def note_trained(module: nn.Module) -> None:
    """Record which parameters require a gradient now, for all later checkpoints of the module."""
    names = trained_names(module)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.add(plain_name(name))


def note_rewritten(module: nn.Module) -> list[str]:
    """Record which frozen weights under adapters peft itself writes, as if they were trained.

    Returns:
        Plain names of those that it wrote when it made the adapter, and would write otherwise the next time, without
        those that are known already.
    """
    at_random: list[str] = []
    for host_name, host in hosts(module).items():
        configs: dict[str, Any] = getattr(host, "peft_config", {})
        inits = {adapter: str(getattr(config, "init_lora_weights", "")) for adapter, config in configs.items()}
        for name, layer in host.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            place = f"{prefix_of(host_name)}{prefix_of(name)}base_layer"
            names = [plain_name(f"{place}.{inner}") for inner, _ in layer.base_layer.named_parameters()]
            if any(inits.get(adapter, "").startswith(_DIFFER_EACH_TIME) for adapter in layer.r):
                at_random += names
            # peft's attention merges its adapter in each forward and takes it out, which moves the weights by rounding.
            elif isinstance(layer, MultiheadAttention):
                trained_names(module).update(names)
    new = [name for name in at_random if name not in trained_names(module)]
    trained_names(module).update(new)
    return new
