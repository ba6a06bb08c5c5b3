"""Checkpoints under every strategy: with all that is trained, in one format, small, resumable on any number of ranks.

All runs on two processes share one launch; those on one process run here.
"""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checkpoint_runs import END, MIDDLE, loader, local, train, trainer_of
from fits import Collectives, ShardedAutomatic
from float64_runs import RHO, network
from helpers import same
from launch import Results, Runs, launch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_flatlora import AdapterCheckpoint, EFMLoRA
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import MARK
from lightning_flatlora.sharding import is_sharded, sharding_of

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp1-full": ("fsdp1-linears", {"state_dict_type": "full"}),
    "fsdp1-sharded": ("fsdp1-root", {"state_dict_type": "sharded"}),
    "fsdp2-full": ("fsdp2", {"save_distributed_checkpoint": False}),
    "fsdp2-distributed": ("fsdp2", {"save_distributed_checkpoint": True}),
}
# Our own file is the same for each format of Lightning's.
ONE_OF_EACH = ("ddp", "fsdp1-full", "fsdp2-full")
GATHERED = ("fsdp1-full", "fsdp2-full")
APART = {"nothing": None, "an older file": "6", "no such file": "5"}
"""What the other rank finds if the machines share no folder: the step in its file's name."""


def apart(folder: str, strategy: str, resumes: list[str | None], **settings: Any) -> dict[str, Any]:
    """Each rank resumes from its own file, or from none, as if machines shared no folder."""
    return train(folder, strategy, resume=resumes[int(os.environ["RANK"])], **settings)


class Wide(nn.Module):
    """A frozen base much larger than the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 500), nn.Linear(500, 500)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))[:, :3]


def traffic(folder: str, strategy: str, **settings: Any) -> dict[str, Any]:
    """Bytes of the largest tensor in collectives of saving and loading, and of the largest factor and base weight."""
    largest = {}

    def counted(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with Collectives() as mode:
                result = action(*args, **kwargs)
            largest[name] = mode.largest
            return result

        return run

    def trainer(where: str, steps: int) -> Any:
        save: Any = AdapterCheckpoint(where, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        save._save_checkpoint = counted("save", save._save_checkpoint)
        return trainer_of(strategy, [EFMLoRA(RHO), save], max_steps=steps, **settings)

    first = wide_module()
    factor = max(p.nbytes for p in first.parameters() if p.requires_grad)
    base = max(p.nbytes for p in first.parameters())
    trainer(folder, 1).fit(first, loader())
    resumed = trainer(folder + "-2", 2)
    connector = resumed._checkpoint_connector
    connector._restore_modules_and_callbacks = counted("load", connector._restore_modules_and_callbacks)
    resumed.fit(wide_module(), loader(), ckpt_path=f"{folder}/step=1.ckpt")
    return {**largest, "factor": factor, "base": base}


def wide_module() -> ShardedAutomatic:
    torch.manual_seed(0)
    net = get_peft_model(Wide(), LoraConfig(r=2, target_modules=["first", "last"])).double()
    return ShardedAutomatic(net)


def gathered(kind: str) -> dict[str, Any]:
    """What is gathered from a model that is only partly sharded, as a configure_model may do it."""
    torch.manual_seed(0)
    inner, scale = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)), nn.Parameter(torch.ones(7))
    with torch.no_grad():
        inner[0].bias.fill_(-0.0)  # a sum over the ranks would turn it into 0.0
    expected = {name: p.detach().clone() for name, p in inner.named_parameters()}
    if kind == "fsdp1":
        unit: Any = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        unit = fully_shard(inner, mesh=init_device_mesh("cpu", (2,)))
    model = nn.ModuleDict({"unit": unit})
    model.register_parameter("scale", scale)
    layout = sharding_of(model)
    found = {name: layout.gather(p, p) for name, p in inner.named_parameters()}
    parts = [same(local(layout.part(found[name], p)), local(p)) for name, p in inner.named_parameters()]
    return {
        "expected": expected,
        "found": found,
        "parts": all(parts),
        "whole": torch.equal(layout.gather(scale, scale), scale) and not layout.splits(scale),
        "sharded": is_sharded(model),
    }


def odd_optimizer(folder: str, strategy: str) -> dict[str, Any]:
    """An optimizer whose state for a sharded parameter is neither a number nor of the parameter's shape."""

    class Odd(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            for state in trainer.optimizers[0].state.values():
                state["history"] = torch.zeros(1000)

    save = AdapterCheckpoint(folder, every_n_train_steps=1)
    trainer_of(strategy, [Odd(), save], max_steps=1).fit(ShardedAutomatic(network()), loader())
    return {}


class Checkpoints:
    """Results of the launch, and of the runs on one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.one = train(str(folder / "one"), "single")
        self.two: Results = launch(folder, self._planned())

    def file(self, run: str, step: int = MIDDLE) -> str:
        return str(self.folder / run / f"step={step}.ckpt")

    def _planned(self) -> Runs:
        runs: Runs = {}
        for name in STRATEGIES:
            runs |= self._planned_under(name)
        for kind in ("fsdp1", "fsdp2"):
            runs[f"gathered-{kind}"] = partial(gathered, kind)
        runs["odd"] = partial(odd_optimizer, str(self.folder / "odd"), "fsdp2")
        return runs

    def _planned_under(self, name: str) -> Runs:
        runs: Runs = {}
        strategy, settings = STRATEGIES[name]

        def add(run: str, function: Callable[..., dict[str, Any]] = train, **arguments: Any) -> None:
            folder = str(self.folder / f"{name}-{run}")
            runs[f"{name}-{run}"] = partial(function, folder, strategy, strategy_settings=settings, **arguments)

        add("whole", lightnings=True)
        add("resumed", resume=self.file(f"{name}-whole"))
        add("lightning-resumed", saver="lightning", resume=self.file(f"{name}-whole/lightning"))
        if name in ONE_OF_EACH:
            add("from-one", resume=self.file("one"))
            for found, other in APART.items():
                add(f"apart-{found}", apart, resumes=[self.file("one"), other and self.file("one", int(other))])
        if name in GATHERED:
            add("traffic", traffic)
            add("frozen", frozen_A=1.0)
            add("frozen-resumed", frozen_A=2.0, resume=self.file(f"{name}-frozen"))
        return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


def saved(runs: Checkpoints, name: str, step: int = MIDDLE) -> dict[str, Any]:
    return torch.load(runs.file(f"{name}-whole", step), weights_only=True)


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(torch.as_tensor(value).double(), torch.as_tensor(other[name]).double(), atol=1e-10), name


@pytest.mark.parametrize("run", [f"{name}-{kind}" for name in STRATEGIES for kind in ("resumed", "lightning-resumed")])
def test_resumed_equals_uninterrupted_bit_for_bit(runs: Checkpoints, run: str) -> None:
    """On the same layout, with our files and with both formats of Lightning's, all written by one run."""
    whole = runs.two[run.replace("-lightning", "").replace("-resumed", "-whole")]
    for rank, resumed in enumerate(runs.two[run]):
        for part, value in whole[rank].items():
            assert same(value, resumed[part]), (rank, part)
        assert resumed["steps"] == END
        assert any(E.any() for E in resumed["driver"]["perturbation"]["E"].values())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_saved_on_two_ranks_resumed_on_one(runs: Checkpoints, name: str, tmp_path: Path) -> None:
    resumed = train(str(tmp_path), "single", resume=runs.file(f"{name}-whole"))
    assert_close(resumed["weights"], runs.one["weights"])
    assert_close(resumed["optimizer"], runs.one["optimizer"])
    assert_close(*(each["driver"]["perturbation"]["E"] for each in (resumed, runs.one)))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_saved_on_one_resumed_on_two_ranks(runs: Checkpoints, name: str) -> None:
    for rank in runs.two[f"{name}-from-one"]:
        assert_close(rank["weights"], runs.one["weights"])
        assert_close(rank["driver"]["perturbation"]["E"], runs.one["driver"]["perturbation"]["E"])
    resumed = torch.load(runs.file(f"{name}-from-one", END), weights_only=True)
    expected = torch.load(runs.file("one", END), weights_only=True)
    for index, state in expected["optimizer_states"][0]["state"].items():
        assert_close(resumed["optimizer_states"][0]["state"][index], state)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_writes_the_file_of_one_process(runs: Checkpoints, name: str) -> None:
    """The same entries, shapes and dtypes; thus nothing of the base, and no names of wrappers."""
    file, expected = saved(runs, name), torch.load(runs.file("one"), weights_only=True)
    # Sharded parts of the base have no sample of values by which another base could be recognized.
    assert file[MARK]["left_out"].keys() == expected[MARK]["left_out"].keys()
    not_compared = {"callbacks": None, "loops": None, MARK: None}
    assert outline({**file, **not_compared}) == outline({**expected, **not_compared})
    assert_close(file["state_dict"], expected["state_dict"])
    E = file["callbacks"]["EFMLoRA"]["perturbation"]["E"]
    assert sorted(E) == [f"net.base_model.model.{layer}.lora_B.default.weight" for layer in (0, 2, 4)]


def outline(value: Any) -> Any:
    """Keys, shapes and dtypes of nested states."""
    if isinstance(value, dict):
        return {key: outline(each) for key, each in value.items()}
    if isinstance(value, list):
        return [outline(each) for each in value]
    return (value.shape, value.dtype, value.device) if isinstance(value, torch.Tensor) else type(value)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_peft_loads_the_folder(runs: Checkpoints, name: str) -> None:
    folder = Path(runs.file(f"{name}-whole", END)).with_suffix("")
    loaded = PeftModel.from_pretrained(plain_base(), str(folder))
    expected = runs.two[f"{name}-whole"][0]["weights"]
    found = dict(loaded.named_parameters())
    for key, value in expected.items():
        assert same(found[key].detach(), value), key


def plain_base() -> nn.Module:
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("name", GATHERED)
def test_the_frozen_base_is_never_gathered(runs: Checkpoints, name: str) -> None:
    """No collective is larger than a factor, in saving and in loading."""
    for rank in runs.two[f"{name}-traffic"]:
        assert 0 < max(rank["save"], rank["load"]) <= rank["factor"] < rank["base"]


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_any_trained_parameter_is_gathered_whatever_is_wrapped(runs: Checkpoints, kind: str) -> None:
    """Biases and norms too, and a parameter outside of the sharded part if only a part of the model is sharded."""
    for rank in runs.two[f"gathered-{kind}"]:
        assert same(rank["found"], rank["expected"])
        assert rank["parts"]
        assert rank["whole"]
        assert rank["sharded"]


def test_an_optimizer_that_cannot_be_made_whole_is_refused(runs: Checkpoints) -> None:
    for error in runs.two.error("odd"):
        assert "AdamW keeps ['history'], and it can't be known how that is split over the ranks" in error


@pytest.mark.parametrize("found", APART)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_ranks_that_find_different_checkpoints_end_with_one_error(runs: Checkpoints, name: str, found: str) -> None:
    """Before DDP trains on from both, and before FSDP waits for a rank that has nothing to load."""
    steps = {"an older file": r"\[9, 6\]"}.get(found, r"\[9, 0\]")
    for error in runs.two.error(f"{name}-apart-{found}"):
        assert re.search(rf"the ranks would continue from different steps, {steps} .*share, or copy the file", error)


@pytest.mark.parametrize("name", GATHERED)
def test_a_frozen_A_is_saved_with_its_B(runs: Checkpoints, name: str) -> None:
    """LoRA-FA: each process draws its own A, and continues with the checkpoint's."""
    whole, resumed = runs.two[f"{name}-frozen"], runs.two[f"{name}-frozen-resumed"]
    for one, other in zip(whole, resumed, strict=True):
        assert same(one["weights"], other["weights"])
    folder = Path(runs.file(f"{name}-frozen")).with_suffix("")
    factors = load_file(folder / "adapter_model.safetensors")
    assert len([key for key in factors if "lora_A" in key]) == len([key for key in factors if "lora_B" in key]) == 3
