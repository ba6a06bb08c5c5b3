"""Sweeps of the few-shot recipe: what is run, resumed and chosen, and the table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from coop_sets import write_set
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip_fewshot import sweep
from recipes.clip_fewshot.__main__ import main
from recipes.clip_fewshot.plan import Run, Sweep
from recipes.clip_fewshot.table import tables
from recipes.shared.configs import RECIPES
from recipes.shared.ledger import Row, StoppedError

pytestmark = pytest.mark.usefixtures("command_line")


def plan_of(folder: Path, grids: dict[str, Sequence[float]], **given: Any) -> Sweep:
    names: dict[str, Any] = {"datasets": [None], "shots": [1], "methods": ["lora"], "seeds": [0]}
    return Sweep(**names | given, grids=grids, folder=folder)


def test_a_run_that_was_stopped_in_its_last_test_is_done_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = plan_of(tmp_path, {}).open_runs()
    last = tmp_path / run.name / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    resumed: list[bool] = []

    def run_process(command: list[str]) -> None:
        """A run whose training is complete ends at once, without a result."""
        resumed.append(f"--ckpt_path={last}" in command)
        if not resumed[-1]:
            (tmp_path / run.name / "result.json").write_text('{"dataset": "mine"}')

    monkeypatch.setattr(sweep, "run_process", run_process)
    assert sweep.perform(run, tmp_path, [])["dataset"] == "mine"
    assert resumed == [True, False]
    assert (tmp_path / run.name / "checkpoints-1" / "last.ckpt").exists()


def test_data_sets_do_not_share_a_folder(tmp_path: Path) -> None:
    for other in ("data_pets", "data/pets/"):
        message = f"the data sets data/pets, {other} would share folders"
        with pytest.raises(MisconfigurationException, match=message):
            plan_of(tmp_path, {}, datasets=["data/pets", "eurosat", other])
    (run,) = plan_of(tmp_path, {}, datasets=["data_pets"]).open_runs()
    result = tmp_path / run.name / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text('{"dataset": "data/pets"}')  # of an earlier command
    with pytest.raises(MisconfigurationException, match="is of the data set data/pets, not of data_pets"):
        sweep.perform(run, tmp_path, [])


def test_the_papers_table_of_two_data_sets_is_run_resumed_and_shown(
    tiny_clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dataset in ("eurosat", "dtd"):
        write_set(tmp_path / "data", dataset)
    performed: list[str] = []
    most = 3

    def in_this_process(command: Sequence[str]) -> None:
        if len(performed) == most:
            raise StoppedError(130)
        assert list(command[1:3]) == ["-m", "recipes.clip_fewshot"]
        performed.append(next(part for part in command if "logger.init_args.save_dir" in part))
        main(list(command[3:]))

    monkeypatch.setattr(sweep, "run_process", in_this_process)
    arguments = ["sweep", "--datasets", "eurosat", "dtd", "--methods", "lora", "efmlora", "--rho", "0.01", "10"]
    arguments += [
        "--shots",
        "1",
        "--seeds",
        "0",
        "--config",
        f"{RECIPES / 'clip_fewshot' / 'configs' / 'clip_lora.yaml'}",
    ]
    arguments += [f"--folder={tmp_path / 'sweep'}", f"--data.root={tmp_path / 'data'}"]
    arguments += [f"--model.model={tiny_clip}", "--model.pretrained=null", "--model.learning_rate=0.02"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.val_check_interval=4"]
    arguments += ["--data.iterations_per_shot=4"]
    assert main(arguments) == 130
    most = 6
    assert main(arguments) == 0
    assert len(performed) == 6  # each once
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()]
    assert [(row["dataset"], row["method"], row["config"].get("rho")) for row in rows] == [
        *(("eurosat", "efmlora", 0.01), ("eurosat", "efmlora", 10), ("eurosat", "lora", None)),
        *(("dtd", "efmlora", 0.01), ("dtd", "efmlora", 10), ("dtd", "lora", None)),
    ]
    trained = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("sweep/**/config.yaml")]
    assert sorted(config["trainer"]["callbacks"][-1].get("init_args", {}).get("rho", 0) for config in trained) == [
        *(0, 0, 0.01, 0.01, 10, 10)
    ]
    assert {(row["split"], row["lora"]["r"], row["steps"]) for row in rows} == {("coop", 2, 4)}
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "dtd:\n\n| method | 1 shot | step time |\n|---|---|---|\n| CLIP-LoRA, published | 54.3 |  |" in table
    for dataset in ("eurosat", "dtd"):
        trials = [row for row in rows if row["dataset"] == dataset and row["method"] == "efmlora"]
        best = max(trials, key=lambda row: row["validation"]["accuracy"])
        assert f"| EFMLoRA | {100 * best['test']['accuracy']:.1f} (1) [rho {best['config']['rho']:g}] |" in table
    assert "arXiv 2405.18541" in table


def test_validation_chooses_and_the_test_part_does_not(tmp_path: Path) -> None:
    grids = {"rho": (0.1, 0.3), "learning_rate": (1e-3, 1e-2)}
    plan = plan_of(tmp_path, grids, datasets=["mine"], shots=[4, 16], methods=["efmlora"], seeds=[0, 1])
    # By shots, rho and rate: accuracies on validation and test of each seed.
    found = {
        (4, 0.1, 1e-3): ((0.5, 0.9), (0.6, 0.9)),
        (4, 0.1, 1e-2): ((0.1, 0.9), (0.1, 0.9)),
        (4, 0.3, 1e-3): ((0.7, 0.2), (0.6, 0.4)),
        (4, 0.3, 1e-2): ((0.9, 0.9), (0.1, 0.9)),
        (16, 0.1, 1e-3): (
            (0.8, 0.5),
            (0.8, 0.5),
        ),  # another number of shots has a choice of its own; the first of equals
        (16, 0.1, 1e-2): ((0.8, 0.6), (0.8, 0.6)),
        (16, 0.3, 1e-3): ((0.1, 0.9), (0.1, 0.9)),
        (16, 0.3, 1e-2): ((0.1, 0.9), (0.1, 0.9)),
    }

    def invented(run: Run, judged: bool = True) -> Row:
        validation, test = found[run.shots, run.config["rho"], run.config["learning_rate"]][run.seed]
        row = {"dataset": "mine", "split": "official", "seconds_per_step": None, "test": {"accuracy": test}}
        row |= {"validation": {"accuracy": validation} if judged else {}, "zero_shot": {"accuracy": 0.1}}
        return {**run.key(), **row}

    plan.work(invented, lambda run: None)
    shown = tables(plan)
    chosen = "30.0 ± 10.0 (2) [rho 0.3, learning_rate 0.001] | 50.0 ± 0.0 (2) [rho 0.1, learning_rate 0.001]"
    assert f"| EFMLoRA | {chosen} | - |" in shown
    assert "best validation accuracy" in shown
    assert "published" not in shown
    assert "| EFMLoRA, rho 0.3, learning_rate 0.01 | 50.0 ± 40.0 (2) | 10.0 ± 0.0 (2) | - |" in tables(
        plan, "validation"
    )
    other = plan_of(tmp_path / "other", grids, methods=["efmlora"], shots=[4])
    with pytest.raises(
        MisconfigurationException, match=r"no accuracy on the validation part.*validation_shots above 0"
    ):
        other.work(lambda run: invented(run, judged=False), lambda run: None)
