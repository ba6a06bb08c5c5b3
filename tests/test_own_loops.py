"""EFMLoRA and FMLoRA in plain PyTorch: the callbacks' weights, clean, scaled and compiled."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from float64_runs import BETA, Automatic, fit_in_float64, loss, optimizer_of
from helpers import E_hat, assert_no_trace, is_perturbed, same, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from loop_runs import batches, method_of, net_of, run, schedule, seeds, started, train, trained_plainly
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA, FMLoRA

METHODS = ("EFMLoRA", "FMLoRA")


def close(one: Any, other: Any, tolerance: float = 1e-12) -> bool:
    return all(float((value - other[name]).abs().max()) < tolerance for name, value in one.items())


@pytest.mark.parametrize(
    ("window", "clip", "method"), [(1, None, {"start_step": 1, "every_n_steps": 2}), (4, 0.05, {})]
)
@pytest.mark.parametrize("name", METHODS)
def test_weights_equal_the_callbacks(name: str, window: int, clip: float | None, method: dict[str, int]) -> None:
    """With dropout, schedules of rho and of the learning rate, accumulation and clipping."""
    ours, theirs = net_of(dropout=0.2), net_of(dropout=0.2)
    flat = train(name, ours, batches(), method=method, window=window, clip=clip)
    kind: Any = partial(EFMLoRA, beta=BETA) if name == "EFMLoRA" else FMLoRA
    callback = kind(schedule(), **method)
    settings = {"accumulate_grad_batches": window, "gradient_clip_val": clip}
    fit_in_float64(Automatic(theirs), 1, [seeds(), callback], DataLoader(batches(), batch_size=None), **settings)
    assert flat.step == callback.step == -(-len(batches()) // window)
    E, other = flat.perturbation.state_dict()["E"], callback.perturbation.state_dict()["E"]
    if clip is not None and name == "EFMLoRA":
        # The loop's E is of the clipped gradients, which have one direction, and rounding of their own.
        assert close(weights(ours), weights(theirs))
    else:
        assert same(weights(ours), weights(theirs))
        assert same(list(E.values()), list(other.values()))
    assert all(float(each.norm()) > 0 for each in E.values())
    assert_no_trace(ours)


@pytest.mark.parametrize("name", METHODS)
def test_only_the_forward_of_a_layer_or_a_pass_reads_perturbed_weights(name: str) -> None:
    flat, net, optimizer = started(name)
    inside: list[bool] = []
    net.base_model.model[0].lora_B["default"].register_forward_hook(lambda *args: inside.append(is_perturbed(net)))
    stored: dict[str, Any] = {}

    def look(index: int) -> None:
        assert not is_perturbed(net)
        stored.update(copy.deepcopy(net.state_dict()))

    run(flat, net, optimizer, batches()[:3], after_step=look)
    assert inside == ([False, True, True] if name == "EFMLoRA" else [False, True] * 3)
    assert same(dict(net.state_dict()), stored)
    x, _ = batches()[0]
    inside.clear()
    with torch.no_grad():
        net(x)
    net.eval()(x)
    net.train()
    assert inside == [False, False]


# -- steps of other kinds


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_scaler_changes_nothing_and_an_overflow_moves_nothing(name: str, fused: bool) -> None:
    """A power of two leaves every bit as it is. A fused optimizer skips steps by itself, after its hooks."""
    plain, net = net_of(), net_of()

    def start(net: nn.Module) -> tuple[Any, Any]:
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.1, fused=fused)
        return optimizer, method_of(name, net, optimizer, 0.3)

    other, unscaled = start(plain)
    run(unscaled, plain, other, batches()[:4])
    scaler = GradScaler("cpu", init_scale=2.0**12)
    optimizer, flat = start(net)
    head = next(p for key, p in net.named_parameters() if "modules_to_save" in key)
    for batch in [*batches()[:2], None, *batches()[2:4]]:
        before = flat.perturbation.state_dict()["E"]
        for each_pass in flat.training_passes():
            with each_pass:
                scaler.scale(loss(net, batches()[0] if batch is None else batch)).backward()
        if batch is None:
            head.grad.fill_(torch.inf)
        ascended = flat.perturbation.state_dict()["E"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if batch is None:
            assert same(flat.perturbation.state_dict()["E"], ascended)
            assert name == "FMLoRA" or same(ascended, before)
    assert flat.step == (5 if fused else 4)
    assert same(weights(net), weights(plain))


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_closure_is_refused_before_it_is_called(as_keyword: bool) -> None:
    flat, net, optimizer = started("EFMLoRA")
    before = weights(net)
    with pytest.raises(MisconfigurationException, match="run forward and backward before the optimizer's step"):
        optimizer.step(closure=lambda: 1 / 0) if as_keyword else optimizer.step(lambda: 1 / 0)
    assert same(weights(net), before)
    run(flat, net, optimizer, batches()[:2])
    assert flat.step == 2


@pytest.mark.parametrize("name", METHODS)
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    net = net_of()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    optimizer = optimizer_of(net)
    flat = method_of(name, compiled, optimizer, 0.3)
    run(flat, compiled, optimizer, batches()[:4])
    assert close(weights(net), weights(trained_plainly(name, batches()[:4])))
    assert not [pair.name for pair in flat.perturbation.pairs if "_orig_mod" in pair.name]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.:DeprecationWarning")  # torch's own
def test_a_compiled_step_of_the_optimizer() -> None:
    flat, net, optimizer = started("EFMLoRA")
    torch._dynamo.reset()
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches()[:4]:
            loss(net, batch).backward()
            step()
            optimizer.zero_grad()
    assert flat.step == 4
    # A compiled AdamW counts in float32.
    assert close(weights(net), weights(trained_plainly("EFMLoRA", batches()[:4])), 1e-6)


# -- several optimizers


def halves(net: nn.Module) -> list[torch.optim.Optimizer]:
    first = [p for name, p in net.named_parameters() if p.requires_grad and ".model.0." in name]
    others = [p for name, p in net.named_parameters() if p.requires_grad and ".model.0." not in name]
    return [torch.optim.AdamW(each, lr=3e-3) for each in (first, others)]


def test_several_optimizers_take_one_object_each() -> None:
    """The second optimizer steps every other batch; each object has its own count, average and ball."""
    both, alone = net_of(), net_of()
    for net, count in ((both, 2), (alone, 1)):
        optimizers = halves(net)
        flats = [method_of("EFMLoRA", net, optimizer, 0.3) for optimizer in optimizers[:count]]
        for index, batch in enumerate(batches()):
            loss(net, batch).backward()
            for optimizer in optimizers[: 1 + index % 2]:
                optimizer.step()
                optimizer.zero_grad()
        assert [flat.step for flat in flats] == [10, 5][:count]
        for flat in flats:
            for pair in flat.perturbation.pairs:
                assert 0 < float((pair.scaling * E_hat(flat)[pair.name] @ pair.A.detach()).norm()) < 0.33
            flat.close()
        assert_no_trace(net)
    assert not same(weights(both), weights(alone))
