"""Choose what a checkpoint holds: adapters, all that is outside the base, buffers, and trained parameters.

The rest of the base is recognized on loading, by the shapes of its parameters and a few of their values.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lightning_flatlora.pairs.find import pairs_from, search_pairs
from lightning_flatlora.pairs.lora_pair import Finder, all_factors
from lightning_flatlora.wrappers import bare, clean_name

# Drawn at random, or made from data or gradients. Plain PiSSA and OLoRA come out the same from the same base.
_DIFFER_EACH_TIME = ("pissa_niter", "corda", "lora_ga")
_PUT_AROUND = re.compile(r"\.(base_layer|original_module)(?=\.)")
# Of a parameter that is left out.
_SAMPLES = 8
# Of a parameter: "shape", "dtype", and a "sample" of its values; None if these can't be compared.
Identity = dict[str, Any] | None


@contextmanager
def unwrapped(module: nn.Module) -> Iterator[None]:
    """Remove for a while the modules that FSDP1, compilation and activation checkpointing have inserted.

    Inside, names are clean, so that peft finds its layers, and FSDP1's hooks, which would gather the model, do not run.
    Neither do replacements of a part's ``state_dict``, such as alpaca-lora's, which leaves out the base.

    Example:
        >>> from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
        >>> model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
        >>> with unwrapped(model):
        ...     print(list(model.state_dict()))
        ['0.weight', '0.bias']
    """
    with ExitStack() as put_back:
        for parent in module.modules():
            own = vars(parent).pop("state_dict", None)
            if own is not None:
                put_back.callback(vars(parent).__setitem__, "state_dict", own)
            for name, child in parent._modules.items():
                if child is not None and bare(child) is not child:
                    put_back.callback(parent._modules.__setitem__, name, child)
                    parent._modules[name] = bare(child)
        yield


def divided_state(module: nn.Module, finder: Finder | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a module's state dict, by clean names, into the entries that every checkpoint holds and the base's.

    Returns:
        The entries of adapters, of buffers, of all that was ever trained and of everything outside of the base; and the
        other parameters of the base, with None for what a quantized layer keeps next to its weight and can recreate.
    """
    with unwrapped(module):
        # By PyTorch's method, since a module's own may leave entries out or rename them. And before all else, since
        # under FSDP2 this call brings back the sharded parameters.
        state: dict[str, Any] = nn.Module.state_dict(module, keep_vars=True)
        always_kept = (*_adapter_parameters(module), *found_factors(module, finder).values(), *module.buffers())
        kept_ids = {id(tensor) for tensor in always_kept}
        # The state_dict of a part may leave out an adapter, too.
        parameters = module.named_parameters(remove_duplicate=False)
        state = {**{name: each for name, each in parameters if id(each) in kept_ids}, **state}
        parts: set[nn.Module] = set()
        for host in hosts(module, finder).values():
            parts.update(host.modules())
        # With duplicates, since the base of a peft model may be an attribute of the module too.
        named = module.named_modules(remove_duplicate=False)
        places = tuple(f"{name}.".removeprefix(".") for name, part in named if part in parts)
    kept, base, trained = {}, {}, trained_names(module)
    for name, value in state.items():
        is_kept = id(value) in kept_ids or name.endswith("_extra_state") or plain_name(name) in trained
        if is_kept or not name.startswith(places):
            kept[name] = value
        else:
            base[name] = value if isinstance(value, nn.Parameter) else None
    return kept, base


def _adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Find the parameters of adapters, active or not, and of prompt encoders."""
    for part in module.modules():
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper):
            attributes = {*part.adapter_layer_names, *part.other_param_names}
        elif isinstance(part, PeftModel):
            attributes = {"prompt_encoder"}
        else:
            continue
        for name, parameter in part.named_parameters():
            if name.partition(".")[0] in attributes:
                yield parameter


def hosts(module: nn.Module, finder: Finder | None = None) -> dict[str, Any]:
    """Find the modules that hold the base, by name.

    These are the outermost modules that hold peft's adapters: peft models, and modules into which ``add_adapter`` of
    transformers or diffusers, or ``peft.inject_adapter_in_model``, has put peft's layers; and the child modules in
    which a finder finds factors.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> list(hosts(nn.ModuleDict({"net": net, "head": nn.Linear(3, 2)})))
        ['net']
    """
    first_parts = {name.partition(".")[0] for name in found_factors(module, finder)}
    found: dict[str, Any] = {name: child for name, child in module.named_children() if name in first_parts}
    named = list(module.named_modules())
    of_peft = [(name, part) for name, part in named if isinstance(part, PeftModel)]
    # Innermost first: peft leaves its configs in the module that it was given, and the attribute of a module around
    # that is a user's own.
    injected = [(name, part) for name, part in reversed(named) if "peft_config" in vars(part)]
    covered: set[nn.Module] = set()
    for name, part in [*of_peft, *injected]:
        new = set(part.modules()) - covered
        if any(isinstance(inner, PeftModel | BaseTunerLayer) for inner in new):
            found[name] = part
            covered |= new
    return found


def found_factors(module: nn.Module, finder: Finder | None) -> dict[str, nn.Parameter]:
    """Find the parameters that hold a finder's factors, by each of their names."""
    pairs = [] if finder is None else pairs_from(finder, module)
    factors = {id(factor) for factor in all_factors(pairs)}
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if id(parameter) in factors}


def scalings_of(module: nn.Module, finder: Finder | None = None) -> dict[str, float]:
    """Read the scaling s by which a layer multiplies an adapter's product of factors, by the names of B.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
        >>> scalings_of(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        {'base_model.model.0.lora_B.default.weight': 2.0}
    """
    search = search_pairs(module, None, finder)
    return {pair.name: float(pair.scaling) for pair in (*search.pairs, *search.resting)}


# -- what has been trained


def plain_name(name: str) -> str:
    """Give a parameter's name without the layers that peft has put around it, perhaps in the middle of a fit.

    Example:
        >>> plain_name("net.head.base_layer.weight"), plain_name("net._orig_mod.head.original_module.bias")
        ('net.head.weight', 'net.head.bias')
    """
    return _PUT_AROUND.sub("", clean_name(name))


def trained_names(module: nn.Module) -> set[str]:
    """Give the plain names of all that ever required a gradient in a module, or was in a file that it has loaded."""
    # Kept by the module and not by a callback, since another Trainer may come, or load_adapter_checkpoint without one.
    names: set[str] = vars(bare(module)).setdefault("_ever_trained", set())
    return names


def note_trained(module: nn.Module) -> None:
    """Record which parameters require a gradient now, for all later checkpoints of the module."""
    named = module.named_parameters(remove_duplicate=False)
    trained_names(module).update(plain_name(name) for name, parameter in named if parameter.requires_grad)


def note_rewritten(module: nn.Module) -> None:
    """Record which frozen weights under adapters peft itself writes, as if they were trained."""
    for host_name, host in hosts(module).items():
        inits = [str(getattr(config, "init_lora_weights", "")) for config in host.peft_config.values()]
        differs = any(init.startswith(_DIFFER_EACH_TIME) for init in inits)
        if differs:
            rank_zero_warn(
                f"AdapterCheckpoint: peft rewrote the base of {host_name or 'the module'}, as init_lora_weights says, "
                "and would rewrite it differently next time. So the .ckpt files hold it. The folders don't: to use the "
                "adapter elsewhere, load the .ckpt by load_adapter_checkpoint, and merge it by merge_and_unload"
            )
        for name, layer in host.named_modules(prefix=host_name):
            # peft's attention merges its adapter in each forward and takes it out, which moves the weights by rounding.
            if isinstance(layer, MultiheadAttention) or (differs and isinstance(layer, LoraLayer)):
                parameters = layer.base_layer.named_parameters(prefix=f"{name}.base_layer")
                trained_names(module).update(plain_name(inner) for inner, _ in parameters)


def note_changed(module: nn.Module, identities: Mapping[str, Identity]) -> bool:
    """Record which frozen weights have changed since the first save, as by ReLoRA's merges, as if they were trained.

    Returns:
        Whether any have, by what can be compared of them.
    """
    at_first = vars(bare(module)).setdefault("_base_at_first_save", dict(identities))
    changed = [name for name, now in identities.items() if not _same(at_first.get(name), now)]
    trained_names(module).update(map(plain_name, changed))
    return bool(changed)


# -- which base it was


def identities_of(parameters: Mapping[str, Tensor | None], sharded: bool = False) -> dict[str, Identity]:
    """Describe the parameters of a base, so that another base is recognized; None for those not compared.

    Args:
        parameters: the base's, by name.
        sharded: whether this rank holds only parts of them, whose samples would be meaningless.

    Example:
        >>> identities_of({"w": torch.ones(2, 3)})["w"]["sample"]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    return {name: None if sharded else _identity(tensor) for name, tensor in parameters.items()}


def _identity(tensor: Tensor | None) -> Identity:
    """Read a few elements, evenly spaced from the first to the last, since an embedding's new rows are at its end."""
    # Packed weights of 4 or 8 bits are of integers, and change with the way in which they are packed.
    if tensor is None or not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return None
    places = torch.linspace(0, tensor.numel() - 1, _SAMPLES, dtype=torch.float64, device=tensor.device).long()
    try:
        # Not reshape(-1), which would copy a weight that is transposed.
        sample = tensor.detach()[torch.unravel_index(places, tensor.shape)].to(torch.float32).tolist()
    except Exception:  # a quantizer's own kind of tensor, which may raise anything
        return None
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "sample": sample}


def differing(expected: Mapping[str, Identity], found: Mapping[str, Identity]) -> list[str]:
    """Name the parameters that differ from a checkpoint's description, or that only one side has.

    A parameter of another dtype may differ by its rounding. What can't be read on one side is not compared.
    """
    return [name for name in {**expected, **found} if not _same(expected.get(name, {}), found.get(name, {}))]


def _same(old: Identity, new: Identity) -> bool:
    """Compare two samples up to rounding to the coarser of two dtypes, or up to another machine's arithmetic.

    Frozen weights are not rounded again. So within one dtype even the next bfloat16 number counts as different:
    a chat model's weights differ that little from its base's.
    """
    if old is None or new is None:
        return True
    if old.get("shape") != new.get("shape"):
        return False
    tolerance = 1e-4
    if old["dtype"] != new["dtype"]:
        # One of them was rounded to the coarser dtype.
        tolerance = max(tolerance, *(torch.finfo(getattr(torch, each["dtype"])).eps for each in (old, new)))
    one, other = torch.tensor(old["sample"]), torch.tensor(new["sample"])
    size = one.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)
