"""Every precision trains, and a batch that overflows only changes the loss scaler.

The overflow is in the whole loss, in one trained parameter that is not a LoRA factor, or in the second pass only; the
run must continue bit for bit like one that never saw the batch, at the scale to which the scaler has fallen.
"""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    FEATURES,
    FRONT_ENDS,
    Classifier,
    E_hat,
    build,
    calling,
    driver_of,
    fit,
    is_perturbed,
    make_dataset,
    make_loader,
    same,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.amp import GradScaler
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_flatlora import EFMLoRA, FMLoRA
from lightning_flatlora.baselines import SAM, BalancednessRegularization, LoRASAM

BATCHES, SIZE = 8, 4


def half_precision() -> MixedPrecision:
    """16-mixed on the CPU with a scaler that acts as on a GPU, at a scale where float16 loses nothing here."""
    return MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_every_precision_trains_flat(tmp_path, front_end, precision):
    """The weights keep their dtype, E is float32 or wider and inside the ball, and the run differs from plain LoRA."""
    dtype = torch.float64 if precision == "64-true" else torch.float32
    ends = []
    for front, rho in ((front_end, 0.5), ("plain", 0.5)):
        kwargs: dict[str, Any] = {"plugins": half_precision()} if precision == "16-mixed" else {"precision": precision}
        module, callbacks, more = build(front, rho=rho)
        loader = make_loader(dtype=dtype)
        trainer = fit(tmp_path, module, callbacks, loader, **kwargs, **more)
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert all(torch.isfinite(w).all() for w in weights(module).values())
        ends.append(weights(module))
        if front != "plain":
            perturbation = driver_of(trainer).perturbation
            E = perturbation.state_dict()["E"]
            assert {e.dtype for e in E.values()} == {dtype}
            radius = sum((p.scaling * E[p.name] @ p.A.detach()).square().sum() for p in perturbation.pairs).sqrt()
            assert 0.1 < radius <= 0.5 * 1.5
    assert not same(*ends)


@pytest.mark.parametrize("callback", [EFMLoRA, FMLoRA, SAM, LoRASAM, BalancednessRegularization])
def test_bf16_true_warns(tmp_path, callback):
    """A small E is lost if B is kept in bfloat16; one warning at the start says so."""
    with pytest.warns(UserWarning, match=r"stored in torch.bfloat16.*bf16-mixed"):
        fit(tmp_path, Classifier(), [callback(0.5)], make_loader(dtype=torch.bfloat16), precision="bf16-true")


# -- overflow under a loss scaler


class Overflow(Callback):
    """Makes one batch overflow, and records the state before and after its window."""

    def __init__(self, where: str, bad: int, window: set[int]) -> None:
        self.where, self.bad, self.window = where, bad, window
        self.before: Any = None
        self.after: Any = None
        self.scales: list[float] = []
        self.handle: Any = None

    def inside(self, module: Any, batch_idx: int) -> None:
        """Poison one gradient of this pass, if the test asks for it."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        poisoned = self.where == "other" or (self.where == "second" and is_perturbed(module))
        if batch_idx == self.bad and poisoned:
            bias = module.net.base_model.model[4].base_layer.bias
            self.handle = bias.register_hook(lambda grad: grad * torch.inf)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == min(self.window):
            self.before = snapshot(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        if batch_idx == max(self.window):
            self.after = snapshot(trainer)


def snapshot(trainer: Any) -> tuple[Any, Any, Any]:
    """Copies of the weights, of the average Ê if there is one, and of the optimizer's state."""
    callback = driver_of(trainer)
    optimizer = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
    return weights(trainer.lightning_module), E_hat(callback) if isinstance(callback, EFMLoRA) else {}, optimizer


def lower_scale(index: int) -> Callback:
    """Halves the scale at one batch, as the other run's scaler did at the overflow."""

    def halve(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == index:
            scaler = trainer.precision_plugin.scaler
            scaler.scale(torch.ones(()))  # creates the scale, if no step has done so yet
            scaler.update(scaler.get_scale() / 2)

    return calling(on_train_batch_start=halve)


def overflowing(dataset: TensorDataset, batches: set[int]) -> TensorDataset:
    factor = dataset.tensors[2].clone()
    for index in batches:
        factor[index * SIZE : (index + 1) * SIZE] = 1e30
    return TensorDataset(*dataset.tensors[:2], factor)


OVERFLOWS = [
    *product(FRONT_ENDS, ["loss"], [(1, 0), (1, 3), (2, 4), (2, 5)]),
    *product(FRONT_ENDS, ["other"], [(1, 0), (2, 4)]),
    *product(["fmlora", "module", "efmlora+module"], ["second"], [(1, 3), (2, 5)]),
]


@pytest.mark.parametrize(("front_end", "where", "which"), OVERFLOWS)
def test_overflow_changes_nothing_but_the_scaler(tmp_path, front_end, where, which):
    """Batch ``bad`` overflows: E, weights and Adam's state stay, and the run continues as if without its window."""
    window, bad = which
    every = {"every_n_steps": 1}  # a skipped step counts, so longer intervals would shift against the shorter run
    skipped = set(range(bad // window * window, bad // window * window + window))
    dataset = make_dataset(BATCHES * SIZE)

    module, callbacks, kwargs = build(front_end, accumulate=window, **every)
    overflow = Overflow(where, bad, skipped)
    module.inside.append(overflow.inside)
    loader = DataLoader(overflowing(dataset, {bad} if where == "loss" else set()), batch_size=SIZE)
    trainer = fit(tmp_path, module, [*callbacks, overflow], loader, max_epochs=1, plugins=half_precision(), **kwargs)
    assert overflow.scales[max(skipped)] == overflow.scales[-1] == 2.0**9
    assert same(overflow.before, overflow.after)

    kept = [i for i in range(BATCHES * SIZE) if i // SIZE not in skipped]
    reference, callbacks, kwargs = build(front_end, accumulate=window, **every)
    lower = lower_scale(min(skipped))
    loader = DataLoader(Subset(dataset, kept), batch_size=SIZE)
    other = fit(tmp_path, reference, [*callbacks, lower], loader, max_epochs=1, plugins=half_precision(), **kwargs)
    assert trainer.global_step == other.global_step + 1
    assert same(snapshot(trainer), snapshot(other))
    if front_end == "efmlora":
        assert all(E.any() for E in E_hat(driver_of(trainer)).values())


# -- no scaler


@pytest.mark.parametrize(
    "callback", [EFMLoRA(0.5), FMLoRA(0.5), SAM(0.5), LoRASAM(0.5)], ids=lambda c: type(c).__name__
)
def test_sparse_gradients_beside_the_pairs_are_those_of_a_dense_embedding(tmp_path: Any, callback: Any) -> None:
    class Embeds(Classifier):
        def __init__(self, sparse: bool) -> None:
            super().__init__(lr=0.1)
            torch.manual_seed(0)
            self.embedding = torch.nn.Embedding(CLASSES, FEATURES, sparse=sparse)
            self.optimizer_class = torch.optim.SGD

        def loss(self, batch: Any, batch_idx: int) -> Any:
            return super().loss((batch[0] + self.embedding(batch[1]), *batch[1:]), batch_idx)

    trained = []
    for sparse in (False, True):
        module = Embeds(sparse)
        fit(tmp_path, module, [copy.deepcopy(callback)], plugins=half_precision())
        trained.append(weights(module))
    for dense, of_sparse in zip(trained[0].values(), trained[1].values(), strict=True):
        torch.testing.assert_close(of_sparse, dense)
