"""The paper's tables on a tiny RoBERTa and GLUE's files: what is planned, chosen, run, shared, resumed and shown."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hub_sets import save_glue, save_roberta
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.command_line.cli import RecipeCLI
from recipes.reproduce.__main__ import main
from recipes.reproduce.run import restored
from recipes.reproduce.table import TABLES
from recipes.studies import process
from recipes.studies.process import StoppedError
from recipes.studies.queue import Queue, file_storage, study_so_far
from recipes.studies.rows import Row

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),  # a test logs into its own folder
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists:UserWarning"),  # from a resumed run
]

GRIDS = {"lora_dropout": (0.0, 0.1), "rho": (0.0, 0.05), "lora_rho": (0.0, 0.1), "sigma": (0.0, 0.1), "alpha": (0.0, 1)}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that make a run small."""
    return [
        f"--model.model={save_roberta(tmp_path_factory.mktemp('roberta'))}",
        f"--data.dataset={save_glue(tmp_path_factory.mktemp('glue'))}",
        "--data.batch_size=8",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1",
    ]


@pytest.fixture
def prompts(options: list[str]) -> list[str]:
    return [*options, "--data.shots=8", "--trainer.max_steps=4", "--trainer.val_check_interval=2"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, command_line: None, own_datasets: None) -> list[list[str]]:
    """Do runs in this process, with small grids; the list of commands that were run."""
    commands: list[list[str]] = []

    def run_here(command: list[str]) -> None:
        commands.append(command)
        RecipeCLI(command[3:])

    monkeypatch.setenv("FLATLORA_PRECISION", "32-true")
    monkeypatch.setattr(process, "run_process", run_here)
    for name in ("table1", "table2"):
        small = replace(TABLES[name], learning_rates=(1e-2,), grids=GRIDS, trial_steps=None)
        monkeypatch.setitem(TABLES, name, small)
    return commands


def rows_of(folder: Path, table: str) -> list[Row]:
    return Queue(study_so_far(file_storage(folder), table), restored).rows


def kinds(commands: list[list[str]]) -> list[str]:
    return [command[3] for command in commands]


# -- the whole command


def test_a_table_from_plan_to_figures(
    tmp_path: Path, here: list[list[str]], prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "table"
    given = ["table1", "--tasks=sst2", "--methods", "lora", "efmlora", "--seeds", "13", "21", f"--folder={folder}"]
    assert main([*given, "--plan"]) == 0
    assert "| SST-2 | 2 / 2 | 3 | 4 | 7,000 |" in capsys.readouterr().out
    assert not folder.exists()

    assert main([*given, *prompts]) == 0
    rows = rows_of(folder, "table1")
    tested = len(rows) - 3
    assert tested in (2, 4)  # two if EFMLoRA's best radius is 0
    assert kinds(here) == ["fit"] * 3 + ["fit", "test"] * tested
    assert [row["part"] for row in rows] == ["validation"] * 3 + ["test"] * tested
    for row in rows:
        assert (row["steps"], row["precision"], row["devices"]) == (4, "32-true", 1)
        assert row["part"] == "test" or row["metrics"]["val_score"] == row["score"]
        assert not list(folder.rglob("*.ckpt"))
        assert (folder / row["adapter"] / "adapter_config.json").exists() == (row["part"] == "test")
    shown = capsys.readouterr().out
    finals = {(row["method"], row["seed"]): 100 * row["metrics"]["test_score"] for row in rows[3:]}
    mean = (finals["lora", 13] + finals["lora", 21]) / 2
    assert f"| LoRA | {mean:.1f} ± " in shown
    assert "| *published:* LoRA, BAR's | 91.1±.8 |" in shown
    assert f"**Run with other settings than these: `{' '.join(prompts)}`.**" in shown

    here.clear()
    assert main([*given, *prompts]) == 0
    assert not here  # everything is done
    capsys.readouterr()
    assert main([*given, "--plan"]) == 0  # it needs no options
    assert f"Done: {len(rows)}. 0 runs may start now." in capsys.readouterr().out
    with pytest.raises(
        MisconfigurationException, match=r"options was \[.* and is \[.*'--data.shots=4'\]. Give the original ones"
    ):
        main([*given, *prompts, "--data.shots=4"])


def test_a_stopped_run_resumes_where_it_was(
    tmp_path: Path, here: list[list[str]], prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = process.run_process

    def stop_halfway(command: Any) -> None:
        complete([*command, "--trainer.max_steps=2"])
        next(tmp_path.rglob("fit.json")).unlink()
        raise StoppedError

    given = ["table1", "--tasks=sst2", "--methods=lora", "--protocol=paper", "--seeds=13", f"--folder={tmp_path}/table"]
    monkeypatch.setattr(process, "run_process", stop_halfway)
    assert main([*given, *prompts]) == 130
    monkeypatch.setattr(process, "run_process", complete)
    assert main([*given, *prompts]) == 0
    assert any(argument.startswith("--ckpt_path=") and argument.endswith("last.ckpt") for argument in here[1])
    fitted = json.loads(next(tmp_path.rglob("fit.json")).read_text())
    assert [validation["step"] for validation in fitted["validations"]] == [2, 4]
    assert fitted["steps"] == 4


def test_later_tasks_start_from_the_adapter_of_the_same_method_and_seed(
    tmp_path: Path, here: list[list[str]], options: list[str]
) -> None:
    folder = tmp_path / "table"
    given = ["table2", "--tasks=rte", "--methods=efmlora", "--seeds=3", "--protocol=tuned", f"--folder={folder}"]
    assert main([*given, *options, "--trainer.max_epochs=1"]) == 0
    rows = rows_of(folder, "table2")
    assert [(row["task"], row["part"]) for row in rows] == [
        *[("mnli", "validation")] * 2,
        ("mnli", "test"),
        *[("rte", "validation")] * 2,
        ("rte", "test"),
    ]
    by_name = {f"{row['task']}/{row['part']}": row for row in rows}
    arguments = chain.from_iterable(here)
    starts = [argument for argument in arguments if argument.startswith("--model.start_from=")]
    assert f"--model.start_from={folder / by_name['mnli/test']['adapter']}" in starts
    assert "mnli/validation" in starts[0]
    start = by_name["rte/test"]["start"]
    assert (start["task"], start["part"]) == ("mnli", "test")
