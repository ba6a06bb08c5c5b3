"""A scaling may change in mid-fit: the radius stays, and a pair whose scaling is 0 rests."""

from typing import Any

import pytest
import torch
from changing_models import At, Averages
from helpers import Classifier, E_hat, TwoPassClassifier, assert_no_trace, fit
from lightning.pytorch import Callback
from torch import Tensor

from lightning_flatlora import EFMLoRA, FMLoRA


class Radius(Callback):
    """The radius of the fresh perturbation in full weight space at each step; beta=1 keeps it alone."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.radii = callback, []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scaling = {n: m.scaling["default"] for n, m in pl_module.named_modules() if hasattr(m, "scaling")}
        total = torch.zeros(())
        for pair in self.callback.search.pairs:
            E = E_hat(self.callback)[pair.name]
            total += (scaling[pair.name.removesuffix(".lora_B.default.weight")] * E @ pair.A).detach().square().sum()
        self.radii.append(float(total.sqrt()))


@pytest.mark.parametrize("in_step", [False, True])
def test_a_scaling_changed_in_mid_fit_leaves_the_radius(tmp_path, in_step):
    module = Classifier()
    callback = EFMLoRA(0.5, beta=1.0, estimator="projected")
    radius = Radius(callback)

    def change(module: Any, *_: Any) -> None:
        for part in module.modules():
            if hasattr(part, "set_scale"):
                part.set_scale("default", 10.0)

    if in_step:
        module.inside.append(lambda module, batch_idx: change(module) if batch_idx == 3 else None)
    fit(tmp_path, module, [callback, radius, *([] if in_step else [At(3, change)])], max_epochs=1)
    assert radius.radii == pytest.approx([0.5] * 6, rel=1e-3)


@pytest.mark.parametrize("callback", [FMLoRA, EFMLoRA])
def test_a_scaling_of_zero_leaves_its_layer_out(tmp_path, callback):
    """One layer that is switched off so must not make every perturbation vanish."""
    module, ours = Classifier(), callback(0.5)
    change = At(2, lambda module: module.net.base_model.model[2].set_scale("default", 0.0))
    fit(tmp_path, module, [ours, change], max_epochs=1)
    assert all(E.isfinite().all() for E in E_hat(ours).values())
    assert sum(bool(E.any()) for name, E in E_hat(ours).items() if ".2." not in name) == 2


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("layers", [[2], [0, 2, 4]])
def test_a_scaling_of_zero_lets_a_pair_rest(tmp_path, layers, in_step):
    """One pair, or all of them: Ê stays until the scaling comes back, and then counts with the new one."""
    module, ours = Classifier(), EFMLoRA(0.5)
    averages = Averages(ours)

    def change(module: Any, batch_idx: int) -> None:
        scaling = {2: 0.0, 4: 2.0}.get(batch_idx)
        for layer in layers if scaling is not None else []:
            module.net.base_model.model[layer].set_scale("default", scaling)

    if in_step:
        loss = module.loss

        def loss_after_change(batch: Any, batch_idx: int) -> Tensor:
            change(module, batch_idx)
            return loss(batch, batch_idx)

        module.loss = loss_after_change
    else:
        module.on_train_batch_start = lambda batch, batch_idx: change(module, batch_idx)
    fit(tmp_path, module, [ours, averages], max_epochs=1)
    names = [f"net.base_model.model.{layer}.lora_B.default.weight" for layer in layers]
    for name in names:
        assert averages.seen[1][name].any()
        assert torch.equal(averages.seen[3][name], averages.seen[1][name])
        assert not torch.equal(averages.seen[4][name], averages.seen[3][name])
    assert_no_trace(module)


def test_a_changed_scaling_reaches_a_module_of_two_passes(tmp_path):
    module = TwoPassClassifier(0.5)
    fit(
        tmp_path, module, [At(2, lambda module: module.net.base_model.model[2].set_scale("default", 3.0))], max_epochs=1
    )
    assert sorted(pair.scaling for pair in module._driver.perturbation.pairs) == [2.0, 2.0, 6.0]
