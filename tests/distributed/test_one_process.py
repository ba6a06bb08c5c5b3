"""FSDP2 and FSDP1 in a single process, where nothing is sharded: on the CPU, and on a CUDA device if there is one."""

from functools import partial
from typing import Any

import pytest
import torch
from fits import WRAPPING, E_of, FSDPOnCPU, full_weights, parts, relative_difference, single
from float64_runs import dataset, fit_in_float64, network
from launch import Results, Runs, launch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

FRONT_ENDS = ("EFMLoRA", "FMLoRA", "FMLoRAModule")
CASES: dict[str, tuple[str, str, str]] = {}
for strategy, front_ends in {
    "single": FRONT_ENDS,
    "fsdp2": FRONT_ENDS,
    "fsdp1": ("EFMLoRA", "FMLoRA"),  # it has no manual optimization
}.items():
    for front_end in front_ends:
        for precision in ("32-true", "bf16-mixed"):
            CASES[f"{strategy}:{front_end}:{precision}"] = (strategy, front_end, precision)
SHARDED = [name for name in CASES if not name.startswith("single")]
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def alone(strategy: str, front_end: str, precision: str, accelerator: str) -> dict[str, Any]:
    """Train in one process, on one device or under a sharding strategy of world size 1."""
    net = network().float()
    module, callbacks, trainer = parts(front_end, net, accumulate=2)
    used: Any = SingleDeviceStrategy(torch.device("cuda:0" if accelerator == "cuda" else "cpu"))
    if strategy == "fsdp1":
        kind = FSDPStrategy if accelerator == "cuda" else FSDPOnCPU
        used = kind(auto_wrap_policy=WRAPPING["layers"])
    elif strategy == "fsdp2":
        used = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    loader = DataLoader(single(), batch_size=4)
    settings = {
        "precision": precision,
        "devices": 1,
        "accelerator": accelerator,
        "limit_train_batches": 9,  # odd: the last window of two is shorter
        "use_distributed_sampler": False,
        **trainer,
    }
    fit_in_float64(module, 1, callbacks, loader, strategy=used, **settings)
    return {"weights": {n: w.cpu() for n, w in full_weights(used, net).items()}, "E": E_of(module, callbacks)}


def validated(front_end: str, batches: int) -> dict[str, Any]:
    """Train three epochs under FSDP2 with one unit for all; full copies of parameters stay in modules after validation.

    Args:
        front_end: see :func:`parts`.
        batches: batches per validation.
    """
    net = network()
    module, callbacks, _ = parts(front_end, net, accumulate=1)
    loader = DataLoader(dataset(), batch_size=4)
    module.configure_model = lambda: fully_shard(net, mesh=module.device_mesh["data_parallel"])
    module.val_dataloader = lambda: loader
    module.validation_step = lambda batch, batch_idx: module.net(batch[0]).sum()
    used = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    limits = {"limit_train_batches": 4, "limit_val_batches": batches, "num_sanity_val_steps": batches}
    settings: dict[str, Any] = {"devices": 1, "strategy": used, "precision": "32-true", **limits}
    fit_in_float64(module, 3, callbacks, loader, **settings)
    return {"weights": full_weights(used, net)}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {name: partial(alone, *case, accelerator=request.param) for name, case in CASES.items()}
    if request.param == "cpu":
        for front_end in FRONT_ENDS:
            for batches in (0, 1):
                runs[f"validated:{front_end}:{batches}"] = partial(validated, front_end, batches)
    return launch(tmp_path_factory.mktemp("one"), runs, ranks=1)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharding_strategy_of_world_size_1_equals_one_device(results: Results, name: str) -> None:
    (sharded,), (single,) = results[name], results["single:" + name.partition(":")[2]]
    assert any((E != 0).any() for E in sharded["E"].values())
    tolerance = 1e-5 if "32" in name else 0.1  # FSDP1's plugin also reduces and holds the layers' weights in bfloat16
    for kind in ("weights", "E"):
        assert relative_difference(sharded[kind], single[kind]) < tolerance


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("results", ["cpu"], indirect=True)
def test_a_validation_changes_nothing_where_the_root_holds_the_pairs(results: Results, front_end: str) -> None:
    """FSDP2 leaves the root's parameters unsharded after a forward pass without a backward pass."""
    (plain,), (validated,) = results[f"validated:{front_end}:0"], results[f"validated:{front_end}:1"]
    assert all(torch.equal(weight, validated["weights"][name]) for name, weight in plain["weights"].items())
