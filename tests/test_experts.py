"""LoRA on parameters that hold several experts: one pair holds a product per expert, and each counts as a layer."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TwoPassClassifier, fit, same, trainer_of
from imitated_layers import Learner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from loop_runs import run, squares
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatlora import EFMLoRA, find_pairs, loops
from lightning_flatlora.baselines import BalancednessRegularization, BiLoRA, RandomPerturbation
from lightning_flatlora.flatness import Point, loss_gradient, measure, random_direction, trained_factors
from lightning_flatlora.flatness.landscape import loss_at
from lightning_flatlora.flatness.sharpness import overlaps, read
from lightning_flatlora.perturbation import Perturbation

pytestmark = pytest.mark.skipif(
    not hasattr(ParamWrapper, "get_delta_factors"), reason="this peft takes all experts for transposed ones"
)
EXPERTS, WIDTH, HIDDEN, RANK = 3, 5, 4, 2
LORA: Any = {"r": RANK, "lora_alpha": 6, "init_lora_weights": False}
Batch = tuple[Tensor, Tensor]


class Fused(nn.Module):
    """One module with two parameters for all experts, so that ParamWrappers are nested; the batch has the routing."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed  # read by peft
        up, down = torch.randn(EXPERTS, HIDDEN, WIDTH), torch.randn(EXPERTS, WIDTH, HIDDEN)
        self.up = nn.Parameter(up.mT.contiguous() if is_transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if is_transposed else down)

    def forward(self, batch: Batch) -> Tensor:
        x, which = batch
        up, down = (self.up.mT, self.down.mT) if self.is_transposed else (self.up, self.down)
        hidden = torch.tanh(torch.einsum("bi,boi->bo", x, up[which]))
        return torch.einsum("bi,boi->bo", hidden, down[which])


class Apart(nn.Module):
    """The same experts, each with its own two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(EXPERTS)])
        self.down = nn.ModuleList([nn.Linear(HIDDEN, WIDTH, bias=False) for _ in range(EXPERTS)])

    def forward(self, batch: Batch) -> Tensor:
        x, which = batch
        outputs = torch.zeros_like(x)
        for expert in which.unique().tolist():
            mine = which == expert
            outputs[mine] = self.down[expert](torch.tanh(self.up[expert](x[mine])))
        return outputs


def fused(is_transposed: bool = False) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(Fused(is_transposed).double())
    return get_peft_model(net, LoraConfig(**LORA, target_modules=[], target_parameters=["0.up", "0.down"]))


def apart_from(model: nn.Module) -> nn.Module:
    """The network of Linear layers with a fused network's weights and factors."""
    net = nn.Sequential(Apart().double())
    other: Any = get_peft_model(net, LoraConfig(**LORA, target_modules=r".*\.(up|down)\.\d"))
    experts = next(module for module in model.modules() if isinstance(module, Fused))
    with torch.no_grad():
        for pair in find_pairs(model).pairs:
            which = "up" if pair.A.shape[1] == WIDTH else "down"
            weight = getattr(experts, which)
            weight = weight.mT if experts.is_transposed else weight
            for expert, (A, B) in enumerate(zip(*pair.matrices(), strict=True)):
                layer = getattr(other.base_model.model[0], which)[expert]
                layer.base_layer.weight.copy_(weight[expert])
                layer.lora_A["default"].weight.copy_(A)
                layer.lora_B["default"].weight.copy_(B)
    return other


def by_expert(model: nn.Module) -> dict[tuple[bool, int], tuple[Tensor, Tensor]]:
    """A and B of every expert of either network, by its number and whether they are those of ``up``."""
    factors = {}
    for pair in find_pairs(model).pairs:
        is_up = pair.A.shape[1] == WIDTH
        if pair.experts == 1:
            factors[is_up, int(pair.name.split(".")[-4])] = pair.matrices()
            continue
        for expert, matrices in enumerate(zip(*pair.matrices(), strict=True)):
            factors[is_up, expert] = matrices
    return factors


def batches() -> Iterator[Batch]:
    """In the first and third batch one expert has no tokens, and in the second only one expert has any."""
    generator = torch.Generator().manual_seed(5)
    for which in ([0, 0, 1, 1], [2, 2, 2, 2], [0, 2, 0, 2], [0, 1, 2, 1], [1, 1, 0, 2]):
        yield torch.randn(4, WIDTH, generator=generator, dtype=torch.float64), torch.tensor(which)


def train(method: str, model: nn.Module, **settings: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    own = {"beta": 0.6} if method == "EFMLoRA" else {}
    flat = getattr(loops, method)(model, optimizer, 0.3, **own, **settings)
    run(flat, model, optimizer, list(batches()), loss=squares)
    flat.close()


@pytest.mark.parametrize("norm_scope", ["global", "layer"])
@pytest.mark.parametrize("estimator", ["average", "projected"])
@pytest.mark.parametrize("method", ["EFMLoRA", "FMLoRA"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_fused_experts_train_as_if_each_had_layers_of_its_own(
    is_transposed: bool, method: str, estimator: str, norm_scope: str
) -> None:
    model = fused(is_transposed)
    other = apart_from(model)
    start = by_expert(model)[True, 0][1].clone()
    for each in (model, other):
        train(method, each, estimator=estimator, norm_scope=norm_scope)
    mine, theirs = by_expert(model), by_expert(other)
    assert mine.keys() == theirs.keys()
    assert not torch.allclose(mine[True, 0][1], start)
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=1e-12)


def test_experts_are_refused_by_the_method_that_scales_whole_factors(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [BalancednessRegularization(2.0, "nBAR")], max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"factors of several experts.* leave experts out"):
        trainer.fit(Learner(fused()), DataLoader(list(batches()), batch_size=None))


def test_an_expert_without_tokens_keeps_its_perturbation() -> None:
    model = fused()
    pairs = find_pairs(model).pairs
    perturbation = Perturbation(pairs)
    perturbation.install()

    def step(batch: Batch) -> list[Tensor]:
        model.zero_grad()
        squares(model, batch).backward()
        perturbation.average(perturbation.ascend(0.3, at_perturbed=False), beta=0.5)
        return [pair.products(pair.A, E)[1].clone() for pair, E in zip(pairs, read(perturbation), strict=True)]

    first, second, third, *_ = batches()
    # Experts 0 and 1, then only 2, then 0 and 2.
    one, two, three = step(first), step(second), step(third)
    for before, between, after in zip(one, two, three, strict=True):
        assert before[:2].abs().sum((1, 2)).min() > 0
        assert not before[2].any()
        assert torch.equal(between[:2], before[:2])
        assert torch.equal(after[1], before[1])
        assert not torch.equal(after[0], before[0])
    assert perturbation.state_dict()["averaged"] == {pair.name: [True] * EXPERTS for pair in pairs}


class TwoPassLearner(TwoPassClassifier):
    def compute_loss(self, batch: Batch, batch_idx: int) -> Tensor:
        return squares(self.net, batch)


def test_an_expert_of_any_micro_batch_moves_the_average_of_a_window(tmp_path: Path) -> None:
    """The first micro-batch has no tokens for expert 2, and the second only for that one."""
    flat = EFMLoRA(0.3)
    module = TwoPassLearner(0.3, net=fused(), accumulate_grad_batches=2)
    loader = DataLoader(list(batches()), batch_size=None)
    fit(tmp_path, module, [flat], loader, max_epochs=1, limit_train_batches=2)
    for pair in flat.perturbation.pairs:
        _, E = pair.products(pair.A, flat.perturbation.state_dict()["E"][pair.name])
        assert E.abs().sum((1, 2)).count_nonzero() == EXPERTS


def test_the_first_perturbation_of_an_expert_is_taken_whole_after_a_resume_too() -> None:
    model = fused()
    pairs = find_pairs(model).pairs
    perturbation, resumed = Perturbation(pairs), Perturbation(pairs)
    first, second, *_ = batches()
    squares(model, first).backward()
    perturbation.average(perturbation.ascend(0.3, at_perturbed=False), beta=0.5)
    state = perturbation.state_dict()
    assert all(averaged == [True, True, False] for averaged in state["averaged"].values())
    resumed.load_state_dict(state)
    model.zero_grad()
    squares(model, second).backward()
    for each in (perturbation, resumed):
        each.average(each.ascend(0.3, at_perturbed=False), beta=0.5)
    assert same(perturbation.state_dict(), resumed.state_dict())


def test_flatness_is_measured_as_of_experts_with_layers_of_their_own() -> None:
    values = []
    model = fused()
    everyone = torch.cat([x for x, _ in batches()]), torch.cat([which for _, which in batches()])
    for net in (model, apart_from(model)):
        pairs = find_pairs(net).pairs
        point = Point(partial(squares, net, everyone), Perturbation(pairs), rho=0.3)
        names = ["sharpness", "lora_sharpness", "radius", "gradient_residual", "critical_sharpness", "balancedness"]
        values.append(measure(point, names))
        direction = random_direction(pairs, seed=0)
        torch.testing.assert_close(overlaps(pairs, direction, direction).sum().item(), 1.0)
        at = loss_gradient(point.loss, trained_factors(pairs))
        # The slope along a direction is the sum of its products with B's gradients.
        slope = sum((E * at.of(pair.B).flatten(1)).sum() for pair, E in zip(pairs, direction, strict=True))
        rise = loss_at(point.loss, pairs, (1e-6, direction)) - loss_at(point.loss, pairs, (-1e-6, direction))
        torch.testing.assert_close(rise / 2e-6, slope, rtol=1e-6, atol=1e-9)
    for name, value in values[0].items():
        # The radius is a mean over pairs, of which the fused network has two instead of six.
        if name != "radius":
            torch.testing.assert_close(value, values[1][name], msg=name)


@pytest.mark.parametrize("method", [RandomPerturbation, BiLoRA])
def test_methods_on_linear_layers_warn_of_the_share_of_experts(tmp_path: Path, method: Any) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), Fused(False))
    model = get_peft_model(net, LoraConfig(**LORA, target_modules=["0"], target_parameters=["1.up"]))
    pairs = find_pairs(model).pairs
    sizes = {pair.experts: pair.A.numel() + pair.B.numel() for pair in pairs}
    share = sizes[EXPERTS] / sum(sizes.values())
    with pytest.warns(
        UserWarning, match=rf"leaves unperturbed: ParamWrapper: its base, a Fused, .*; in all {share:.1%} of"
    ):
        trainer_of(tmp_path, [method(0.1)], max_steps=0).fit(Learner(model), DataLoader([0]))
