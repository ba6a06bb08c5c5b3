"""EFMLoRA beside FMLoRAModule: fresh perturbations at refresh steps, the average in between."""

from typing import Any

import pytest
import torch
from helpers import (
    E_hat,
    TwoPassClassifier,
    build,
    fit,
    is_perturbed,
    make_loader,
    make_net,
    same,
    weights,
)
from reference import ascent, perturbations
from torch import nn

from lightning_flatlora import EFMLoRA, find_pairs


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
