"""EFMLoRA and FMLoRA in plain PyTorch: the callbacks' weights bit for bit, clean, resumed, scaled and compiled."""

import copy
import sys
import types
from typing import Any

import pytest
import torch
from float64_runs import BETA, Automatic, fit_in_float64, optimizer_of
from helpers import assert_no_trace, is_perturbed, make_net, same, weights
from loop_runs import Seeds, batches, method_of, net_of, run, schedule, train
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA, FMLoRA, LearningRateRho, LinearRho, NoPairsError, loops
from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.wrappers import unwrapped

METHODS = ("EFMLoRA", "FMLoRA")


@pytest.mark.parametrize(("window", "clip"), [(1, None), (4, 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_weights_equal_the_callbacks_bit_for_bit(
    name: str, dtype: torch.dtype, window: int, clip: float | None
) -> None:
    """With dropout, schedules of rho and of the learning rate, accumulation and clipping."""
    ours, theirs = net_of(dtype, dropout=0.2), net_of(dtype, dropout=0.2)
    flat = train(name, ours, batches(dtype), window=window, clip=clip)
    callback: Any = EFMLoRA(schedule(), beta=BETA) if name == "EFMLoRA" else FMLoRA(schedule())
    precision = "64-true" if dtype == torch.float64 else "32-true"
    settings = {"accumulate_grad_batches": window, "gradient_clip_val": clip, "precision": precision}
    loader = DataLoader(batches(dtype), batch_size=None)
    fit_in_float64(Automatic(theirs), 1, [Seeds(), callback], loader, **settings)
    assert same(weights(ours), weights(theirs))
    assert flat.step == callback.step == -(-len(batches()) // window)
    E, other = flat.perturbation.state_dict()["E"], callback.perturbation.state_dict()["E"]
    assert same(list(E.values()), list(other.values()))
    assert all(float(each.norm()) > 0 for each in E.values())
    assert_no_trace(ours)


@pytest.mark.parametrize("name", METHODS)
def test_rho_zero_is_the_plain_loop_bit_for_bit_and_more_is_not(name: str) -> None:
    finals = []
    for each, rho in ((None, None), (name, 0.0), (name, 0.3)):
        net = net_of(dropout=0.2)
        train(each, net, batches(), rho)
        finals.append(weights(net))
    assert same(finals[0], finals[1])
    assert not same(finals[0], finals[2])


@pytest.mark.parametrize("name", METHODS)
def test_stored_weights_are_clean_and_layers_read_them_outside_of_a_pass(name: str) -> None:
    net = net_of()
    optimizer = optimizer_of(net)
    flat = method_of(name, net, optimizer)
    x, y = batches()[0]
    seen: list[bool] = []
    for _ in range(3):
        stored = copy.deepcopy(net.state_dict())
        for each_pass in flat.training_passes():
            with each_pass:
                seen.append(is_perturbed(net))
                nn.functional.cross_entropy(net(x), y).backward()
                assert same(dict(net.state_dict()), dict(stored))
            assert not is_perturbed(net)
        flat.before_step()
        assert same(dict(net.state_dict()), dict(stored))
        optimizer.step()
        optimizer.zero_grad()
    assert seen == ([False, True, True] if name == "EFMLoRA" else [False, True] * 3)
    for each_pass in flat.training_passes():
        with pytest.raises(ZeroDivisionError), each_pass:
            raise ZeroDivisionError
        assert not is_perturbed(net)
        assert all(p.grad is None for p in net.parameters())


def test_buffers_count_a_batch_once_and_gradients_of_the_ascent_are_dropped() -> None:
    net = nn.Sequential(make_net(), nn.BatchNorm1d(3))
    flat = loops.FMLoRA(net, optimizer_of(net), 0.5)
    for each_pass in flat.training_passes():
        with each_pass:
            net(torch.randn(4, 6)).square().sum().backward()
            gradient = net[1].weight.grad.clone()
    assert int(net[1].num_batches_tracked) == 1
    assert same(net[1].weight.grad, gradient)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_loop_equals_an_uninterrupted_one(name: str) -> None:
    whole, first = net_of(), net_of()
    saved: dict[str, Any] = {}

    def keep(index: int) -> None:
        if index == 4:
            saved.update(copy.deepcopy({"net": net.state_dict(), "optimizer": optimizer.state_dict()}))
            saved["flat"] = flat.state_dict()

    train(name, whole, batches(), 0.3)
    net, optimizer = first, optimizer_of(first)
    flat = method_of(name, net, optimizer, 0.3)
    run(flat, net, optimizer, batches()[:5], after_step=keep)
    second = net_of()
    other = optimizer_of(second)
    resumed = method_of(name, second, other, 0.3)
    second.load_state_dict(saved["net"])
    other.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["flat"])
    run(resumed, second, other, batches()[5:])
    uninterrupted = net_of()
    optimizer = optimizer_of(uninterrupted)
    run(method_of(name, uninterrupted, optimizer, 0.3), uninterrupted, optimizer, batches())
    assert resumed.step == 10
    assert same(weights(second), weights(uninterrupted))
    with pytest.raises(MisconfigurationException, match="estimator must be 'average' as in the checkpoint"):
        method_of(name, second, other, 0.3, estimator="projected").load_state_dict(saved["flat"])
    with pytest.raises(MisconfigurationException, match="of 2 optimizers, and a loop's object follows one"):
        resumed.load_state_dict({**saved["flat"], "optimizers": [saved["flat"], saved["flat"]]})


def test_a_state_of_other_pairs_changes_nothing() -> None:
    net = net_of()
    flat = train("EFMLoRA", net, batches()[:2], 0.3)
    state = flat.state_dict()
    state["perturbation"]["E"]["another"] = torch.zeros(3, 2)
    state["perturbation"]["averaged"]["another"] = True
    other = method_of("EFMLoRA", net, optimizer_of(net), 0.3)
    with pytest.raises(MisconfigurationException, match="another is in the checkpoint but not in the model"):
        other.load_state_dict(state)
    assert other.step == 0
    assert not other.perturbation.may_be_nonzero


def test_the_state_of_the_callback_is_taken_over() -> None:
    net, callback = net_of(), EFMLoRA(0.3, beta=BETA)
    fit_in_float64(Automatic(net), 1, [callback], DataLoader(batches(), batch_size=None))
    state = callback.state_dict()
    state["perturbation"]["E"] = {name.removeprefix("net."): E for name, E in state["perturbation"]["E"].items()}
    for kind in ("averaged", "missed"):
        table = state["perturbation"][kind]
        state["perturbation"][kind] = {name.removeprefix("net."): value for name, value in table.items()}
    flat = method_of("EFMLoRA", net, optimizer_of(net), 0.3)
    flat.load_state_dict(state)
    assert flat.step == 10
    assert same(flat.state_dict(), state)


@pytest.mark.parametrize("name", METHODS)
def test_a_scaler_changes_nothing_and_an_overflow_skips_the_step(name: str) -> None:
    """A power of two leaves every bit as it is; where any trained gradient is infinite Ê stays."""
    plain, net = net_of(), net_of()
    train(name, plain, batches()[:4], 0.3)
    optimizer, scaler = optimizer_of(net), GradScaler("cpu", init_scale=2.0**12)
    flat = method_of(name, net, optimizer, 0.3)
    head = next(p for key, p in net.named_parameters() if "modules_to_save" in key)
    for batch in [*batches()[:2], None, *batches()[2:4]]:
        x, y = batches()[0] if batch is None else batch
        before = flat.perturbation.state_dict()["E"]
        for each_pass in flat.training_passes():
            with each_pass:
                scaler.scale(nn.functional.cross_entropy(net(x), y)).backward()
        if batch is None:
            head.grad.fill_(torch.inf)
        flat.before_step()
        if batch is None and name == "EFMLoRA":
            assert same(flat.perturbation.state_dict()["E"], before)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert flat.step == 5
    unscheduled = net_of()
    other = optimizer_of(unscheduled)
    run(method_of(name, unscheduled, other, 0.3), unscheduled, other, batches()[:4])
    assert same(weights(net), weights(unscheduled))


def test_an_overflow_in_A_beside_a_frozen_B_leaves_the_average() -> None:
    """The scaler skips such a step, and nothing of this pair's gradients enters E."""
    net = net_of()
    optimizer, (x, y) = optimizer_of(net), batches()[0]
    flat = method_of("EFMLoRA", net, optimizer, 0.3)
    for each in range(2):
        if each == 1:
            pair = flat.perturbation.pairs[0]
            pair.B.requires_grad_(False)
        with flat.training_pass():
            nn.functional.cross_entropy(net(x), y).backward()
        if each == 1:
            pair.A.grad.fill_(torch.inf)
            before = flat.perturbation.state_dict()["E"]
        flat.before_step()
        optimizer.zero_grad()
    assert same(flat.perturbation.state_dict()["E"], before)


@pytest.mark.parametrize("name", METHODS)
def test_compiled(name: str) -> None:
    plain, net = net_of(), net_of()
    train(name, plain, batches()[:4])
    compiled = torch.compile(net, backend="eager")
    optimizer = optimizer_of(net)
    flat = method_of(name, compiled, optimizer)
    run(flat, compiled, optimizer, batches()[:4])
    other = net_of()
    optimizer = optimizer_of(other)
    run(method_of(name, other, optimizer), other, optimizer, batches()[:4])
    assert same(weights(net), weights(other))
    assert not [pair.name for pair in flat.perturbation.pairs if "_orig_mod" in pair.name]


def test_steps_without_a_refresh_and_frozen_pairs() -> None:
    net = net_of()
    optimizer = optimizer_of(net)
    flat = loops.FMLoRA(net, optimizer, 0.3, start_step=1, every_n_steps=2)
    counts = []
    for batch in batches()[:4]:
        passes = 0
        for each_pass in flat.training_passes():
            with each_pass:
                nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
            passes += 1
        counts.append(passes)
        flat.before_step()
        optimizer.step()
        optimizer.zero_grad()
    assert counts == [1, 2, 1, 2]
    assert len(list(flat.training_passes())) == 1
    flat.before_step()
    for key, p in net.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_B" not in key)
    assert flat.method.refreshes
    assert len(list(flat.training_passes())) == 1


def test_rho_may_follow_the_learning_rate() -> None:
    net = net_of()
    optimizer = optimizer_of(net)
    flat = loops.EFMLoRA(net, optimizer, LearningRateRho(0.4))
    assert flat.current_rho == 0.4
    optimizer.param_groups[0]["lr"] /= 4
    assert flat.current_rho == 0.1
    assert loops.EFMLoRA(net, optimizer, LinearRho(2.0, 0.0), total_steps=4).current_rho == 2.0


def test_a_compiled_model_of_length_zero_is_unwrapped() -> None:
    class Empty(nn.Sequential):
        def __len__(self) -> int:
            return 0

    model = Empty(make_net())
    assert unwrapped(torch.compile(model, backend="eager")) is model


# -- what is refused


def refusal(model: nn.Module, method: type[Any] = loops.FMLoRA, rho: Any = 0.3, **settings: Any) -> str:
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MisconfigurationException) as caught:
        method(model, optimizer, rho, **settings)
    assert_no_trace(model)
    return str(caught.value)


def of_library(name: str) -> type[nn.Module]:
    return type("Engine", (nn.Sequential,), {"__module__": f"{name}.runtime.engine"})


def test_what_wraps_a_model_otherwise_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "DeepSpeed's Engine inside a model" in refusal(nn.Sequential(of_library("deepspeed")(make_net())))
    assert "Megatron keeps gradients" in refusal(nn.Sequential(of_library("megatron")(make_net())))
    assert "DataParallel copies the layers" in refusal(nn.DataParallel(make_net()))
    state = types.SimpleNamespace(model_parallel_is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)  # type: ignore[arg-type]
    assert "tensor parallelism splits the factors" in refusal(make_net(), loops.EFMLoRA)


class PipelineEngine:
    """What DeepSpeed's engine says of its configuration; the real one is in tests/distributed/test_deepspeed.py."""

    def zero_optimization_stage(self) -> int:
        return 3

    def zero_offload_optimizer(self) -> Any:
        return {"device": "cpu"}

    def managed_gradient_accumulation(self) -> bool:
        return False


def test_what_is_refused_of_deepspeeds_engine_is_named_together() -> None:
    problems = engine_problems(PipelineEngine(), takes_two_passes=True)
    for word in ("pipeline", "ZeRO-3", "offload_optimizer", "managed_gradient_accumulation", "use EFMLoRA"):
        assert sum(word in problem for problem in problems) == 1, word
    assert len(problems) == 5


def test_arguments_are_refused_together() -> None:
    said = refusal(make_net(), loops.EFMLoRA, -1.0, beta=2.0, every_n_steps=0, finder="litgpt")
    for word in ("rho must be", "beta must be", "every_n_steps must be", "finder must be"):
        assert word in said
    net = make_net()
    assert "set total_steps" in refusal(net, rho=LinearRho(1.0, 0.0))
    factors = [p for p in net.parameters() if p.requires_grad]
    assert "not in the optimizer" in refusal(net, optimizer=torch.optim.SGD(factors[:1], lr=0.1))
    assert "LBFGS takes several gradients" in refusal(net, optimizer=torch.optim.LBFGS(factors))
    with pytest.raises(NoPairsError, match=r"LoRA"):
        loops.EFMLoRA(nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), 0.3)


def test_arguments_of_the_other_method_are_refused() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="beta"):
        loops.FMLoRA(net, optimizer, 0.3, beta=0.5)
    with pytest.raises(TypeError, match="sync_ascent"):
        loops.EFMLoRA(net, optimizer, 0.3, sync_ascent=False)
    assert "total_steps must be an integer >= 1, got 0" in refusal(net, rho=LinearRho(1.0, 0.0), total_steps=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_without_before_step_or_the_other_way_round_is_refused(name: str) -> None:
    """In either order nothing would be perturbed, and nobody would see it."""

    def take_passes(flat: Any) -> None:
        for each_pass in flat.training_passes():
            with each_pass:
                nn.functional.cross_entropy(net(x), y).backward()

    net = net_of()
    optimizer, (x, y) = optimizer_of(net), batches()[0]
    first = method_of(name, net, optimizer, 0.3)
    with pytest.raises(RuntimeError, match=f"{name}.before_step came without a pass"):
        first.before_step()
    take_passes(first)
    before = weights(net)
    with pytest.raises(RuntimeError, match=f"about to step without {name}'s before_step"):
        optimizer.step()
    assert same(weights(net), before)
    first.before_step()
    optimizer.step()
    take_passes(first)
    # The first object was left in the middle of a window, and the second takes its place.
    second = method_of(name, net, optimizer, 0.3)
    take_passes(second)
    second.before_step()
    optimizer.step()
    take_passes(second)
    first.close()
    with pytest.raises(RuntimeError, match=f"about to step without {name}'s before_step"):
        optimizer.step()
    second.close()
    optimizer.step()


def test_a_pass_that_is_not_entered_is_refused() -> None:
    net = make_net()
    flat = loops.FMLoRA(net, torch.optim.SGD(net.parameters(), lr=0.1), 0.3)
    passes = flat.training_passes()
    next(passes)
    with pytest.raises(RuntimeError, match="the first pass was not entered"):
        next(passes)


def test_schedules_of_a_users_own_are_checked() -> None:
    class Negative(LinearRho):
        def __call__(self, *args: Any) -> float:
            return -1.0

    net = make_net()
    flat = loops.EFMLoRA(net, torch.optim.SGD(net.parameters(), lr=0.1), Negative(1.0, 0.0, total_steps=3))
    with flat.training_pass():
        net(torch.randn(4, 6)).sum().backward()
    with pytest.raises(MisconfigurationException, match=r"must give a finite number >= 0, and gave -1\.0 at step 0"):
        flat.before_step()
