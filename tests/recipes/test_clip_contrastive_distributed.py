"""Contrastive training on two processes under DDP, FSDP2 and FSDP1 against one process with the joint batch."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Results, launch

pytest.importorskip("open_clip", reason="the recipes' dependencies are not installed")

from clip_contrastive_runs import CLIP, SIGLIP, fit, run, save_model, save_pictures

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]

STRATEGIES = ("ddp", "fsdp2", "fsdp1")
METHODS = ("efmlora", "fmlora", "fmlora_manual", "full", "siglip")
REFUSED = [("fsdp1", "fmlora_manual"), ("fsdp1", "full")]
RUNS = [run for run in product(STRATEGIES, METHODS) if run not in REFUSED]
YAML = [
    "--trainer.precision=32-true",
    "--trainer.max_epochs=1",
    "--trainer.log_every_n_steps=1",
    "--model.init_args.pretrained=null",
    "--model.init_args.lora.lora_dropout=0",
    "--data.init_args.num_workers=0",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contrastive")


@pytest.fixture(scope="module")
def inputs(place: Path) -> dict[str, str]:
    """Names of the models, and the folder of images."""
    models = {name: save_model(place / name, config) for name, config in (("clip", CLIP), ("siglip", SIGLIP))}
    return models | {"pictures": save_pictures(place / "pictures")}


def settings(inputs: dict[str, str], method: str) -> dict[str, Any]:
    """Arguments of a run; SigLIP's is with a learnt scale and bias."""
    if method == "siglip":
        return {"model": inputs["siglip"], "pictures": inputs["pictures"], "method": "efmlora", "learn": True}
    return {"model": inputs["clip"], "pictures": inputs["pictures"], "method": method}


@pytest.fixture(scope="module")
def results(place: Path, inputs: dict[str, str]) -> Results:
    found: dict[str, tuple[str, dict[str, Any]]] = {}

    def add(name: str, strategy: str, method: str, **options: Any) -> None:
        arguments = settings(inputs, method) | {"strategy": strategy, "batch_size": 4, "folder": str(place / name)}
        found[name] = ("clip_contrastive_runs:fit", arguments | options)

    for strategy, method in RUNS:
        add(f"{strategy}:{method}", strategy, method)
    for strategy in STRATEGIES:
        whole = place / f"{strategy}:whole"
        add(whole.name, strategy, "efmlora", dropout=0.3, save=True)
        add(
            f"{strategy}:resumed",
            strategy,
            "efmlora",
            dropout=0.3,
            save=True,
            seed=5,
            ckpt_path=str(whole / "step=2.ckpt"),
        )
        options = [*YAML, f"--model.init_args.model={inputs['clip']}", f"--data.init_args.dataset={inputs['pictures']}"]
        options.append("--data.init_args.batch_size=4")
        arguments = {"command": "fit", "method": "efmlora", "strategy": strategy, "options": options}
        found[f"{strategy}:yaml"] = (
            "clip_contrastive_runs:run",
            {"folder": str(place / f"{strategy}:yaml"), **arguments},
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it
        return launch(place, found)


@pytest.fixture(scope="module")
def alone(inputs: dict[str, str], place: Path) -> dict[str, dict[str, Any]]:
    """The same runs in one process, with both processes' batches as one."""
    options = {"strategy": "one", "batch_size": 8, "folder": str(place / "alone")}
    return {method: fit(**settings(inputs, method), **options) for method in METHODS}


@pytest.mark.parametrize(("strategy", "method"), RUNS)
def test_two_processes_equal_one_with_the_joint_batch(
    strategy: str, method: str, results: Results, alone: dict[str, dict[str, Any]]
) -> None:
    expected = alone[method]
    for rank in results[f"{strategy}:{method}"]:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank["weights"].keys() == expected["weights"].keys()
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-3, atol=1e-5)
        for name, value in expected["logged"].items():
            assert rank["logged"][name] == pytest.approx(value, rel=1e-5), name


def test_the_runs_train_and_differ(alone: dict[str, dict[str, Any]]) -> None:
    assert len(alone["efmlora"]["losses"]) == 3
    assert 0 < alone["efmlora"]["logged"]["val_image_to_text_recall@5"] <= 1
    flat = {}
    for method in ("efmlora", "fmlora", "fmlora_manual"):
        weights = alone[method]["weights"].items()
        flat[method] = torch.cat([weight.flatten() for name, weight in weights if "lora_B" in name])
    assert (flat["efmlora"] - flat["fmlora"]).abs().max() > 1e-5
    torch.testing.assert_close(flat["fmlora"], flat["fmlora_manual"])
    assert {"contrastive.logit_scale", "contrastive.logit_bias"} <= alone["siglip"]["weights"].keys()
    assert "contrastive.logit_scale" not in alone["efmlora"]["weights"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_resumed_in_mid_epoch_equals_the_uninterrupted_one(strategy: str, results: Results) -> None:
    for one, other in zip(results[f"{strategy}:whole"], results[f"{strategy}:resumed"], strict=True):
        assert one["losses"][2:] == other["losses"]
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())
        assert one["logged"] == other["logged"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_strategies_work_from_yaml(strategy: str, results: Results) -> None:
    reference = results["ddp:yaml"][0]
    for rank in results[f"{strategy}:yaml"]:
        assert rank["steps"] == reference["steps"] == 3
        assert rank["units"] == (0 if strategy != "fsdp1" else 1 + 4 + 4 * 3 * 2)  # the rest, blocks, their factors
        for name, weight in reference["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-3, atol=1e-5)
        assert rank["logged"]["val_loss"] == pytest.approx(reference["logged"]["val_loss"], rel=1e-5)


def test_the_recipe_alone_measures_the_same(
    results: Results, inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["test"])  # LightningCLI warns of other arguments beside its own
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(tmp_path)  # and back
    options = [*YAML, f"--model.init_args.model={inputs['clip']}", f"--data.init_args.dataset={inputs['pictures']}"]
    found = run("fit", str(tmp_path), "efmlora", "one", [*options, "--data.init_args.batch_size=8"])
    assert found["logged"]["val_loss"] == pytest.approx(results["ddp:yaml"][0]["logged"]["val_loss"], rel=1e-3)
