"""Find the LoRA pairs of peft's layers: those that are one product s B A, and their names."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.tp_layer import LoraParallelLinear
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant, DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.xlora.layer import XLoraLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_flatlora.class_overlay import plain_class
from lightning_flatlora.pairs.lora_pair import LoRAPair
from lightning_flatlora.perturbed_read import AnyRef, ParameterRef, as_ref
from lightning_flatlora.wrappers import bare, clean_name

# An embedding's variant is a DoraLinearVariant.
_EXACT_VARIANTS = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """List every peft LoRA layer of a model, with its name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def search_layers(
    model: nn.Module, layers: Sequence[tuple[str, LoraLayer]], adapter_name: str | None
) -> tuple[list[LoRAPair], set[int], dict[str, list[str]], list[Any], list[nn.Parameter]]:
    """Find the pairs of a model's LoRA layers, of one adapter or of all; only active adapters are trained.

    Returns:
        All pairs, the identities of the trained B, the names of layers that are not pairs by reason, the factors of
        adapters that are not pairs, and the parameters of the layers named as left out.
    """
    pairs: list[LoRAPair] = []
    trained: set[int] = set()
    left_out: dict[str, list[str]] = defaultdict(list)
    others: list[Any] = []
    plain: list[nn.Parameter] = []
    for layer_name, layer in layers:
        for adapter, A, B in _adapters(layer):
            is_wanted = adapter_name in (None, adapter)
            is_active = adapter in layer.active_adapters
            of_A, of_B = as_ref(A), as_ref(B)
            reason = _why_not(layer, adapter, of_A.module, of_B.module)
            if not is_wanted or reason:
                others += [of_A.parameter, of_B.parameter]
                # An inactive adapter is not trained anyway, so it is not reported.
                if is_wanted and is_active:
                    left_out[f"{kind_of(layer).__name__}: {reason}"].append(clean_name(layer_name))
                    plain += chain(of_A.module.parameters(), of_B.module.parameters())
                continue
            pairs += _pairs_of(layer_name, layer, adapter, A, B)
            if is_active and of_B.parameter.requires_grad:
                trained.add(id(of_B.parameter))
    for name, module in model.named_modules():
        # Layers of other tuners, next to LoRA layers in a PeftMixedModel.
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            tuner = kind_of(module).__module__.split(".")[-2]
            left_out[f"{kind_of(module).__name__} of {tuner}, which is not LoRA"].append(clean_name(name))
            plain += [parameter for part, parameter in module.named_parameters() if not part.startswith("base_layer.")]
    return pairs, trained, left_out, others, plain


def _pairs_of(layer_name: str, layer: Any, adapter: str, A: AnyRef, B: AnyRef) -> list[LoRAPair]:
    """Make one pair, or one per group of a convolution: each is a product of some rows of A and of B."""
    of_A, of_B = as_ref(A), as_ref(B)
    is_embedding = of_B is B
    part = f"lora_embedding_A.{adapter}" if is_embedding else f"lora_B.{adapter}.weight"
    name = clean_name(f"{layer_name}.{part}")
    # The experts of a ParamWrapper.
    experts = getattr(layer, "num_experts", 1)
    whole = LoRAPair(name, of_A.parameter, of_B.parameter, float(layer.scaling[adapter]), [B], [A], [layer])
    groups = getattr(B, "groups", 1)
    if groups == 1:
        return [replace(whole, experts=experts, is_transposed=is_embedding)]
    pairs = []
    r, n = layer.r[adapter] // groups, layer.out_features // groups
    for group in range(groups):
        A_rows, B_rows = range(group * r, (group + 1) * r), range(group * n, (group + 1) * n)
        own_name = f"{name}[{B_rows.start}:{B_rows.stop}]"
        readers: Any = {"readers": [replace(of_B, rows=B_rows)], "A_readers": [replace(of_A, rows=A_rows)]}
        pairs.append(replace(whole, name=own_name, **readers, A_rows=A_rows, B_rows=B_rows))
    return pairs


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """Return a layer's own class: FSDP2 and a loop's object replace it by a subclass."""
    kind = plain_class(layer)
    return kind.__bases__[-1] if issubclass(kind, FSDPModule) else kind


def _adapters(layer: LoraLayer) -> Iterator[tuple[str, AnyRef, AnyRef]]:
    """Yield every adapter with the readers of A and B."""
    for adapter in layer.lora_B:
        yield adapter, _reader(layer.lora_A, adapter), _reader(layer.lora_B, adapter)
    # For an embedding peft initializes A with zeros, so A serves as B, transposed. A perturbation of the other factor
    # would be huge while A is small.
    for adapter in layer.lora_embedding_B:
        yield adapter, _reader(layer.lora_embedding_B, adapter), _reader(layer.lora_embedding_A, adapter)


def _reader(factors: Any, adapter: str) -> AnyRef:
    """Return a module whose weight is the factor, or, for embeddings, a reference to the parameter itself."""
    return ParameterRef(factors, adapter) if isinstance(factors, nn.ParameterDict) else bare(factors[adapter])


def _why_not(layer: LoraLayer, adapter: str, A: object, B: object) -> str | None:
    """Return why a layer's update can't be perturbed through B; None if it can."""
    if isinstance(layer, LoraParallelLinear):
        return "tensor-parallel LoRA keeps a slice of each factor"
    # X-LoRA replaces the forward of each layer.
    is_xlora = isinstance(getattr(vars(layer).get("forward"), "__self__", None), XLoraLayer)
    if is_xlora or any(router in layer.active_adapters for router in getattr(layer, "lora_arrow", {})):
        return "X-LoRA or Arrow weights the adapters by a router, so the update is s B A times a changing factor"
    # Such as AdaLoRA's layers, whose update is B diag(E) A.
    if not kind_of(layer).__module__.startswith("peft.tuners.lora."):
        return "not one of peft's own LoRA layers, so its update may not be a product s B A"
    # A variant changes the layer's computation. Only those with s B A as a term are allowed.
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, _EXACT_VARIANTS):
        return f"the variant {type(variant).__name__} is not known to add exactly s B A with a trained B"
    if getattr(layer.get_base_layer(), "sparse", False):
        return "an embedding with sparse=True has sparse gradients"
    for factor in (A, B):
        if isinstance(factor, nn.ParameterDict):
            continue
        if not isinstance(factor, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return f"a factor is a {type(factor).__name__}, not a Linear or a convolution"
        # The trained parameters then have other names than the weight.
        names = [name for name, _ in factor.named_parameters()]
        if names and "weight" not in names:
            return "a factor is computed from other parameters (parametrize, weight_norm, spectral_norm, prune)"
    return None


def merge_problems(model: nn.Module) -> list[str]:
    """Say why pairs can't be trained in peft's layers as they are: merged layers compute only with their base."""
    names = [clean_name(name) for name, layer in lora_layers(model) if layer.merged]
    if not names:
        return []
    return [f"the adapter is merged into its base, as in {names[0]}, so it can't train: call unmerge_adapter() first"]


def check_adapter(layers: Sequence[tuple[str, LoraLayer]], adapter_name: str | None, must_be_active: bool) -> None:
    """Refuse an adapter that no layer has, or that is active in no layer; the ValueError lists the others."""
    known: set[str] = set()
    for _, layer in layers:
        known.update(layer.lora_B, layer.lora_embedding_B)
    active = active_adapters(layers)
    if adapter_name is None or not known:
        return
    if adapter_name not in known:
        raise ValueError(f"adapter_name must be None or one of {sorted(known)}, got {adapter_name!r}")
    if must_be_active and adapter_name not in active:
        raise ValueError(
            f"adapter_name={adapter_name!r} is not active, so it would not be trained; active: {sorted(active)}. "
            "Call the model's set_adapter first, or leave adapter_name out to take the active ones"
        )


def active_adapters(layers: Iterable[tuple[str, LoraLayer]]) -> set[str]:
    """Name the adapters that are active in any layer."""
    return set(chain.from_iterable(layer.active_adapters for _, layer in layers))
