"""The replication of column A with a language model in docs/results/matrix_replication.py."""

import math
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from recipes.studies.rows import Row

sys.path.append(str(Path(__file__).parents[2] / "docs" / "results"))
import matrix_replication as replication
from matrix_choice import EFMLORA, LORA, RANDOM, Run
from matrix_disturbances import B_NOISE, BASE_NOISE, CLEAN, noise_on_B, noisy
from shared_runs import open_runs

COST = {EFMLORA: 0.05, RANDOM: 0.3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def test_a_changed_net_computes_with_disturbed_merged_layers_and_is_restored() -> None:
    torch.manual_seed(0)
    net = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"])).double().eval()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(5, 3, dtype=torch.float64)
    clean = net(x)
    with replication.changed(net, replication.disturbances(100)[CLEAN][0]):
        torch.testing.assert_close(net(x), clean, rtol=1e-12, atol=1e-12)
    with replication.changed(net, noise_on_B(3.0, range(2))[1]):
        found = net(x)
    with torch.no_grad():
        for name in ("up", "down"):
            B = net.get_submodule(f"base_model.model.{name}.lora_B.default").weight
            B.copy_(noisy(B, 3.0, 1, f"{name}, B"))
    torch.testing.assert_close(found, net(x), rtol=1e-12, atol=1e-12)
    assert (found - clean).abs().max() > 0.1
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora_B" not in name)


def row_of(run: replication.Run) -> Row:
    # A strength costs as many nats as it has units.
    row = {**run.key(), "value": 3 + (run.strength or 0.0)}
    if run.stage == "final":
        losses = {name: 3 + math.sin(run.seed + len(name)) for name in replication.disturbances(100)}
        row["test"] = {name: loss - 0.5 * (run.arm == RANDOM) for name, loss in losses.items()}
    return row


def test_the_strengths_nearest_in_cost_get_final_runs_beside_the_rivals() -> None:
    rows: dict[str, Row] = {}
    stages = (replication.scan, lambda rows: replication.final(COST, rows))
    while runs := open_runs(list(rows.values()), lambda run: run.name in rows, stages):
        rows[runs[0].name] = row_of(runs[0])
    found = list(rows.values())
    assert replication.strengths_of(found, COST) == {EFMLORA: [0.05, 0.2], RANDOM: [0.1, 0.3]}
    finals = [row for row in found if row["stage"] == "final"]
    assert len(found) - len(finals) == 1 + 4 + 4
    assert len(finals) == 10 * (3 + 2 + 2)
    of_lora = {(row["rank"], row["rate"]) for row in finals if row["arm"] == LORA}
    assert of_lora == {(8, "3e-3"), (32, "3e-3"), (32, "1e-3")}
    assert {(row["rank"], row["rate"]) for row in finals if row["arm"] != LORA} == {(32, "3e-3")}
    lines = replication.table(found, COST).splitlines()
    assert len(lines) == 2 + 7 * len(replication.disturbances(100))
    for line in lines[2:]:
        if RANDOM in line:
            assert line.count("-0.500 [-0.500, -0.500]") == 3
    found += [row_of(run) for run in replication.audited(found)]
    assert len(found) == len(rows) + 5 * 2
    both = replication.tables(found, COST).splitlines()
    assert both[: len(lines)] == lines
    audit = both[len(lines) + 3 :]
    assert len(audit) == 9 * len(replication.disturbances(100))
    assert all(line.count("-0.500 [-0.500, -0.500]") == 2 for line in audit if RANDOM in line)


@pytest.mark.parametrize("method", [EFMLORA, RANDOM])
def test_the_cost_is_that_of_column_a(method: str) -> None:
    """Made-up rows of column A, in which the method's choice has a clean loss of 0.02 nats more."""
    settings = {"rate": 1e-3, "head_rate": "same", "rank": 2, "dropout": 0.0, "averaging": "none"}
    rows = []
    for arm, strength in ((LORA, None), (EFMLORA, 2), (RANDOM, 1)):
        for seed in (0, 1, 2):
            losses = {CLEAN: 2 + 0.02 * (arm == method), BASE_NOISE: 3.0, B_NOISE: 3.0}
            validation = {name: {"loss": loss} for name, loss in losses.items()}
            run = Run(arm, settings, strength, seed)
            rows.append({**run.key(), "validation": validation})
    assert replication.costs(rows)[method] == pytest.approx(0.02)


def test_runs_name_their_method_and_strength() -> None:
    given = {run.arm: " ".join(run.arguments()) for run in replication.scan([])}
    assert "efmlora" not in given[LORA]
    assert "--method=efmlora --rho=3.2" in given[EFMLORA]
    assert "RandomPerturbation --trainer.callbacks.sigma=1.0" in given[RANDOM]
