"""EFMLoRA beside FMLoRAModule: fresh perturbations at refresh steps, the average in between."""

from typing import Any

import pytest
import torch
from helpers import E_hat, TwoPassClassifier, build, fit, is_perturbed, make_loader, make_net, same, weights
from reference import Reference
from torch import nn

from lightning_flatlora import EFMLoRA, find_pairs


class Paired(Reference):
    """The callback beside the module, word for word (method.md, section 5)."""

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
    """Refresh steps: fresh E at the clean point, Ê moved, descent at B + E; the others: one pass at B + Ê."""
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
    """EFMLoRA in configure_callbacks, after the module's own driver, works as one in the Trainer's list."""

    class Own(TwoPassClassifier):
        def configure_callbacks(self) -> Any:
            return [*super().configure_callbacks(), EFMLoRA(0.5, every_n_steps=2)]

    module, (other, callbacks, _) = Own(0.5), build("efmlora+module")
    trainer = fit(tmp_path, module, [])
    fit(tmp_path, other, callbacks)
    assert same(weights(module), weights(other))
    assert next(c for c in trainer.callbacks if isinstance(c, EFMLoRA)).step == 12
