"""A small model of real peft layers in float64, and its perturbation from one backward pass."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_flatlora import Perturbation, find_pairs
from lightning_flatlora.pairs.lora_pair import LoRAPair

RHO = 0.3


class Net(nn.Module):
    """A convolution and two Linear layers of equal shape, so that there are two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(torch.tanh(self.conv(x)).mean((2, 3)))))


def model_and_pairs(dtype: torch.dtype = torch.float64, dropout: float = 0.0, **config: object):  # type: ignore[no-untyped-def]
    settings = {"r": 3, "lora_alpha": 4, "target_modules": ["conv", "one", "two"], "lora_dropout": dropout, **config}
    model = get_peft_model(Net(), LoraConfig(**settings)).to(dtype)  # type: ignore[arg-type]
    pairs = find_pairs(model).pairs
    with torch.no_grad():
        for pair in pairs:
            pair.B.normal_(std=0.3)
    return model, pairs


def backward(model: nn.Module, scale: float = 1.0, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 6, (16,), generator=generator)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    (loss * scale).backward()
    return loss.detach()


def fresh(pairs: list[LoRAPair], at_perturbed: bool = False, **settings: object) -> dict[str, Tensor]:
    perturbation = Perturbation(pairs, **settings)  # type: ignore[arg-type]
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=at_perturbed))
    return perturbation.state_dict()["E"]


def slices(stacks: list[Tensor]) -> list[Tensor]:
    """Slices of the stacks in the order of the pairs: the convolution's group comes first, as in the model."""
    rows = []
    for stack in stacks:
        rows += stack.unbind()
    return rows
