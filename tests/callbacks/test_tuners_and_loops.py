"""Lightning's tuners and loops around ours: finders find with ours inactive, evaluation sees the clean weights, and
compiled, checkpointed and hand-optimized modules train as plain ones do.
"""

import copy
from typing import Any

import pytest
import torch
from helpers import (
    FRONT_ENDS,
    Classifier,
    E_hat,
    Losses,
    TwoPassClassifier,
    assert_no_trace,
    build,
    driver_of,
    fit,
    is_perturbed,
    make_dataset,
    make_loader,
    make_net,
    same,
    since_lightning,
    trainer_of,
    weights,
)
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA, FMLoRA

WITH_PLAIN = ("plain", *FRONT_ENDS)


class OwnLoader:
    """A module that builds its loader from ``batch_size``, as the batch-size finder wants it."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(make_dataset(24), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(make_dataset(4, seed=2), batch_size=4)


class Sized(OwnLoader, Classifier):
    pass


class SizedTwoPass(OwnLoader, TwoPassClassifier):
    pass


SIZED = (Sized, SizedTwoPass)


class Passes:
    """Counts passes and those at moved weights, apart for those that a finder ran and those of training."""

    def __init__(self, module: Any) -> None:
        self.finding = True
        self.counts = {(finding, moved): 0 for finding in (True, False) for moved in (True, False)}
        module.inside.append(self)

    def __call__(self, module: Any, batch_idx: int) -> None:
        if module.training:
            self.counts[self.finding, is_perturbed(module)] += 1


class Begin(Callback):
    """Marks the start of training proper: finders run before it."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.passes.finding = False


def searched(front_end: str, **kwargs: Any) -> tuple[Any, list[Callback], dict[str, Any], Passes]:
    module, callbacks, kwargs = build(front_end, classes=SIZED, **kwargs)
    return module, callbacks, kwargs, Passes(module)


def assert_inactive_while_finding(passes: Passes, front_end: str) -> None:
    assert passes.counts[True, False] > 0
    assert passes.counts[True, True] == 0
    if front_end != "plain":
        assert passes.counts[False, True] > 0


def plain_fit(tmp_path: Any, front_end: str, **attributes: Any) -> Any:
    """The run without any finder."""
    module, callbacks, kwargs, _ = searched(front_end)
    for name, value in attributes.items():
        setattr(module, name, value)
    return train(tmp_path, module, callbacks, kwargs)


def train(tmp_path: Any, module: Any, callbacks: list[Callback], kwargs: dict[str, Any], trainer: Any = None) -> Any:
    trainer = trainer_of(tmp_path, callbacks, **kwargs) if trainer is None else trainer
    trainer.fit(module)
    return trainer


def assert_same_run(trainer: Any, other: Any) -> None:
    assert same(weights(trainer.lightning_module), weights(other.lightning_module))
    assert trainer.global_step == other.global_step
    if [c for c in trainer.callbacks if hasattr(c, "perturbation")]:
        assert driver_of(trainer).step == driver_of(other).step
        assert same(E_hat(driver_of(trainer)), E_hat(driver_of(other)))
    assert_no_trace(trainer.lightning_module)


@pytest.mark.parametrize("front_end", WITH_PLAIN)
def test_learning_rate_finder_as_tuner(tmp_path, front_end):
    module, callbacks, kwargs, passes = searched(front_end)
    trainer = trainer_of(tmp_path, [*callbacks, Begin(passes)], **kwargs)
    finder = Tuner(trainer).lr_find(module, num_training=5, update_attr=False)
    assert len(finder.results["lr"]) == 5
    assert_no_trace(module)
    train(tmp_path, module, callbacks, kwargs, trainer)
    assert_inactive_while_finding(passes, front_end)
    assert_same_run(trainer, plain_fit(tmp_path, front_end))


@since_lightning("2.5.4", "a run after the finder is another one, without us too (Lightning#21068)")
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("front_end", WITH_PLAIN)
def test_learning_rate_finder_as_callback(tmp_path, front_end, ours_first):
    module, callbacks, kwargs, passes = searched(front_end)
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    order = [*callbacks, finder] if ours_first else [finder, *callbacks]
    trainer = train(tmp_path, module, [*order, Begin(passes)], kwargs)
    assert len(finder.optimal_lr.results["lr"]) == 5
    assert_inactive_while_finding(passes, front_end)
    assert_same_run(trainer, plain_fit(tmp_path, front_end))


@pytest.mark.parametrize("front_end", WITH_PLAIN)
def test_batch_size_finder_as_tuner(tmp_path, front_end):
    module, callbacks, kwargs, passes = searched(front_end)
    trainer = trainer_of(tmp_path, [*callbacks, Begin(passes)], **kwargs)
    Tuner(trainer).scale_batch_size(module, steps_per_trial=2, max_trials=2, init_val=2)
    assert_no_trace(module)
    module.batch_size = 4
    train(tmp_path, module, callbacks, kwargs, trainer)
    assert_inactive_while_finding(passes, front_end)
    assert_same_run(trainer, plain_fit(tmp_path, front_end))


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("front_end", WITH_PLAIN)
def test_batch_size_finder_as_callback(tmp_path, front_end, ours_first):
    module, callbacks, kwargs, passes = searched(front_end)
    finder = BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=2)
    order = [*callbacks, finder] if ours_first else [finder, *callbacks]
    trainer = train(tmp_path, module, [*order, Begin(passes)], kwargs)
    assert_inactive_while_finding(passes, front_end)
    assert_same_run(trainer, plain_fit(tmp_path, front_end, batch_size=finder.optimal_batch_size))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_learning_rate_finder_between_two_fits(tmp_path, front_end):
    """The finder's own checkpoint does not carry steps and Ê of the last fit into the next."""
    module, callbacks, kwargs, _ = searched(front_end)
    train(tmp_path, module, callbacks, kwargs)
    fresh, fresh_callbacks, _, _ = searched(front_end)
    fresh.load_state_dict(module.state_dict())

    trainer = trainer_of(tmp_path, callbacks, **kwargs)
    Tuner(trainer).lr_find(module, num_training=5, update_attr=False)
    train(tmp_path, module, callbacks, kwargs, trainer)
    assert_same_run(trainer, train(tmp_path, fresh, fresh_callbacks, kwargs))


class FinderInBetween(LearningRateFinder):
    """At the start of the second epoch again, as Lightning's documentation shows."""

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_learning_rate_finder_in_the_middle_of_a_fit(tmp_path, front_end):
    """The run goes on as if it had not been there, and later checkpoints hold the state of their own step."""
    module, callbacks, kwargs, _ = searched(front_end)
    finder = FinderInBetween(num_training_steps=20, update_attr=False)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    trainer = train(tmp_path, module, [*callbacks, finder, saving], kwargs | {"enable_checkpointing": True})
    assert finder.optimal_lr is not None
    assert_same_run(trainer, plain_fit(tmp_path, front_end))
    saved = torch.load(saving.best_model_path, weights_only=True)["callbacks"]
    states = [state for state in saved.values() if "perturbation" in state or "initial_lr" in state]
    assert [state["step"] for state in states] == [driver_of(trainer).step]
    if callbacks and isinstance(callbacks[0], EFMLoRA):
        assert same(states[0]["perturbation"]["E"], E_hat(driver_of(trainer)))


# -- evaluation, and fitting again


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_evaluation_sees_clean_weights(tmp_path, front_end):
    """In the sanity check, within epochs and after fit, the logits are those of the stored weights."""
    module, callbacks, kwargs = build(front_end)
    seen: list[str] = []
    inputs = make_dataset(4).tensors[0]

    def look(module: Any, batch_idx: int) -> None:
        if module.training:
            return
        seen.append(str(module.trainer.state.stage.value))
        plain = make_net()
        plain.load_state_dict(module.net.state_dict())
        assert same(module.net(inputs), plain.eval()(inputs))

    module.inside.append(look)
    val = make_loader(1)
    trainer = fit(tmp_path, module, callbacks, val=val, num_sanity_val_steps=1, val_check_interval=2, **kwargs)
    trainer.validate(module, val, verbose=False)
    trainer.test(module, val, verbose=False)
    assert seen == ["sanity_check"] + ["validate"] * 7 + ["test"]
    assert_no_trace(module)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_validation_does_not_change_the_run(tmp_path, front_end):
    runs = []
    for val in (None, make_loader(2)):
        module, callbacks, kwargs = build(front_end, accumulate=2)
        trainer = fit(tmp_path, module, callbacks, val=val, val_check_interval=3, **kwargs)
        runs.append(trainer)
    assert_same_run(*runs)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_second_fit_on_the_same_objects(tmp_path, front_end):
    """It equals the fit of new objects that start from the same weights."""
    module, callbacks, kwargs = build(front_end)
    fit(tmp_path, module, callbacks, **kwargs)
    fresh, fresh_callbacks, _ = build(front_end)
    fresh.load_state_dict(module.state_dict())
    again = fit(tmp_path, module, callbacks, seed=7, **kwargs)
    assert_same_run(again, fit(tmp_path, fresh, fresh_callbacks, seed=7, **kwargs))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_second_fit_of_one_trainer(tmp_path, front_end):
    """With more epochs allowed the same Trainer trains on: the count goes on, Ê begins anew as the optimizer does."""
    module, callbacks, kwargs = build(front_end)
    trainer = fit(tmp_path, module, callbacks, max_epochs=1, **kwargs)
    fresh, fresh_callbacks, _ = build(front_end)
    fresh.load_state_dict(module.state_dict())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_loader(), make_loader(1))
    other = fit(tmp_path, fresh, fresh_callbacks, max_epochs=1, **kwargs)
    assert same(weights(module), weights(fresh))
    assert (driver_of(trainer).step, driver_of(other).step) == (12, 6)


@pytest.mark.parametrize("evaluate", ["validate", "test"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_evaluating_a_checkpoint_loads_no_state_for_the_next_fit(tmp_path, front_end, evaluate):
    """``validate(ckpt_path=...)`` hands callbacks the file's state; a fit without it must not use that."""
    module, callbacks, kwargs = build(front_end)
    file = ModelCheckpoint(tmp_path, filename="last")
    fit(tmp_path, module, [*callbacks, file], **kwargs)
    fresh, fresh_callbacks, _ = build(front_end)
    fresh.load_state_dict(module.state_dict())

    again = ModelCheckpoint(tmp_path, filename="again")
    trainer = trainer_of(tmp_path, [*callbacks, again], max_epochs=1, limit_val_batches=1, **kwargs)
    getattr(trainer, evaluate)(module, make_loader(1), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    trainer.fit(module, make_loader(), make_loader(1))
    assert_same_run(trainer, fit(tmp_path, fresh, fresh_callbacks, max_epochs=1, **kwargs))


# -- compiled and checkpointed networks


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_compiled_network_toggles_without_recompiling(tmp_path, front_end):
    """One graph for the clean weights and one for the moved, and the run of the network that is not compiled."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    module, callbacks, kwargs = build(front_end, net=torch.compile(make_net(), backend=counter))
    trainer = fit(tmp_path, module, callbacks, **kwargs)
    assert counter.frame_count == 2
    assert_no_trace(module)
    other, other_callbacks, kwargs = build(front_end)
    plain = fit(tmp_path, other, other_callbacks, **kwargs)
    for left, right in zip(weights(module).values(), weights(other).values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    E, expected = E_hat(driver_of(trainer)), E_hat(driver_of(plain))
    assert list(E) == list(expected)  # no _orig_mod in the names


@pytest.mark.parametrize("front_end", ["efmlora", "fmlora"])
def test_compiled_with_autograd_tracing(tmp_path, front_end):
    """The same through AOTAutograd, whose backward is traced with the moved weight as an input."""
    torch._dynamo.reset()
    module, callbacks, kwargs = build(front_end, net=torch.compile(make_net(), backend="aot_eager"))
    other, other_callbacks, _ = build(front_end)
    fit(tmp_path, module, callbacks, make_loader(3), max_epochs=1, **kwargs)
    fit(tmp_path, other, other_callbacks, make_loader(3), max_epochs=1, **kwargs)
    for left, right in zip(weights(module).values(), weights(other).values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


class Recomputed(nn.Module):
    """A network under activation checkpointing: its forward runs a second time inside backward."""

    def __init__(self, net: nn.Module, use_reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.use_reentrant = net, use_reentrant

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.use_reentrant is None:
            return self.net(inputs)
        return checkpoint(self.net, inputs.requires_grad_(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_activation_checkpointing_equals_none(tmp_path, front_end, accumulate):
    """Both kinds, dropout included: what is recomputed reads the same weights as the first forward."""
    ends = []
    for use_reentrant in (None, False, True):
        net = Recomputed(make_net(0.2), use_reentrant)
        module, callbacks, kwargs = build(front_end, net=net, accumulate=accumulate)
        module.inside.append(lambda module, _: None)
        trainer = fit(tmp_path, module, callbacks, **kwargs)
        ends.append((weights(module), E_hat(driver_of(trainer))))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


# -- the user's own manual optimization, and other forms of training_step


class ByHand(Losses, LightningModule):
    """Manual optimization with one optimizer for all, or one for the pairs and one for the bias."""

    def __init__(self, optimizers: int = 1, accumulate: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.count, self.accumulate = optimizers, accumulate
        self.looks: list[tuple[bool, bool]] = []

    def configure_optimizers(self) -> Any:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        groups = [list(trained.values())]
        if self.count == 2:
            groups = [
                [p for n, p in trained.items() if "lora" not in n],
                [p for n, p in trained.items() if "lora" in n],
            ]
        return [torch.optim.AdamW(group, lr=self.lr) for group in groups]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.manual_backward(self.loss(batch, batch_idx) / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        self.looks.append((is_perturbed(self), same(self.net.state_dict(), copy.deepcopy(self.net).state_dict())))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizers", [1, 2])
def test_efmlora_in_a_module_optimized_by_hand(tmp_path, optimizers, accumulate):
    """With one or two optimizers of which one holds all pairs: the run of automatic optimization, bit for bit."""
    module = ByHand(optimizers, accumulate)
    callback, other_callback = EFMLoRA(0.5, every_n_steps=2), EFMLoRA(0.5, every_n_steps=2)
    fit(tmp_path, module, [callback])
    other = Classifier()
    fit(tmp_path, other, [other_callback], accumulate_grad_batches=accumulate)
    assert same(weights(module), weights(other))
    assert same(E_hat(callback), E_hat(other_callback))
    assert callback.step == other_callback.step == 12 // accumulate
    assert all(moved for moved, _ in module.looks[accumulate:])
    assert all(clean for _, clean in module.looks)
    assert_no_trace(module)


class FromIterator(Losses, LightningModule):
    """Takes its batches from the iterator itself."""

    def training_step(self, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        return self.loss(batch, batch_idx)


class NoIndex(Losses, LightningModule):
    """Takes the batch alone, and returns a mapping."""

    def training_step(self, batch: Any) -> Any:
        return {"loss": self.loss(batch, 0), "more": 1}


@pytest.mark.parametrize(
    ("form", "callback"), [(FromIterator, EFMLoRA), (NoIndex, EFMLoRA), (NoIndex, FMLoRA)], ids=lambda c: c.__name__
)
def test_other_forms_of_training_step(tmp_path, form, callback):
    module, other = form(), Classifier()
    fit(tmp_path, module, [callback(0.5)])
    fit(tmp_path, other, [callback(0.5)])
    assert same(weights(module), weights(other))
