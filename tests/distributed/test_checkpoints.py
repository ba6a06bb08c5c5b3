"""Checkpoints under every strategy: complete for what learns, of one format, small, resumable on any number of ranks.

All runs on two processes share one launch; those on one process run here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import END, MIDDLE, train
from helpers import same
from launch import Results, launch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from lightning_flatlora.callbacks.adapter_checkpoint.transfer import MARK

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp1-full": ("fsdp1-linears", {"state_dict_type": "full"}),
    "fsdp1-sharded": ("fsdp1-root", {"state_dict_type": "sharded"}),
    "fsdp2-full": ("fsdp2", {"save_distributed_checkpoint": False}),
    "fsdp2-distributed": ("fsdp2", {"save_distributed_checkpoint": True}),
}
# Our own file does not depend on the format of Lightning's.
ONE_OF_EACH = ("ddp", "fsdp1-full", "fsdp2-full")
GATHERED = ("fsdp1-full", "fsdp2-full")
APART = {"nothing": None, "an older file": "6", "no such file": "5"}
"""What the other rank finds if the machines share no folder: the step in its file's name."""


class Runs:
    """Results of the launch, and of the runs on one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.one = train(str(folder / "one"), "single")
        self.two: Results = launch(folder, dict(self._planned()))

    def file(self, run: str, step: int = MIDDLE) -> str:
        return str(self.folder / run / f"step={step}.ckpt")

    def _planned(self) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
        for name, (strategy, settings) in STRATEGIES.items():
            common = {"strategy": strategy, "strategy_settings": settings}

            def planned(run: str, name: str = name, common: Any = common, function: str = "train", **more: Any) -> Any:
                run = f"{name}-{run}"
                return run, (f"checkpoint_runs:{function}", {"folder": str(self.folder / run), **common, **more})

            yield planned("whole", lightnings=True)
            yield planned("resumed", resume=self.file(f"{name}-whole"))
            yield planned("lightning-resumed", saver="lightning", resume=self.file(f"{name}-whole/lightning"))
            if name in ONE_OF_EACH:
                yield planned("from-one", resume=self.file("one"))
            if name in GATHERED:
                yield planned("traffic", function="traffic")
                yield planned("frozen", frozen_A=1.0)
                yield planned("frozen-resumed", frozen_A=2.0, resume=self.file(f"{name}-frozen"))
            for found, other in APART.items() if name in ONE_OF_EACH else ():
                resumes = [self.file("one"), other and self.file("one", int(other))]
                yield planned(f"apart-{found}", function="apart", resumes=resumes)
        for kind in ("fsdp1", "fsdp2"):
            yield f"gathered-{kind}", ("checkpoint_runs:gathered", {"kind": kind})
        run = "odd"
        yield run, ("checkpoint_runs:odd_optimizer", {"folder": str(self.folder / run), "strategy": "fsdp2"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("checkpoints"))


def saved(runs: Runs, name: str, step: int = MIDDLE) -> dict[str, Any]:
    return torch.load(runs.file(f"{name}-whole", step), weights_only=True)


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(torch.as_tensor(value).double(), torch.as_tensor(other[name]).double(), atol=1e-10), name


@pytest.mark.parametrize("run", [f"{name}-{kind}" for name in STRATEGIES for kind in ("resumed", "lightning-resumed")])
def test_resumed_equals_uninterrupted_bit_for_bit(runs: Runs, run: str) -> None:
    """On the same layout, with our files and with Lightning's of both formats, which one run writes."""
    whole = runs.two[run.replace("-lightning", "").replace("-resumed", "-whole")]
    for rank, resumed in enumerate(runs.two[run]):
        for part, value in whole[rank].items():
            assert same(value, resumed[part]), (rank, part)
        assert resumed["steps"] == END
        assert any(E.any() for E in resumed["driver"]["perturbation"]["E"].values())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_saved_on_two_ranks_resumed_on_one(runs: Runs, name: str, tmp_path: Path) -> None:
    resumed = train(str(tmp_path), "single", resume=runs.file(f"{name}-whole"))
    assert_close(resumed["weights"], runs.one["weights"])
    assert_close(resumed["optimizer"], runs.one["optimizer"])
    assert_close(*(each["driver"]["perturbation"]["E"] for each in (resumed, runs.one)))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_saved_on_one_resumed_on_two_ranks(runs: Runs, name: str) -> None:
    for rank in runs.two[f"{name}-from-one"]:
        assert_close(rank["weights"], runs.one["weights"])
        assert_close(rank["driver"]["perturbation"]["E"], runs.one["driver"]["perturbation"]["E"])
    resumed = torch.load(runs.file(f"{name}-from-one", END), weights_only=True)
    expected = torch.load(runs.file("one", END), weights_only=True)
    for index, state in expected["optimizer_states"][0]["state"].items():
        assert_close(resumed["optimizer_states"][0]["state"][index], state)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_writes_the_file_of_one_process(runs: Runs, name: str) -> None:
    """The same entries, shapes and dtypes, so nothing of the base and no wrapper's name in any of them."""
    file, expected = saved(runs, name), torch.load(runs.file("one"), weights_only=True)
    # Parts of the base have no sample, from which another base could be recognized.
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
def test_peft_loads_the_folder(runs: Runs, name: str) -> None:
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
def test_the_frozen_base_is_never_gathered(runs: Runs, name: str) -> None:
    """No collective is larger than a factor, on saving and on loading."""
    for rank in runs.two[f"{name}-traffic"]:
        assert 0 < max(rank["save"], rank["load"]) <= rank["factor"] < rank["base"]


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_any_trained_parameter_is_gathered_whatever_is_wrapped(runs: Runs, kind: str) -> None:
    """Biases and norms too, and where only a part of the model is sharded, a parameter outside of it."""
    for rank in runs.two[f"gathered-{kind}"]:
        assert same(rank["found"], rank["expected"])
        assert rank["parts"]
        assert rank["whole"]
        assert rank["sharded"]


def test_an_optimizer_that_cannot_be_made_whole_is_refused(runs: Runs) -> None:
    for error in runs.two.error("odd"):
        assert "AdamW keeps ['history'], and it can't be known how that is split over the ranks" in error


@pytest.mark.parametrize("found", APART)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_ranks_that_find_different_checkpoints_end_with_one_error(runs: Runs, name: str, found: str) -> None:
    """Before DDP trains on from both, and before FSDP waits for a rank that has nothing to load."""
    steps = {"an older file": r"\[9, 6\]"}.get(found, r"\[9, 0\]")
    for error in runs.two.error(f"{name}-apart-{found}"):
        assert re.search(rf"the ranks would continue from different steps, {steps} .*share, or copy the file", error)


@pytest.mark.parametrize("name", GATHERED)
def test_a_frozen_A_is_saved_with_its_B(runs: Runs, name: str) -> None:
    """LoRA-FA: each process draws its own A, and continues with that of the checkpoint."""
    whole, resumed = runs.two[f"{name}-frozen"], runs.two[f"{name}-frozen-resumed"]
    for one, other in zip(whole, resumed, strict=True):
        assert same(one["weights"], other["weights"])
    folder = Path(runs.file(f"{name}-frozen")).with_suffix("")
    factors = load_file(folder / "adapter_model.safetensors")
    assert len([key for key in factors if "lora_A" in key]) == len([key for key in factors if "lora_B" in key]) == 3
