"""No step of a method waits for the device: each of them trains a model on "meta", whose tensors have no values.

There, any read of a value fails, such as ``.item()``, ``bool(tensor)`` or ``.cpu()``. Some reads are intended, outside
of such steps: a checkpoint's state, FlatnessMonitor's measurements, and what the last test names. Under fp16 it is
Lightning's GradScaler that reads whether to skip a step, and not the package.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import litgpt_models
import pytest
import torch
from helpers import BASELINES, FRONT_ENDS, build, calling, driver_of, fit, is_perturbed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from loop_runs import run, squares
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatlora import CosineRho, LearningRateRho, loops
from lightning_flatlora.full_weight import WeightNoise
from lightning_flatlora.pairs.finders import litgpt_pairs

META = torch.device("meta")
WINDOW, STEPS = 2, 5
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*groups > 1. Merging is not supported"),  # peft's warning
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # peft 0.18's warning about experts
]


class UnfusedAdam(torch.optim.Adam):
    """Takes the place of fused Adam, which doesn't exist on meta, but never skips a step."""

    def __init__(self, parameters: Any, maximize: bool, fused: bool) -> None:
        super().__init__(parameters, maximize=maximize)

    def step(self) -> None:  # type: ignore[override]
        self.found_inf = self.grad_scale = None
        super().step()


@pytest.fixture(autouse=True)
def _what_meta_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give meta an autocast, a random state and Adam, and restore its buffers like those of another device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())
    device_module = SimpleNamespace(
        get_rng_state=lambda device: None,
        set_rng_state=lambda state, device: None,
        is_available=lambda: False,  # called by PyTorch 2.15's optimizers
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: device_module)
    monkeypatch.setattr("lightning_flatlora.baselines.bi_lora.Adam", UnfusedAdam)
    monkeypatch.setattr("lightning_flatlora.methods.put_back._is_copyable", lambda buffer: buffer is not None)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bm,enm->bn", x, self.up)


class Net(nn.Module):
    """Every kind of layer: the attention has its three projections in one parameter, and so have the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 1, groups=2)
        self.table = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts()
        self.norm, self.dropout, self.out = nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv(x)).flatten(2).mT + self.table(torch.arange(9, device=x.device))
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.out(self.dropout(self.norm(self.experts(x))))


def net_on_meta(experts: bool = True) -> nn.Module:
    layers = ["conv", "grouped", "table", "attention", "out"]
    parameters = ["experts.up"] if experts else []
    with META:
        return get_peft_model(Net(), LoraConfig(r=2, target_modules=layers, target_parameters=parameters))


def litgpt_on_meta() -> nn.Module:
    """In each attention, the pairs of queries, keys and values are rows of one A and one B."""
    with META:
        return litgpt_models.gpt("q, v")


class Copies(TorchDispatchMode):
    """Lists operations with tensors of two devices, as a copy from the host may also wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.is_on = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        kinds = {t.device.type for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        if self.is_on and len(kinds) > 1:
            self.seen.append(str(func))
        return out


# -- loops


def run_loop(method: str, net: nn.Module, inputs: Tensor, rho: Any = 0.5, lr: float = 0.1, **settings: Any) -> Any:
    """Train for several steps of several micro-batches; returns the method and the copies."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr)
    flat = getattr(loops, method)(net, optimizer, rho, total_steps=STEPS, **settings)
    copies = Copies()
    with copies:
        run(flat, net, optimizer, [inputs] * WINDOW * STEPS, window=WINDOW, loss=squares)
    return flat, copies.seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimator": "projected", "rho": LearningRateRho(0.5)},
        {"norm_scope": "layer", "start_step": 1, "every_n_steps": 2},
        {"estimator": "projected", "norm_scope": "layer", "rho": CosineRho(0.5, 0.1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["peft", "litgpt"])
@pytest.mark.parametrize("method", ["EFMLoRA", "FMLoRA"])
def test_a_loop(method: str, model: str, settings: dict[str, Any]) -> None:
    if model == "peft":
        flat, copied = run_loop(method, net_on_meta(), torch.empty(4, 2, 5, 5, device=META), **settings)
    else:
        tokens = torch.empty(2, 6, dtype=torch.long, device=META)
        flat, copied = run_loop(method, litgpt_on_meta(), tokens, finder=litgpt_pairs, **settings)
        assert any(pair.B_rows is not None for pair in flat.method.pairs)
    assert flat.step == STEPS
    assert {stack.E.device for stack in flat.perturbation._stacks} == {META}
    assert flat.perturbation.may_be_nonzero or method == "FMLoRA"
    assert not copied


# -- callbacks and FMLoRAModule


class OnMeta(SingleDeviceStrategy):
    """A strategy that, unlike Lightning's, doesn't move the model to the CPU at the end."""

    def teardown(self) -> None:
        pass


class AnyDevice(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class Batches(IterableDataset[Any]):
    """Batches on meta, without a length, as Lightning would compare it on the device."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(WINDOW * STEPS):
            labels = torch.empty(4, dtype=torch.long, device=META)
            yield torch.empty(4, 2, 5, 5, device=META), labels, torch.empty(4, device=META)


def fit_on_meta(tmp_path: Path, name: str, **settings: Any) -> tuple[Any, list[str]]:
    """Train with a front end or a baseline, as if there were a loss scaler; returns its callback and the copies."""
    net = net_on_meta(experts=name not in ("nBAR", "oBAR"))  # they refuse experts
    module, callbacks, more = build(name, net=net, accumulate=WINDOW, **settings)
    copies = Copies()
    copies.is_on = False

    def start(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        copies.is_on = batch_idx > 0  # pairs are searched for in the first batch
        driver_of(trainer).method.loss_scaler = torch.amp.GradScaler(enabled=False)

    watch = calling(on_train_batch_start=start, on_train_batch_end=lambda *args: setattr(copies, "is_on", False))
    on_meta: dict[str, Any] = {"strategy": OnMeta(META), "accelerator": AnyDevice(), "max_epochs": 1}
    with copies:
        trainer = fit(tmp_path, module, [watch, *callbacks], DataLoader(Batches(), batch_size=None), **on_meta, **more)
    assert trainer.global_step == STEPS
    return driver_of(trainer), copies.seen


@pytest.mark.filterwarnings("ignore:(RandomPerturbation|BiLoRA) leaves unperturbed:UserWarning")
@pytest.mark.parametrize("name", [*FRONT_ENDS, *BASELINES])
def test_a_fit(tmp_path: Path, name: str) -> None:
    callback, copied = fit_on_meta(tmp_path, name)
    assert callback.step == STEPS
    # This noise's seed is a CPU tensor, which the operator reads there.
    expected = {"lightning_flatlora.noise_product.default"} if name == "RandomPerturbation" else set()
    assert set(copied) == expected


def test_noise_on_whole_weights() -> None:
    net, inputs = net_on_meta(), torch.empty(4, 2, 5, 5, device=META)
    with WeightNoise(net).applied(0.5, seed=3):
        net(inputs).sum().backward()
    assert not is_perturbed(net)


def test_a_first_step_at_a_rate_of_zero_reads_the_gradients() -> None:
    """A warm-up has one such step; only its gradients tell it from the step in which PyTorch creates a state."""
    with pytest.raises(RuntimeError, match="meta"):
        run_loop("EFMLoRA", net_on_meta(), torch.empty(4, 2, 5, 5, device=META), lr=0.0)
