"""EFMLoRA and FMLoRA in plain PyTorch: the same weights as with the callbacks; clean, scaled and compiled."""

import copy
import logging
from functools import partial
from typing import Any

import pytest
import torch
from float64_runs import BETA, Automatic, fit_in_float64, loss, optimizer_of
from helpers import E_hat, assert_no_trace, is_perturbed, same, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from loop_runs import METHODS, batches, method_of, net_of, run, schedule, seeds, started, train, trained_plainly
from pytorch_optimizer import TRAC, Lookahead, OrthoGrad, ScheduleFreeWrapper
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA, FMLoRA, LearningRateRho


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
        # The loop's E comes from the clipped gradients, which have the same direction but other rounding errors.
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


@pytest.mark.parametrize("name", METHODS)
def test_a_pass_without_the_adapter_leaves_a_frozen_a_frozen(name: str) -> None:
    """LoRA-FA with a reference pass, after which peft lets A require a gradient that no optimizer clears.

    Nor does a loss scaler look at it, so that it may stay infinite.
    """
    ends = []
    for refers in (False, True):
        net = net_of()
        for key, parameter in net.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in key)
        optimizer = optimizer_of(net)
        flat = method_of(name, net, optimizer, 0.3)

        def refer(index: int, net: Any = net, flat: Any = flat, refers: bool = refers) -> None:
            if refers:
                with net.disable_adapter(), torch.no_grad():
                    net(batches()[0][0])
                A = net.base_model.model[0].lora_A["default"].weight
                A.grad = torch.full_like(A, torch.inf)
                if index == 5:
                    flat.look_again()

        run(flat, net, optimizer, batches(), after_step=refer)
        assert net.base_model.model[0].lora_A["default"].weight.requires_grad == refers
        ends.append([weights(net), flat.perturbation.state_dict()["E"]])
    assert same(*ends)


# -- steps of other kinds


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_scaler_changes_nothing_and_an_overflow_moves_nothing(name: str, fused: bool) -> None:
    """A power of two doesn't change a bit. A fused optimizer skips steps by itself, after its hooks."""
    plain, net = net_of(), net_of()

    def start(net: nn.Module) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(trained(net), lr=3e-3, weight_decay=0.1, fused=fused)
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


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def last_layer_and_others(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    of_last = [p for name, p in net.named_parameters() if p.requires_grad and ".model.4." in name]
    others = [p for name, p in net.named_parameters() if p.requires_grad and ".model.4." not in name]
    return of_last, others


def test_several_optimizers_take_one_object_each() -> None:
    """The second optimizer steps every other batch; each object has its own count, average and ball."""
    both, alone = net_of(), net_of()
    for net, count in ((both, 2), (alone, 1)):
        optimizers = [torch.optim.AdamW(part, lr=3e-3) for part in last_layer_and_others(net)]
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


# -- optimizers that wrap others, that step more than once, or that have more parameters later


class StepsTwice(torch.optim.AdamW):
    """Takes two steps in its step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups[0]["params"], lr=1e-2)

    def step(self, closure: Any = None) -> Any:
        super().step()
        return super().step()


WRAPPERS = {
    "StepsTwice": StepsTwice,
    "Lookahead": lambda inner: Lookahead(inner, k=2),
    "OrthoGrad": OrthoGrad,
    "TRAC": TRAC,
    "ScheduleFree": ScheduleFreeWrapper,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_gradients_of_a_wrapper_are_those_before_its_step(name: str) -> None:
    """OrthoGrad changes them in its step; under Lightning's Trainer, the callback also runs before that."""
    net = net_of()
    optimizer = WRAPPERS[name](optimizer_of(net))
    flat = method_of("EFMLoRA", net, optimizer, 0.3)
    seen = []
    original = flat.method.use_gradients

    def use_gradients(also_finite: Any) -> None:
        seen.append([parameter.grad.clone() for parameter in trained(net)])
        original(also_finite)

    flat.method.use_gradients = use_gradients
    if name == "ScheduleFree":
        optimizer.train()
    for batch in batches()[:4]:
        loss(net, batch).backward()
        before = [parameter.grad.clone() for parameter in trained(net)]
        optimizer.step()
        optimizer.zero_grad()
        assert same(seen[-1], before)
    assert (flat.step, len(seen)) == (4, 4)
    # The state is in the inner optimizer's, which each wrapper contains.
    state = copy.deepcopy(optimizer.state_dict())
    run(flat, net, optimizer, batches()[4:5])
    if name in ("Lookahead", "OrthoGrad"):
        optimizer.load_state_dict(state)
        assert flat.step == 4


class Fails(torch.optim.AdamW):
    """Like an optimizer that runs out of memory for its first moments."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise torch.OutOfMemoryError
        return super().step(closure)


@pytest.mark.parametrize("name", ["EFMLoRA", "FMLoRA"])
def test_after_a_step_that_raised_the_next_one_counts(name: str) -> None:
    net = net_of()
    optimizer = Fails(trained(net), lr=1e-2)
    flat = method_of(name, net, optimizer, 0.3)
    run(flat, net, optimizer, batches()[:2])
    optimizer.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        run(flat, net, optimizer, batches()[2:3])
    optimizer.fails = False
    optimizer.zero_grad()
    run(flat, net, optimizer, batches()[3:5])
    assert flat.step == 5


def test_pairs_that_the_optimizer_lacks_are_named_and_perturbed_once_they_join_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in gradual unfreezing."""
    net = net_of()
    of_last, others = last_layer_and_others(net)
    optimizer = torch.optim.AdamW(of_last, lr=1e-2)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        flat = method_of("EFMLoRA", net, optimizer, 0.3)
    assert (
        "EFMLoRA leaves unperturbed: 2 pairs that the optimizer lacks, such as base_model.model.0.lora_B" in caplog.text
    )
    run(flat, net, optimizer, batches()[:2])
    before = flat.state_dict()["perturbation"]["E"]
    assert len(before) == 1
    optimizer.add_param_group({"params": others})
    flat.look_again()
    run(flat, net, optimizer, batches()[2:3])
    after = flat.state_dict()["perturbation"]["E"]
    assert len(after) == 3
    assert all(E.any() for E in after.values())
    run(flat, net, optimizer, batches()[3:])
    assert flat.step == len(batches())


def test_a_rate_that_can_not_be_followed_any_more_is_warned_of() -> None:
    net = net_of()
    of_last, others = last_layer_and_others(net)
    optimizer = torch.optim.AdamW(of_last, lr=1e-2)
    flat = method_of("EFMLoRA", net, optimizer, LearningRateRho(0.3))
    run(flat, net, optimizer, batches()[:2])
    optimizer.add_param_group({"params": others, "lr": 1e-3})
    with pytest.warns(UserWarning, match=r"several parameter groups: .* Until then the first group's is followed"):
        flat.look_again()
    run(flat, net, optimizer, batches()[2:])
    assert (flat.step, len(flat.method.pairs)) == (len(batches()), 3)


def test_an_optimizer_with_a_state_from_the_start_is_no_late_one() -> None:
    net = net_of()
    optimizer = torch.optim.Adagrad(trained(net), lr=0.1)
    flat = method_of("EFMLoRA", net, optimizer, 0.3)
    run(flat, net, optimizer, batches()[:3])
    assert flat.step == 3


def test_a_foreign_state_is_refused_in_words() -> None:
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:2])
    for state in ({"lr": 0.1}, {"step": 2}, {**flat.state_dict(), "perturbation": {"F": {}}}):
        with pytest.raises(MisconfigurationException, match="the state was not saved by EFMLoRA"):
            flat.load_state_dict(state)
    with pytest.raises(MisconfigurationException, match="the state was not saved by EFMLoRA"):
        EFMLoRA(0.3).per_optimizer.load_state_dict({"lr": 0.1})
    assert flat.step == 2
