"""Which factors are found, under which names, and that everything else is left out by name."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from lightning_flatlora.pairs import NoPairsError, clean_name, find_pairs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv, self.grouped = nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3, groups=2)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)


def peft(targets: list[str], **config: object) -> nn.Module:
    return get_peft_model(Net(), LoraConfig(r=2, lora_alpha=6, target_modules=targets, **config))  # type: ignore[arg-type]


def names(model: nn.Module, adapter: str | None = None) -> list[str]:
    return [pair.name.removeprefix("base_model.model.") for pair in find_pairs(model, adapter).pairs]


def test_finds_every_exact_layer_with_its_scaling() -> None:
    search = find_pairs(peft(["one", "two", "conv"]))
    assert [pair.scaling for pair in search.pairs] == [3.0] * 3
    assert not search.left_out
    assert find_pairs(peft(["one"], use_rslora=True)).pairs[0].scaling == pytest.approx(6 / 2**0.5)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_leaves_out_by_name_what_is_not_one_product() -> None:
    model = peft(["embed", "grouped", "one"])
    search = find_pairs(model)
    assert names(model) == ["one.lora_B.default.weight"]
    text = " ".join(search.left_out)
    assert "Embedding" in text
    assert "embed" in text
    assert "grouped convolution" in text


def test_leaves_out_adalora_whose_factors_are_no_modules() -> None:
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=10, tinit=1, tfinal=1, deltaT=1, target_modules=["one"])
    with pytest.raises(NoPairsError, match="SVDLinear"):
        find_pairs(get_peft_model(Net(), config))


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported:UserWarning")
@pytest.mark.parametrize("variant", ["alora", "unknown class", "parameter"])
def test_leaves_out_variants_and_foreign_layers(variant: str) -> None:
    if variant == "alora":
        model = peft(["one"], alora_invocation_tokens=[1])
    elif variant == "parameter":
        model = peft(["two"], target_parameters=["one.weight"])
    else:
        model = peft(["one"])
        model.base_model.model.one.__class__ = type("Foreign", (Linear,), {"__module__": "elsewhere"})
    if variant == "parameter":
        search = find_pairs(model)
        assert names(model) == ["two.lora_B.default.weight"]
        assert "ParamWrapper" in search.left_out[0]
    else:
        with pytest.raises(NoPairsError, match=r"ALora|Foreign"):
            find_pairs(model)


def test_every_variant_that_peft_knows_is_either_exact_or_left_out() -> None:
    """A variant that peft adds later must not be perturbed in silence."""
    from peft.tuners.lora import variants

    from lightning_flatlora.pairs import _EXACT_VARIANTS

    known = {v for v in vars(variants).values() if isinstance(v, type) and v.__name__.endswith("LinearVariant")}
    assert {v.__name__ for v in known if issubclass(v, _EXACT_VARIANTS)} == {"DoraLinearVariant"}


def test_tied_adapters_are_found_once_and_all_their_readers() -> None:
    model = peft(["one", "two"])
    net = model.base_model.model
    net.two.lora_A["default"].weight = net.one.lora_A["default"].weight
    net.two.lora_B["default"].weight = net.one.lora_B["default"].weight
    pairs = find_pairs(model).pairs
    assert len(pairs) == 1
    assert pairs[0].readers == [net.one.lora_B["default"], net.two.lora_B["default"]]


def test_a_factor_that_serves_in_two_products_is_left_out() -> None:
    model = peft(["one", "two", "conv"])
    net = model.base_model.model
    net.two.lora_B["default"].weight = net.one.lora_B["default"].weight
    search = find_pairs(model)
    assert [pair.name.split(".")[2] for pair in search.pairs] == ["conv"]
    assert "shared" in search.left_out[0]


def test_adapters() -> None:
    model = peft(["one"])
    model.add_adapter("other", LoraConfig(r=3, target_modules=["two"]))
    assert names(model) == ["one.lora_B.default.weight"]
    model.set_adapter("other")
    assert names(model) == ["two.lora_B.other.weight"]
    with pytest.raises(ValueError, match=r"adapter_name must be None or one of \['default', 'other'\], got 'third'"):
        find_pairs(model, "third")


def test_frozen_B_is_not_perturbed_and_frozen_A_is() -> None:
    model = peft(["one", "two"])
    net = model.base_model.model
    net.one.lora_B["default"].weight.requires_grad_(False)
    net.two.lora_A["default"].weight.requires_grad_(False)
    pairs = find_pairs(model).pairs
    assert [pair.name.split(".")[2] for pair in pairs] == ["two"]
    assert not pairs[0].learns_A


def test_nothing_found_lists_what_there_is() -> None:
    with pytest.raises(NoPairsError, match="no LoRA layer, only Conv1d, Embedding, Linear, Net"):
        find_pairs(Net())
    model = peft(["one"])
    model.requires_grad_(False)
    with pytest.raises(NoPairsError, match=r"LoRA layers seen: Linear; adapter .*default.* Every B is frozen"):
        find_pairs(model)


def test_names_are_the_same_under_wrappers() -> None:
    model = peft(["one"])
    wrapped = nn.ModuleDict({"net": torch.compile(copy.deepcopy(model), backend="eager")})
    assert find_pairs(wrapped).pairs[0].name == "net." + find_pairs(model).pairs[0].name
    assert clean_name("_orig_mod.a._fsdp_wrapped_module.b.weight") == "a.b.weight"
