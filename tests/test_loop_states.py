"""The optimizer's state carries the method's: a resumed loop equals an uninterrupted one, bit for bit."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from float64_runs import BETA, Automatic, fit_in_float64, optimizer_of
from helpers import same, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from loop_runs import batches, method_of, net_of, run
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA
from lightning_flatlora.loop_method import STATE_KEY

METHODS = ("EFMLoRA", "FMLoRA")


@pytest.mark.parametrize("name", METHODS)
def test_an_object_that_is_made_after_the_load_takes_its_state_from_state_dict(name: str) -> None:
    """One that is made before finds it in the optimizer's: see test_hostile_modules.py."""
    whole, first, second = net_of(), net_of(), net_of()
    optimizer = optimizer_of(whole)
    run(method_of(name, whole, optimizer), whole, optimizer, batches())
    optimizer = optimizer_of(first)
    flat = method_of(name, first, optimizer)
    run(flat, first, optimizer, batches()[:5])
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), flat.state_dict()))
    second.load_state_dict(saved[0])
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(saved[1])
    resumed = method_of(name, second, optimizer)
    resumed.load_state_dict(saved[2])
    run(resumed, second, optimizer, batches()[5:])
    assert resumed.step == 10
    assert same(weights(second), weights(whole))
    with pytest.raises(MisconfigurationException, match="estimator must be 'average' as in the checkpoint"):
        method_of(name, second, optimizer, estimator="projected").load_state_dict(saved[2])
    with pytest.raises(MisconfigurationException, match="of 2 optimizers, and a loop's object follows one"):
        resumed.load_state_dict({**saved[2], "optimizers": [saved[2], saved[2]]})


def test_optimizer_states_go_from_runs_with_the_method_to_runs_without_and_back() -> None:
    net, plain = net_of(), net_of()
    optimizer, other = optimizer_of(net), optimizer_of(plain)
    run(method_of("EFMLoRA", net, optimizer, 0.3), net, optimizer, batches()[:3])
    run(None, plain, other, batches()[:3])
    with pytest.warns(UserWarning, match="the optimizer's state has none of EFMLoRA, as after a run without it"):
        optimizer.load_state_dict(other.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert STATE_KEY in optimizer.state_dict()
    assert STATE_KEY not in other.state_dict()
    # Of two methods each finds its own.
    first = method_of("EFMLoRA", net, optimizer, 0.3, adapter_name="default")
    state = optimizer.state_dict()
    assert set(state[STATE_KEY]) == {"EFMLoRA[default]"}
    run(first, net, optimizer, batches()[:1])
    optimizer.load_state_dict(state)
    assert first.step == 0


@pytest.mark.parametrize("name", METHODS)
def test_preparing_a_distributed_checkpoint_is_no_step(name: str) -> None:
    """It steps the optimizer once, with zero gradients, and keeps nothing of ours: state_dict is there for that."""
    from torch.distributed.checkpoint import state_dict as dcp

    net, plain = net_of(), net_of()
    optimizer, other = optimizer_of(net), optimizer_of(plain)
    flat, unprepared = method_of(name, net, optimizer), method_of(name, plain, other)
    assert STATE_KEY not in dcp.get_optimizer_state_dict(net, optimizer)
    assert (flat.step, len(optimizer.state)) == (0, len(other.param_groups[0]["params"]))
    # The preparation counts as a step in AdamW's own bias correction.
    optimizer.state.clear()
    run(flat, net, optimizer, batches()[:3])
    run(unprepared, plain, other, batches()[:3])
    assert same(weights(net), weights(plain))


class LoadsWithoutHooks(torch.optim.AdamW):
    """As the optimizers of bitsandbytes."""

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
    # Somebody else's method over this one still calls it after the end.
    over = optimizer.load_state_dict
    run(second, net, optimizer, batches()[:1])
    second.close()
    over(state)
    assert second.step == 3


def test_the_state_of_the_callback_is_taken_over() -> None:
    """If the loop's model is the module itself, since pairs are known by their names in it."""
    module, callback = Automatic(net_of()), EFMLoRA(0.3, beta=BETA)
    fit_in_float64(module, 1, [callback], DataLoader(batches(), batch_size=None))
    flat = method_of("EFMLoRA", module, optimizer_of(module), 0.3)
    flat.load_state_dict(callback.state_dict())
    assert flat.step == 10
    assert same(flat.perturbation.state_dict(), callback.perturbation.state_dict())
