"""FMLoRAModule does by hand what Lightning does for the FMLoRA callback; with EFMLoRA it uses the average.

Also, what a subclass may not do.
"""

from typing import Any

import lightning as L
import pytest
import torch
from helpers import (
    E_hat,
    TwoPassClassifier,
    build,
    driver_of,
    fit,
    is_perturbed,
    make_loader,
    make_net,
    same,
    trainer_of,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import Reference
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA, FMLoRAModule, LinearRho, find_pairs

# -- whole runs


class Watch(Callback):
    """Notes the learning rate at each batch's end, and rho at each batch's start."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.radii: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        callback = driver_of(trainer)
        self.radii.append((callback.step, callback.current_rho))


class Estimates:
    """Notes how many steps Lightning expects."""

    def configure_optimizers(self) -> Any:
        module: Any = self
        module.estimated = module.trainer.estimated_stepping_batches
        return super().configure_optimizers()  # type: ignore[misc]


def whole_run(
    front_end: str,
    *,
    rho: Any = 0.5,
    accumulate: int = 1,
    clip: tuple[str, float] | None = None,
    scheduler: Any = None,
    **kwargs: Any,
) -> tuple[dict[str, torch.Tensor], Watch, Any]:
    """35 batches in float64 with dropout; 7 batches per epoch leave a shorter last window."""
    net = make_net(dropout=0.2).double()
    module, callbacks, more = build(front_end, rho, net=net, accumulate=accumulate, own=Estimates)
    module.scheduler = scheduler
    if clip is not None and front_end == "fmlora":
        more |= {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    elif clip is not None:
        module.gradient_clip_algorithm, module.gradient_clip_val = clip
    watch = Watch()
    loader = make_loader(7, dtype=torch.float64)
    trainer = fit(None, module, [*callbacks, watch], loader, **{"max_epochs": 5, **more, **kwargs})
    assert module.estimated == trainer.global_step
    return weights(module), watch, trainer


def scheduled(kind: str) -> Any:
    """Scheduler configurations by name."""
    interval, frequency = kind.split("/")

    def make(optimizer: Any) -> dict[str, Any]:
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.8)
        return {"scheduler": scheduler, "interval": interval, "frequency": int(frequency)}

    return make


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, ("value", 0.003)), (3, ("norm", 0.05))])
@pytest.mark.parametrize("kind", ["step/1", "step/3", "epoch/2"])
def test_whole_run_equals_the_callback(kind, accumulate, clip):
    """In its weights, the number of steps, and each batch's learning rate."""
    settings = {"accumulate": accumulate, "clip": clip, "scheduler": scheduled(kind)}
    left, watch, trainer = whole_run("fmlora", **settings)
    right, other_watch, other = whole_run("module", **settings)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-12, msg=name)
    assert trainer.global_step == other.global_step == 5 * -(-7 // accumulate)
    assert driver_of(trainer).step == driver_of(other).step == trainer.global_step
    assert len(set(watch.rates)) > 1
    assert watch.rates == other_watch.rates


class EndsEarly:
    """Leaves out the last two batches of each epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 4 else None


@pytest.mark.parametrize("settings", [{}, {"max_steps": 6}], ids=["ended", "stopped"])
@pytest.mark.parametrize("kind", ["epoch/1", "epoch/2"])
def test_an_epoch_that_a_hook_ends_early_is_one(tmp_path, kind, settings):
    """As under automatic optimization, it counts as an epoch unless the run was stopped within it."""
    rates = []
    for front_end in ("plain", "module"):
        module, _, _ = build(front_end, rho=0.0, own=EndsEarly)
        module.scheduler = scheduled(kind)
        trainer = fit(tmp_path, module, [], max_epochs=4, **settings)
        rates.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))
    assert rates[0] == rates[1]
    # Lightning 2.5 itself treats such an epoch as one that was stopped.
    assert settings or rates[0][1] < module.lr or L.__version__.startswith("2.5")


class Visited:
    """Lets another Trainer evaluate it in the middle of a fit, then returns to its own."""

    def on_train_epoch_start(self: Any) -> None:
        own = self.trainer
        trainer_of(None, []).validate(self, make_loader(1), verbose=False)
        self.trainer = own


@pytest.mark.parametrize("front_end", ["module", "efmlora+module"])
def test_another_trainer_may_evaluate_the_module_in_the_middle_of_a_fit(front_end):
    """The module brings its callback to the other Trainer, too."""
    seen = []
    for own in (object, Visited):
        module, callbacks, _ = build(front_end, own=own)
        trainer = fit(None, module, callbacks, max_epochs=3)
        seen.append((trainer.global_step, weights(module)))
        assert not is_perturbed(module)
    assert same(*seen)


@pytest.mark.parametrize("validate_every", [2, 3])
def test_validation_inside_a_window_keeps_its_gradients(validate_every):
    """Lightning clears gradients before validation unless it accumulates, and doesn't know the module's window."""
    settings = {"accumulate": 3, "val": make_loader(1, dtype=torch.float64), "val_check_interval": validate_every}
    left, *_ = whole_run("fmlora", **settings)
    right, *_ = whole_run("module", **settings)
    assert same(left, right)


@pytest.mark.parametrize(
    "run", [{"max_epochs": 3}, {"max_epochs": 9, "max_steps": 10}, {"max_epochs": -1, "max_steps": 6}]
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_schedules_of_rho_span_the_same_steps(accumulate, run):
    """Like the callback's, the horizon counts optimizer steps, including shorter windows and max_steps."""
    settings = {"accumulate": accumulate, "rho": LinearRho(1.0, 0.0), **run}
    _, watch, trainer = whole_run("fmlora", **settings)
    _, other_watch, other = whole_run("module", **settings)
    assert trainer.global_step == other.global_step
    assert watch.radii == other_watch.radii
    last = LinearRho(1.0, 0.0, total_steps=trainer.global_step)(trainer.global_step - 1)
    assert watch.radii[-1] == (trainer.global_step - 1, pytest.approx(last))


# -- passes


@pytest.mark.parametrize("wrong", [3.0, "loss", {"value": 1}])
def test_compute_loss_must_return_a_loss(tmp_path, wrong):
    class Wrong(TwoPassClassifier):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            return wrong

    with pytest.raises(TypeError, match="compute_loss must return the loss, a dict"):
        fit(tmp_path, Wrong(0.5), [])
    missing = type("Missing", (TwoPassClassifier,), {"compute_loss": FMLoRAModule.compute_loss})
    with pytest.raises(NotImplementedError, match="Missing must define compute_loss"):
        fit(tmp_path, missing(0.5), [])


# -- clipping


class OwnHook:
    """A user's on_before_optimizer_step, which does not call super()."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen = getattr(self, "seen", 0) + 1
        self.gradient = max(float(p.grad.abs().max()) for p in self.parameters() if p.grad is not None)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_survives_the_users_own_hook(tmp_path, algorithm):
    ends = []
    for own, clip in ((object, 0.003), (OwnHook, 0.003), (OwnHook, None)):
        module, _, _ = build("module", own=own, gradient_clip_val=clip, gradient_clip_algorithm=algorithm)
        module.optimizer_class = torch.optim.SGD
        fit(tmp_path, module, [], max_epochs=1)
        ends.append(weights(module))
        if own is OwnHook:
            assert module.gradient > 0.003  # not yet clipped, as in automatic optimization
    assert module.seen == 6
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


@pytest.mark.parametrize("clip", [None, 0.5])
def test_clipping_may_be_the_subclass_own(tmp_path, clip):
    """The hook is called as in automatic optimization, even if no clipping is set."""
    seen = []

    class Own(TwoPassClassifier):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            seen.append((gradient_clip_val, gradient_clip_algorithm))
            for p in self.parameters():
                if p.grad is not None:
                    p.grad.zero_()

    module = Own(0.5, gradient_clip_val=clip)
    module.optimizer_class = torch.optim.SGD
    before = weights(module)
    fit(tmp_path, module, [], max_epochs=1)
    assert seen == [(clip, "norm")] * 6
    assert same(before, weights(module))


# -- what a subclass may not do


def test_a_module_that_does_not_give_its_callback_is_refused(tmp_path):
    module = type("Own", (TwoPassClassifier,), {"configure_callbacks": lambda self: []})(0.5)
    with pytest.raises(MisconfigurationException, match=r"was not set up.*super\(\)\.configure_callbacks\(\)"):
        fit(tmp_path, module, [])


def test_batches_that_the_loader_left_out_are_as_in_automatic_optimization(tmp_path):
    """None instead of a batch, at the start, in the middle or at the end of a window."""
    batches = list(make_loader(9))
    for index in (1, 3, 8):
        batches[index] = None
    loader = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    ends = []
    for front_end in ("fmlora", "module"):
        module, callbacks, more = build(front_end, accumulate=3)
        with pytest.warns(UserWarning, match="train_dataloader yielded None"):
            trainer = fit(tmp_path, module, callbacks, loader, **more)
        ends.append((trainer.global_step, list(weights(module).values())))
    assert same(*ends)


class SetsWindow(Estimates, TwoPassClassifier):
    """Sets the window when the devices are known, and again in its second epoch."""

    def setup(self, stage: str) -> None:
        self.accumulate_grad_batches = 3

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.accumulate_grad_batches = 2


def test_a_window_may_be_set_later_and_is_the_modules_alone(tmp_path):
    module, given = SetsWindow(0.5), TwoPassClassifier(0.5, accumulate_grad_batches=3)
    for each in (module, given):
        trainer = fit(tmp_path, each, [], max_epochs=1)
    assert same(weights(module), weights(given))
    assert module.estimated == trainer.global_step == 2
    module = SetsWindow(0.5)
    trainer = fit(tmp_path, module, [], max_epochs=2)
    assert trainer.global_step == 2 + 3
    # Setting it on the Trainer would change the steps at which loggers log.
    assert trainer.accumulate_grad_batches == 1
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 12


class Paired(Reference):
    """The callback together with the module, word for word (method.md, section 5)."""

    def one_pass_gradients(self, window: list[Any]) -> None:
        E = self.ema
        if self.due:
            self.loss(self.model, window[0]).backward()
            E = self.fresh()
            self.optimizer.zero_grad()
            if self.ema is None:
                self.ema = E
            else:
                self.ema = [(1 - self.beta) * old + self.beta * new for old, new in zip(self.ema, E, strict=True)]
        self.move(E)
        self.loss(self.model, window[0]).backward()
        self.move_back()


def loss(net: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("every_n_steps", [1, 2, 5])
def test_efmlora_beside_the_module_equals_the_literal_loop(tmp_path, every_n_steps, beta):
    """In refresh steps: fresh E at the clean point, Ê updated, descent at B + E; in others: one pass at B + Ê."""
    net, other = make_net().double(), make_net().double()
    loader = make_loader(6, dtype=torch.float64)
    module, callbacks, _ = build("efmlora+module", net=net, every_n_steps=every_n_steps, beta=beta)
    passes: list[bool] = []
    module.inside.append(lambda module, _: passes.append(is_perturbed(module)))
    fit(tmp_path, module, callbacks, loader, max_epochs=5)
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(other).pairs]
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.02)
    run = Paired(other, pairs, loss, optimizer, lambda step: 0.5, beta=beta, every_n_steps=every_n_steps)
    run.train(list(loader) * 5)
    for name, parameter in weights(other).items():
        torch.testing.assert_close(weights(net)[name], parameter, rtol=0, atol=1e-10, msg=name)
    for E, expected in zip(E_hat(callbacks[0]).values(), run.ema, strict=True):
        torch.testing.assert_close(E, expected, rtol=0, atol=1e-10)
    assert len(passes) == 30 + -(-30 // every_n_steps)
    assert callbacks[0].step == 30


def test_callback_given_by_the_module_itself(tmp_path):
    """EFMLoRA in configure_callbacks, after the module's own driver, works as in the Trainer's list."""

    class Own(TwoPassClassifier):
        def configure_callbacks(self) -> Any:
            return [*super().configure_callbacks(), EFMLoRA(0.5, every_n_steps=2)]

    module, (other, callbacks, _) = Own(0.5), build("efmlora+module")
    trainer = fit(tmp_path, module, [])
    fit(tmp_path, other, callbacks)
    assert same(weights(module), weights(other))
    assert next(c for c in trainer.callbacks if isinstance(c, EFMLoRA)).step == 12
