"""The verdict on any sweep: tables, Hydra's folders and Optuna's storages, and what may be missing in them."""

from pathlib import Path
from typing import Any

import optuna
import pandas
import pytest
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.tune.verdict import main


def loss(rate: float, rho: float, seed: int) -> float:
    """1e-2 and rho 0.5 are best, and rho 0.5 lowers the loss by 0.3."""
    return 1.0 + abs(rate - 1e-2) * 10 - 0.3 * (rho == 0.5) + 0.01 * (seed % 3) + 0.003 * rho * (seed % 2)


def sweep(seeds: Any = (0, 1, 2), radii: Any = (0.0, 0.5), rates: Any = (1e-3, 1e-2)) -> list[dict[str, Any]]:
    """Runs as Weights & Biases exports them."""
    runs = []
    for rate in rates:
        for rho in radii:
            for seed in seeds:
                settings = {"optimizer.lr": rate, "callbacks.efmlora.rho": rho or None, "seed": seed}
                own = {"Name": f"run-{len(runs)}", "State": "finished"}
                runs.append({**own, **settings, "val_loss": loss(rate, rho, seed)})
    return runs


def said(source: Path | str, *options: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(source), "--metric", "val_loss", "--picture", str(folder / "verdict.png"), *options]) == 0
    assert (folder / "verdict.png").stat().st_size > 10_000
    return capsys.readouterr().out


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_sweep_is_judged(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"sweep.{ending}"
    table = pandas.DataFrame(sweep())
    if ending == "csv":
        table.to_csv(path, index=False)
    elif ending == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    out = said(path, folder=tmp_path, capsys=capsys)
    assert "Use it, with rho=0.5: it is better than LoRA, by 0.29" in out
    assert "with the perturbation: lr=0.01, rho=0.5" in out
    assert "The seeds that chose the winners also judge them" in out
    assert "unequal" not in out
    assert "no control" not in out


def test_fresh_seeds_judge_what_the_others_have_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [*sweep(rates=(1e-3, 1e-2, 1e-1)), *sweep(seeds=(10, 11), rates=(1e-2,))]
    pandas.DataFrame(runs).to_csv(tmp_path / "sweep.csv", index=False)
    out = said(tmp_path / "sweep.csv", "--fresh", "10", "11", folder=tmp_path, capsys=capsys)
    assert "standard error over seeds 10, 11" in out
    assert "The seeds that chose" not in out


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [*sweep(rates=(1e-2,), radii=(0.5,)), *sweep(rates=(1e-3, 1e-1), radii=(0.0,))]
    runs.append({**runs[0], "seed": 9, "val_loss": None})
    runs.append({**runs[0], "State": "crashed"})
    pandas.DataFrame(runs).to_csv(tmp_path / "sweep.csv", index=False)
    out = said(tmp_path / "sweep.csv", folder=tmp_path, capsys=capsys)
    assert "1 runs have no val_loss and are left out" in out
    assert "1 runs have not finished (State: crashed) and are left out" in out
    assert "The sides are unequal: 2 settings were tried without the perturbation and 1 with it." in out
    assert "There is no control: run LoRA with lr=0.01, rho=0 and the same seeds" in out


def test_a_run_that_diverged_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a table NaN is no missing number; where a library hides the difference, a line says so."""
    runs = [*sweep(rates=(1e-2,)), {**sweep(rates=(1e-2,))[0], "seed": None}]
    is_last = [run["callbacks.efmlora.rho"] == 0.5 and run["seed"] == 2 for run in runs]
    lines = [{**run, "val_loss": "NaN"} if last else run for run, last in zip(runs, is_last, strict=True)]
    pandas.DataFrame(lines).to_csv(tmp_path / "sweep.csv", index=False)
    out = said(tmp_path / "sweep.csv", folder=tmp_path, capsys=capsys)
    assert "Don't: it diverged in 1 of its 3 final runs" in out
    assert "1 runs have no seed and are left out: if they diverged, leaving them out favors their side" in out
    for number, (run, last) in enumerate(zip(runs[:6], is_last, strict=False)):
        folder = tmp_path / "multirun" / str(number)
        (folder / ".hydra").mkdir(parents=True)
        rho = f"rho={run['callbacks.efmlora.rho']}" if run["callbacks.efmlora.rho"] else "~callbacks.efmlora"
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([rho, f"seed={run['seed']}"]))
        logged = pandas.DataFrame({"step": [1, 2], "val_loss": [None, "nan" if last else run["val_loss"]]})
        logged.to_csv(folder / "metrics.csv", index=False)
    assert "Don't: it diverged in 1 of its 3 final" in said(tmp_path / "multirun", folder=tmp_path, capsys=capsys)


def test_hydras_folders_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, run in enumerate(sweep()):
        folder = tmp_path / "multirun" / str(number)
        (folder / ".hydra").mkdir(parents=True)
        names = {"lr": "optimizer.lr", "callbacks.efmlora.rho": "callbacks.efmlora.rho", "seed": "seed"}
        overrides = ["experiment=mine", *(f"{name}={run[column] or 0}" for name, column in names.items())]
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
        (folder / "csv" / "version_0").mkdir(parents=True)
        logged = pandas.DataFrame({"step": [1, 2, 2], "val_loss": [9.0, None, run["val_loss"]]})
        logged.to_csv(folder / "csv" / "version_0" / "metrics.csv", index=False)
    out = said(tmp_path / "multirun", folder=tmp_path, capsys=capsys)
    assert "with the perturbation: lr=0.01, rho=0.5\n" in out
    assert "Use it, with rho=0.5: it is better than LoRA, by 0.29" in out
    with pytest.raises(MisconfigurationException, match=r"csv has no Hydra run, that is, no folder with .hydra/"):
        main([str(tmp_path / "multirun" / "0" / "csv")])


def test_a_study_of_another_program_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    study = optuna.create_study(storage=url, study_name="mine")
    for run in sweep():
        frozen = optuna.trial.create_trial(
            params={"lr": run["optimizer.lr"], "rho": run["callbacks.efmlora.rho"] or 0.0},
            distributions={
                "lr": optuna.distributions.FloatDistribution(1e-5, 1.0),
                "rho": optuna.distributions.FloatDistribution(0.0, 8.0),
            },
            user_attrs={"seed": run["seed"]},
            value=run["val_loss"],
        )
        study.add_trial(frozen)
    # Without --mode, the study's direction counts: less is better.
    options = ["--metric", "value", "--picture", str(tmp_path / "verdict.png")]
    assert main([url, *options]) == 0
    assert "Use it, with rho=0.5" in capsys.readouterr().out
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    assert main([url, *options]) == 0
    assert "1 trials failed and are left out: if they diverged" in capsys.readouterr().out
    optuna.create_study(storage=url, study_name="other")
    with pytest.raises(MisconfigurationException, match=r"must be one of \['mine', 'other'\], .* got None"):
        main([url, *options])
    assert main([url, "--study", "mine", *options]) == 0
    with pytest.raises(MisconfigurationException, match="the study 'other' has no finished trial yet"):
        main([url, "--study", "other", *options])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ["--metric", "loss"], "there is no column loss: the columns are Name, State, optimizer.lr"),
        ({}, ["--rho", "radius"], "--rho must name one column, found none"),
        ({"x.rho": 1.0}, [], "--rho must name one column, found callbacks.efmlora.rho, x.rho"),
        ({"seed": 1}, [], r"the same seed and the same settings \(optimizer.lr\): .*They differ in nothing; the col"),
        ({}, ["--settings", "State"], r"the same settings \(State\): .*They differ in optimizer.lr; the columns are"),
        ({}, ["--settings", "lr"], "--settings: there is no column lr"),
        ({"callbacks.efmlora.rho": 0.5}, ["--settings", "Name"], "there are no runs without the perturbation"),
        ({"callbacks.efmlora.rho": "cosine"}, [], "the column callbacks.efmlora.rho must hold numbers"),
        ({"seed": 0.5}, [], "the column seed must hold whole numbers, got 0.5"),
        ({"seed": "inf"}, [], "the column seed must hold whole numbers, got inf"),
        ({"callbacks.efmlora.rho": -0.1}, [], "must hold radii of 0 or more, where 0 is LoRA, got -0.1"),
        ({"State": 3}, [], "there are no runs without the perturbation"),
        ({}, ["--setting", "lr"], "there is no option --setting"),
        ({}, ["--metric", "val_rmse"], "say whether less or more of val_rmse is better, by --mode min or --mode max"),
    ],
)
def test_what_can_not_be_judged_is_said(
    changes: dict[str, Any], options: list[str], message: str, tmp_path: Path
) -> None:
    pandas.DataFrame([{**run, **changes} for run in sweep()]).to_csv(tmp_path / "sweep.csv", index=False)
    with pytest.raises(MisconfigurationException, match=message):
        main([str(tmp_path / "sweep.csv"), "--metric", "val_loss", *options])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.csv", "there is no nothing.csv"),
        ("sweep.txt", "sweep.txt must be a file"),
        ("empty.csv", "empty.csv can't be read: No columns to parse from file"),
        ("mixed.json", "mixed.json can't be read: 'int' object is not iterable"),
        ("sqlite:////no/such/place.db", "the study's storage can't be opened"),
        ("nothing://user:secret@host/database", r"storage can't be opened: [^\n]*$"),
    ],
)
def test_a_source_that_can_not_be_read_is_said(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").touch()
    Path("mixed.json").write_text('[{"seed": 1}, 3]')
    with pytest.raises(MisconfigurationException, match=message):
        main([source, "--metric", "val_loss"])


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_a_list_is_a_setting_like_any_other(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pandas.DataFrame(sweep(rates=(1e-2,)))
    table["data.sizes"] = [[1, 2]] * len(table)
    getattr(table, f"to_{ending}")(tmp_path / f"sweep.{ending}")
    out = said(tmp_path / f"sweep.{ending}", folder=tmp_path, capsys=capsys)
    assert "Use it, with rho=0.5: it is better than LoRA, by 0.29" in out


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        *((".hydra/overrides.yaml", text, "overrides.yaml must be a list of texts") for text in ("3", "[3]", "", "a")),
        (".hydra/overrides.yaml", "a: [", "overrides.yaml can't be read: ParserError"),
        (".hydra/overrides.yaml", "!!python/object:os.system {}", "overrides.yaml can't be read: ConstructorError"),
        (".hydra/overrides.yaml", "\xff", "overrides.yaml can't be read: ReaderError"),
        (".hydra/overrides.yaml", "[" * 1000, "overrides.yaml can't be read"),
        *(("metrics.csv", text, "metrics.csv can't be read") for text in ("", "\xff", "val_loss\nx\n", '"a,b\n1')),
    ],
)
def test_a_damaged_file_of_hydra_is_named(file: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[rho=0, seed=0]")
    (tmp_path / "metrics.csv").write_text("val_loss\n1.0\n")
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(MisconfigurationException, match=says):
        main([str(tmp_path), "--metric", "val_loss"])
