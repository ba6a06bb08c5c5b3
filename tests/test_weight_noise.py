"""Noise on the full weight: its distribution, its gradient compared with a dense one, and that it leaves no trace."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_flatlora.full_weight.weight_noise import WeightNoise, derived_seed

SIGMA, SEED = 0.3, 11
SHAPES = [(7, 5), (5, 9)]


def make_net(dtype: torch.dtype = torch.float64, conv1d: bool = False, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    layers = [Conv1D(n, m) if conv1d else nn.Linear(m, n) for n, m in SHAPES[::-1]]
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"], fan_in_fan_out=conv1d, **settings)
    net = get_peft_model(nn.Sequential(layers[0], nn.Tanh(), layers[1]), config).to(dtype)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3)
    return net


def layers_of(net: nn.Module) -> list[nn.Module]:
    return [net.base_model.model[0], net.base_model.model[2]]


def merged(layer: nn.Module) -> Tensor:
    """W' (n, m), formed explicitly."""
    base = layer.base_layer.weight
    base = base.mT if layer.fan_in_fan_out else base
    updates = [layer.lora_B[a].weight @ layer.lora_A[a].weight * layer.scaling[a] for a in layer.active_adapters]
    return (base + sum(updates)).detach()


def noise_of(noise: WeightNoise, layer: nn.Module, sigma: float = SIGMA, seed: int = SEED) -> Tensor:
    """A layer's n x m noise, measured by applying the layer to the identity."""
    x = torch.eye(layer.in_features, dtype=layer.base_layer.weight.dtype)
    clean = layer(x)
    with noise.applied(sigma, seed):
        return (layer(x) - clean).detach().mT


def test_mean_and_variance_are_those_of_equation_7() -> None:
    """In each entry over 1,000 seeds, within five standard errors of 0 and of sigma^2 ||W'_i||^2 / m."""
    net, count = make_net(), 1000
    noise = WeightNoise(net)
    for layer in layers_of(net):
        samples = torch.stack([noise_of(noise, layer, seed=seed) for seed in range(count)])
        W = merged(layer)
        variance = (SIGMA**2 * W.square().sum(1, keepdim=True) / W.shape[1]).expand_as(W)
        assert ((samples.mean(0)).abs() < 5 * (variance / count).sqrt()).all()
        assert ((samples.var(0) / variance - 1).abs() < 5 * (2 / count) ** 0.5).all()


def dense(net: nn.Module, seed: int = SEED) -> nn.Module:
    """A copy whose stored base weights include the noise."""
    twin = copy.deepcopy(net)
    for index, layer in enumerate(layers_of(twin)):
        W = merged(layer)
        normal = torch.randn(
            W.shape, generator=torch.Generator().manual_seed(derived_seed(seed, index)), dtype=torch.float64
        )
        eps = SIGMA / W.shape[1] ** 0.5 * W.norm(dim=1, keepdim=True) * normal
        layer.base_layer.weight.data += eps.mT if layer.fan_in_fan_out else eps
    return twin


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("conv1d", "adapters"), [(False, 1), (True, 1), (False, 2)])
def test_loss_and_gradients_equal_the_dense_ones(conv1d: bool, adapters: int, checkpointed: bool) -> None:
    """The gradients of A and B in all layers, also through the noise of later layers, and that of the input."""
    net = make_net(conv1d=conv1d)
    if adapters == 2:
        net.add_adapter("second", LoraConfig(r=3, lora_alpha=2, target_modules=["0", "2"], init_lora_weights=False))
        net.base_model.set_adapter(["default", "second"])
        net.double()
    twin, x = dense(net), torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    twin(x).square().sum().backward()
    expected, x.grad = x.grad, None
    with WeightNoise(net).applied(SIGMA, SEED):
        output = checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
        output.square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-10)
    others = dict(twin.named_parameters())
    found = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert len(found) == 4 * adapters
    for name, grad in found.items():
        torch.testing.assert_close(grad, others[name].grad, rtol=1e-10, atol=1e-10)


def test_no_drift_no_random_number_and_no_trace() -> None:
    """After 1,000 blocks, some of which raise, stored weights, generator and hooks are as before, bit for bit."""
    net = make_net()
    noise, stored = WeightNoise(net), copy.deepcopy(net.state_dict())
    generator, x = torch.get_rng_state(), torch.ones(2, 9, dtype=torch.float64)
    clean = net(x)
    for seed in range(1000):
        try:
            with noise.applied(SIGMA, seed):
                assert not torch.equal(net(x), clean)
                if seed % 10 == 0:
                    raise RuntimeError
        except RuntimeError:
            pass
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in stored.items())
    assert torch.equal(net(x), clean)
    assert all(type(layer.base_layer) is nn.Linear for layer in layers_of(net))
    assert not any("_flatlora_terms" in vars(module) for module in net.modules())


def test_nothing_of_full_size_is_kept_for_the_backward() -> None:
    net = make_net()
    frozen = {layer.base_layer.weight.untyped_storage().data_ptr() for layer in layers_of(net)}
    kept: list[Tensor] = []
    pack = lambda tensor: kept.append(tensor) or tensor  # noqa: E731
    with WeightNoise(net).applied(SIGMA, SEED), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(torch.ones(2, 9, dtype=torch.float64))
    transposed = [shape[::-1] for shape in SHAPES]
    full = [t for t in kept if tuple(t.shape) in SHAPES + transposed]
    assert kept
    assert all(t.untyped_storage().data_ptr() in frozen for t in full)


def test_copies_and_disabled_adapters_have_no_noise() -> None:
    net, x = make_net(), torch.randn(3, 9, dtype=torch.float64)
    clean = net(x)
    with net.disable_adapter():
        base = net(x)
    with WeightNoise(net).applied(SIGMA, SEED):
        assert torch.equal(copy.deepcopy(net)(x), clean)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), clean)
        with net.disable_adapter():
            assert torch.equal(net(x), base)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_sees_the_noise_of_every_step(backend: str) -> None:
    """Though it was compiled without noise, and neither size nor seed is that of the first noisy step."""
    net, x = make_net(), torch.randn(3, 9, dtype=torch.float64)
    noise = WeightNoise(net)
    torch.compiler.reset()
    compiled = torch.compile(net, backend=backend)
    assert torch.equal(compiled(x), net(x))
    graphs = []
    for seed, sigma in enumerate((0.1, 0.2, 0.0, 0.3, 0.4)):
        with noise.applied(sigma, seed):
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-12, atol=1e-12)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1  # one compilation with noise and one without


def test_autocast_computes_in_the_base_layers_dtype() -> None:
    net = make_net(torch.float32)
    x = torch.randn(3, 9)
    clean = net(x)
    with WeightNoise(net).applied(SIGMA, SEED):
        wide = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = net(x)
        narrow.float().sum().backward()
    assert narrow.dtype == torch.bfloat16
    assert (narrow - wide).norm() < 0.05 * (wide - clean).norm() + 0.02 * wide.norm()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


class Mixed(nn.Module):
    """One layer of each kind that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.attention = nn.Conv2d(2, 4, 3), nn.Linear(4, 4), nn.MultiheadAttention(4, 2)


def test_layers_that_get_no_noise_are_named() -> None:
    net = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["conv", "linear", "attention"]))
    noise = WeightNoise(net)
    assert noise.names == ["base_model.model.linear"]
    text = "\n".join(noise.left_out)
    assert "Conv2d: its base, a Conv2d, is not a plain Linear (1 in all, first base_model.model.conv)" in text
    assert "its base, a MultiheadAttention, is not a plain Linear" in text
    assert "nn.MultiheadAttention reads the weight itself" in text


@pytest.mark.parametrize(
    ("name", "bad"), [("sigma", -0.1), ("sigma", float("nan")), ("seed", -1), ("seed", 0.5), ("seed", True)]
)
def test_values(name: str, bad: Any) -> None:
    settings: Any = {"sigma": 0.1, "seed": 0, name: bad}
    allowed = {"sigma": "a finite number", "seed": "an integer"}[name]
    noise = WeightNoise(make_net())
    with pytest.raises(ValueError, match=f"{name} must be {allowed} >= 0, got {bad}"), noise.applied(**settings):
        pass
