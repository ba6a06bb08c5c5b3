"""How a loop's layers read B + Ê, what an object leaves behind, and what the optimizer's state carries.

For layers of every kind, and checkpointing, see test_hostile_modules.py.
"""

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from float64_runs import BETA, Automatic, fit_in_float64, optimizer_of
from helpers import assert_copies_are_plain, assert_no_trace, is_perturbed, same, weights
from hostile_modules import CHECKPOINTS, Checkpointed, two_linear, under_peft
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from loop_runs import METHODS, batches, method_of, net_of, run, schedule, squares, started, trained_plainly
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA, loops
from lightning_flatlora.loops.loop_method import STATE_KEY

INPUTS = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))


def loop(net: nn.Module) -> Any:
    """Run EFMLoRA in a loop over the inputs; returns the object, which is still open."""
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, 0.5, beta=BETA)
    run(flat, net, optimizer, list(INPUTS), loss=squares)
    return flat


def linear() -> nn.Module:
    return under_peft(two_linear, "0", "2", init_lora_weights=False)


def test_merging_and_generating_in_training_mode_use_the_clean_weights() -> None:
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:3])
    x, _ = batches()[0]
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


@pytest.mark.parametrize("name", METHODS)
def test_a_forward_pass_that_raises_leaves_clean_layers_and_can_be_tried_again(name: str) -> None:
    flat, net, optimizer = started(name)
    run(flat, net, optimizer, batches()[:3])

    def fail(*args: Any) -> None:
        if is_perturbed(net):
            raise ZeroDivisionError

    handle = net.get_submodule("base_model.model.2.lora_B.default").register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run(flat, net, optimizer, batches()[3:4])
    handle.remove()
    assert not is_perturbed(net)
    optimizer.zero_grad()
    run(flat, net, optimizer, batches()[3:4])
    assert same(weights(net), weights(trained_plainly(name, batches()[:4])))


def test_an_open_model_prints_as_it_is_and_its_copies_and_pickles_are_plain() -> None:
    net = linear()
    printed = repr(net)
    flat = loop(net)
    assert repr(net) == printed
    assert_copies_are_plain(net)
    flat.close()
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
    with pytest.raises(RuntimeError, match="a newer object has ended this EFMLoRA"):
        next(flats[0].training_passes())
    newer.close()


@pytest.mark.parametrize("end", [close, forget, make_a_newer_one])
def test_an_object_that_has_ended_leaves_plain_layers(end: Callable[..., None]) -> None:
    """Even if it was not closed and only the layers are left, as in a notebook."""
    net = linear()
    flats = [loop(net)]
    with torch.no_grad():
        clean = net(INPUTS[0])
    assert not same(net(INPUTS[0]).detach(), clean)
    end(flats, net)
    assert same(net(INPUTS[0]).detach(), clean)
    assert_no_trace(net)


def test_looking_again_finds_a_new_adapter() -> None:
    net: Any = linear()
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


@pytest.mark.parametrize("name", METHODS)
def test_an_object_that_is_made_after_the_load_warns_unless_it_takes_its_state_from_state_dict(name: str) -> None:
    """An object made before the load finds its state in the optimizer's: see test_hostile_modules.py."""
    second = net_of()
    flat, first, optimizer = started(name, schedule())
    run(flat, first, optimizer, batches()[:5])
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), flat.state_dict()))
    for takes_it in (False, True):
        second.load_state_dict(saved[0])
        optimizer = optimizer_of(second)
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        resumed = method_of(name, second, optimizer)
        if takes_it:
            resumed.load_state_dict(saved[2])
        else:
            with pytest.warns(UserWarning, match=f"the optimizer has already taken steps without {name}"):
                run(resumed, second, optimizer, batches()[5:6])
    run(resumed, second, optimizer, batches()[5:])
    assert resumed.step == 10
    assert same(weights(second), weights(trained_plainly(name, batches(), schedule())))
    with pytest.raises(MisconfigurationException, match="estimator must be 'average' as in the checkpoint"):
        method_of(name, second, optimizer, estimator="projected").load_state_dict(saved[2])
    with pytest.raises(MisconfigurationException, match="of 2 optimizers, but a loop's object follows one"):
        resumed.load_state_dict({**saved[2], "optimizers": [saved[2], saved[2]]})


def test_optimizer_states_go_from_runs_with_the_method_to_runs_without_and_back() -> None:
    flat, net, optimizer = started("EFMLoRA")
    plain = net_of()
    other = optimizer_of(plain)
    run(flat, net, optimizer, batches()[:3])
    run(None, plain, other, batches()[:3])
    optimizer.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match="the optimizer has already taken steps without EFMLoRA"):
        run(flat, net, optimizer, batches()[3:4])
    other.load_state_dict(optimizer.state_dict())
    assert STATE_KEY in optimizer.state_dict()
    assert STATE_KEY not in other.state_dict()
    # Each of two methods finds its own state.
    first = method_of("EFMLoRA", net, optimizer, 0.3, adapter_name="default")
    state = optimizer.state_dict()
    assert set(state[STATE_KEY]) == {"EFMLoRA[default]"}
    with pytest.warns(UserWarning, match="has already taken steps without"):
        run(first, net, optimizer, batches()[:1])
    optimizer.load_state_dict(state)
    assert first.step == 0


@pytest.mark.parametrize("name", METHODS)
def test_preparing_a_distributed_checkpoint_is_no_step(name: str) -> None:
    """It steps the optimizer once with zero gradients, and keeps nothing of ours, which is in state_dict instead."""
    from torch.distributed.checkpoint import state_dict as dcp

    flat, net, optimizer = started(name)
    assert STATE_KEY not in dcp.get_optimizer_state_dict(net, optimizer)
    assert (flat.step, len(optimizer.state)) == (0, len(optimizer.param_groups[0]["params"]))
    # The preparation counts as a step in AdamW's own bias correction.
    optimizer.state.clear()
    run(flat, net, optimizer, batches()[:3])
    assert same(weights(net), weights(trained_plainly(name, batches()[:3])))


class LoadsWithoutHooks(torch.optim.AdamW):
    """Like the optimizers of bitsandbytes."""

    def load_state_dict(self, state_dict: Any) -> None:
        hooks, self._optimizer_load_state_dict_pre_hooks = self._optimizer_load_state_dict_pre_hooks, OrderedDict()
        super().load_state_dict(state_dict)
        self._optimizer_load_state_dict_pre_hooks = hooks


def test_an_optimizer_that_loads_without_hooks_carries_the_state_too() -> None:
    net = net_of()
    optimizer = LoadsWithoutHooks([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    first = method_of("EFMLoRA", net, optimizer, 0.3)
    run(first, net, optimizer, batches()[:2])
    state = optimizer.state_dict()
    first.close()
    assert "load_state_dict" not in vars(optimizer)
    second = method_of("EFMLoRA", net, optimizer, 0.3)
    optimizer.load_state_dict(state)
    assert second.step == 2
    assert same(second.state_dict(), first.state_dict())
    # A method that other code has put on top still calls this one after the end.
    over = optimizer.load_state_dict
    run(second, net, optimizer, batches()[:1])
    second.close()
    over(state)
    assert second.step == 3


def test_the_state_of_the_callback_is_taken_over() -> None:
    """If the loop's model is the module itself, since pairs are identified by their names in it."""
    module, callback = Automatic(net_of()), EFMLoRA(0.3, beta=BETA)
    fit_in_float64(module, 1, [callback], DataLoader(batches(), batch_size=None))
    flat = method_of("EFMLoRA", module, optimizer_of(module), 0.3)
    flat.load_state_dict(callback.state_dict())
    assert flat.step == 10
    assert same(flat.perturbation.state_dict(), callback.perturbation.state_dict())
