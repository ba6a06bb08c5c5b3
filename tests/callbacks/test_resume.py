"""A resumed run ends bit for bit like an uninterrupted one, and a run at rho = 0 like plain LoRA.

Files are ModelCheckpoint's, from within an epoch and from its end. Settings that would change the meaning of the state
are refused with the reason; the radius may change; a file without our state starts afresh. For resuming with another
rho, and other modules, see tests/test_hostile_modules.py.
"""

from contextlib import nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BASELINES,
    FRONT_ENDS,
    E_hat,
    ResumableLoader,
    assert_no_trace,
    build,
    calling,
    driver_of,
    fit,
    make_loader,
    make_net,
    same,
    trainer_of,
    two_adapters,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.amp import GradScaler

from lightning_flatlora import CosineRho, LearningRateRho

BATCHES, EPOCHS = 5, 3


def seed(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
    """Seed each batch by its number in the run, so that dropout continues as it would have."""
    torch.manual_seed(BATCHES * trainer.current_epoch + batch_idx)


class AtEnds(ModelCheckpoint):
    """A second ModelCheckpoint, with its own state key."""


def run(
    path: Path,
    front_end: str,
    *,
    resume: Path | None = None,
    accumulate: int = 1,
    precision: str = "32-true",
    dropout: float = 0.0,
    net: Any = None,
    **settings: Any,
) -> Any:
    """Train three epochs of five shuffled batches, save every step, and return the Trainer."""
    settings = {"rho": CosineRho(1.0, 0.2)} | settings
    net = make_net(dropout) if net is None else net
    module, callbacks, kwargs = build(front_end, net=net, accumulate=accumulate, **settings)
    module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
    callbacks = [calling(on_train_batch_start=seed), *callbacks]
    files = {"save_top_k": -1, "filename": "{step}", "auto_insert_metric_name": False}
    callbacks.append(ModelCheckpoint(path / "steps", every_n_train_steps=1, **files))
    callbacks.append(AtEnds(path / "ends", every_n_epochs=1, **files))  # a resumed run adds "-v1" to its files' names
    if precision == "16-mixed":
        scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=4)
        kwargs["plugins"] = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    else:
        kwargs["precision"] = precision
    loader = ResumableLoader(list(make_loader(BATCHES)))
    return fit(path, module, callbacks, loader, ckpt_path=resume, max_epochs=EPOCHS, **kwargs)


def state_of(trainer: Any) -> dict[str, Any]:
    """All state that must be equal at the end."""
    callback = driver_of(trainer)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "weights": weights(trainer.lightning_module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "E": E_hat(callback),
        "step": (callback.step, trainer.global_step, trainer.current_epoch),
        "callback": callback.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
    }


def assert_same_end(trainer: Any, other: Any) -> None:
    left, right = state_of(trainer), state_of(other)
    for name in left:
        assert same(left[name], right[name]), name


def resume_points(accumulate: int) -> list[str]:
    """Files by optimizer step: from within the second epoch, and from the end of the first."""
    per_epoch = -(-BATCHES // accumulate)
    return [f"steps/{per_epoch + 2}", f"steps/{per_epoch}", f"ends/{per_epoch}"]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"accumulate": 2},
    {"precision": "bf16-mixed"},
    {"precision": "16-mixed", "accumulate": 2},
    {"rho": LearningRateRho(1.0)},
    {"rho": 0.5, "norm_scope": "layer", "estimator": "projected"},
    {"rho": 0.5, "start_step": 3, "every_n_steps": 3},
    {"rho": CosineRho(1.0, 0.1, total_steps=9), "dropout": 0.3},
]
RUNS = [*product(FRONT_ENDS, SETTINGS), *product(BASELINES, ({}, {"accumulate": 2, "rho": LearningRateRho(0.5)}))]


@pytest.mark.parametrize(("front_end", "settings"), RUNS, ids=str)
def test_resumed_equals_uninterrupted(tmp_path, front_end, settings):
    if front_end == "efmlora+module":
        settings = {key: value for key, value in settings.items() if key != "start_step"}
    whole = run(tmp_path, front_end, **settings)
    for point in resume_points(settings.get("accumulate", 1)):
        assert_same_end(whole, run(tmp_path, front_end, resume=tmp_path / f"{point}.ckpt", **settings))


def both_adapters() -> Any:
    net = two_adapters()
    net.base_model.set_adapter(["default", "other"])
    return net


@pytest.mark.parametrize("front_end", ["efmlora", "efmlora+module"])
def test_another_adapter_is_refused(tmp_path, front_end):
    """Its state has another key, so the run would start from scratch."""
    run(tmp_path, front_end, net=both_adapters(), adapter_name="default")
    net = both_adapters()
    message = r"holds the state of .*'default'.*, but this is .*'other'.*: give that run's adapter_name"
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, front_end, resume=tmp_path / "steps" / "7.ckpt", net=net, adapter_name="other")
    assert_no_trace(net)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_refused_checkpoint_is_forgotten(tmp_path, front_end):
    """The same objects can then be trained without it, from the start."""
    run(tmp_path, front_end)
    net = make_net()
    module, callbacks, kwargs = build(front_end, net=net, estimator="projected", norm_scope="layer")
    module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
    loader = ResumableLoader(list(make_loader(BATCHES)))
    with pytest.raises(MisconfigurationException, match=r"(?s)estimator must be.*norm_scope must be"):
        fit(tmp_path, module, callbacks, loader, ckpt_path=tmp_path / "steps" / "7.ckpt", **kwargs)
    assert_no_trace(net)
    trainer = fit(tmp_path, module, callbacks, make_loader(BATCHES), max_epochs=1, **kwargs)
    assert driver_of(trainer).step == 5


def test_a_checkpoint_of_plain_lora_starts_afresh(tmp_path):
    """And warns that a schedule which only starts midway will not reach its end."""
    module, _, kwargs = build("plain")
    fit(tmp_path, module, [], max_epochs=1, **kwargs).save_checkpoint(tmp_path / "plain.ckpt")
    for rho in (CosineRho(1.0, 0.0), CosineRho(1.0, 0.0, total_steps=6)):
        module, callbacks, kwargs = build("efmlora", rho)
        trainer = trainer_of(tmp_path, callbacks, max_epochs=2, **kwargs)
        expected = pytest.warns(UserWarning, match=r"only now, at step 6 of 12, so rho=CosineRho.*set its total_steps")
        with expected if rho.total_steps is None else nullcontext():
            trainer.fit(module, make_loader(), make_loader(1), ckpt_path=tmp_path / "plain.ckpt")
        assert callbacks[0].step == 6
        assert (callbacks[0].current_rho == 0) is (rho.total_steps is not None)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_state_is_plain_and_small(tmp_path, front_end):
    """torch.load(weights_only=True) reads it; E is kept only for EFMLoRA, once, under clean names."""
    run(tmp_path, front_end)
    states = torch.load(tmp_path / "steps" / "7.ckpt", weights_only=True)["callbacks"]
    ours = {key: state for key, state in states.items() if "LoRA" in key}
    state, *others = ours.values()
    assert all("perturbation" not in other for other in others)
    assert state["step"] == 7
    if "efmlora" in front_end:
        names = [f"net.base_model.model.{layer}.lora_B.default.weight" for layer in (0, 2, 4)]
        assert sorted(state["perturbation"]["E"]) == names
        assert all(E.dtype == torch.float32 and E.device.type == "cpu" for E in state["perturbation"]["E"].values())
    else:
        assert "perturbation" not in state


class Course(Callback):
    """The weights after each batch, and the losses that the Trainer received."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.weights.append(weights(pl_module))
        # In automatic optimization Lightning returns the loss divided by the window.
        divisor = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self.losses.append(outputs["loss"] * divisor)


@cache
def course(front_end: str, accumulate: int, clip: float | None, precision: str) -> Any:
    """One run with dropout and a scheduler: weights and losses of each batch, Adam's state, the generator's state."""
    module, callbacks, kwargs = build(front_end, rho=0, net=make_net(0.3), accumulate=accumulate)
    if "module" in front_end:
        module.gradient_clip_val = clip
    else:
        kwargs["gradient_clip_val"] = clip
    module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    seen = Course()
    loader = make_loader(5)
    trainer = fit(None, module, [*callbacks, seen], loader, val=make_loader(2), precision=precision, **kwargs)
    states = trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.get_last_lr()
    return seen.weights, seen.losses, states, torch.get_rng_state()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.05)])
@pytest.mark.parametrize("front_end", [*FRONT_ENDS, *BASELINES])
def test_rho_zero_is_the_base_run(front_end, accumulate, clip, precision):
    base = course("plain", accumulate, clip, precision)
    ours = course(front_end, accumulate, clip, precision)
    for what, left, right in zip(("weights", "losses", "optimizer", "generator"), base, ours, strict=True):
        assert same(left, right), what
