"""LoRA on embeddings and grouped convolutions trains like equivalent other layers."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatlora import find_pairs, loops
from lightning_flatlora.flatness.landscape import loss_at, random_direction
from lightning_flatlora.flatness.sharpness import read
from lightning_flatlora.pairs.finders import PairsByName
from lightning_flatlora.pairs.lora_pair import NoPairsError

WORDS, WIDTH, GROUPS, CHANNELS, RANK = 7, 4, 2, 6, 4
LORA: Any = {"r": RANK, "lora_alpha": 8, "init_lora_weights": False}


def of_embedding(**config: Any) -> nn.Module:
    net = nn.Sequential(nn.Embedding(WORDS, WIDTH)).double()
    return get_peft_model(net, LoraConfig(**LORA, target_modules=["0"], **config))


class OnOneHot(nn.Module):
    """An embedding as x (W + s B A) for one-hot rows x, where B is the factor that peft initializes to zero."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        layer: Any = like.base_model.model[0]  # type: ignore[union-attr, index]
        self.scaling = layer.scaling["default"]
        self.register_buffer("weight", layer.base_layer.weight.detach().clone())
        self.A = nn.Parameter(layer.lora_embedding_B["default"].detach().mT.clone())
        self.B = nn.Parameter(layer.lora_embedding_A["default"].detach().mT.clone())

    def forward(self, x: Tensor) -> Any:
        return F.one_hot(x, WORDS).double() @ (self.weight + self.scaling * self.B @ self.A)


class Groups(nn.Module):
    """A grouped convolution as one convolution per group, whose weights for other groups' channels are zero."""

    def __init__(self, convolution: nn.Conv1d) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        n, m = CHANNELS // GROUPS, CHANNELS // GROUPS
        for group in range(GROUPS):
            part = nn.Conv1d(CHANNELS, n, 3, bias=False).double()
            nn.init.zeros_(part.weight)
            own = convolution.weight.data[group * n : (group + 1) * n]
            part.weight.data[:, group * m : (group + 1) * m].copy_(own)
            self.parts.append(part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=1)


def of_groups() -> nn.Module:
    net = nn.Sequential(nn.Conv1d(CHANNELS, CHANNELS, 3, groups=GROUPS, bias=False)).double()
    return get_peft_model(net, LoraConfig(**LORA, target_modules=["0"]))


def of_parts(like: nn.Module) -> nn.Module:
    layer: Any = like.base_model.model[0]  # type: ignore[union-attr, index]
    config: Any = LORA | {"r": RANK // GROUPS, "lora_alpha": 8 // GROUPS}  # with the same alpha / r
    net = nn.Sequential(Groups(layer.base_layer))
    other: Any = get_peft_model(
        net, LoraConfig(**config, target_modules=[f"0.parts.{group}" for group in range(GROUPS)])
    )
    A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    for part, of_A, of_B in zip(other.base_model.model[0].parts, A.chunk(GROUPS), B.chunk(GROUPS), strict=True):
        part.lora_A["default"].weight.data.copy_(of_A)
        part.lora_B["default"].weight.data.copy_(of_B)
    return other


def words() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randint(WORDS, (3, 5)) for _ in range(4)]


def series() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(2, CHANNELS, 8, dtype=torch.float64) for _ in range(4)]


def embeddings() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    model = of_embedding()
    return model, OnOneHot(model), words()


def convolutions() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    model = of_groups()
    return model, of_parts(model), series()


def train(method: str, model: nn.Module, batches: Sequence[Tensor], **settings: Any) -> list[Tensor]:
    """The outputs of a network during and after some steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    finder = PairsByName("A", "B", "scaling") if isinstance(model, OnOneHot) else None
    flat = getattr(loops, method)(model, optimizer, 0.3, finder=finder, **settings)
    outputs = []
    for batch in batches:
        for each_pass in flat.training_passes():
            with each_pass:
                output = model(batch)
                (output.tanh() - output.roll(1, -1)).square().mean().backward()
        outputs.append(output.detach())
        optimizer.step()
        optimizer.zero_grad()
    flat.close()
    with torch.no_grad():
        return [*outputs, model(batches[0])]


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("norm_scope", ["global", "layer"])
@pytest.mark.parametrize("estimator", ["average", "projected"])
@pytest.mark.parametrize("method", ["EFMLoRA", "FMLoRA"])
@pytest.mark.parametrize("made", [embeddings, convolutions])
def test_it_trains_as_the_layers_that_compute_the_same(
    made: Callable[[], tuple[nn.Module, nn.Module, list[Tensor]]], method: str, estimator: str, norm_scope: str
) -> None:
    model, other, batches = made()
    mine = train(method, model, batches, estimator=estimator, norm_scope=norm_scope)
    theirs = train(method, other, batches, estimator=estimator, norm_scope=norm_scope)
    assert not torch.allclose(mine[-1], mine[0])
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["EFMLoRA", "FMLoRA"])
def test_an_embeddings_perturbation_is_of_size_rho_from_the_first_step_on(method: str) -> None:
    """From peft's own initialization, with one factor zero: a perturbation of the other factor would be huge."""
    torch.manual_seed(0)
    config: Any = LORA | {"init_lora_weights": True}
    model = get_peft_model(
        nn.Sequential(nn.Embedding(WORDS, WIDTH)).double(), LoraConfig(**config, target_modules=["0"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    flat = getattr(loops, method)(model, optimizer, 0.3, estimator="projected")
    (pair,) = flat.perturbation.pairs
    assert not pair.B.any()
    for batch in words() * 3:
        for each_pass in flat.training_passes():
            with each_pass:
                (model(batch) - batch[..., None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        A, E = pair.products(pair.A, *read(flat.perturbation))
        size = (pair.scaling * E @ A).norm().item()
        assert 0.1 < size < 0.3 * 1.01
        assert size == pytest.approx(0.3, rel=0.02) or method == "EFMLoRA"


def test_an_embedding_with_DoRA_reads_the_perturbation_as_stored_weights() -> None:
    model = of_embedding(use_dora=True)
    (pair,) = find_pairs(model).pairs
    batch = words()[0]
    E = random_direction([pair], seed=1)
    at_E = loss_at(lambda: model(batch).square().mean(), [pair], (0.5, E))
    with torch.no_grad():
        pair.B.add_(0.5 * E[0])
    torch.testing.assert_close(model(batch).square().mean().detach(), at_E, rtol=1e-14, atol=0)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_the_pairs_of_a_grouped_convolution_are_named_by_their_rows() -> None:
    model = of_groups()
    names = [pair.name for pair in find_pairs(model).pairs]
    assert names == [f"base_model.model.0.lora_B.default.weight[{rows}]" for rows in ("0:3", "3:6")]
    # A step along one group's direction only moves that group's channels.
    first, _ = find_pairs(model).pairs
    (x, *_) = series()
    before = model(x)
    moved = []
    loss_at(lambda: moved.append(model(x)) or moved[-1].sum(), [first], (1.0, random_direction([first], seed=1)))
    assert torch.equal(moved[0][:, 3:], before[:, 3:])
    assert not torch.allclose(moved[0][:, :3], before[:, :3])


def test_an_embedding_with_sparse_gradients_is_named() -> None:
    net = nn.Sequential(nn.Embedding(WORDS, WIDTH, sparse=True))
    with pytest.raises(NoPairsError, match="Embedding: an embedding with sparse=True has sparse gradients"):
        find_pairs(get_peft_model(net, LoraConfig(**LORA, target_modules=["0"])))
