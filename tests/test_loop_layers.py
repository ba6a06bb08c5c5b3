"""How a loop's layers read B + Ê: merging, exceptions, copies, measurements, and what leaves them.

Layers of every kind, and checkpointing, are in test_hostile_modules.py.
"""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from float64_runs import BETA, optimizer_of
from helpers import assert_copies_are_plain, assert_no_trace, is_perturbed, same, weights
from hostile_modules import CHECKPOINTS, Checkpointed, of_litgpt, two_adapters, two_linear, under_peft
from loop_runs import batches, method_of, net_of, run
from peft import LoraConfig
from torch import Tensor, nn

from lightning_flatlora import Perturbation, find_pairs, loops, perturbed_read
from lightning_flatlora.pairs.finders import litgpt_pairs

INPUTS = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: under_peft(two_linear, "0", "2", init_lora_weights=False), {}),
    "litgpt": (of_litgpt, {"finder": litgpt_pairs}),
}


def squares(net: nn.Module, batch: Tensor) -> Tensor:
    return net(batch).square().mean()


def loop(net: nn.Module, rho: float = 0.5, **settings: Any) -> Any:
    """EFMLoRA in a loop over the inputs; what is left running."""
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, rho, beta=BETA, **settings)
    for batch in INPUTS:
        squares(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return flat


def test_merging_and_generating_in_training_mode_use_the_clean_weights() -> None:
    net: Any = net_of()
    optimizer, (x, _) = optimizer_of(net), batches()[0]
    run(method_of("EFMLoRA", net, optimizer, 0.3), net, optimizer, batches()[:3])
    clean = copy.deepcopy(net)
    assert net.training
    assert not same(net(x), clean(x))
    with torch.no_grad():
        for model in (net, *(Checkpointed(net, how) for how in CHECKPOINTS.values())):
            assert same(model(x), clean(x))
    for each in (net, clean):
        each.merge_adapter()
    assert same(net.state_dict(), clean.state_dict())
    for each in (net, clean):
        each.unmerge_adapter()
    assert same(net.state_dict(), clean.state_dict())


def test_a_step_that_raises_leaves_clean_layers_and_can_be_tried_again() -> None:
    plain, net = net_of(), net_of()
    optimizer, other = optimizer_of(net), optimizer_of(plain)
    flat = method_of("EFMLoRA", net, optimizer, 0.3)
    run(method_of("EFMLoRA", plain, other, 0.3), plain, other, batches()[:4])
    run(flat, net, optimizer, batches()[:3])

    def fail(*args: Any) -> None:
        assert is_perturbed(net)
        raise ZeroDivisionError

    layer = net.get_submodule("base_model.model.2.lora_B.default")
    handle = layer.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        net(batches()[3][0])
    handle.remove()
    assert not is_perturbed(net)
    run(flat, net, optimizer, batches()[3:4])
    assert same(weights(net), weights(plain))


@pytest.mark.parametrize("kind", ["linear", "litgpt"])
def test_copies_and_pickles_are_plain(kind: str) -> None:
    make, settings = LAYERS[kind]
    net = make()
    flat = loop(net, **settings)
    if kind == "linear":
        assert_copies_are_plain(net)
    else:  # litgpt's own layers hold a lambda, which nobody can pickle
        other = copy.deepcopy(net)
        assert_no_trace(other)
        assert same(other.state_dict(), net.state_dict())
    flat.close()
    assert_no_trace(net)


@pytest.mark.parametrize("kind", ["linear", "litgpt"])
def test_a_measurement_in_the_middle_leaves_the_loop_as_it_is(kind: str) -> None:
    """Others install readers on the layers too, of A as well, and take them away in any order."""
    make, settings = LAYERS[kind]
    plain, net = make(), make()
    loop(plain, **settings).close()
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, 0.5, beta=BETA, **settings)
    pairs = find_pairs(net, finder=settings.get("finder")).pairs
    assert len(pairs) == len(flat.perturbation.pairs)
    others, switch = [], perturbed_read.Switch()
    for index, batch in enumerate(INPUTS):
        squares(net, batch).backward()
        if index == 1:
            others = [Perturbation(pairs), Perturbation(pairs)]
            for other in others:
                other.install()
            perturbed_read.perturb(pairs[0].A_readers[0], torch.ones_like(pairs[0].A), switch)
            with others[0].applied(others[0].ascend(1.0, at_perturbed=True).stacks):
                squares(net, batch)
        optimizer.step()
        optimizer.zero_grad()
        if index == 3:
            others[0].uninstall()
    flat.close()
    others[1].uninstall()
    perturbed_read.release(pairs[0].A_readers[0], switch)
    assert same(weights(net), weights(plain))
    assert_no_trace(net)


# -- the end of an object


def close(flats: list[Any], net: nn.Module) -> None:
    flats.pop().close()


def forget(flats: list[Any], net: nn.Module) -> None:
    flats.clear()
    gc.collect()


def make_a_newer_one(flats: list[Any], net: nn.Module) -> None:
    newer = loops.EFMLoRA(net, optimizer_of(net), 0.5)
    squares(net, INPUTS[0]).backward()
    with pytest.raises(RuntimeError, match="a newer object, has ended this EFMLoRA"):
        next(flats[0].training_passes())
    newer.close()


@pytest.mark.parametrize("end", [close, forget, make_a_newer_one])
def test_an_object_that_has_ended_leaves_plain_layers(end: Callable[..., None]) -> None:
    """Also one that nobody has closed, and of which only the layers are left: a notebook's."""
    net = LAYERS["linear"][0]()
    flats = [loop(net)]
    with torch.no_grad():
        clean = net(INPUTS[0])
    assert not same(net(INPUTS[0]).detach(), clean)
    end(flats, net)
    assert same(net(INPUTS[0]).detach(), clean)
    assert_no_trace(net)


def test_looking_again_finds_a_new_adapter() -> None:
    net: Any = LAYERS["linear"][0]()
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, 0.5)
    squares(net, INPUTS[0]).backward()
    optimizer.step()
    before = flat.state_dict()["perturbation"]["E"]
    net.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    optimizer.add_param_group({"params": [p for name, p in net.named_parameters() if ".other." in name]})
    flat.look_again()
    assert len(flat.method.pairs) == 4
    now = flat.state_dict()["perturbation"]["E"]
    assert same(before, {name: now[name] for name in before})


def test_adapters_that_take_turns_within_a_step() -> None:
    found = []
    for first in ("default", "other"):
        net: Any = two_adapters().double()
        net.set_adapter(first)
        optimizer = torch.optim.SGD([p for name, p in net.named_parameters() if "lora" in name], lr=0.1)
        flat = loops.EFMLoRA(net, optimizer, rho=0.5)
        for batch in torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
            for adapter in ("default", "other"):
                net.set_adapter(adapter)
                net(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights(net))
        assert len(flat.perturbation.pairs) == 5
        assert all(float(E.norm()) > 0 for E in flat.perturbation.state_dict()["E"].values())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
