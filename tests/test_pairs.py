"""Which factors are found, under which names, and that everything else is left out by name."""

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from imitated_layers import Bare
from peft import (
    AdaLoraConfig,
    ArrowConfig,
    LoHaConfig,
    LoraConfig,
    LoraRuntimeConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.tuners.lora import Linear
from peft.tuners.xlora.model import convert_layers_to_xlora
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_flatlora.pairs import find_pairs
from lightning_flatlora.pairs.lora_pair import NoPairsError
from lightning_flatlora.wrappers import clean_name


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv, self.grouped = nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3, groups=2)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)


def peft(targets: list[str], **config: object) -> nn.Module:
    return get_peft_model(Net(), LoraConfig(r=2, lora_alpha=6, target_modules=targets, **config))  # type: ignore[arg-type]


def names(model: nn.Module) -> list[str]:
    return [pair.name.removeprefix("base_model.model.") for pair in find_pairs(model).pairs]


EXACT = [
    {},
    {"use_rslora": True},
    {"lora_bias": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_2"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "gaussian"},
    {"rank_pattern": {"one": 4}, "alpha_pattern": {"one": 5}},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
]


class Layered(nn.Module):
    """A model for options that select layers by number."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList([Net(), Net()])})


@pytest.mark.parametrize("config", EXACT, ids=str)
def test_what_is_found_is_exactly_one_product(config: dict[str, Any]) -> None:
    """Moving B by E changes the layer's output by s E A x, whatever its options are."""
    targets = ["one", "two", "conv"] if config.get("init_lora_weights", True) is True else ["one", "two"]
    model = get_peft_model(Layered(), LoraConfig(r=2, lora_alpha=6, target_modules=targets, **config)).double()
    search = find_pairs(model)
    assert not search.left_out
    layers = {f"{name}.lora_B.default.weight": layer for name, layer in model.named_modules()}
    for pair in search.pairs:
        layer = layers[pair.name]
        x = torch.randn(3, 8, 5 if pair.A.ndim == 3 else 8, dtype=torch.float64)
        E = torch.randn_like(pair.B)
        before = layer(x)
        with torch.no_grad():
            pair.B.add_(E)
        moved = layer(x) - before
        A, E = pair.A.flatten(1), E.flatten(1)
        if pair.A.ndim == 3:
            expected = nn.functional.conv1d(x, (pair.scaling * E @ A).view(-1, *pair.A.shape[1:]))
        else:
            expected = x @ (pair.scaling * E @ A).mT
        torch.testing.assert_close(moved, expected)


def test_names_are_the_same_under_wrappers() -> None:
    model = peft(["one"])
    wrapped = nn.ModuleDict({"net": torch.compile(copy.deepcopy(model), backend="eager")})
    assert find_pairs(wrapped).pairs[0].name == "net." + find_pairs(model).pairs[0].name
    assert clean_name("_orig_mod.a._fsdp_wrapped_module.b.weight") == "a.b.weight"


# -- what is left out, by name


def of_adalora() -> nn.Module:
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=10, tinit=1, tfinal=1, deltaT=1, target_modules=["one"])
    return get_peft_model(Net(), config)


def foreign() -> nn.Module:
    model: Any = peft(["one"])
    model.base_model.model.one.__class__ = type("Foreign", (Linear,), {"__module__": "elsewhere"})
    return model


def of_xlora() -> nn.Module:
    model = peft(["one", "conv"])
    xlora = XLoraConfig(hidden_size=8, adapters={"default": ""}, use_trainable_adapters=True)
    convert_layers_to_xlora(model, SimpleNamespace(disabled=False), xlora)  # type: ignore[arg-type]
    return model


def of_arrow() -> nn.Module:
    """The router is the active adapter; the experts that it weighs are trained without being active."""
    model: Any = peft(["one"])
    arrow = ArrowConfig()
    arrow.task_adapter_names = ["default"]
    model.add_adapter("arrow_router", LoraConfig(r=2, target_modules=["one"], arrow_config=arrow))
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["two"]))
    model.base_model.set_adapter(["arrow_router", "plain"])
    expert = model.base_model.model.one.lora_B["default"].weight
    expert.requires_grad_(True).grad = torch.ones_like(expert)
    return model


def shared_B() -> nn.Module:
    model: Any = peft(["one", "two", "conv"])
    net = model.base_model.model
    net.two.lora_B["default"].weight = net.one.lora_B["default"].weight
    return model


def tied_by_memory() -> nn.Module:
    """An output layer and its embedding, tied as by peft's ensure_weight_tying."""
    net = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 6)})
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["embedding", "inner", "head"]))
    layers = model.base_model.model
    head, embedding = layers["head"], layers["embedding"]
    assert len(find_pairs(model).pairs) == 3
    head.lora_B["default"].weight = nn.Parameter(embedding.lora_embedding_A["default"].data.mT)
    head.lora_A["default"].weight = nn.Parameter(embedding.lora_embedding_B["default"].data.mT)
    return model


def computed(how: Any, factor: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: Any = peft(["one", "two"], init_lora_weights=False)
        how(getattr(model.base_model.model.one, factor)["default"], "weight")
        return model

    return make


def of_mixed_tuners() -> nn.Module:
    model: Any = get_peft_model(Net(), LoraConfig(r=2, target_modules=["two"]), mixed=True)
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["one"]))
    model.set_adapter(["default", "loha"])
    return model


LEFT_OUT: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "of another library": (lambda: nn.Sequential(Bare()), [], "only .*Bare.*finders.litgpt_pairs"),
    "LoHa": (lambda: get_peft_model(Net(), LoHaConfig(r=2, target_modules=["one"])), [], "only .*LoHaModel"),
    "AdaLoRA": (of_adalora, [], "SVDLinear: not one of peft's own LoRA layers"),
    "aLoRA": (lambda: peft(["one"], alora_invocation_tokens=[1]), [], "ALora"),
    "foreign class": (foreign, [], "Foreign"),
    "X-LoRA": (of_xlora, ["conv.lora_B.default"], "Linear: X-LoRA or Arrow weights the adapters by a router"),
    "Arrow": (of_arrow, ["two.lora_B.plain"], "Linear: X-LoRA or Arrow weights the adapters by a router"),
    "LoHa next to LoRA": (
        of_mixed_tuners,
        ["two.lora_B.default"],
        "Linear of loha, which is not LoRA .1 in all, first .*one",
    ),
    "shared": (shared_B, ["conv.lora_B.default"], "shared with another pair"),
    "tied by memory": (tied_by_memory, ["inner.lora_B.default"], "shared with another pair"),
}
for how in (parametrizations.weight_norm, parametrizations.spectral_norm, prune.identity):
    for factor in ("lora_A", "lora_B"):
        made = (computed(how, factor), ["two.lora_B.default"], "computed from other parameters")
        LEFT_OUT[f"{how.__name__} of {factor}"] = made


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported:UserWarning")
@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_is_not_one_product_is_left_out_by_name(what: str) -> None:
    make, found, message = LEFT_OUT[what]
    model = make()
    if not found:
        with pytest.raises(NoPairsError, match=message):
            find_pairs(model)
        return
    search = find_pairs(model)
    assert [name.removesuffix(".weight") for name in names(model)] == found
    assert re.search(message, " ".join(search.left_out))
    if what == "Arrow":
        assert search.names == {"base_model.model.two.lora_B.plain.weight"}
        model.base_model.set_adapter(["default", "plain"])
        assert names(model) == ["one.lora_B.default.weight", "two.lora_B.plain.weight"]


def test_every_variant_that_peft_knows_is_either_exact_or_left_out() -> None:
    """A variant that peft adds later must not be perturbed silently."""
    from peft.tuners.lora import variants

    from lightning_flatlora.pairs.peft_pairs import _EXACT_VARIANTS

    known = {v for v in vars(variants).values() if isinstance(v, type) and v.__name__.endswith("LinearVariant")}
    assert {v.__name__ for v in known if issubclass(v, _EXACT_VARIANTS)} == {"DoraLinearVariant"}
