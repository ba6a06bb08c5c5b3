"""The sweep over rho of a recipe's own run: what is run, resumed and judged, and what it says."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.choose_rho.__main__ import main
from recipes.choose_rho.report import advice, chosen, table
from recipes.shared.cli import RecipeCLI
from recipes.shared.configs import RECIPES
from recipes.shared.ledger import Row, StoppedError
from recipes.studies import process

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

BASE = RECIPES / "classification" / "configs" / "base.yaml"


def rows_of(values: dict[float, Sequence[float]], mode: str = "min") -> list[Row]:
    rows = []
    for rho, of_seeds in values.items():
        for seed, value in enumerate(of_seeds):
            rows.append({"rho": rho, "seed": seed, "metric": "val_loss", "mode": mode, "value": value})
    return rows


def test_a_sweep_of_a_recipe_is_run_once_and_judged_on_validation(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences = [{"text": f"The {('cat', 'dog')[i % 2]} number {i}", "label": ("cat", "dog")[i % 2]} for i in range(60)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(sentence) for sentence in sentences))
    started: list[Sequence[str]] = []

    def run_here(command: Sequence[str]) -> None:
        started.append(command)
        if len(started) == 3:
            raise StoppedError(130)
        RecipeCLI(list(command[3:]))  # behind python -m recipes.classification

    monkeypatch.setattr(process, "run_process", run_here)
    options = [
        *("classification", "--rho", "0", "0.5", "--seeds", "0", "1", "--folder", str(tmp_path / "sweep")),
        *(f"--config={BASE}", f"--config={RECIPES / 'configs' / 'methods' / 'efmlora.yaml'}"),
        "--data.validation_share=0.15",
        *(f"--model.model={tiny}", "--model.lora.target_modules=[q_proj,v_proj]", f"--data.dataset={data}"),
        *("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true", "--trainer.max_epochs=2"),
        *("--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"),
    ]
    assert main(options) == 130
    assert "The same command resumes" in capsys.readouterr().out
    assert main(options) == 0
    assert len(started) == 5  # the one that was stopped, and each of the others once
    rows = [json.loads(line) for line in (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()]
    assert [(row["rho"], row["seed"]) for row in rows] == [(0, 0), (0.5, 0), (0, 1), (0.5, 1)]
    assert {(row["metric"], row["mode"]) for row in rows} == {("val_score", "max")}
    with (tmp_path / "sweep" / "rho_0_seed_0" / "fit" / "metrics.csv").open() as file:
        logged = [float(line["val_score"]) for line in csv.DictReader(file) if line["val_score"]]
    assert len(logged) == 2
    assert rows[0]["value"] == pytest.approx(max(logged))
    out = capsys.readouterr().out
    assert "mean and standard error over the seeds" in out
    assert (tmp_path / "sweep" / "rho.png").stat().st_size > 0
    # Rows of another metric or of other options can't be compared with those that are there.
    with pytest.raises(MisconfigurationException, match="name another folder"):
        main([*options, "--metric", "val_loss"])
    # Without a metric that the configuration keeps a checkpoint by, nothing is trained.
    without = [*options, f"--folder={tmp_path / 'other'}", "--trainer.callbacks=lightning_flatlora.EFMLoRA"]
    with pytest.raises(MisconfigurationException, match="such as --metric val_loss"):
        main([*without, "--trainer.callbacks.rho=1"])
    assert not list(tmp_path.glob("other/**/*.ckpt"))
    with pytest.raises(SystemExit, match="has logged no val_wrong on validation, only val_"):
        main([*options, f"--folder={tmp_path / 'third'}", "--metric", "val_wrong"])


def test_the_best_mean_is_chosen_and_said_with_its_doubt() -> None:
    rows = rows_of({0.0: [1.0, 1.2], 0.1: [0.7, 0.91], 1.0: [0.8, 1.5]})
    assert chosen(rows) == 0.1
    assert chosen(rows_of({0.0: [1.0], 0.1: [2.0]}, "max")) == 0.1
    assert advice(rows) == "Take rho = 0.1. Its difference to plain LoRA is -0.2950 ± 0.0050."
    assert "contains 0" in advice(rows_of({0.0: [1.0, 1.2], 0.1: [0.5, 1.3], 1.0: [2.0, 2.0]}))
    assert "One seed" in advice(rows_of({0.0: [1.0], 0.1: [0.5], 1.0: [2.0]}))
    assert "add 3 to --rho" in advice(rows_of({0.0: [1.0, 1.0], 1.0: [0.5, 0.5]}))
    assert advice(rows_of({0.0: [1.0], 0.1: [1.0]})) == "No radius is better than 0 here: take plain LoRA."
    assert [row[-1] for row in table(rows).rows] == ["", "best", ""]


def test_a_run_that_diverged_is_never_chosen() -> None:
    rows = rows_of({0.0: [1.0, 2.0], 8.0: [0.5, math.inf]})
    assert chosen(rows) == 0.0
    assert chosen(rows_of({0.0: [0.5], 8.0: [-math.inf]}, "max")) == 0.0
    # LoRA diverged and the method did not.
    assert advice(rows_of({0.0: [math.inf, 1.0], 0.1: [0.5, 0.5], 1.0: [2.0, 2.0]})).startswith("Take rho = 0.1.")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--config=x.yaml", "--rho", "-1"], "0 or more, got -1"),
        (["--config=x.yaml", "--rho", "1", "1"], "twice"),
    ],
)
def test_wrong_options_are_refused_before_the_first_run(wrong: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        main(["vqa", *wrong])
    assert list(tmp_path.iterdir()) == []
