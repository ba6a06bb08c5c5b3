"""The rules that set rho without a search: against dense references, and their runs and table."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

pytest.importorskip("transformers", reason="the recipes' dependencies are not installed")

from evidence_runs import RUN, SETTINGS, Fake, figures, install
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_flatlora import EFMLoRA, find_pairs
from lightning_flatlora.perturbation import FreshPerturbation, Perturbation
from recipes.evidence import __main__ as command
from recipes.evidence import radius, radius_study
from recipes.evidence.module import ShotsClassifier
from recipes.evidence.plan import STAGES, Plan
from recipes.evidence.radius import DIRECTIONS, RULES, RadiusRule, RuledEFMLoRA
from recipes.evidence.radius_study import RATES, RadiusPlan, Reference, lost, radius_table
from recipes.evidence.run import perform
from recipes.evidence.workloads import SEARCH_SEEDS
from recipes.shared.ledger import Row


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


class Net(nn.Module):
    """Two layers with LoRA in float64, whose B are not zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"])
        self.layers = get_peft_model(layers, config).double()
        for name, parameter in self.layers.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        self.inputs, self.labels = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 3

    def loss(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layers(self.inputs), self.labels)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def perturbation(net: Net) -> Perturbation:
    found = Perturbation(find_pairs(net).pairs)
    found.install()
    net.loss().backward()
    return found


def test_the_rise_is_the_slope_along_the_perturbation(net: Net, perturbation: Perturbation) -> None:
    rise = radius.first_order_rise(perturbation)
    E = perturbation.ascend(1e-5, at_perturbed=False).stacks
    step = {id(pair.B): part for pair, part in radius.by_pair(perturbation, E)}
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for pair in perturbation.pairs:
                pair.B.add_(step[id(pair.B)], alpha=sign)
            values.append(float(net.loss()))
            for pair in perturbation.pairs:
                pair.B.sub_(step[id(pair.B)], alpha=sign)
    assert rise == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
    assert rise > 0


def test_a_loss_budget_gives_the_radius_of_its_rise_up_to_the_cap(perturbation: Perturbation) -> None:
    rise = radius.first_order_rise(perturbation)
    assert radius.loss_budget(0.1)(perturbation, 0.3, 1.0) == pytest.approx(0.1 / rise)
    assert radius.loss_budget(0.1, cap=1e-3)(perturbation, 0.3, 1.0) == 1e-3
    annealed = radius.loss_budget(0.1, anneals=True)
    assert annealed(perturbation, 0.0, 1.0) == pytest.approx(0.1 / rise)
    assert annealed(perturbation, 0.5, 1.0) == pytest.approx(0.05 / rise)
    assert annealed(perturbation, 1.0, 1.0) == 0


def test_a_budget_may_be_a_part_of_the_loss(perturbation: Perturbation) -> None:
    rise = radius.first_order_rise(perturbation)
    assert radius.loss_share(0.1)(perturbation, 0.3, 2.0) == pytest.approx(0.2 / rise)
    assert radius.loss_share(0.1, cap=1e-3)(perturbation, 0.3, 2.0) == 1e-3


def test_a_rule_is_given_the_loss_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def rule(perturbation: Perturbation, share: float, loss: float) -> float:
        given.append(loss)
        return 0.0

    monkeypatch.setitem(RULES, "watching", RadiusRule("watching", lambda c: RuledEFMLoRA(rule), "value", (1.0,)))
    losses: list[float] = []
    training_step = ShotsClassifier.training_step

    def watched_step(self: ShotsClassifier, batch: Any, batch_index: int) -> torch.Tensor:
        loss = training_step(self, batch, batch_index)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(ShotsClassifier, "training_step", watched_step)
    changed("watching", value=1.0)
    assert losses
    assert given == losses


def test_without_a_gradient_the_budget_gives_the_cap(perturbation: Perturbation) -> None:
    for pair in perturbation.pairs:
        pair.A.grad = pair.B.grad = None
    assert radius.loss_budget(0.1, cap=2.0)(perturbation, 0.0, 1.0) == 2.0


def test_the_relative_radius_is_a_multiple_of_the_dense_update(net: Net, perturbation: Perturbation) -> None:
    squares = 0.0
    for module in net.modules():
        if hasattr(module, "get_delta_weight"):
            squares += float(module.get_delta_weight("default").detach().square().sum())
    assert radius.relative_to_update(3.0)(perturbation, 0.0, 1.0) == pytest.approx(3 * squares**0.5)


def test_the_norm_of_a_fresh_perturbation_is_its_radius(perturbation: Perturbation) -> None:
    perturbation = Perturbation(perturbation.pairs, estimator="projected")
    stacks = perturbation.ascend(0.7, at_perturbed=False).stacks
    # Up to the damping of the pseudo-inverses.
    assert radius.perturbation_norm(perturbation, stacks) == pytest.approx(0.7, rel=1e-4)


def changed(arm: str, **config: float) -> Row:
    return perform(replace(RUN, arm=arm, config={"learning_rate": 1e-2, **config}))


def test_a_constant_rule_is_efmlora(monkeypatch: pytest.MonkeyPatch) -> None:
    constant = RadiusRule(
        "constant", lambda c: RuledEFMLoRA(lambda perturbation, share, loss: c["value"]), "value", (2.0,)
    )
    monkeypatch.setitem(RULES, "constant", constant)
    assert figures(changed("constant", value=2.0)) == figures(changed("efmlora", rho=2.0))


def test_every_rule_and_direction_trains_and_differs_from_lora() -> None:
    plain = figures(changed("lora"))
    for arm, rule in {**RULES, **DIRECTIONS}.items():
        row = changed(arm, **{rule.name: rule.values[-1], "rho": 2.0})
        assert not row["failed"], arm
        assert figures(row) != plain, arm


def test_batch_noise_is_the_fresh_ascent_less_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    ascended: list[list[torch.Tensor]] = []
    lengths: list[float] = []
    taken: list[list[torch.Tensor]] = []
    ascend, average = Perturbation.ascend, Perturbation.average

    def watched_ascend(self: Perturbation, rho: float, *, at_perturbed: bool) -> FreshPerturbation:
        fresh = ascend(self, rho, at_perturbed=at_perturbed)
        ascended.append([E.clone() for E in fresh.stacks])
        lengths.append(radius.perturbation_norm(self, fresh.stacks))
        return fresh

    def watched_average(self: Perturbation, fresh: FreshPerturbation, beta: float) -> None:
        taken.append([E.clone() for E in fresh.stacks])
        assert radius.perturbation_norm(self, fresh.stacks) == pytest.approx(lengths[-1], rel=1e-5)
        average(self, fresh, beta)

    monkeypatch.setattr(Perturbation, "ascend", watched_ascend)
    monkeypatch.setattr(Perturbation, "average", watched_average)
    changed("batch_noise", rho=2.0, times=1.0)
    means = [torch.zeros_like(E) for E in ascended[0]]
    assert len(taken) == len(ascended) == SETTINGS["steps"]
    for fresh, noise in zip(ascended, taken, strict=True):
        for place, E in enumerate(fresh):
            means[place] = 0.9 * means[place] + 0.1 * E
            cosine = torch.cosine_similarity((E - means[place]).flatten(), noise[place].flatten(), dim=0)
            assert cosine == pytest.approx(1.0, abs=1e-5)


def test_without_noise_the_batch_noise_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.Tensor] = []
    average = Perturbation.average

    def without_gradient(self: Perturbation, rho: float, *, at_perturbed: bool) -> FreshPerturbation:
        zeros = [torch.zeros(len(self.pairs), 16, 2)]
        return FreshPerturbation(zeros, torch.tensor(True), False)

    def watched_average(self: Perturbation, fresh: FreshPerturbation, beta: float) -> None:
        taken.extend(fresh.stacks)
        average(self, fresh, beta)

    monkeypatch.setattr(Perturbation, "ascend", without_gradient)
    monkeypatch.setattr(Perturbation, "average", watched_average)
    assert not changed("batch_noise", rho=2.0, times=1.0)["failed"]
    assert all(bool((E == 0).all()) for E in taken)


def test_the_ball_of_pairs_and_head_has_the_radius_and_the_steepest_split(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[float, float, float, float]] = []
    radii: list[float] = []
    before, ascend = radius.HeadEFMLoRA.before_optimizer_step, Perturbation.ascend

    def watched_ascend(self: Perturbation, rho: float, *, at_perturbed: bool) -> FreshPerturbation:
        radii.append(rho)
        return ascend(self, rho, at_perturbed=at_perturbed)

    def watched(self: radius.HeadEFMLoRA, trainer: Any, pl_module: Any, pair_group: Any) -> None:
        gradient = self._head.weight.grad
        assert gradient is not None
        slope = radius.first_order_rise(pair_group.perturbation)
        past = self._E
        before(self, trainer, pl_module, pair_group)
        assert self._E is not None
        fresh = self._E if past is None else (self._E - (1 - self.beta) * past) / self.beta
        assert torch.cosine_similarity(fresh.flatten(), gradient.flatten(), dim=0) == pytest.approx(1.0, abs=1e-5)
        steps.append((radii[-1], float(fresh.norm()), slope, float(gradient.norm())))

    monkeypatch.setattr(Perturbation, "ascend", watched_ascend)
    monkeypatch.setattr(radius.HeadEFMLoRA, "before_optimizer_step", watched)
    changed("head", rho=2.0, times=1.0)
    assert len(steps) == SETTINGS["steps"]
    for of_pairs, of_head, slope, head_slope in steps:
        assert math.hypot(of_pairs, of_head) == pytest.approx(2.0, rel=1e-4)
        assert of_pairs * head_slope == pytest.approx(of_head * slope, rel=1e-3)


def test_the_heads_gradient_is_taken_at_the_perturbed_head() -> None:
    head = nn.Linear(3, 2).double()
    inputs, E = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    callback = radius.HeadEFMLoRA(1.0)
    callback._E, callback._is_on = E, True
    handle = head.register_forward_hook(callback._add_perturbation)
    head(inputs).square().sum().backward()
    handle.remove()
    moved = (head.weight + E).detach().requires_grad_()
    nn.functional.linear(inputs, moved, head.bias).square().sum().backward()
    torch.testing.assert_close(head.weight.grad, moved.grad)


def test_training_sees_the_perturbed_head(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = figures(changed("head", rho=2.0, times=1.0))
    monkeypatch.setattr(radius.HeadEFMLoRA, "_add_perturbation", lambda self, head, inputs, logits: logits)
    assert figures(changed("head", rho=2.0, times=1.0)) != seen


# -- the runs and their table


def plan_of(folder: Path) -> RadiusPlan:
    return RadiusPlan(folder, "tiny", SETTINGS, ("lora", "efmlora"), STAGES, ())


def searched(folder: Path) -> RadiusPlan:
    Plan(folder, "tiny", SETTINGS, ("lora", "efmlora"), ("search",), ()).work(Fake(0.0), lambda run: None)
    return plan_of(folder)


def test_the_rules_run_at_rates_around_loras_choice_once_the_searches_are_done(tmp_path: Path) -> None:
    assert plan_of(tmp_path).reference() is None
    assert plan_of(tmp_path).pieces() == []
    plan = searched(tmp_path)
    found = plan.reference()
    assert found is not None
    assert (found.rho, found.rate, found.lora_rate) == (2.0, 2e-3, 2e-3)
    assert found.base - found.searched == pytest.approx(0.1)
    runs = plan.open_runs()
    ruled = sum(len(rule.values) for rule in RULES.values())
    directed = sum(len(rule.values) for rule in DIRECTIONS.values())
    assert len(runs) == (ruled * len(RATES) + directed) * len(SEARCH_SEEDS)
    assert {run.config["learning_rate"] for run in runs if run.arm in RULES} == {2e-3, 4e-3, 8e-3}
    directions = [run.config for run in runs if run.arm in DIRECTIONS]
    assert {(config["learning_rate"], config["rho"]) for config in directions} == {(2e-3, 2.0)}


def test_the_table_gives_the_share_of_the_gain_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radius_study, "RULES", {"budget": RULES["budget"]})  # one rule, since each run is a file
    plan = searched(tmp_path)
    fake = Fake(0.0)
    plan.work(fake, lambda run: None)
    assert len(fake.done) == len(set(map(str, fake.done)))
    lines = {(row[0], row[1]): row for row in radius_table([plan]).rows}
    assert lines["fixed rho", "rho 2"][-1] == "0 %"
    assert lines["fixed rho", "rho 8"][-1] == "100 %"
    assert lines["loss budget in nats, cap 32", "nats 0.2"][-1] == "100 %"


def test_a_share_needs_a_gain() -> None:
    assert lost(2.2, Reference(2.0, 2.0, 0.0, 1e-3, 1e-3)) is None
    assert lost(2.2, Reference(2.0, 1.8, 1.0, 1e-3, 1e-3)) == 200.0


def test_the_command_refuses_a_folder_without_searches_and_shows_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["radius", "--workloads", "tiny", "--folder", str(tmp_path), "--precision", "32-true"]
    monkeypatch.setattr(L.Trainer, "fit", lambda *args, **options: pytest.fail("nothing is to be trained"))
    with pytest.raises(SystemExit, match="lacks the searches of tiny"):
        command.main(arguments)
    searched(tmp_path)
    assert command.main([*arguments, "--report"]) == 0
    assert "fixed rho" in capsys.readouterr().out
    assert "searched rho 2" in (tmp_path / "radius.md").read_text()


def test_efmlora_of_the_package_is_what_a_rule_extends() -> None:
    assert isinstance(RULES["cosine"].callbacks(start=2.0, steps=4)[0], EFMLoRA)
