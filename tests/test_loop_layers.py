"""How a loop's layers read B + Ê: layers of every kind, checkpointing, exceptions, copies, and what leaves them."""

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from float64_runs import BETA, fit_in_float64, optimizer_of
from helpers import assert_copies_are_plain, assert_no_trace, is_perturbed, same, weights
from loop_runs import batches, method_of, net_of, run
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA, Perturbation, find_pairs, loops, perturbed_read
from lightning_flatlora.pairs.finders import litgpt_pairs

INPUTS = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x[None], x[None], x[None])[0]
        return found


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x[:, None, None, :].expand(-1, 1, 2, -1))
        return found


def under_peft(base: nn.Module, **settings: Any) -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **settings)
    return get_peft_model(base, config).double()


def of_litgpt() -> nn.Module:
    models = pytest.importorskip("litgpt_models")

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = models.gpt()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.gpt((x.abs() * 3).long())
            return found

    return Reads()


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: under_peft(linear(), target_modules=["0", "2"]), {}),
    "DoRA": (lambda: under_peft(linear(), target_modules=["0", "2"], use_dora=True), {}),
    "DoRA of a convolution": (lambda: under_peft(Pictures(), target_modules=["conv"], use_dora=True), {}),
    "MultiheadAttention": (lambda: under_peft(Attention(), target_modules=["attention"]), {}),
    "litgpt": (of_litgpt, {"finder": litgpt_pairs}),
}


class Squares(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return squares(self.net, batch)

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.net)


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


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_every_kind_equal_the_callback(kind: str) -> None:
    """Also those whose forward does not call ``lora_B``."""
    make, settings = LAYERS[kind]
    ours, theirs, plain = [], [], []
    for nets, rho in ((ours, 0.5), (plain, 0.0)):
        torch.manual_seed(0)
        nets.append(make())
        loop(nets[0], rho, **settings).close()
        assert_no_trace(nets[0])
    torch.manual_seed(0)
    theirs.append(make())
    callback = EFMLoRA(0.5, beta=BETA, **settings)
    fit_in_float64(Squares(theirs[0]), 1, [callback], DataLoader(INPUTS, batch_size=None))
    assert same(weights(ours[0]), weights(theirs[0]))
    assert not same(weights(ours[0]), weights(plain[0]))


class Recomputed(torch.autograd.Function):
    """Reentrant checkpointing as other libraries write it."""

    @staticmethod
    def forward(ctx: Any, net: nn.Module, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.net = net
        ctx.save_for_backward(x)
        with torch.no_grad():
            found: Tensor = net(x)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.net(x)
        torch.autograd.backward(output, gradient)
        return None, x.grad


CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "to the end": partial(checkpoint, use_reentrant=False, early_stop=False),
    "another library's": Recomputed.apply,
}


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = CHECKPOINTS[self.how](self.net, x.clone().requires_grad_())
        return found


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_activation_checkpointing_changes_no_bit(how: str) -> None:
    """Reentrant checkpointing computes the loss without autograd, and its backward computes it again."""
    # The other library does not care for dropout.
    dropout = 0.0 if how == "another library's" else 0.2
    plain, net = net_of(dropout=dropout), net_of(dropout=dropout)
    losses: list[list[Tensor]] = [[], []]
    for seen, each, model in ((losses[0], plain, plain), (losses[1], net, Checkpointed(net, how))):
        optimizer = optimizer_of(each)
        flat = method_of("EFMLoRA", model, optimizer, 0.3)
        model.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.detach()))
        run(flat, model, optimizer, batches())
    assert same(weights(net), weights(plain))
    assert same(*losses)


def test_merging_and_generating_in_training_mode_use_the_clean_weights() -> None:
    net: Any = net_of()
    optimizer, (x, _) = optimizer_of(net), batches()[0]
    run(method_of("EFMLoRA", net, optimizer, 0.3), net, optimizer, batches()[:3])
    clean = copy.deepcopy(net)
    assert net.training
    assert not same(net(x), clean(x))
    with torch.no_grad():
        for model in (net, *(Checkpointed(net, how) for how in CHECKPOINTS)):
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
    torch.manual_seed(0)
    plain = make()
    loop(plain, **settings).close()
    torch.manual_seed(0)
    net = make()
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, 0.5, beta=BETA, **settings)
    pairs = find_pairs(net, finder=settings.get("finder")).pairs
    assert len(pairs) == len(flat.perturbation.pairs)
    others = []
    for index, batch in enumerate(INPUTS):
        squares(net, batch).backward()
        if index == 1:
            others = [Perturbation(pairs), Perturbation(pairs)]
            for other in others:
                other.install()
            perturbed_read.install(pairs[0].A_readers[0])
            with others[0].applied(others[0].ascend(1.0, at_perturbed=True).stacks):
                squares(net, batch)
        optimizer.step()
        optimizer.zero_grad()
        if index == 3:
            others[0].uninstall()
    flat.close()
    others[1].uninstall()
    perturbed_read.uninstall(pairs[0].A_readers[0])
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
    assert len(flats[0]._handles) == 0
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
    net.double()
    optimizer.add_param_group({"params": [p for name, p in net.named_parameters() if ".other." in name]})
    flat.look_again()
    assert len(flat.method.pairs) == 4
    now = flat.state_dict()["perturbation"]["E"]
    assert same(before, {name: now[name] for name in before})
