"""Two gloo processes under DDP equal one process on the joint batch, and hold one perturbation."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exactness import RHO, Automatic, Manual, fit, network

from lightning_flatlora import EFMLoRA, FMLoRA

HERE = Path(__file__).parent


def two_ranks(tmp_path: Path, front_end: str, accumulate: int, sync_ascent: bool = True) -> list[dict[str, Any]]:
    arguments = [front_end, str(accumulate), str(sync_ascent), str(tmp_path)]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    run = subprocess.run(
        [*command, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(HERE / "ddp_run.py"), *arguments],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def one_process(front_end: str, accumulate: int) -> dict[str, torch.Tensor]:
    net = network()
    if front_end == "FMLoRAModule":
        fit(Manual(net, rho=RHO, accumulate_grad_batches=accumulate), 2, [])
    else:
        callback = EFMLoRA(RHO) if front_end == "EFMLoRA" else FMLoRA(RHO)
        fit(Automatic(net), 2, [callback], accumulate_grad_batches=accumulate)
    return {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("front_end", ["EFMLoRA", "FMLoRA", "FMLoRAModule"])
def test_two_ranks_equal_one_process_on_the_joint_batch(tmp_path: Path, front_end: str, accumulate: int) -> None:
    first, second = two_ranks(tmp_path, front_end, accumulate)
    expected = one_process(front_end, accumulate)
    for name, weight in expected.items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert torch.allclose(first["weights"][name], weight, atol=1e-10)
    assert all(torch.equal(E, second["E"][name]) for name, E in first["E"].items())
    assert any((E != 0).any() for E in first["E"].values())


@pytest.mark.parametrize("front_end", ["FMLoRA", "FMLoRAModule"])
def test_without_sync_each_rank_has_its_own_ascent_and_all_have_the_same_weights(
    tmp_path: Path, front_end: str
) -> None:
    first, second = two_ranks(tmp_path, front_end, accumulate=2, sync_ascent=False)
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())
    assert any(not torch.equal(E, second["E"][name]) for name, E in first["E"].items())
