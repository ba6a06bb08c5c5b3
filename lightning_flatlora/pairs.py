"""The LoRA pairs (A, B) of a model: how they are found in peft's layers, or by a finder in others."""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import Embedding, LoraLayer, ParamWrapper
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraLinearVariant,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.xlora.layer import XLoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_flatlora.class_overlay import plain_class
from lightning_flatlora.lora_pair import (
    IS_SHARED,
    SCALING_IS_0,
    Finder,
    LoRAPair,
    NoPairsError,
    PairSearch,
    pairs_from,
    search_found,
)

_EXACT_VARIANTS = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPER_NAMES = re.compile(rf"(^|\.)({'|'.join(_WRAPPED)})(?=\.)")


def find_pairs(model: nn.Module, adapter_name: str | None = None, *, finder: Finder | None = None) -> PairSearch:
    """Find every pair whose B is trained and whose update is exactly s B A, each parameter once.

    Args:
        model: a module that contains LoRA layers at any depth.
        adapter_name: the adapter of peft to look at; None takes each layer's active ones.
        finder: says what the pairs are where the layers are not peft's, see :mod:`lightning_flatlora.finders`.

    Returns:
        The pairs, and what was left out and why.

    Raises:
        ValueError: no LoRA layer has an adapter of that name, or it is active in none; the message lists the others. Or
            the finder gave something that is not a pair, or both arguments were given.
        NoPairsError: no pair is left; the message lists the LoRA layers and module types that were seen.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> [(pair.name, pair.B.shape, pair.A.shape) for pair in find_pairs(model).pairs]
        [('base_model.model.0.lora_B.default.weight', torch.Size([3, 2]), torch.Size([2, 4]))]
    """
    search = search_pairs(model, adapter_name, finder)
    if not search.pairs:
        raise NoPairsError(nothing_found(model, adapter_name, finder, search))
    return search


def search_pairs(
    model: nn.Module, adapter_name: str | None, finder: Finder | None, *, must_be_active: bool = True
) -> PairSearch:
    """Find what :func:`find_pairs` gives; it may be nothing.

    Args:
        model: see :func:`find_pairs`, as the other two.
        adapter_name: may be the name of an adapter that is activated later, if ``must_be_active`` is False.
        finder: for layers that are not peft's.
        must_be_active: whether a named adapter that is not active is refused.

    Raises:
        ValueError: as :func:`find_pairs`.
    """
    if finder is not None and adapter_name is not None:
        raise ValueError("adapter_name applies to peft layers, finder to all others: give one of them")
    if finder is not None:
        return search_found(pairs_from(finder, model))
    layers = lora_layers(model)
    _check_adapter(layers, adapter_name, must_be_active)
    return _search_layers(layers, adapter_name)


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """List every peft LoRA layer of a model, with its name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _search_layers(layers: list[tuple[str, LoraLayer]], adapter_name: str | None) -> PairSearch:
    pairs: dict[int, LoRAPair] = {}
    trained: set[int] = set()
    left_out: dict[str, list[str]] = defaultdict(list)
    for layer_name, layer in layers:
        for adapter in _adapters(layer) if adapter_name is None else [adapter_name]:
            is_active = adapter in layer.active_adapters
            reason = _why_not(layer, adapter)
            if reason:
                # Only an active adapter is missed. An inactive one is not trained in any case.
                if is_active:
                    left_out[f"{_kind(layer).__name__}: {reason}"].append(clean_name(layer_name))
            elif adapter in layer.lora_B:
                new = _pair(layer_name, layer, adapter)
                if is_active and new.scaling == 0:
                    left_out[f"{_kind(layer).__name__}: {SCALING_IS_0}"].append(clean_name(layer_name))
                # A tied adapter is met once for each layer that reads it, and is still one pair.
                pair = pairs.setdefault(id(new.B), new)
                pair.readers.append(bare(layer.lora_B[adapter]))
                pair.A_readers.append(bare(layer.lora_A[adapter]))
                pair.layers.append(layer)
                if is_active and new.scaling != 0 and new.B.requires_grad:
                    trained.add(id(new.B))
    for pair, reason in _badly_tied(layers, pairs):
        # As above, nobody misses what is not trained.
        if id(pair.B) in trained:
            left_out[reason].append(pair.name)
        del pairs[id(pair.B)]
    lines = [f"{kind} ({len(names)} in all, first {names[0]})" for kind, names in left_out.items()]
    search = PairSearch([], lines)
    for pair in pairs.values():
        (search.pairs if id(pair.B) in trained else search.resting).append(pair)
    return search


def clean_name(name: str) -> str:
    """A parameter's name without what FSDP, torch.compile and activation checkpointing put in.

    Example:
        >>> clean_name("model._orig_mod.layer._checkpoint_wrapped_module.lora_B.default.weight")
        'model.layer.lora_B.default.weight'
    """
    return _WRAPPER_NAMES.sub("", name).removeprefix(".")


def bare(module: Any) -> Any:
    """A factor's own module, without what a wrapping policy, compilation or checkpointing has put around it."""
    while True:
        inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
        if not inner:
            return module
        module = inner


def _kind(layer: nn.Module) -> type[nn.Module]:
    """A layer's own class; FSDP2 gives every unit a subclass of it, and so does a loop's object."""
    kind = plain_class(layer)
    return kind.__bases__[-1] if issubclass(kind, FSDPModule) else kind


def _pair(layer_name: str, layer: LoraLayer, adapter: str) -> LoRAPair:
    name = clean_name(f"{layer_name}.lora_B.{adapter}.weight".removeprefix("."))
    A, B = bare(layer.lora_A[adapter]).weight, bare(layer.lora_B[adapter]).weight
    return LoRAPair(name, A, B, float(layer.scaling[adapter]))


def _why_not(layer: LoraLayer, adapter: str) -> str | None:
    """The reason for which a layer's update cannot be perturbed through B; None if it can."""
    if isinstance(layer, Embedding) and adapter in layer.lora_embedding_B:
        return "embedding LoRA keeps bare parameters, whose reading cannot be redirected"
    if adapter not in layer.lora_B:
        return None
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
    if not _kind(layer).__module__.startswith("peft.tuners.lora."):
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


def _badly_tied(layers: list[tuple[str, LoraLayer]], pairs: dict[int, LoRAPair]) -> list[tuple[LoRAPair, str]]:
    """The pairs one of whose factors also serves in another product than s B A."""
    products: dict[Hashable, set[tuple[Hashable, Hashable, float]]] = defaultdict(set)
    for _, layer in layers:
        for adapter in _adapters(layer):
            A, B = map(_place, _factors_of(layer, adapter))
            for place in (A, B):
                products[place].add((A, B, float(layer.scaling[adapter])))
    badly_tied = []
    for pair in pairs.values():
        if len(products[_place(pair.A)] | products[_place(pair.B)]) > 1:
            badly_tied.append((pair, IS_SHARED))
    return badly_tied


def _place(factor: Any) -> Hashable:
    """Where a factor's values lie: peft ties an output layer to its embedding by parameters that share memory."""
    # A rank may hold nothing of a sharded parameter, and such ones lie at one place.
    if type(factor) is not nn.Parameter or isinstance(factor.data, DTensor) or factor.numel() == 0:
        return id(factor)
    return factor.data_ptr() or id(factor)


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


def _check_adapter(layers: Sequence[tuple[str, LoraLayer]], adapter_name: str | None, must_be_active: bool) -> None:
    known = set(chain.from_iterable(_adapters(layer) for _, layer in layers))
    active = _active_adapters(layers)
    if adapter_name is None or not known:
        return
    if adapter_name not in known:
        raise ValueError(f"adapter_name must be None or one of {sorted(known)}, got {adapter_name!r}")
    if must_be_active and adapter_name not in active:
        raise ValueError(
            f"adapter_name={adapter_name!r} is not active, so it would not be trained; active: {sorted(active)}. "
            "Call the model's set_adapter first, or leave adapter_name out, which takes the active ones"
        )


def _looks_like_lora(module: nn.Module) -> bool:
    """Whether a layer has LoRA's names but is not peft's, such as those of litgpt, torchtune, loralib and NeMo."""
    if isinstance(module, BaseTunerLayer | LoraLayer):
        return False
    held = (*module.named_parameters(recurse=False), *module.named_children())
    names = {name.lower() for name, _ in held}
    return {"lora_a", "lora_b"} <= names or {"linear_in", "linear_out"} <= names


def _active_adapters(layers: Iterable[tuple[str, LoraLayer]]) -> set[str]:
    return set(chain.from_iterable(layer.active_adapters for _, layer in layers))


def _adapters(layer: LoraLayer) -> Iterator[str]:
    yield from layer.lora_B
    yield from layer.lora_embedding_B


def nothing_found(model: nn.Module, adapter_name: str | None, finder: Finder | None, search: PairSearch) -> str:
    """Say why a model has no pair to perturb, with the LoRA layers and module types that were seen."""
    if finder is not None:
        return _finder_found_nothing(model, finder, search)
    layers = lora_layers(model)
    lines = ["no LoRA pair to perturb: need a peft LoRA layer whose B is trained."]
    others = sorted({type(module).__name__ for module in model.modules() if _looks_like_lora(module)})
    tuners = sorted(_other_methods_of_peft(model))
    if not layers and others:
        lines += [
            f"The model holds layers that look like another library's LoRA, {', '.join(others)}; without a finder only "
            "peft's are found.",
            "Give one, such as finder=lightning_flatlora.finders.litgpt_pairs, torchtune_pairs, nemo_pairs, or "
            'PairsByName(a="lora_A", b="lora_B", scaling="scaling") with the names that the layers have.',
        ]
    elif not layers and tuners:
        lines.append(
            f"The model holds peft's {', '.join(tuners)}, and no LoRA layer: only LoRA's update is a product s B A."
        )
    elif not layers:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        lines += [f"The model holds no LoRA layer, only {', '.join(kinds)}.", "Wrap it with peft.get_peft_model."]
    else:
        kinds = sorted({_kind(layer).__name__ for _, layer in layers})
        adapters = adapter_name or sorted(_active_adapters(layers))
        lines.append(f"LoRA layers seen: {', '.join(kinds)}; adapter {adapters}.")
        lines += [f"Left out: {line}." for line in search.left_out]
        if not search.left_out:
            lines.append(
                "Every B is frozen: was the adapter loaded with is_trainable=False, disabled, or never activated? "
                "Where it is unfrozen later in the fit, let a BaseFinetuning callback do it"
            )
    return " ".join(lines)


def _other_methods_of_peft(model: nn.Module) -> set[str]:
    """The names of peft's methods in a model: of those that adapt layers their classes, of prompts their kinds."""
    found = set()
    for module in model.modules():
        if isinstance(module, BaseTuner):
            found.add(type(module).__name__)
        elif isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
            found.add(str(module.active_peft_config.peft_type.value))
    return found


def _finder_found_nothing(model: nn.Module, finder: Finder, search: PairSearch) -> str:
    """Why a finder gave no pair to perturb."""
    lines = [f"no LoRA pair to perturb: {getattr(finder, '__name__', finder)} found none whose B is trained."]
    lines += [f"Left out: {line}." for line in search.left_out]
    if search.resting:
        lines.append(f"{len(search.resting)} are not trained, {search.resting[0].name} among them: unfreeze their B.")
    if not search.left_out and not search.resting:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        lines.append(f"The model holds {', '.join(kinds)}: does the finder know these layers?")
    return " ".join(lines)
