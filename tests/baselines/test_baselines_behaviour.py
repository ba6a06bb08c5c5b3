"""The baselines in a real Trainer: what other code sees, settings that must not change, early ends of steps, refusals.

For size 0, resuming, exceptions and refused fits, see tests/callbacks/test_resume.py,
test_steps_that_end_early.py and test_refused_fits.py.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BASELINES, ByHand, Classifier, ResumableLoader, assert_no_trace, fit, make_loader, same, weights
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.amp import GradScaler

from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation

PERTURBING = ("SAM", "LoRASAM", "RandomPerturbation", "BiLoRA")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (RandomPerturbation(0.1, seed=1), RandomPerturbation(0.1, seed=2), "seed must be 1"),
        (BalancednessRegularization(0.1), BalancednessRegularization(0.1, "oBAR"), "kind must be 'nBAR'"),
        (BiLoRA(0.1), BiLoRA(0.1, rank=3), "rank must be 8"),
    ],
)
def test_settings_that_a_resumed_run_must_keep(first: Any, second: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"{message} as in the checkpoint"):
        second.method.load_state_dict(first.method.state_dict(), [])


HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_start")


@pytest.mark.parametrize("name", PERTURBING)
def test_others_compute_with_clean_weights(tmp_path: Path, name: str) -> None:
    """Outside of the passes; for the stored weights inside them, see callbacks/test_clean_weights.py."""
    module, x, looks = Classifier(), torch.ones(2, 6), []

    def look(*args: Any, **kwargs: Any) -> None:
        clean, generator = copy.deepcopy(module.net), torch.get_rng_state()
        assert_no_trace(clean)
        assert torch.equal(module.net(x), clean(x))
        assert torch.equal(torch.get_rng_state(), generator)
        looks.append(weights(module))

    early, late = (type(each, (Callback,), dict.fromkeys(HOOKS, look))() for each in ("Early", "Late"))
    fit(tmp_path, module, [early, BASELINES[name](0.5), late], val=make_loader(2))
    assert len(looks) == 2 * (3 * 12 + 2 * 2)
    assert not any(m._forward_hooks for m in module.modules())


# -- steps that end early


def overflowing() -> ResumableLoader:
    """Six batches, the fourth of which has an infinite loss."""
    batches = [list(batch) for batch in make_loader(6)]
    batches[3][2] = torch.full((4,), torch.inf)
    return ResumableLoader(batches)


@pytest.mark.parametrize("name", BASELINES)
def test_a_step_that_the_loss_scaler_skips_changes_nothing(tmp_path: Path, name: str) -> None:
    module, steps = Classifier(), []
    notes = type("Notes", (Callback,), {"on_train_batch_end": lambda *args: steps.append(weights(module))})()
    scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=10**6)
    plugins = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(tmp_path, module, [BASELINES[name](0.5), notes], overflowing(), plugins=plugins, max_epochs=1)
    assert [same(one, other) for one, other in zip(steps[1:], steps, strict=False)].count(True) == 1
    assert all(value.isfinite().all() for value in steps[5].values())


@pytest.mark.parametrize("fused", [False, True])
def test_auxiliary_pairs_climb_by_unscaled_gradients(tmp_path: Path, fused: bool) -> None:
    """With an eps of which a scaled gradient would take no notice. A fused optimizer unscales in its own step."""

    class WithAdam(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.1, eps=0.1, fused=fused)

    ends = []
    for scale in (1.0, 2.0**12):
        module, callback = WithAdam(), BiLoRA(0.5)
        scaler = GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        # In bfloat16, in which a power of two changes no digit.
        plugin = MixedPrecision("bf16-mixed", "cpu", scaler=None)
        plugin.scaler = scaler
        fit(tmp_path, module, [callback], plugins=plugin, max_epochs=1)
        ends.append([weights(module), callback.state_dict()])
    assert same(*ends)


class StepsTwice(ByHand):
    """Two optimizer steps in one training_step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            self.outputs.append(self.net(torch.ones(1, 6)).detach())
            super().training_step(batch, batch_idx)


@pytest.mark.parametrize("name", ["nBAR", "oBAR", "RandomPerturbation", "BiLoRA"])
def test_manual_optimization(tmp_path: Path, name: str) -> None:
    callback, module = BASELINES[name](0.3), StepsTwice(lr=0.0)
    module.optimizer_class, module.outputs = torch.optim.SGD, []
    fit(tmp_path, module, [callback], make_loader(3), max_epochs=1)
    assert callback.step == 6
    if name == "BiLoRA":  # its pairs climb at the optimizer's rate, which is 0 here
        for saved in callback.state_dict()["auxiliary"].values():
            assert saved["ascent"]["state"][0]["step"] == 6
    elif name in PERTURBING:  # each step has its own perturbation
        outputs = torch.cat(module.outputs)
        assert (torch.cdist(outputs, outputs) + torch.eye(6) > 1e-4).all()
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAM(-1), "SAM: rho must be a finite number >= 0 or a RhoSchedule, got -1"),
        (lambda: LoRASAM(0.1, every_n_steps=0), "LoRASAM: every_n_steps must be an integer >= 1, got 0"),
        (lambda: RandomPerturbation("a"), "RandomPerturbation: sigma must be a finite number >= 0 or a RhoSchedule"),
        (lambda: RandomPerturbation(0.1, seed=-1), "seed must be an integer >= 0, got -1"),
        (lambda: BalancednessRegularization(None), "alpha must be a finite number >= 0 or a RhoSchedule, got None"),
        (lambda: BalancednessRegularization(1, "xBAR"), "kind must be 'nBAR' or 'oBAR', got 'xBAR'"),
        (lambda: BalancednessRegularization(-1, 3), "BalancednessRegularization: 2 problems"),
        (lambda: BiLoRA(0.1, rank=0), "rank must be an integer >= 1, got 0"),
        (lambda: BiLoRA(-1, rank=1.5, seed=-1), "BiLoRA: 3 problems"),
    ],
)
def test_values(make: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_lora_sam_leaves_a_frozen_A(tmp_path: Path) -> None:
    module = Classifier()
    for name, p in module.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_A" not in name)
    before = weights(module)
    fit(tmp_path, module, [LoRASAM(0.5)])
    assert all(same(v, before[n]) for n, v in weights(module).items() if "lora_A" in n)


YAML: dict[str, dict[str, Any]] = {
    "LoRASAM": {"rho": 0.1},
    "SAM": {"rho": {"class_path": "lightning_flatlora.LinearRho", "init_args": {"start": 1, "end": 0}}},
    "RandomPerturbation": {"sigma": 0.05, "seed": 3},
    "BalancednessRegularization": {"alpha": 1, "kind": "oBAR"},
    "BiLoRA": {"rho": 0.5, "rank": 4, "seed": 3},
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name: str) -> None:
    """In the form in which LightningCLI reads an entry of trainer.callbacks."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    entry = {"class_path": f"lightning_flatlora.baselines.{name}", "init_args": YAML[name]}
    assert type(parser.instantiate(parser.parse_object({"callback": entry})).callback).__name__ == name
