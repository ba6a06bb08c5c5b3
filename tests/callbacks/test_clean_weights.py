"""The weights stored in the module are the clean ones at every moment, and nothing patched stays behind.

A shadow of the weights is written in one place only, right after the optimizer's own update. Every hook of other
callbacks (before and after ours), every hook of the module, the inside of every training step, and every checkpoint
must hold the shadow's bits. The other half guards against a test of nothing: while they hold them, the layers do read
B + E.
"""

import copy
import signal
from typing import Any

import pytest
import torch
from helpers import (
    FRONT_ENDS,
    Classifier,
    E_hat,
    TwoPassClassifier,
    assert_copies_are_plain,
    assert_no_trace,
    build,
    driver_of,
    fit,
    is_perturbed,
    make_loader,
    make_net,
    needs_weight_averaging,
    same,
    trainer_of,
    weights,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from torch import nn

from lightning_flatlora import EFMLoRA, FMLoRA, read_through

CALLBACK_HOOKS = [name for name in dir(Callback) if name.startswith("on_")] + ["setup", "teardown"]
MODULE_HOOKS = [
    *(name for kind in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(kind) if name.startswith("on_")),
    "setup",
    "teardown",
    "transfer_batch_to_device",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "backward",
]
TRAINING_HOOKS = {
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_end",
    "on_save_checkpoint",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
}


class Shadow:
    """What the weights must be: taken at the start and after each update of the optimizer, never else."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.parameters = dict(net.named_parameters())
        self.keys = list(net.state_dict())
        self.seen: dict[str, set[str]] = {}
        self.take()

    def take(self) -> None:
        self.stored = weights(self.net)

    def look(self, who: str, where: str) -> None:
        """The stored bits, by every way to get at them, are the shadow's."""
        now = dict(self.net.named_parameters())
        assert list(now) == list(self.parameters), (who, where)
        assert all(now[name] is parameter for name, parameter in self.parameters.items()), (who, where)
        assert same({name: p.data for name, p in now.items()}, self.stored), (who, where)
        state = self.net.state_dict()
        assert list(state) == self.keys, (who, where)
        assert same({name: state[name] for name in self.stored}, self.stored), (who, where)
        self.seen.setdefault(where, set()).add(who)
        if is_perturbed(self.net):
            self.seen.setdefault("perturbed", set()).add(where)

    def optimizer_class(self) -> type[torch.optim.AdamW]:
        shadow = self

        class Shadowed(torch.optim.AdamW):
            def step(self, closure: Any = None) -> Any:
                loss = None
                if closure is not None:
                    with torch.enable_grad():
                        loss = closure()
                shadow.look("optimizer", "step")
                super().step()
                shadow.take()
                return loss

        return Shadowed


def spy(shadow: Shadow, name: str) -> Callback:
    """A callback that looks in every hook there is."""

    def hook_of(hook: str) -> Any:
        return lambda self, *args, **kwargs: shadow.look(name, hook)

    return type(f"Spy{name}", (Callback,), {hook: hook_of(hook) for hook in CALLBACK_HOOKS})()


def spied(base: type[Any]) -> type[Any]:
    """A module class that looks around every hook it has."""

    def hook_of(hook: str) -> Any:
        original = getattr(base, hook)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.shadow.look("module", hook)
            answer = original(self, *args, **kwargs)
            self.shadow.look("module", hook)
            return answer

        return method

    return type(f"Spied{base.__name__}", (base,), {hook: hook_of(hook) for hook in MODULE_HOOKS})


def watched(front_end: str, **settings: Any) -> tuple[Any, list[Callback], dict[str, Any], Shadow]:
    """A front end whose module and callbacks are all watched."""
    net = make_net(dropout=0.2)
    shadow = Shadow(net)
    module, callbacks, kwargs = build(
        front_end, net=net, classes=(spied(Classifier), spied(TwoPassClassifier)), **settings
    )
    module.shadow = shadow
    module.optimizer_class = shadow.optimizer_class()
    module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)
    module.inside.append(lambda *_: shadow.look("module", "training_step"))
    return module, [spy(shadow, "Before"), *callbacks, spy(shadow, "After")], kwargs, shadow


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_stored_bits_in_every_hook(tmp_path, front_end, accumulate):
    module, callbacks, kwargs, shadow = watched(front_end, accumulate=accumulate)
    callbacks.append(ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1))
    clip = {} if isinstance(module, TwoPassClassifier) else {"gradient_clip_val": 0.5}
    start = weights(module)
    fit(tmp_path, module, callbacks, val=make_loader(2), val_check_interval=3, num_sanity_val_steps=1, **kwargs, **clip)

    manual = {"on_before_zero_grad"} if isinstance(module, TwoPassClassifier) else set()  # Lightning calls it nowhere
    for hook in TRAINING_HOOKS - manual:
        assert {"Before", "After"} <= shadow.seen[hook], hook
    for hook in ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "backward"):
        assert "module" in shadow.seen[hook], hook
    assert "training_step" in shadow.seen["perturbed"]
    assert "on_before_backward" in shadow.seen["perturbed"]
    for hook in shadow.seen["perturbed"]:
        assert "validation" not in hook
        assert "checkpoint" not in hook
        assert "train_batch_end" not in hook
    assert not same(weights(module), start)
    assert_no_trace(module)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_step_sees_the_loss_of_moved_weights(tmp_path, front_end):
    """The loss in each pass equals that of a plain copy whose B was moved by E, bit for bit."""
    module, callbacks, kwargs = build(front_end)
    passes: list[str] = []

    def compare(module: Any, batch_idx: int) -> None:
        batch = next(b for i, b in enumerate(loader) if i == batch_idx)
        E = shown(module.net)
        moved, clean = copy.deepcopy(module.net), copy.deepcopy(module.net)
        assert_no_trace(moved)
        with torch.no_grad():
            for name, reader in moved.named_modules():
                if name in E:
                    reader.weight += E[name]
            here, there, unmoved = (net(batch[0]) for net in (module.net, moved, clean))
        assert same(here, there)
        passes.append("clean" if torch.equal(here, unmoved) else "moved")

    loader = make_loader()
    module.inside.append(compare)
    fit(tmp_path, module, callbacks, loader, max_epochs=1, **kwargs)
    expected = {
        "efmlora": ["clean"] + ["moved"] * 5,
        "fmlora": ["clean", "moved"] * 6,
        "module": ["clean", "moved"] * 6,
        "efmlora+module": ["clean", "moved", "moved"] * 3,
    }
    assert passes == expected[front_end]


def shown(net: nn.Module) -> dict[str, torch.Tensor]:
    """The E that each reader adds now, by module name."""
    E = {name: read_through.shown(module) for name, module in net.named_modules()}
    return {name: tensor.clone() for name, tensor in E.items() if tensor is not None}


# -- checkpoints


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_every_checkpoint_holds_clean_weights(tmp_path, front_end):
    """Saved from every hook of training and from inside the step, with and without the rest of the state."""
    module, callbacks, kwargs, shadow = watched(front_end)
    saved: list[tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def save(where: str, trainer: Any) -> None:
        for weights_only in (False, True):
            path = tmp_path / f"{len(saved)}.ckpt"
            trainer.save_checkpoint(path, weights_only=weights_only)
            held = torch.load(path, weights_only=True)["state_dict"]
            saved.append((where, {k.removeprefix("net."): v for k, v in held.items()}, dict(shadow.stored)))

    class Saver(Callback):
        pass

    for hook in ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"):
        setattr(Saver, hook, lambda self, trainer, *args, where=hook, **kw: save(where, trainer))
    module.inside.append(lambda module, _: save("step", module.trainer))

    class OnlyWeights(ModelCheckpoint):
        pass

    every = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    files = [
        ModelCheckpoint(tmp_path / "all", **every),
        OnlyWeights(tmp_path / "only", save_weights_only=True, **every),
    ]
    trajectory: dict[int, dict[str, torch.Tensor]] = {}

    class Trajectory(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trajectory[trainer.global_step] = dict(shadow.stored)

    loader = make_loader(3)
    savers = Saver(), type("LateSaver", (Saver,), {})()
    fit(tmp_path, module, [Trajectory(), savers[0], *callbacks, savers[1], *files], loader, max_epochs=1, **kwargs)

    assert {where for where, _, _ in saved} >= {"on_train_batch_start", "on_after_backward", "step"}
    for where, held, clean in saved:
        assert same(held, clean), where
    assert len(trajectory) == 3
    for step, clean in trajectory.items():
        for folder in ("all", "only"):
            held = torch.load(tmp_path / folder / f"step={step}.ckpt", weights_only=True)["state_dict"]
            assert same({k.removeprefix("net."): v for k, v in held.items()}, clean)


@needs_weight_averaging
@pytest.mark.parametrize("averaging", ["mean", "ema"])
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_weight_averaging_beside_us_averages_clean_weights(tmp_path, front_end, ours_first, averaging):
    """Lightning's averages equal those over the recorded clean trajectory, in the end and in checkpoints."""
    net = make_net()
    shadow = Shadow(net)
    module, callbacks, kwargs = build(front_end, net=net)
    module.optimizer_class = shadow.optimizer_class()
    average = lightnings.WeightAveraging() if averaging == "mean" else lightnings.EMAWeightAveraging(decay=0.5)
    trajectory: list[dict[str, torch.Tensor]] = []

    class Trajectory(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            trajectory.append(dict(shadow.stored))

    order = [*callbacks, average] if ours_first else [average, *callbacks]
    checkpoint = ModelCheckpoint(tmp_path, every_n_epochs=1, filename="last")
    fit(tmp_path, module, [*order, Trajectory(), checkpoint], val=make_loader(1), max_epochs=1, **kwargs)

    expected = trajectory[0]
    for n, clean in enumerate(trajectory[1:], start=1):
        weight = 0.5 if averaging == "ema" else 1 / (n + 1)
        expected = {name: torch.lerp(mean, clean[name], weight) for name, mean in expected.items()}
    torch.testing.assert_close(weights(net), expected, rtol=1e-5, atol=1e-6)
    file = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same({k.removeprefix("net."): v for k, v in file["current_model_state"].items()}, trajectory[-1])
    averaged = {k.removeprefix("net."): v for k, v in file["state_dict"].items()}
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-6)
    assert_no_trace(module)


# -- steps that end early


@pytest.mark.parametrize("hook_of", ["module", "callback"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_batch_start_returns_minus_one(tmp_path, front_end, hook_of):
    """The rest of the epoch is skipped after E was switched on; the next epoch goes on."""
    module, callbacks, kwargs, _ = watched(front_end)
    answer = lambda *args: -1 if args[-1] == 2 else None  # noqa: E731
    if hook_of == "module":
        module.on_train_batch_start = answer
    else:
        callbacks.append(type("Skips", (Callback,), {"on_train_batch_start": lambda self, *args: answer(*args)})())
    ends: list[bool] = []

    class AtEpochEnd(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            ends.append(is_perturbed(pl_module))

        on_train_end = on_validation_batch_start = lambda self, trainer, pl_module, *args: ends.append(
            is_perturbed(pl_module)
        )

    trainer = fit(tmp_path, module, [*callbacks, AtEpochEnd()], val=make_loader(1), **kwargs)
    assert trainer.global_step == (4 if hook_of == "module" else 12)
    assert not any(ends)
    assert_no_trace(module)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_training_step_returns_none(tmp_path, front_end, accumulate):
    module, callbacks, kwargs, _ = watched(front_end, accumulate=accumulate)
    module.inside.append(lambda module, batch_idx: "skip" if batch_idx == 3 else None)
    fit(tmp_path, module, callbacks, **kwargs)
    assert all(torch.isfinite(w).all() for w in weights(module).values())
    assert_no_trace(module)


@pytest.mark.parametrize("pass_number", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_exception_in_a_step(tmp_path, front_end, error, pass_number):
    """In the first or second pass of the third batch: clean weights, plain classes, and Ê in what is saved then."""
    if pass_number == 2 and front_end == "efmlora":
        pytest.skip("EFMLoRA has one pass")
    module, callbacks, kwargs, shadow = watched(front_end)
    calls = []

    def interrupt(module: Any, batch_idx: int) -> None:
        calls.append(batch_idx)
        if batch_idx == 2 and calls.count(2) == pass_number:
            states.append({name: E.clone() for name, E in shown(module.net).items()})
            assert bool(states[-1]) is (front_end == "efmlora" or pass_number == 2)
            raise error("stop here")

    states: list[dict[str, torch.Tensor]] = []
    module.inside.append(interrupt)
    seen: list[bool] = []

    class AtException(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            seen.append(is_perturbed(pl_module))

    before = signal.getsignal(signal.SIGINT)
    callbacks = [*callbacks, AtException(), OnExceptionCheckpoint(tmp_path, "crash")]
    trainer = trainer_of(tmp_path, callbacks, **kwargs)
    try:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            trainer.fit(module, make_loader(), make_loader(1))
    finally:
        signal.signal(signal.SIGINT, before)

    assert seen == [False]
    assert same(weights(module.net), shadow.stored)
    assert_no_trace(module)
    assert_copies_are_plain(module.net)
    assert "log" not in module.__dict__
    assert {"Before", "After"} <= shadow.seen["on_exception"]
    file = torch.load(tmp_path / "crash.ckpt", weights_only=True)
    assert same({k.removeprefix("net."): v for k, v in file["state_dict"].items()}, shadow.stored)
    if "efmlora" in front_end:
        state = file["callbacks"]["EFMLoRA"]["perturbation"]
        assert state["started"]
        assert same(state["E"], E_hat(driver_of(trainer)))
        assert all(E.any() for E in state["E"].values())


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_fit_again_after_an_exception(tmp_path, front_end):
    """The objects of a crashed run train on as new ones with the same weights would."""
    module, callbacks, kwargs = build(front_end)
    crash = [True]

    def interrupt(module: Any, batch_idx: int) -> None:
        if batch_idx == 3 and crash:
            raise RuntimeError("stop here")

    module.inside.append(interrupt)
    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, module, callbacks, **kwargs)
    crash.clear()
    other, other_callbacks, _ = build(front_end)
    other.load_state_dict(module.state_dict())
    fit(tmp_path, module, callbacks, seed=5, **kwargs)
    fit(tmp_path, other, other_callbacks, seed=5, **kwargs)
    assert same(weights(module), weights(other))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_copies_made_during_training_are_plain(tmp_path, front_end, monkeypatch):
    """deepcopy, pickle and torch.save in every pass and hook give plain classes with clean weights, and no Trainer."""

    def never(trainer: Any, memo: Any) -> None:
        raise AssertionError("a copy of the module copies the Trainer")

    monkeypatch.setattr(Trainer, "__deepcopy__", never, raising=False)
    module, callbacks, kwargs = build(front_end)
    states: list[bool] = []

    def look(module: LightningModule, *_: Any) -> None:
        states.append(is_perturbed(module))
        assert read_through.is_installed(module)
        assert_copies_are_plain(module.net)
        inside, module.inside = module.inside, []
        twin = copy.deepcopy(module)
        module.inside = inside
        assert_no_trace(twin)
        assert same(twin.state_dict(), module.state_dict())

    class Copies(Callback):
        on_train_batch_start = on_before_backward = on_after_backward = on_train_batch_end = (
            lambda self, trainer, pl_module, *args: look(pl_module)
        )

    module.inside.append(look)
    fit(tmp_path, module, [*callbacks, Copies()], make_loader(3), max_epochs=1, **kwargs)
    assert any(states)
    assert not all(states)


def test_stand_alone_use_after_training_is_plain(tmp_path):
    """After fit, hooks of later validate and test leave no attribute of ours on the layers."""
    for callback in (EFMLoRA(0.5), FMLoRA(0.5)):
        module = Classifier()
        trainer = fit(tmp_path, module, [callback])
        trainer.validate(module, make_loader(1), verbose=False)
        trainer.test(module, make_loader(1), verbose=False)
        assert_no_trace(module)
