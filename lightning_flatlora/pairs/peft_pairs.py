"""The LoRA pairs of peft's layers: which of them are one product s B A, and under which names."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import Embedding, LoraLayer, ParamWrapper
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraLinearVariant,
)
from peft.tuners.xlora.layer import XLoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_flatlora.pairs.division import divided
from lightning_flatlora.pairs.lora_pair import LoRAPair, PairSearch

_EXACT_VARIANTS = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPER_NAMES = re.compile(rf"(^|\.)({'|'.join(_WRAPPED)})(?=\.)")


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """List every peft LoRA layer of a model, with its name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def search_layers(layers: Sequence[tuple[str, LoraLayer]], adapter_name: str | None) -> PairSearch:
    """Find the pairs of peft's layers; there may be none.

    Args:
        layers: of :func:`lora_layers`.
        adapter_name: the only adapter to look at; None takes all of them, of which the active ones are trained.
    """
    pairs: list[LoRAPair] = []
    trained: set[int] = set()
    left_out: dict[str, list[str]] = defaultdict(list)
    others: list[Any] = []
    for layer_name, layer in layers:
        for adapter in _adapters(layer):
            is_wanted = adapter_name in (None, adapter)
            is_active = adapter in layer.active_adapters
            reason = _why_not(layer, adapter)
            if not is_wanted or reason:
                others += _factors_of(layer, adapter)
                # An inactive adapter is not trained in any case, so nobody misses it.
                if is_wanted and is_active:
                    left_out[f"{kind_of(layer).__name__}: {reason}"].append(clean_name(layer_name))
                continue
            pair = _pair(layer_name, layer, adapter)
            pairs.append(pair)
            if is_active and pair.B.requires_grad:
                trained.add(id(pair.B))
    return divided(pairs, lambda pair: id(pair.B) in trained, left_out, others)


def clean_name(name: str) -> str:
    """Give a parameter's name without what FSDP, torch.compile and activation checkpointing put in.

    Example:
        >>> clean_name("model._orig_mod.layer._checkpoint_wrapped_module.lora_B.default.weight")
        'model.layer.lora_B.default.weight'
    """
    return _WRAPPER_NAMES.sub("", name).removeprefix(".")


def bare(module: Any) -> Any:
    """Give a factor's own module, without what a wrapping policy, compilation or checkpointing has put around it."""
    while True:
        inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
        if not inner:
            return module
        module = inner


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """Give a layer's own class; FSDP2 gives every unit a subclass of it."""
    return type(layer).__bases__[-1] if isinstance(layer, FSDPModule) else type(layer)


def _pair(layer_name: str, layer: LoraLayer, adapter: str) -> LoRAPair:
    lora_A, lora_B = bare(layer.lora_A[adapter]), bare(layer.lora_B[adapter])
    return LoRAPair(
        clean_name(f"{layer_name}.lora_B.{adapter}.weight".removeprefix(".")),
        lora_A.weight,
        lora_B.weight,
        float(layer.scaling[adapter]),
        readers=[lora_B],
        A_readers=[lora_A],
        layers=[layer],
    )


def _why_not(layer: LoraLayer, adapter: str) -> str | None:
    """The reason for which a layer's update cannot be perturbed through B; None if it can."""
    if isinstance(layer, Embedding) and adapter in layer.lora_embedding_B:
        return "embedding LoRA keeps bare parameters, whose reading cannot be redirected"
    if adapter not in layer.lora_B:
        return "it keeps its factors in another form"
    if isinstance(layer, AdaLoraLayer):
        return "AdaLoRA's update is B diag(E) A, and not a product s B A"
    if isinstance(layer, ParamWrapper):
        return "LoRA on a bare parameter (such as those of experts) shares one pair among several products"
    if isinstance(layer, LoraParallelLinear):
        return "tensor-parallel LoRA keeps a slice of each factor"
    # X-LoRA replaces the forward of each layer by a method of its own.
    if isinstance(getattr(vars(layer).get("forward"), "__self__", None), XLoraLayer):
        return "X-LoRA weighs the adapters by a router, so the update is s B A times something that changes"
    if any(router in layer.active_adapters for router in getattr(layer, "lora_arrow", {})):
        return "Arrow weighs the adapters by a router, so the update is s B A times something that changes"
    if not kind_of(layer).__module__.startswith("peft.tuners.lora."):
        return "not one of peft's own LoRA layers, so the product of its factors is unknown"
    # A variant changes what the layer computes. Only those of which s B A is known to be a term are allowed.
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, _EXACT_VARIANTS):
        return f"the variant {type(variant).__name__} is not known to add exactly s B A, with a B that is trained"
    return _why_not_factors(bare(layer.lora_A[adapter]), bare(layer.lora_B[adapter]))


def _why_not_factors(lora_A: object, lora_B: object) -> str | None:
    for factor in (lora_A, lora_B):
        if isinstance(factor, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if factor.groups != 1:
                return "a grouped convolution's update is not one product B A"
        elif not isinstance(factor, nn.Linear):
            return f"a factor is a {type(factor).__name__}, not a Linear or a convolution"
        if _is_computed(factor):
            return "a factor is computed from other parameters (parametrize, weight_norm, spectral_norm, prune)"
    return None


def _is_computed(factor: nn.Module) -> bool:
    """Whether a module's weight is no parameter of its own: what trains are parameters beside it, under other names."""
    names = [name for name, _ in factor.named_parameters()]
    return bool(names) and "weight" not in names


def _factors_of(layer: LoraLayer, adapter: str) -> list[Any]:
    """The parameters A and B of an adapter."""
    held: tuple[Any, Any] = (layer.lora_embedding_A, layer.lora_embedding_B)
    if adapter in layer.lora_B:
        held = (layer.lora_A, layer.lora_B)
    factors = []
    # AdaLoRA and embeddings keep them as parameters, without a module around them.
    for factor in (held[0][adapter], held[1][adapter]):
        factors.append(getattr(bare(factor), "weight", None) if isinstance(factor, nn.Module) else factor)
    return factors


def merge_problems(model: nn.Module) -> list[str]:
    """Say why pairs can't be trained as peft's layers are now: merged, they compute with their base only."""
    names = [clean_name(name) for name, layer in lora_layers(model) if layer.merged]
    if not names:
        return []
    return [f"the adapter is merged into its base, as in {names[0]}, and can't learn: call unmerge_adapter() first"]


def check_adapter(layers: Sequence[tuple[str, LoraLayer]], adapter_name: str | None, must_be_active: bool) -> None:
    """Refuse an adapter that can't be the one to perturb.

    Raises:
        ValueError: no LoRA layer has an adapter of that name, or it is active in none; the message lists the others.
    """
    known = set(chain.from_iterable(_adapters(layer) for _, layer in layers))
    active = active_adapters(layers)
    if adapter_name is None or not known:
        return
    if adapter_name not in known:
        raise ValueError(f"adapter_name must be None or one of {sorted(known)}, got {adapter_name!r}")
    if must_be_active and adapter_name not in active:
        raise ValueError(
            f"adapter_name={adapter_name!r} is not active, so it would not be trained; active: {sorted(active)}. "
            "Call the model's set_adapter first, or leave adapter_name out, which takes the active ones"
        )


def active_adapters(layers: Iterable[tuple[str, LoraLayer]]) -> set[str]:
    """Name the adapters that are active in any layer."""
    return set(chain.from_iterable(layer.active_adapters for _, layer in layers))


def _adapters(layer: LoraLayer) -> Iterator[str]:
    yield from layer.lora_B
    yield from layer.lora_embedding_B
