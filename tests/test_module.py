"""FMLoRAModule does by hand what Lightning does for the FMLoRA callback: windows, clipping, schedulers, logging.

Both write the same algorithm, so their runs are compared whole, and the pair EFMLoRA + FMLoRAModule with a loop that is
written out here in plain PyTorch (weights moved and put back, dense algebra of tests/reference.py).
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import (
    Classifier,
    E_hat,
    Losses,
    TwoPassClassifier,
    assert_no_trace,
    build,
    driver_of,
    fit,
    is_perturbed,
    make_loader,
    make_net,
    same,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from reference import ascent, perturbations
from torch import nn
from torch.optim import lr_scheduler

from lightning_flatlora import CosineRho, EFMLoRA, FMLoRAModule, LearningRateRho, LinearRho, find_pairs

FRONT_ENDS = ("fmlora", "module")


class Watch(Callback):
    """Learning rate at each batch's end, and rho of each step in which a perturbation is taken."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.radii: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        callback = driver_of(trainer)
        self.radii.append((callback.step, callback.current_rho(trainer)))


def course(
    tmp_path: Any,
    front_end: str,
    *,
    batches: int = 7,
    accumulate: int = 1,
    clip: tuple[str, float] | None = None,
    scheduler: Any = None,
    val: Any = None,
    classes: Any = (Classifier, TwoPassClassifier),
    loader: Any = None,
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[dict[str, torch.Tensor], Watch, Any]:
    """One run in float64 with dropout; the settings go to the Trainer or to the module, where each belongs."""
    net = make_net(dropout=0.2).double()
    module, callbacks, more = build(front_end, net=net, accumulate=accumulate, classes=classes, **(settings or {}))
    module.scheduler = scheduler
    if clip is not None and front_end == "fmlora":
        more |= {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    elif clip is not None:
        module.gradient_clip_algorithm, module.gradient_clip_val = clip
    watch = Watch()
    loader = make_loader(batches, dtype=torch.float64) if loader is None else loader
    kwargs = {"max_epochs": 5, **kwargs}
    trainer = fit(tmp_path, module, [*callbacks, watch], loader, val=val, **more, **kwargs)
    return weights(module), watch, trainer


def cosine(optimizer: Any) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, 40)


# -- whole runs


@pytest.mark.parametrize("clip", [None, ("norm", 0.05), ("value", 0.003)], ids=["free", "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_whole_run_equals_the_callback(tmp_path, accumulate, clip):
    """35 batches in float64 with dropout and a scheduler; 7 batches an epoch leave a shorter last window."""
    settings = {"accumulate": accumulate, "clip": clip, "scheduler": cosine}
    left, watch, trainer = course(tmp_path, "fmlora", **settings)
    right, other_watch, other = course(tmp_path, "module", **settings)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-12, msg=name)
    assert trainer.global_step == other.global_step == 5 * -(-7 // accumulate)
    assert driver_of(trainer).step == driver_of(other).step == trainer.global_step
    assert watch.rates == other_watch.rates
    unclipped, *_ = course(tmp_path, "module", **(settings | {"clip": None}))
    assert same(unclipped, right) is (clip is None)


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "projected", "norm_scope": "layer"},
        {"start_step": 4, "every_n_steps": 3},
        {"rho": LearningRateRho(0.5)},
    ],
    ids=["projected-layer", "intervals", "learning-rate"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_settings_mean_the_same(tmp_path, accumulate, settings):
    left, *_ = course(tmp_path, "fmlora", accumulate=accumulate, scheduler=cosine, settings=settings)
    right, *_ = course(tmp_path, "module", accumulate=accumulate, scheduler=cosine, settings=settings)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("validate_every", [2, 3, 7])
def test_validation_inside_a_window_keeps_its_gradients(tmp_path, validate_every):
    """Lightning clears gradients before validation unless it accumulates, and knows nothing of the module's window."""
    settings = {"accumulate": 3, "val": make_loader(1, dtype=torch.float64), "val_check_interval": validate_every}
    left, *_ = course(tmp_path, "fmlora", **settings)
    right, *_ = course(tmp_path, "module", **settings)
    assert same(left, right)


@pytest.mark.parametrize(
    "run", [{"max_epochs": 3}, {"max_epochs": 9, "max_steps": 10}, {"max_epochs": -1, "max_steps": 6}]
)
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("schedule", [CosineRho, LinearRho])
def test_schedules_of_rho_span_the_same_steps(tmp_path, schedule, accumulate, run):
    """The horizon counts optimizer steps, shorter windows and max_steps included, as the callback's does."""
    settings = {"accumulate": accumulate, "settings": {"rho": schedule(1.0, 0.0)}, **run}
    _, watch, trainer = course(tmp_path, "fmlora", **settings)
    _, other_watch, other = course(tmp_path, "module", **settings)
    assert trainer.global_step == other.global_step
    assert watch.radii == other_watch.radii
    last = schedule(1.0, 0.0, total_steps=trainer.global_step)(trainer.global_step - 1)
    assert watch.radii[-1] == (trainer.global_step - 1, pytest.approx(last))


# -- learning-rate schedulers


def scheduled(kind: str) -> Any:
    """Scheduler configurations by name."""
    interval, frequency, monitor = kind.split("/")

    def make(optimizer: Any) -> dict[str, Any]:
        if monitor == "-":
            scheduler: Any = lr_scheduler.StepLR(optimizer, 1, 0.8)
        else:
            scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.02)
        config = {"scheduler": scheduler, "interval": interval, "frequency": int(frequency)}
        return config | ({} if monitor == "-" else {"monitor": monitor})

    return make


class Logging:
    """Logs what plateau schedulers may monitor: in the step, over the epoch, and in the module's own hook."""

    def loss(self, batch: Any, batch_idx: int) -> Any:
        loss = super().loss(batch, batch_idx)  # type: ignore[misc]
        if self.training:  # type: ignore[attr-defined]
            self.log("train_loss", loss)  # type: ignore[attr-defined]
            self.log("epoch_loss", loss, on_step=False, on_epoch=True)  # type: ignore[attr-defined]
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("hook", float(self.current_epoch % 2))  # type: ignore[attr-defined]


class LoggingClassifier(Logging, Classifier):
    pass


class LoggingTwoPass(Logging, TwoPassClassifier):
    pass


@pytest.mark.parametrize(
    "kind",
    [
        "step/1/-",
        "step/2/-",
        "step/3/-",
        "epoch/1/-",
        "epoch/2/-",
        "step/1/train_loss",
        "step/2/train_loss",
        "step/1/val_loss",
        "epoch/1/train_loss",
        "epoch/1/epoch_loss",
        "epoch/1/val_loss",
        "epoch/2/val_loss",
        "epoch/1/hook",
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedulers_step_when_the_callback_s_do(tmp_path, accumulate, kind):
    """The learning rate of each batch is that of automatic optimization."""
    settings = {
        "accumulate": accumulate,
        "scheduler": scheduled(kind),
        "val": make_loader(1, seed=5, dtype=torch.float64),
        "val_check_interval": 1 if kind.startswith("step") else 1.0,
        "num_sanity_val_steps": 1,
        "classes": (LoggingClassifier, LoggingTwoPass),
    }
    _, watch, _ = course(tmp_path, "fmlora", **settings)
    _, other, _ = course(tmp_path, "module", **settings)
    assert len(set(watch.rates)) > 1
    assert other.rates == watch.rates


def test_a_plateau_scheduler_without_its_metric(tmp_path):
    """The error names what is monitored and what was logged."""
    with pytest.raises(Exception, match=r"'nothing'.*was not logged.*strict=False"):
        course(tmp_path, "module", scheduler=scheduled("epoch/1/nothing"))


# -- clipping


class OwnHook(TwoPassClassifier):
    """A user's on_before_optimizer_step, which does not call super()."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen = getattr(self, "seen", 0) + 1


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_survives_the_users_own_hook(tmp_path, algorithm):
    """What reaches the optimizer is clipped, and is the gradient that needed it."""
    sizes: list[float] = []

    class Sized(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()  # in which Lightning calls the hooks
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            order = 2.0 if algorithm == "norm" else torch.inf
            sizes.append(float(nn.utils.get_total_norm(grads, norm_type=order)))
            return super().step()

    for clip in (None, 0.003):
        module = OwnHook(0.5, gradient_clip_val=clip, gradient_clip_algorithm=algorithm)
        module.optimizer_class = Sized
        fit(tmp_path, module, [], max_epochs=1)
        assert module.seen == 6
    assert min(sizes[:6]) > 0.01
    assert max(sizes[6:]) <= 0.003 * (1 + 1e-4)


# -- EFMLoRA beside the module


def literal(
    net: nn.Module, batches: list[Any], epochs: int, k: int, rho: float, beta: float, accumulate: int
) -> list[Any]:
    """The callback beside the module, word for word (method.md, section 5); returns Ê."""
    pairs = [(p.A, p.B, p.scaling) for p in find_pairs(net).pairs]
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    ema: list[Any] | None = None
    step = 0

    def gradient(batch: Any, E: list[Any] | None) -> list[Any]:
        clean = [B.data.clone() for _, B, _ in pairs]
        for (_, B, _), e in zip(pairs, E or [0.0] * len(pairs), strict=True):
            B.data = B.data + e
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1]) / accumulate
        grads = torch.autograd.grad(loss, trained)
        for (_, B, _), old in zip(pairs, clean, strict=True):
            B.data = old
        return list(grads)

    for _ in range(epochs):
        for start in range(0, len(batches), accumulate):
            total = [torch.zeros_like(p) for p in trained]
            for batch in batches[start : start + accumulate]:
                if step % k == 0:
                    grads = dict(zip(map(id, trained), gradient(batch, None), strict=True))
                    ascents = [ascent(A.data, B.data, grads[id(A)], grads[id(B)], s, "average") for A, B, s in pairs]
                    fresh = perturbations(ascents, rho, "global")
                    if ema is None:
                        ema = fresh
                    else:
                        ema = [(1 - beta) * old + beta * new for old, new in zip(ema, fresh, strict=True)]
                    grads_here = gradient(batch, fresh)
                else:
                    grads_here = gradient(batch, ema)
                total = [a + b for a, b in zip(total, grads_here, strict=True)]
            for p, grad in zip(trained, total, strict=True):
                p.grad = grad
            optimizer.step()
            step += 1
    assert ema is not None
    return ema


@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("every_n_steps", [1, 2, 5])
def test_efmlora_beside_the_module_equals_the_literal_loop(tmp_path, every_n_steps, beta):
    """Refresh steps: fresh E at the clean point, Ê moved, descent at B + E; the others: one pass at B + Ê."""
    net, other = make_net().double(), make_net().double()
    loader = make_loader(6, dtype=torch.float64)
    module, callbacks, _ = build("efmlora+module", net=net, every_n_steps=every_n_steps, beta=beta)
    passes: list[bool] = []
    module.inside.append(lambda module, _: passes.append(is_perturbed(module)))
    fit(tmp_path, module, callbacks, loader, max_epochs=5)
    ema = literal(other, list(loader), 5, every_n_steps, rho=0.5, beta=beta, accumulate=1)
    for name, parameter in weights(other).items():
        torch.testing.assert_close(weights(net)[name], parameter, rtol=0, atol=1e-10, msg=name)
    for E, expected in zip(E_hat(callbacks[0]).values(), ema, strict=True):
        torch.testing.assert_close(E, expected, rtol=0, atol=1e-10)
    assert len(passes) == 30 + -(-30 // every_n_steps)
    assert callbacks[0].step == 30


def test_the_pair_is_not_either_alone(tmp_path):
    """Guards the test above against a run in which the callback does nothing."""
    ends = []
    for front_end in ("efmlora", "module", "efmlora+module"):
        module, callbacks, kwargs = build(front_end)
        fit(tmp_path, module, callbacks, **kwargs)
        ends.append(list(weights(module).values()))
    assert not same(ends[0], ends[1])
    assert not same(ends[0], ends[2])
    assert not same(ends[1], ends[2])


def test_callback_given_by_the_module_itself(tmp_path):
    """EFMLoRA in configure_callbacks, after the module's own driver, works as one in the Trainer's list."""

    class Own(TwoPassClassifier):
        def configure_callbacks(self) -> Any:
            return [*super().configure_callbacks(), EFMLoRA(0.5, every_n_steps=2)]

    module, (other, callbacks, _) = Own(0.5), build("efmlora+module")
    trainer = fit(tmp_path, module, [])
    fit(tmp_path, other, callbacks)
    assert same(weights(module), weights(other))
    assert next(c for c in trainer.callbacks if isinstance(c, EFMLoRA)).step == 12


# -- the two passes


class Logged(Callback):
    """What the Trainer holds after each batch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.outputs: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.outputs.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_logging_comes_from_the_clean_pass(tmp_path, front_end):
    """log and log_dict, on steps and over the epoch, and the returned loss; a module's own log works again after."""
    losses: dict[bool, list[float]] = {True: [], False: []}

    class Logs:
        def loss(self, batch: Any, batch_idx: int) -> Any:
            loss = super().loss(batch, batch_idx)
            losses[is_perturbed(self)].append(float(loss.detach()))
            self.log("one", loss, on_step=True, on_epoch=True)
            self.log_dict({"two": loss, "passes": 1.0}, on_step=False, on_epoch=True, reduce_fx="sum")
            return loss

    classes = (type("A", (Logs, Classifier), {}), type("B", (Logs, TwoPassClassifier), {}))
    module, callbacks, kwargs = build(front_end, classes=classes)
    logged = Logged()
    trainer = fit(tmp_path, module, [*callbacks, logged], max_epochs=1, **kwargs)
    clean, moved = losses[False], losses[True]
    assert len(clean) == len(moved) == 6
    assert all(there > here for here, there in zip(clean, moved, strict=True))
    assert [metrics["one_step"] for metrics in logged.metrics] == clean
    assert logged.outputs == clean
    assert float(trainer.callback_metrics["one_epoch"]) == pytest.approx(sum(clean) / 6)
    assert float(trainer.callback_metrics["two"]) == pytest.approx(sum(clean))
    assert float(trainer.callback_metrics["passes"]) == 6
    assert "log" not in module.__dict__


class Masks:
    """The dropout masks that each pass drew."""

    def __init__(self, module: Any) -> None:
        self.passes: list[list[torch.Tensor]] = []
        module.inside.append(lambda *_: None)
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.register_forward_hook(self.hook)
        module.net.register_forward_pre_hook(lambda *_: self.passes.append([]))

    def hook(self, layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.passes[-1].append(output == 0)


class Draws(Callback):
    """Another callback that draws from the generators before each step, as mixing of samples does."""

    def on_train_batch_start(self, *args: Any) -> None:
        torch.rand(3)


@pytest.mark.parametrize("others", ["alone", "drawing-before", "drawing-after", "module-draws"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_both_passes_draw_the_same_masks(tmp_path, front_end, others):
    module, callbacks, kwargs = build(front_end, net=make_net(dropout=0.5))
    masks = Masks(module)
    if others == "drawing-before":
        callbacks = [Draws(), *callbacks]
    elif others == "drawing-after":
        callbacks = [*callbacks, Draws()]
    elif others == "module-draws":
        module.on_train_batch_start = lambda batch, batch_idx: (torch.rand(3), None)[1]
    fit(tmp_path, module, callbacks, **kwargs)
    firsts, seconds = masks.passes[::2], masks.passes[1::2]
    assert len(firsts) == len(seconds) == 12
    assert same(firsts, seconds)
    assert not any(same(one, two) for one, two in pairwise(firsts))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_second_pass_without_loss_is_an_error(tmp_path, front_end):
    module, callbacks, kwargs = build(front_end)
    module.inside.append(lambda module, _: "skip" if is_perturbed(module) else None)
    with pytest.raises(RuntimeError, match=r"None in .*second pass"):
        fit(tmp_path, module, callbacks, **kwargs)


@pytest.mark.parametrize("wrong", [3.0, "loss", {"value": 1}])
def test_compute_loss_must_return_a_loss(tmp_path, wrong):
    class Wrong(TwoPassClassifier):
        def compute_loss(self, batch: Any, batch_idx: int) -> Any:
            return wrong

    with pytest.raises(TypeError, match="compute_loss must return the loss as a tensor"):
        fit(tmp_path, Wrong(0.5), [])


def test_compute_loss_is_the_users(tmp_path):
    class Missing(TwoPassClassifier):
        compute_loss = FMLoRAModule.compute_loss

    with pytest.raises(NotImplementedError, match="Missing must define compute_loss"):
        fit(tmp_path, Missing(0.5), [])


def test_accumulation_divides_by_the_window(tmp_path):
    """Two batches of a window with SGD move the weights as their mean does at rho = 0; the short window, as half."""
    loader = make_loader(3, dtype=torch.float64)
    batches = list(loader)
    module = TwoPassClassifier(0.0, net=make_net().double(), lr=0.5, accumulate_grad_batches=2)
    module.optimizer_class = torch.optim.SGD
    fit(tmp_path, module, [], loader, max_epochs=1)

    net = make_net().double()
    trained = [p for p in net.parameters() if p.requires_grad]
    for window in (batches[:2], batches[2:]):
        loss = sum(nn.functional.cross_entropy(net(x), y) for x, y, _ in window) / 2
        for p, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            p.data -= 0.5 * grad
    for left, right in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-14)


# -- what a subclass may not do


class Unreached(TwoPassClassifier):
    """A training_step of its own, beside compute_loss, that takes no pass of FMLoRAModule's."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, batch_idx)


class OwnStep(Losses, FMLoRAModule):
    """A training_step that was kept when the base class changed."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, batch_idx)


def test_a_training_step_in_place_of_compute_loss_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"OwnStep defines training_step.*rename it to compute_loss"):
        fit(tmp_path, OwnStep(0.5), [])


def test_a_training_step_that_takes_no_pass_is_an_error(tmp_path):
    def by_hand(module: Any, batch: Any, batch_idx: int) -> None:
        module.manual_backward(module.loss(batch, batch_idx))
        module.optimizers().step()

    for step in (Unreached.training_step, by_hand, lambda *_: None):
        module = type("Unreached", (TwoPassClassifier,), {"training_step": step})(0.5)
        with pytest.raises(MisconfigurationException, match=r"does not call super\(\)\.training_step"):
            fit(tmp_path, module, [], max_epochs=1)
        assert_no_trace(module)


def test_a_training_step_around_ours_is_welcome(tmp_path):
    class Around(TwoPassClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    module = Around(0.5)
    assert fit(tmp_path, module, [], max_epochs=1).global_step == 5


def test_automatic_optimization_is_refused(tmp_path):
    module = TwoPassClassifier(0.5)
    module.automatic_optimization = True
    with pytest.raises(MisconfigurationException, match="automatic_optimization must be False"):
        fit(tmp_path, module, [])
