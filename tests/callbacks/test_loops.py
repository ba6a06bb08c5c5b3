"""Evaluation sees the clean weights; compiled and hand-optimized modules train as plain ones do."""

import copy
import functools
from itertools import product
from typing import Any

import pytest
import torch
from helpers import (
    FRONT_ENDS,
    ByHand,
    Classifier,
    E_hat,
    Losses,
    assert_no_trace,
    assert_same_run,
    build,
    driver_of,
    fit,
    is_perturbed,
    make_dataset,
    make_loader,
    make_net,
    same,
    weights,
)
from lightning.pytorch import LightningModule

from lightning_flatlora import EFMLoRA, FMLoRA

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
def test_second_fit_of_one_trainer(tmp_path, front_end):
    """With more epochs allowed the same Trainer trains on: the count continues, Ê begins anew as the optimizer does."""
    module, callbacks, kwargs = build(front_end)
    trainer = fit(tmp_path, module, callbacks, max_epochs=1, **kwargs)
    fresh, fresh_callbacks, _ = build(front_end)
    fresh.load_state_dict(module.state_dict())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_loader(), make_loader(1))
    other = fit(tmp_path, fresh, fresh_callbacks, max_epochs=1, **kwargs)
    assert same(weights(module), weights(fresh))
    assert (driver_of(trainer).step, driver_of(other).step) == (12, 6)


# -- compiled networks


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


# -- the user's own manual optimization, and other forms of training_step


class InWindows(ByHand):
    """With one optimizer for all, or one for the pairs and one for the bias."""

    def __init__(self, optimizers: int, accumulate: int) -> None:
        super().__init__()
        self.count, self.accumulate = optimizers, accumulate
        self.looks: list[tuple[bool, bool]] = []

    def configure_optimizers(self) -> Any:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        groups = [list(trained.values())]
        if self.count == 2:
            of_pairs = [p for name, p in trained.items() if "lora" in name]
            groups = [[p for name, p in trained.items() if "lora" not in name], of_pairs]
        return [torch.optim.AdamW(group, lr=self.lr) for group in groups]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate == 0:
            super().training_step(batch, batch_idx)
        else:
            self.manual_backward(self.loss(batch, batch_idx))
        self.looks.append((is_perturbed(self), same(self.net.state_dict(), copy.deepcopy(self.net).state_dict())))

    def loss(self, batch: Any, batch_idx: int) -> Any:
        return super().loss(batch, batch_idx) / self.accumulate


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizers", [1, 2])
def test_efmlora_in_a_module_optimized_by_hand(tmp_path, optimizers, accumulate):
    """With one or two optimizers of which one holds all pairs: the run of automatic optimization, bit for bit."""
    module = InWindows(optimizers, accumulate)
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


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class FromIterator(Losses, LightningModule):
    """Takes its batches from the iterator itself."""

    def training_step(self, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        return self.loss(batch, batch_idx)


class NoIndex(Losses, LightningModule):
    """Takes the batch alone, and returns a mapping."""

    def training_step(self, batch: Any) -> Any:
        return {"loss": self.loss(batch, 0), "more": 1}


class Decorated(NoIndex):
    """Its step seems to take anything."""

    @decorated
    def training_step(self, batch: Any) -> Any:
        return self.loss(batch, 0)


FORMS = [(FromIterator, EFMLoRA), *product([NoIndex, Decorated], [EFMLoRA, FMLoRA])]


@pytest.mark.parametrize(("form", "callback"), FORMS, ids=lambda c: c.__name__)
def test_other_forms_of_training_step(tmp_path, form, callback):
    module, other = form(), Classifier()
    fit(tmp_path, module, [callback(0.5)])
    fit(tmp_path, other, [callback(0.5)])
    assert same(weights(module), weights(other))
