"""The few-shot recipe on two processes under DDP, FSDP2 and FSDP1, from its YAML, against one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Results, launch

pytest.importorskip("open_clip", reason="the recipes' dependencies are not installed")

from clip_fewshot_runs import filled, options_of, run, tiny_clip
from coop_sets import write_set

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]

METHODS = {"ddp": ("efmlora", "fmlora", "fmlora_manual"), "fsdp2": ("efmlora", "fmlora", "fmlora_manual")}
METHODS["fsdp1"] = METHODS["ddp"][:2]
STRATEGIES = tuple(METHODS)
DDP = [f"ddp:{method}" for method in METHODS["ddp"]]
SHARDED = [f"fsdp2:{method}" for method in METHODS["fsdp2"]] + [f"fsdp1:{method}" for method in METHODS["fsdp1"]]
RUNS = DDP + SHARDED
NO_DROPOUT = "--model.init_args.lora.lora_dropout=0"
EVERY_STEP = [
    "--trainer.callbacks+=lightning_flatlora.AdapterCheckpoint",
    "--trainer.callbacks.init_args.every_n_train_steps=1",
    "--trainer.callbacks.init_args.save_top_k=-1",
    "--trainer.callbacks.init_args.filename={step}",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def common(place: Path) -> list[str]:
    """Arguments of all runs, on one of CoOp's data sets."""
    filled(place / "images", 13)  # to predict
    write_set(place, "eurosat", train=6, val=3, test=4)
    data = [f"--data.init_args.root={place}", "--data.init_args.split=coop", "--data.init_args.templates=coop"]
    data.append("--data.init_args.eval_batch_size=3")
    return [*options_of(tiny_clip(place / "tiny"), "eurosat"), "--model.init_args.learning_rate=0.01", *data]


@pytest.fixture(scope="module")
def results(place: Path, common: list[str]) -> Results:
    """All runs on two processes."""
    cases: dict[str, tuple[str, dict[str, Any]]] = {}

    def add(name: str, command: str, method: str, strategy: str, options: list[str]) -> None:
        arguments = {"command": command, "method": method, "strategy": strategy, "options": common + options}
        cases[name] = ("clip_fewshot_runs:run", {"folder": str(place / name), **arguments})

    for name in RUNS:
        strategy, method = name.split(":")
        add(name, "fit", method, strategy, [NO_DROPOUT])
    for strategy in STRATEGIES:
        checkpoint = run_folder(place / f"{strategy}:whole") / "checkpoints" / "step=2.ckpt"
        add(f"{strategy}:whole", "fit", "efmlora", strategy, EVERY_STEP)
        add(f"{strategy}:resumed", "fit", "efmlora", strategy, [f"--ckpt_path={checkpoint}"])
        folder = f"--data.init_args.predict_folder={place / 'images'}"
        add(f"{strategy}:predict", "predict", "lora", strategy, [folder])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it
        return launch(place, cases)


def run_folder(folder: Path, method: str = "efmlora") -> Path:
    return folder / "runs" / "clip_fewshot" / method / "version_0"


def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, method: str, options: list[str]) -> Any:
    monkeypatch.setattr("sys.argv", ["test"])  # LightningCLI warns of other arguments beside its own
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(tmp_path)  # and back
    return run(command, str(tmp_path), method, "one", options)


def flat(result: dict[str, Any]) -> torch.Tensor:
    """A run's trained weights as one vector."""
    return torch.cat([weight.flatten() for weight in result["weights"].values()])


def measured(folder: Path, method: str = "efmlora") -> dict[str, dict[str, float]]:
    """What a run has measured before, in and after training."""
    result = json.loads((run_folder(folder, method) / "result.json").read_text())
    return {name: result[name] for name in ("zero_shot", "validation", "test")}


def close(one: dict[str, dict[str, float]], other: dict[str, dict[str, float]]) -> bool:
    """Whether two runs have measured the same, up to rounding."""
    return all(values == pytest.approx(other[name], rel=1e-4) for name, values in one.items())


def test_two_processes_equal_one_that_accumulates_their_batches(
    results: Results, common: list[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulating = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=6"]
    # as small as the ranks' own batches are, which share the few images
    more = [*common, NO_DROPOUT, *accumulating, "--data.init_args.batch_size=3"]
    expected = alone(monkeypatch, tmp_path, "fit", "efmlora", more)
    for rank in results["ddp:efmlora"]:
        assert rank["steps"] == expected["steps"] == 6
        torch.testing.assert_close(flat(rank), flat(expected), rtol=1e-4, atol=1e-6)
    assert close(measured(place / "ddp:efmlora"), measured(tmp_path))


def test_accumulation_in_manual_optimization_takes_as_many_steps(
    results: Results, common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--model.init_args.accumulate_grad_batches=2", "--model.init_args.sync_ascent=false"]
    options = [*common, NO_DROPOUT, *more, "--trainer.val_check_interval=6", "--data.init_args.batch_size=3"]
    assert alone(monkeypatch, tmp_path, "fit", "fmlora_manual", options)["steps"] == 6


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_runs_equal_ddp(name: str, results: Results, place: Path) -> None:
    method = name.split(":")[1]
    whole = results[f"ddp:{method}"][0]
    for rank in results[name]:
        assert rank["steps"] == whole["steps"] == 6
        torch.testing.assert_close(flat(rank), flat(whole), rtol=1e-4, atol=1e-6)
    assert close(measured(place / name, method), measured(place / f"ddp:{method}", method))


def test_methods_differ(results: Results) -> None:
    assert (flat(results["ddp:efmlora"][0]) - flat(results["ddp:fmlora"][0])).abs().max() > 1e-4
    torch.testing.assert_close(flat(results["ddp:fmlora"][0]), flat(results["ddp:fmlora_manual"][0]))


def test_models_are_sharded(results: Results) -> None:
    assert results["fsdp1:efmlora"][0]["units"] == 1 + 2 * 2 * (1 + 3 * 2)  # the rest, blocks, factors of q, k and v
    assert results["ddp:efmlora"][0]["units"] == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_resumed_in_mid_epoch_equals_the_uninterrupted_one(strategy: str, results: Results, place: Path) -> None:
    whole, resumed = results[f"{strategy}:whole"], results[f"{strategy}:resumed"]
    for one, other in zip(whole, resumed, strict=True):
        assert one["steps"] == other["steps"]
        assert torch.equal(flat(one), flat(other))
    assert measured(place / f"{strategy}:whole") == measured(place / f"{strategy}:resumed")


def test_predictions_are_those_of_one_process_in_the_order_of_the_images(
    results: Results, common: list[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch, tmp_path, "predict", "lora", [*common, f"--data.init_args.predict_folder={place / 'images'}"])
    expected = predictions(tmp_path)
    assert len(expected) == 39
    assert [row["image"] for row in expected] == sorted(row["image"] for row in expected)
    for strategy in STRATEGIES:
        assert results[f"{strategy}:predict"]
        found = predictions(place / f"{strategy}:predict")
        for row, wanted in zip(found, expected, strict=True):
            assert row == wanted | {"probability": pytest.approx(wanted["probability"], rel=1e-4)}


def predictions(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("runs/**/predictions.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]
