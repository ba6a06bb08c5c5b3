"""Run for run, the package equals the literal algorithms in float64: 100 AdamW steps, differences below 1e-10."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import Reference
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatlora import (
    CosineRho,
    EFMLoRA,
    FMLoRA,
    FMLoRAModule,
    InverseSqrtRho,
    LearningRateRho,
    LinearRho,
    find_pairs,
)

RHO, BETA = 0.4, 0.7
BATCHES, SIZE = 26, 4  # 26 is no multiple of 4: the last accumulation window is shorter


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2", "4"], modules_to_save=["6"])
    return get_peft_model(nn.Sequential(*layers), config).double()


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCHES * SIZE, 6, generator=generator)  # float32 values, as FSDP1's plugin casts what comes in
    return TensorDataset(x.double(), torch.randint(0, 3, (BATCHES * SIZE,), generator=generator))


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)


class _Learner:
    """What both modules share: the network, and AdamW under a cosine schedule stepped at each optimizer step."""

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.net)
        return [optimizer], [{"scheduler": scheduler_of(optimizer), "interval": "step"}]


class Automatic(_Learner, L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss(self.net, batch)


class Manual(_Learner, FMLoRAModule):
    def __init__(self, net: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = net

    def compute_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss(self.net, batch)


def fit(
    module: L.LightningModule, epochs: int, callbacks: list[L.Callback], loader: Any = None, **trainer: Any
) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = {"enable_model_summary": False, "accelerator": "cpu", **quiet, **trainer}
    loader = DataLoader(dataset(), batch_size=SIZE) if loader is None else loader
    L.Trainer(**{"max_epochs": epochs, "callbacks": callbacks, "precision": "64-true", **trainer}).fit(module, loader)


def reference(epochs: int, **settings: Any) -> nn.Module:
    model = network()
    optimizer = optimizer_of(model)
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(model).pairs]
    settings = {"loss": loss, "rho": lambda step: RHO, "scheduler": scheduler_of(optimizer), **settings}
    run = Reference(model, pairs, optimizer=optimizer, **settings)
    batches = list(DataLoader(dataset(), batch_size=SIZE))
    for _ in range(epochs):
        run.train(batches)
    assert run.step >= 100
    return model


def worst_difference(one: nn.Module, other: nn.Module) -> float:
    others = dict(other.named_parameters())
    return max(float((p - others[name]).detach().abs().max()) for name, p in one.named_parameters())


CASES = [
    {},
    {"estimator": "projected"},
    {"norm_scope": "layer"},
    {"estimator": "projected", "norm_scope": "layer"},
    {"accumulate": 2},
    {"accumulate": 4},
    {"clip_norm": 0.05},
    {"clip_value": 0.01},
    {"accumulate": 4, "clip_norm": 0.05, "norm_scope": "layer"},
    {"start_step": 7, "every_n_steps": 3},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("front_end", ["EFMLoRA", "FMLoRA", "FMLoRAModule"])
def test_100_steps_equal_the_literal_algorithm(front_end: str, case: dict[str, Any]) -> None:
    accumulate = case.get("accumulate", 1)
    epochs = -(-100 // -(-BATCHES // accumulate))
    algorithm = {"beta": BETA} if front_end == "EFMLoRA" else {}
    expected = reference(epochs, **case, **algorithm)
    method = {
        key: value for key, value in case.items() if key in ("estimator", "norm_scope", "start_step", "every_n_steps")
    }
    clip = {}
    if "clip_norm" in case or "clip_value" in case:
        kind = "norm" if "clip_norm" in case else "value"
        clip = {"gradient_clip_val": case[f"clip_{kind}"], "gradient_clip_algorithm": kind}
    net = network()
    if front_end == "FMLoRAModule":
        fit(Manual(net, rho=RHO, accumulate_grad_batches=accumulate, **method, **clip), epochs, [])
    else:
        callback = EFMLoRA(RHO, beta=BETA, **method) if front_end == "EFMLoRA" else FMLoRA(RHO, **method)
        fit(Automatic(net), epochs, [callback], accumulate_grad_batches=accumulate, **clip)
    assert worst_difference(net, expected) < 1e-10
    assert worst_difference(net, reference(epochs, **{**case, **algorithm, "rho": lambda step: 0.0})) > 1e-4


def penalised(model: nn.Module, batch: Any) -> torch.Tensor:
    """A penalty on A, which one optimizer step sees in its gradient and E must not."""
    sizes = [p.square().sum() + p.abs().sum() for name, p in model.named_parameters() if "lora_A" in name]
    return loss(model, batch) + 0.01 * sum(sizes)


class PenalisedAutomatic(Automatic):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return penalised(self.net, batch)


class PenalisedManual(Manual):
    def compute_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return penalised(self.net, batch)


@pytest.mark.parametrize("front_end", ["EFMLoRA", "FMLoRA", "FMLoRAModule"])
def test_a_penalised_run_equals_the_literal_algorithm(front_end: str) -> None:
    net, algorithm = network(), {"beta": BETA} if front_end == "EFMLoRA" else {}
    if front_end == "FMLoRAModule":
        fit(PenalisedManual(net, rho=RHO), 4, [])
    else:
        fit(PenalisedAutomatic(net), 4, [EFMLoRA(RHO, beta=BETA) if front_end == "EFMLoRA" else FMLoRA(RHO)])
    assert worst_difference(net, reference(4, loss=penalised, **algorithm)) < 1e-10


@pytest.mark.parametrize(
    ("schedule", "rho"),
    [
        (InverseSqrtRho(RHO), lambda step: RHO / (step + 1) ** 0.5),
        (LinearRho(0.0, RHO, total_steps=50), lambda step: RHO * min(step / 50, 1)),
        (CosineRho(RHO, 0.0), lambda step: RHO * (1 + math.cos(math.pi * step / 104)) / 2),
    ],
    ids=["inverse square root", "linear", "cosine"],
)
@pytest.mark.parametrize("kind", [EFMLoRA, FMLoRA])
def test_rho_schedules_equal_the_literal_algorithm(kind: Any, schedule: Any, rho: Any) -> None:
    net = network()
    fit(Automatic(net), 4, [kind(schedule)])
    expected = reference(4, rho=rho, **({"beta": 0.9} if kind is EFMLoRA else {}))
    assert worst_difference(net, expected) < 1e-10


def test_rho_follows_the_learning_rate() -> None:
    net = network()
    fit(Automatic(net), 4, [EFMLoRA(LearningRateRho(RHO), beta=BETA)])
    cosine = [(1 + math.cos(math.pi * step / 200)) / 2 for step in range(104)]
    expected = reference(4, beta=BETA, rho=lambda step: RHO * cosine[step])
    assert worst_difference(net, expected) < 1e-10
