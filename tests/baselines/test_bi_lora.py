"""Bi-LoRA's auxiliary pairs: their ball, what doesn't see them, when they stay unchanged, which layers have them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import DenseBiLoRA, frobenius
from float64_runs import Automatic, fit_in_float64, network
from helpers import Classifier, calling, fit, make_net, same
from imitated_layers import Bare
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from torch import Tensor, nn

from lightning_flatlora import find_pairs
from lightning_flatlora.baselines import BiLoRA
from lightning_flatlora.baselines.bi_lora import BiLoRAStep
from lightning_flatlora.full_weight.output_terms import _Adding
from lightning_flatlora.pairs.finders import PairsByName

OF_BARE = PairsByName(a="lora_A", b="lora_B", scaling="scaling", base="linear")


def states(owner: BiLoRA | BiLoRAStep) -> dict[str, dict[str, Tensor]]:
    """A2 and B2 of each layer."""
    method = owner.method if isinstance(owner, BiLoRA) else owner
    return method.state_dict()["auxiliary"]


def step_on(net: nn.Module, rank: int = 8, seed: int = 0) -> BiLoRAStep:
    """Attach the method's step to a network, outside of any loop."""
    step = BiLoRAStep(rho=0.5, rank=rank, seed=seed)
    step.optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    step.take_pairs(find_pairs(net).pairs, net, net)
    return step


def products(callback: BiLoRA) -> dict[str, Tensor]:
    """The product B2 A2 of each layer."""
    return {name: saved["B"] @ saved["A"] for name, saved in states(callback).items()}


# -- the ball


def test_the_pairs_stay_in_the_ball_and_reach_its_sphere() -> None:
    callback, loop = BiLoRA(0.1, rank=4, seed=5), DenseBiLoRA(lambda step: 0.1)
    norms: list[float] = []
    notes = calling(on_train_batch_end=lambda *args: norms.append(frobenius(list(products(callback).values()))))
    fit_in_float64(Automatic(network()), 2, [callback, notes])
    loop.run(2)
    assert max(norms) <= 0.1 * (1 + 1e-12)
    assert sum(norm > 0.1 * (1 - 1e-12) for norm in norms) > 10
    for norm, unscaled in zip(norms, loop.norms, strict=True):
        assert norm == pytest.approx(min(unscaled, 0.1), rel=1e-9)
    assert float(callback.method.norm()) == pytest.approx(norms[-1], rel=1e-12)


# -- what does not see them


def test_they_are_in_no_module_optimizer_or_checkpoint(tmp_path: Path) -> None:
    files = {}
    for name, callbacks in (("plain", []), ("bi", [BiLoRA(0.5)])):
        module = Classifier()
        checkpoint = ModelCheckpoint(tmp_path, filename=name)
        trainer = fit(tmp_path, module, [*callbacks, checkpoint])
        (group,) = trainer.optimizers[0].param_groups
        files[name] = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        files[name]["held"] = len(group["params"])
    plain, bi = files["plain"], files["bi"]
    assert plain["state_dict"].keys() == bi["state_dict"].keys()
    assert plain["held"] == bi["held"]
    assert len(plain["optimizer_states"][0]["state"]) == len(bi["optimizer_states"][0]["state"])
    assert bi["callbacks"]["BiLoRA"]["auxiliary"].keys() == {f"net.base_model.model.{index}" for index in (0, 2, 4)}


# -- when they stay unchanged


@pytest.mark.parametrize("place", ["of their own", "that a loss scaler watches"])
def test_a_gradient_that_is_not_finite_moves_nothing(place: str) -> None:
    pairs, watched = step_on(make_net()), nn.Parameter(torch.ones(2))
    seen = []
    for entry in (1.0, torch.nan, 1.0):
        for factor in [*pairs.factors, watched]:
            factor.grad = torch.ones_like(factor)
        (pairs.factors[1] if place == "of their own" else watched).grad.view(-1)[0] = entry
        pairs.use_gradients([watched])
        seen.append(states(pairs))
    assert same(seen[0], seen[1])
    assert not same(seen[1], seen[2])


def test_gradients_of_a_window_that_ends_without_a_step_are_dropped(tmp_path: Path) -> None:
    """The first epoch ends after one batch of a window of two."""
    callback, whole = BiLoRA(0.5), BiLoRA(0.5)
    held: list[bool] = []

    class EndsEarly(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            held.append(any(factor.grad is not None for factor in callback.method.factors))
            return -1 if self.trainer.current_epoch == 0 and batch_idx == 1 else None

    fit(tmp_path, EndsEarly(lr=0.0), [callback], max_epochs=2, accumulate_grad_batches=2)
    fit(tmp_path, Classifier(lr=0.0), [whole], max_epochs=1, accumulate_grad_batches=2)
    assert held[:3] == [False, True, True]
    assert callback.step == whole.step == 3
    assert same(states(callback), states(whole))


def test_a_layer_that_is_frozen_for_an_epoch_keeps_its_pair(tmp_path: Path) -> None:
    module, callback = Classifier(), BiLoRA(0.5)
    name, counts, kept = "net.base_model.model.2", [], []

    def freeze(trainer: Any, pl_module: Any) -> None:
        layer = pl_module.net.base_model.model[2]
        for factor in (layer.lora_A.default.weight, layer.lora_B.default.weight):
            factor.requires_grad_(trainer.current_epoch != 1)

    def note(*args: Any) -> None:
        counts.append(len(callback.method.terms))
        kept.append(states(callback)[name])

    changes = calling(on_train_epoch_start=freeze, on_train_epoch_end=note)
    fit(tmp_path, module, [changes, callback], max_epochs=3)
    assert counts == [3, 2, 3]
    assert same(kept[0], kept[1])
    assert not same(kept[1], kept[2])


# -- which layers have pairs, and how the pairs are initialized


def test_ranks_and_the_first_factors() -> None:
    net, random = make_net(), torch.get_rng_state()
    found = [states(step_on(net, 5, seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), random)
    assert same(found[0], found[1])
    for name, saved in found[0].items():
        A, B = saved["A"], saved["B"]
        assert A.shape[0] == B.shape[1] == 5
        assert not B.any()
        assert A.abs().max() <= A.shape[1] ** -0.5
        assert not same(A, found[2][name]["A"])


def test_two_active_adapters_have_one_pair() -> None:
    net = make_net()
    net.add_adapter("other", LoraConfig(r=3, target_modules=["0", "2", "4"]))
    net.base_model.set_adapter(["default", "other"])
    assert len(states(step_on(net))) == 3


def test_layers_of_another_library() -> None:
    module, callback = Classifier(net=nn.Sequential(Bare(), nn.Tanh(), Bare())), BiLoRA(0.5, finder=OF_BARE)
    fit(None, module, [callback])
    assert [tuple(product.shape) for product in products(callback).values()] == [(6, 6), (6, 6)]
    assert frobenius(list(products(callback).values())) > 0.1
    assert not any(isinstance(part, _Adding) for part in module.modules())
