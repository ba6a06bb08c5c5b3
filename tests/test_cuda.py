"""The package on a CUDA device: `make gpu-test`. On other machines these tests are skipped."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FRONT_ENDS, E_hat, build, driver_of, fit, make_loader, make_net, same, weights
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.amp import GradScaler

from lightning_flatlora import EFMLoRA, FlatnessMonitor, FMLoRA, loops
from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation
from lightning_flatlora.full_weight import WeightNoise
from lightning_flatlora.perturbation import Perturbation

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, anything that makes the host wait for the device is an error."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_float64_on_the_device_equals_the_cpu(tmp_path: Path, front_end: str) -> None:
    ends = []
    for accelerator in ("cpu", DEVICE):
        module, callbacks, more = build(front_end, net=make_net().double(), accumulate=2)
        loader = make_loader(dtype=torch.float64)
        trainer = fit(tmp_path, module, callbacks, loader, accelerator=accelerator, precision="64-true", **more)
        ends.append((weights(module.cpu()), E_hat(driver_of(trainer))))
    for on_cpu, on_device in zip(*ends, strict=True):
        assert all(torch.allclose(on_device[name].cpu(), value, atol=1e-8) for name, value in on_cpu.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.filterwarnings("ignore:.*is stored in torch.bfloat16")
def test_every_precision_trains_flat(tmp_path: Path, front_end: str, precision: str) -> None:
    module, callbacks, more = build(front_end)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    trainer = fit(tmp_path, module, callbacks, make_loader(), accelerator=DEVICE, precision=precision, **more)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert all(torch.isfinite(weight).all() for weight in weights(module).values())
    perturbation = driver_of(trainer).perturbation
    E = perturbation.state_dict()["E"]
    assert {e.dtype for e in E.values()} == {torch.float32}
    pairs = perturbation.pairs
    radius = sum((p.scaling * E[p.name] @ p.A.detach().cpu().float()).square().sum() for p in pairs).sqrt()
    assert 0.1 < radius <= 0.5 * 1.5


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_16_mixed_with_an_overflow_goes_on_as_without_that_batch(tmp_path: Path, front_end: str) -> None:
    """The first scale overflows; once it has fallen, the run trains, and no E was spoiled."""
    module, callbacks, more = build(front_end)
    scaler = GradScaler(DEVICE, init_scale=2.0**40, growth_interval=10**6)
    seen: list[bool] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(all(torch.isfinite(e).all() for e in E_hat(driver_of(trainer)).values()))

    plugin = MixedPrecision("16-mixed", DEVICE, scaler)
    trainer = fit(tmp_path, module, [*callbacks, Look()], make_loader(60), accelerator=DEVICE, plugins=plugin, **more)
    assert scaler.get_scale() < 2.0**40
    assert all(seen)
    assert any((e != 0).any() for e in E_hat(driver_of(trainer)).values())
    assert not same(weights(module.cpu()), weights(build(front_end)[0]))


@pytest.mark.parametrize("norm_scope", ["global", "layer"])
@pytest.mark.parametrize("estimator", ["average", "projected"])
def test_the_engine_never_waits_for_the_device(estimator: Any, norm_scope: Any) -> None:
    from lightning_flatlora import find_pairs

    net = make_net().to(DEVICE)
    perturbation = Perturbation(find_pairs(net).pairs, estimator, norm_scope)
    perturbation.install()
    inputs = torch.randn(4, 6, device=DEVICE)
    for _ in range(2):  # the first call creates handles and workspaces
        net(inputs).sum().backward()
        torch.cuda.synchronize()
        with no_waiting():
            fresh = perturbation.ascend(0.5, at_perturbed=True, also_finite=list(net.parameters()))
            perturbation.average(fresh, beta=0.9)
            perturbation.assign(fresh)
            with perturbation.applied():
                net(inputs)
    perturbation.uninstall()


@pytest.mark.parametrize(
    "callback_class", [EFMLoRA, FMLoRA, LoRASAM, SAM, RandomPerturbation, BiLoRA, BalancednessRegularization]
)
def test_the_hooks_of_a_step_never_wait_for_the_device(tmp_path: Path, callback_class: Any) -> None:
    steps = 0

    class Watched(callback_class):  # type: ignore[misc, valid-type]
        def on_train_batch_start(self, *args: Any) -> None:
            with no_waiting():
                super().on_train_batch_start(*args)

        def on_before_optimizer_step(self, *args: Any) -> None:
            nonlocal steps
            steps += 1
            with no_waiting():
                super().on_before_optimizer_step(*args)

    module, _, more = build("plain")
    fit(tmp_path, module, [Watched(0.5)], make_loader(), accelerator=DEVICE, **more)
    assert steps > 5


@pytest.mark.parametrize("moves_later", [False, True])
def test_a_loop_never_waits_and_follows_a_model_that_has_moved(moves_later: bool) -> None:
    net = make_net().to("cpu" if moves_later else DEVICE)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02, foreach=True)
    flat = loops.EFMLoRA(net, optimizer, 0.5)
    net.to(DEVICE)
    flat.look_again()
    inputs = torch.randn(4, 6, device=DEVICE)
    for index in range(4):
        net(inputs).square().sum().backward()
        torch.cuda.synchronize()
        with no_waiting() if index > 1 else nullcontext():  # the first steps create states, handles and workspaces
            optimizer.step()
        optimizer.zero_grad()
    assert flat.step == 4
    assert all(float(E.norm()) > 0 for E in E_hat(flat).values())
    assert {stack.E.device.type for stack in flat.perturbation._stacks} == {DEVICE}


def test_noise_is_the_same_in_both_directions_and_is_not_waited_for() -> None:
    net = make_net().double().to(DEVICE)
    noise, inputs = WeightNoise(net), torch.randn(4, 6, device=DEVICE, dtype=torch.float64)
    net(inputs)
    torch.cuda.synchronize()
    with no_waiting(), noise.applied(0.5, seed=3):
        pass
    with noise.applied(0.5, seed=3):
        assert torch.autograd.gradcheck(net, inputs.requires_grad_())  # fails if backward drew different noise


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_monitor_leaves_a_run_as_it_is(tmp_path: Path, front_end: str) -> None:
    ends = []
    for monitors in ([], [FlatnessMonitor(0.5, every_n_steps=3)]):
        module, callbacks, more = build(front_end, net=make_net(dropout=0.5))
        trainer = fit(tmp_path, module, [*callbacks, *monitors], make_loader(), accelerator=DEVICE, **more)
        ends.append(weights(module))
    assert same(*ends)
    assert trainer.callback_metrics["flatness/sharpness"].isfinite()


def test_both_passes_draw_the_same_dropout_masks(tmp_path: Path) -> None:
    """With a negligible rho, FMLoRA's descent has the loss of its ascent."""
    module, callbacks, more = build("fmlora", rho=1e-12, net=make_net(dropout=0.5))
    losses: list[torch.Tensor] = []
    original = module.loss

    def loss(batch: Any, batch_idx: int) -> Any:
        losses.append(original(batch, batch_idx))
        return losses[-1]

    module.loss = loss
    fit(tmp_path, module, callbacks, make_loader(), accelerator=DEVICE, **more)
    assert len(losses) == 24
    assert all(torch.equal(first, second) for first, second in zip(losses[::2], losses[1::2], strict=True))
