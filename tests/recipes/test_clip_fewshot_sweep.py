"""Sweeps of the few-shot recipe: what is run, resumed and chosen, and the table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from coop_sets import write_set
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip_fewshot import sweep
from recipes.clip_fewshot.__main__ import main
from recipes.clip_fewshot.table import tables
from recipes.shared.cli import RecipeCLI
from recipes.shared.configs import RECIPES
from recipes.shared.ledger import StoppedError

pytestmark = pytest.mark.usefixtures("command_line")


def test_a_run_that_was_stopped_in_its_last_test_is_done_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sweep.Run("lora", None, 1, 0)
    last = run.folder(tmp_path) / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    resumed: list[bool] = []

    def run_process(command: list[str]) -> None:
        """A run whose training is complete ends at once, without a result."""
        resumed.append(f"--ckpt_path={last}" in command)
        if not resumed[-1]:
            (run.folder(tmp_path) / "result.json").write_text('{"dataset": "mine"}')

    monkeypatch.setattr(sweep, "run_process", run_process)
    assert sweep.perform(run, tmp_path, [])["dataset"] == "mine"
    assert resumed == [True, False]
    assert (run.folder(tmp_path) / "checkpoints-1" / "last.ckpt").exists()


@pytest.mark.parametrize("method", ["efmlora", "fmlora_manual"])
def test_a_sweep_over_rho_changes_it_in_the_configuration(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = sweep.Run(method, 0.7, 1, 0)
    texts = []
    for one in (run, run._replace(rho=None)):
        with pytest.raises(SystemExit):
            RecipeCLI(["fit", *sweep.configuration(one), "--print_config"])
        texts.append(capsys.readouterr().out)
    changed, given = texts
    assert changed == given.replace("rho: 0.03", "rho: 0.7") != given


def test_the_result_of_another_folder_of_the_same_name_is_refused(tmp_path: Path) -> None:
    run = sweep.Run("lora", None, 1, 0, "second/images")
    folder = run.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"dataset": "first/images"}))
    with pytest.raises(SystemExit, match="is of the data set first/images, not of second/images"):
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
        performed.append(next(part for part in command if "logger.init_args.name" in part))
        main(list(command[3:]))

    monkeypatch.setattr(sweep, "run_process", in_this_process)
    arguments = ["sweep", "--datasets", "eurosat", "dtd", "--methods", "lora", "efmlora", "--rho", "0.01", "10"]
    arguments += ["--shots", "1", "--seeds", "0", f"--config={RECIPES / 'clip_fewshot' / 'configs' / 'clip_lora.yaml'}"]
    arguments += [f"--folder={tmp_path / 'sweep'}", f"--data.root={tmp_path / 'data'}"]
    arguments += [f"--model.model={tiny_clip}", "--model.pretrained=null", "--model.learning_rate=0.02"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.val_check_interval=4"]
    arguments += ["--data.iterations_per_shot=4"]
    assert main(arguments) == 130
    most = 6
    assert main(arguments) == 0
    assert len(performed) == 6  # each once
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()]
    assert [(row["dataset"], row["method"], row["rho"]) for row in rows] == [
        *(("eurosat", "lora", None), ("eurosat", "efmlora", 0.01), ("eurosat", "efmlora", 10)),
        *(("dtd", "lora", None), ("dtd", "efmlora", 0.01), ("dtd", "efmlora", 10)),
    ]
    assert {(row["split"], row["lora"]["r"], row["steps"]) for row in rows} == {("coop", 2, 4)}
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "dtd:\n\n| method | 1 shot | step time |\n|---|---|---|\n| CLIP-LoRA, published | 54.3 |  |" in table
    for dataset in ("eurosat", "dtd"):
        trials = [row for row in rows if row["dataset"] == dataset and row["method"] == "efmlora"]
        best = max(trials, key=lambda row: row["validation"]["accuracy"])
        assert f"| EFMLoRA | {100 * best['test']['accuracy']:.1f} (1) [rho {best['rho']:g}] |" in table
    assert "arXiv 2405.18541" in table


def row(rho: float, rate: float, seed: int, validation: float, test: float, shots: int = 4) -> dict[str, Any]:
    accuracies = {"validation": {"accuracy": validation}, "test": {"accuracy": test}, "zero_shot": {"accuracy": 0.1}}
    run = {"dataset": "mine", "name": "EFMLoRA", "rho": rho, "learning_rate": rate, "seed": seed, "shots": shots}
    return {**run, **accuracies, "seconds_per_step": None}


def test_validation_chooses_and_the_test_part_does_not() -> None:
    rows = [
        row(0.1, 1e-3, 0, 0.5, 0.9),
        row(0.1, 1e-3, 1, 0.6, 0.9),
        row(0.3, 1e-3, 0, 0.7, 0.2),
        row(0.3, 1e-3, 1, 0.6, 0.4),
        row(0.3, 1e-2, 0, 0.9, 0.9),
        row(0.3, 1e-2, 1, 0.1, 0.9),
        row(0.1, 1e-3, 0, 0.8, 0.5, shots=16),  # another number of shots has a choice of its own; the first of equals
        row(0.3, 1e-3, 0, 0.8, 0.6, shots=16),
    ]
    shown = tables(rows)
    assert "| EFMLoRA | 30.0 ± 10.0 (2) [rho 0.3, lr 0.001] | 50.0 (1) [rho 0.1, lr 0.001] | - |" in shown
    assert "best validation accuracy" in shown
    assert "published" not in shown
    every = tables(rows, "validation")
    assert "| EFMLoRA, rho 0.3, lr 0.01 | 50.0 ± 40.0 (2) | - | - |" in every
    rows[0]["validation"] = {}
    with pytest.raises(MisconfigurationException, match=r"runs have none: set .*validation_shots above 0"):
        tables(rows)
