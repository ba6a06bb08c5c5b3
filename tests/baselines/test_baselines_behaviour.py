"""The baselines in a real Trainer: size 0, resuming, what others see, and steps that end early."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_cases import BASELINES, TWO_PASSES, ByHand
from helpers import Classifier, ResumableLoader, assert_no_trace, fit, make_loader, make_net, same, weights
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.amp import GradScaler

from lightning_flatlora import EFMLoRA, FMLoRA, LearningRateRho, LinearRho, RhoSchedule
from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation

PERTURBING = ("SAM", "LoRASAM", "RandomPerturbation", "BiLoRA")


class Course(Callback):
    """The weights and the loss after every batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append((weights(pl_module), outputs["loss"]))


def course(tmp_path: Path, callbacks: list[Callback], accumulate: int, precision: str) -> Any:
    """Everything that a run with dropout, a scheduler and clipping leaves."""
    module, seen = Classifier(net=make_net(0.3)), Course()
    module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    settings = {"accumulate_grad_batches": accumulate, "precision": precision, "gradient_clip_val": 0.5}
    trainer = fit(tmp_path, module, [*callbacks, seen], make_loader(5), val=make_loader(2), **settings)
    return seen.seen, trainer.optimizers[0].state_dict(), torch.get_rng_state()


@pytest.mark.parametrize(("accumulate", "precision"), [(1, "bf16-mixed"), (2, "32-true")])
@pytest.mark.parametrize("name", BASELINES)
def test_size_zero_is_the_base_run_to_the_bit(tmp_path: Path, name: str, accumulate: int, precision: str) -> None:
    base = course(tmp_path, [], accumulate, precision)
    assert same(course(tmp_path, [BASELINES[name](0)], accumulate, precision), base)
    assert not same(course(tmp_path, [BASELINES[name](0.5)], accumulate, precision), base)


# -- resuming


def run(path: Path, callback: Any, accumulate: int, resume: Path | None = None) -> Any:
    module = Classifier()
    module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
    file = ModelCheckpoint(path, every_n_train_steps=1, save_top_k=-1, filename="{step}", auto_insert_metric_name=False)
    loader = ResumableLoader(list(make_loader(6)))
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": 3, "ckpt_path": resume}
    trainer = fit(path, module, [callback, file], loader, **settings)
    return weights(module), trainer.optimizers[0].state_dict(), callback.state_dict()


@pytest.mark.parametrize(("accumulate", "schedule"), [(1, LearningRateRho(0.5)), (2, LinearRho(1.0, 0.1))])
@pytest.mark.parametrize("name", BASELINES)
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str, accumulate: int, schedule: RhoSchedule) -> None:
    """In the middle and at the end of an epoch, with a size that changes from step to step."""
    per_epoch = 6 // accumulate
    whole = run(tmp_path, BASELINES[name](schedule), accumulate)
    assert whole[2]["step"] == 3 * per_epoch
    for step in (per_epoch, per_epoch + 1):
        assert same(run(tmp_path, BASELINES[name](schedule), accumulate, tmp_path / f"{step}.ckpt"), whole)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            RandomPerturbation(0.1, seed=1),
            RandomPerturbation(0.1, seed=2),
            "seed must be 1 as in the checkpoint, got 2",
        ),
        (
            BalancednessRegularization(0.1),
            BalancednessRegularization(0.1, "oBAR"),
            "kind must be 'nBAR' as in the checkpoint, got 'oBAR'",
        ),
        (BiLoRA(0.1), BiLoRA(0.1, rank=3), "rank must be None as in the checkpoint, got 3"),
    ],
)
def test_settings_that_a_resumed_run_must_keep(tmp_path: Path, first: Any, second: Any, message: str) -> None:
    run(tmp_path, first, 1)
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, second, 1, tmp_path / "4.ckpt")


# -- what others see


@pytest.mark.parametrize("name", PERTURBING)
def test_stored_and_read_weights_in_other_hooks(tmp_path: Path, name: str) -> None:
    """Outside of a pass all see and compute with clean weights; inside they are stored clean, except SAM's."""
    module, x = Classifier(), torch.ones(2, 6)
    shadow = {"stored": weights(module)}
    looks: list[str] = []

    def look(where: str) -> None:
        assert same(weights(module), shadow["stored"]), where
        clean = copy.deepcopy(module.net)
        assert_no_trace(clean)
        if where not in ("step", "on_before_backward", "on_after_backward"):
            mode = torch.get_rng_state()
            assert torch.equal(module.net(x), clean(x)), where
            assert torch.equal(mode, torch.get_rng_state())
        looks.append(where)

    class Shadowed(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure()
            super().step()
            shadow["stored"] = weights(module)
            return loss

    class Looks(Callback):
        pass

    hooks = [f"on_train_batch_{when}" for when in ("start", "end")]
    hooks += ["on_before_optimizer_step", "on_validation_start", "on_validation_batch_start"]
    hooks += ["on_before_backward", "on_after_backward"] if name != "SAM" else []
    for hook in hooks:
        setattr(Looks, hook, lambda *args, where=hook: look(where))
    if name != "SAM":
        module.inside.append(lambda *_: look("step") if module.trainer.training else None)
    module.optimizer_class = Shadowed
    late = type("Late", (Looks,), {})
    fit(tmp_path, module, [Looks(), BASELINES[name](0.5), late()], val=make_loader(2))
    assert set(hooks) <= set(looks)
    assert_no_trace(module)
    assert not any(m._forward_hooks for m in module.modules())


# -- steps that end early


@pytest.mark.parametrize("name", PERTURBING)
@pytest.mark.parametrize("pass_number", [1, 2])
def test_an_exception_leaves_clean_weights(tmp_path: Path, name: str, pass_number: int) -> None:
    module, stored, calls = Classifier(), {}, []

    def interrupt(module: Any, batch_idx: int) -> None:
        calls.append(batch_idx)
        if calls.count(2) == 0 or (batch_idx == 2 and calls.count(2) == 1):
            stored.update(weights(module))
        if calls.count(2) == (pass_number if name in TWO_PASSES else 1):
            raise RuntimeError("stop here")

    module.inside.append(interrupt)
    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, module, [BASELINES[name](0.5)])
    assert same(weights(module), stored)
    assert_no_trace(module)
    assert not any(m._forward_hooks for m in module.modules())
    assert "training_step" not in module.__dict__


def overflowing() -> ResumableLoader:
    """Six batches, the fourth of which has an infinite loss."""
    batches = [list(batch) for batch in make_loader(6)]
    batches[3][2] = torch.full((4,), torch.inf)
    return ResumableLoader(batches)


@pytest.mark.parametrize("name", BASELINES)
def test_a_step_that_the_loss_scaler_skips_changes_nothing(tmp_path: Path, name: str) -> None:
    module, seen = Classifier(), Course()
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6)
    plugins = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(tmp_path, module, [BASELINES[name](0.5), seen], overflowing(), plugins=plugins, max_epochs=1)
    steps = [values for values, _ in seen.seen]
    assert [same(one, other) for one, other in zip(steps[1:], steps, strict=False)].count(True) == 1
    assert all(value.isfinite().all() for value in steps[5].values())


@pytest.mark.parametrize("name", ["nBAR", "oBAR", "RandomPerturbation", "BiLoRA"])
def test_manual_optimization(tmp_path: Path, name: str) -> None:
    callback, module = BASELINES[name](0.3), ByHand()
    module.lr, module.optimizer_class = 0.0, torch.optim.SGD
    fit(tmp_path, module, [callback], make_loader(3), max_epochs=1)
    assert callback.step == 6
    if name in PERTURBING:  # each step has its own
        outputs = torch.cat(module.outputs)
        assert (torch.cdist(outputs, outputs) + torch.eye(6) > 1e-4).all()
    assert not any(m._forward_hooks for m in module.modules())


# -- the YAML switch


@pytest.mark.parametrize(
    ("name", "init", "expected"),
    [
        ("LoRASAM", {"rho": 0.1}, LoRASAM),
        ("SAM", {"rho": {"class_path": "lightning_flatlora.LinearRho", "init_args": {"start": 1, "end": 0}}}, SAM),
        ("RandomPerturbation", {"sigma": 0.05, "seed": 3}, RandomPerturbation),
        ("BalancednessRegularization", {"alpha": 1, "kind": "oBAR"}, BalancednessRegularization),
        ("BiLoRA", {"rho": 0.5, "step_size": 0.2, "rank": 4, "seed": 3}, BiLoRA),
    ],
)
def test_yaml(name: str, init: dict[str, Any], expected: Any) -> None:
    """As LightningCLI reads an entry of trainer.callbacks."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    entry = {"class_path": f"lightning_flatlora.baselines.{name}", "init_args": init}
    assert type(parser.instantiate(parser.parse_object({"callback": entry})).callback) is expected


# -- compiled networks


@pytest.mark.parametrize("name", [*BASELINES, "EFMLoRA", "FMLoRA"])
def test_a_size_that_rises_from_zero_on_a_compiled_network(tmp_path: Path, name: str) -> None:
    """Compiled before the fit, by an evaluation, and in its first steps without any perturbation."""
    method = {**BASELINES, "EFMLoRA": EFMLoRA, "FMLoRA": FMLoRA}[name]
    found = []
    for compiled in (False, True):
        net = make_net()
        module = Classifier(net=net)
        if compiled:
            torch.compiler.reset()
            module.net = torch.compile(net, backend="eager")
            module.net(next(iter(make_loader()))[0])
        fit(tmp_path, module, [method(LinearRho(0.0, 0.5))], max_epochs=1)
        found.append(weights(net))
    assert same(*found)
    plain = Classifier()
    fit(tmp_path, plain, [], max_epochs=1)
    assert not same(weights(plain.net), found[1])
