"""litgpt's layers under DDP give what the dense reference gives in one process, and under FSDP2 and FSDP1 the same."""

from itertools import product
from pathlib import Path

import litgpt_models
import pytest
import torch
from fits import relative_difference
from helpers import same
from launch import Results, launch
from litgpt_runs import BETA, RHO, ROWS, STEPS
from reference import Reference

STRATEGIES = ("ddp", "fsdp2", "fsdp1-root")
FRONT_ENDS = ("EFMLoRA", "FMLoRA")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("litgpt")
    runs = {}
    for strategy, front_end in product(STRATEGIES, FRONT_ENDS):
        saved = str(folder / f"{strategy}-{front_end}")
        arguments = {"strategy": strategy, "front_end": front_end, "folder": saved}
        runs[f"{strategy}:{front_end}"] = ("litgpt_runs:train", arguments)
    return launch(folder, runs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_two_ranks_equal_the_dense_reference(results: Results, strategy: str, front_end: str) -> None:
    apart, pairs = litgpt_models.split(litgpt_models.gpt("all layers"))
    beta = BETA if front_end == "EFMLoRA" else None
    optimizer = litgpt_models.optimizer_of(apart)
    Reference(apart, pairs, litgpt_models.loss, optimizer, lambda step: RHO, beta=beta).train(
        litgpt_models.batches(STEPS, ROWS)
    )
    first, second = results[f"{strategy}:{front_end}"]
    for kind in ("weights", "E"):
        assert all(torch.equal(value, second[kind][name]) for name, value in first[kind].items())
    assert len(first["E"]) == len(pairs)
    assert all(float(E.norm()) > 0 for E in first["E"].values())
    assert relative_difference(first["weights"], litgpt_models.joined(apart)) < 1e-10
    adapter = torch.load(Path(first["folder"]) / f"step={STEPS}" / "lit_model.pth.lora")["model"]
    assert same(adapter, first["weights"])
