"""What a model trains, asked again and again: each kind of change is seen, and what was known is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_net
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

from lightning_flatlora.pair_watch import PairWatch


def watched() -> tuple[Any, PairWatch, list[torch.optim.Optimizer]]:
    net = make_net()
    net.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    watch, optimizers = PairWatch(net), [torch.optim.SGD([nn.Parameter(torch.ones(1))])]
    assert len(watch.search(optimizers).pairs) == 3
    assert not watch.changed(optimizers)
    return net, watch, optimizers


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "B frozen": lambda net, _: net.base_model.model[2].lora_B["default"].requires_grad_(False),
    "A frozen": lambda net, _: net.base_model.model[2].lora_A["default"].requires_grad_(False),
    "another adapter active": lambda net, _: net.set_adapter("other"),
    "a scaling": lambda net, _: net.base_model.model[2].set_scale("default", 2.0),
    "an adapter added": lambda net, _: net.add_adapter("third", LoraConfig(r=2, target_modules=["2"])),
    "parameters in the optimizer": lambda _, optimizer: optimizer.add_param_group(
        {"params": nn.Parameter(torch.ones(1))}
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_once(name: str) -> None:
    net, watch, optimizers = watched()
    CHANGES[name](net, optimizers[0])
    assert watch.changed(optimizers)
    watch.search(optimizers)
    assert not watch.changed(optimizers)


def test_pairs_that_rest_are_kept_and_those_that_are_gone_are_not() -> None:
    net, watch, optimizers = watched()
    before = watch.pairs
    net.set_adapter("other")
    assert len(watch.search(optimizers).pairs) == 4
    assert [pair.name for pair in watch.pairs[1:]] == [pair.name for pair in before]
    net.delete_adapter("default")
    assert [pair.name for pair in watch.search(optimizers).pairs] == ["base_model.model.0.lora_B.other.weight"]
    assert not watch.resting


def test_what_could_come_is_known_by_name() -> None:
    _, watch, _ = watched()
    assert watch.resting == ["base_model.model.0.lora_B.other.weight"]


def test_new_layers_are_seen_after_a_walk() -> None:
    net, watch, optimizers = watched()
    layer = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"]))
    net.base_model.model.append(layer)
    watch.is_stale = True
    assert watch.changed(optimizers)
    assert len(watch.search(optimizers).pairs) == 4


def test_a_named_adapter_may_be_one_that_is_activated_later() -> None:
    net, _, _ = watched()
    with pytest.raises(ValueError, match="is not active"):
        PairWatch(net, "other")
    watch = PairWatch(net, "other", must_be_active=False)
    assert not watch.search([]).pairs
    net.set_adapter("other")
    assert watch.changed([])
    assert len(watch.search([]).pairs) == 1


def test_a_scaling_is_told_once_and_the_next_search_is_still_due() -> None:
    net, watch, optimizers = watched()
    assert not watch.rescaled()
    net.base_model.model[2].set_scale("default", 2.0)
    assert [watch.rescaled(), watch.rescaled()] == [True, False]
    assert watch.changed(optimizers)


def test_a_pair_whose_scaling_is_zero_rests_with_its_last_one() -> None:
    net, watch, optimizers = watched()
    net.base_model.model[2].set_scale("default", 0.0)
    search = watch.search(optimizers)
    assert [(pair.scaling, pair.is_off) for pair in search.pairs] == [(2.0, False), (2.0, False), (2.0, True)]
    assert search.pairs[2].name == "base_model.model.2.lora_B.default.weight"
    assert "its scaling is 0" in search.left_out[0]
    net.base_model.model[2].set_scale("default", 1.0)
    assert [pair.is_off for pair in watch.search(optimizers).pairs] == [False] * 3


def test_a_scaling_that_is_a_tensor_may_be_written_in_place() -> None:
    """As peft's compiled hot swapping does."""
    net, watch, optimizers = watched()
    prepare_model_for_compiled_hotswap(net, target_rank=4)
    watch.search(optimizers)
    assert not watch.changed(optimizers)
    net.base_model.model[2].scaling["default"].fill_(9.0)
    assert [watch.rescaled(), watch.rescaled()] == [True, False]
    assert watch.changed(optimizers)
    assert [pair.scaling for pair in watch.search(optimizers).pairs] == [2.0, 9.0, 2.0]
