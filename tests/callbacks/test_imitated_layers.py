"""Layers of other projects in a real Trainer: exact, rho = 0, clean weights, and a resumed run."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import ResumableLoader, assert_no_trace, same, trainer_of, weights
from imitated_layers import KINDS, Learner, batches, error, model_of, optimizer_of
from reference import Reference
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FMLoRA, find_pairs

RHO, BETA = 0.3, 0.7
METHODS = {"EFMLoRA": (EFMLoRA, {"beta": BETA}), "FMLoRA": (FMLoRA, {})}


def method_of(name: str, rho: float, finder: Any) -> Any:
    kind, own = METHODS[name]
    return kind(rho, finder=finder, **own)


def train(model: nn.Module, *callbacks: Any, steps: int = 4, loader: Any = None, ckpt_path: Any = None) -> None:
    loader = DataLoader(batches(8), batch_size=None) if loader is None else loader
    trainer = trainer_of(None, list(callbacks), max_epochs=-1, max_steps=steps, precision="64-true")
    trainer.fit(Learner(model), loader, ckpt_path=ckpt_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "finder", "name"), KINDS)
def test_steps_equal_the_dense_reference(kind: type[nn.Module], finder: Any, name: str, method: str) -> None:
    expected, model = model_of(kind), model_of(kind)
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(expected, finder=finder).pairs]
    beta = BETA if method == "EFMLoRA" else None
    Reference(expected, pairs, error, optimizer_of(expected), lambda step: RHO, beta=beta).train(batches(4))
    train(model, method_of(method, RHO, finder))
    for key, value in weights(model).items():
        assert torch.allclose(value, weights(expected)[key], rtol=0, atol=1e-10), key
    assert_no_trace(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "finder", "name"), KINDS)
def test_rho_zero_is_the_plain_run_bit_for_bit(kind: type[nn.Module], finder: Any, name: str, method: str) -> None:
    finals = []
    for callbacks in ([], [method_of(method, 0.0, finder)], [method_of(method, RHO, finder)]):
        model = model_of(kind)
        train(model, *callbacks)
        finals.append(weights(model))
    assert same(finals[0], finals[1])
    assert not same(finals[0], finals[2])


class StoredWeights(L.Callback):
    """Compares B as it is stored with what the optimizer has left."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder
        self.left: list[Tensor] = []
        self.comparisons = 0

    def compare(self, module: Any) -> None:
        pairs = find_pairs(module, finder=self.finder).pairs
        if self.left:
            self.comparisons += 1
            assert same([pair.B.detach() for pair in pairs], self.left)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        self.compare(module)

    def on_before_backward(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        self.compare(module)

    def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
        self.compare(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        self.left = [pair.B.detach().clone() for pair in find_pairs(module, finder=self.finder).pairs]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "finder", "name"), KINDS)
def test_stored_weights_are_clean_and_a_resumed_run_is_the_whole_run(
    kind: type[nn.Module], finder: Any, name: str, method: str, tmp_path: Path
) -> None:
    whole, second = model_of(kind), model_of(kind)
    save = AdapterCheckpoint(tmp_path, filename="two", every_n_train_steps=2, save_top_k=-1, finder=finder)
    stored = StoredWeights(finder)
    train(whole, method_of(method, RHO, finder), save, stored, steps=3, loader=ResumableLoader(batches(8)))
    assert stored.comparisons >= 2 * 3
    again = [method_of(method, RHO, finder), AdapterCheckpoint(tmp_path / "again", finder=finder)]
    train(second, *again, steps=3, loader=ResumableLoader(batches(8)), ckpt_path=tmp_path / "two.ckpt")
    assert same(weights(second), weights(whole))
