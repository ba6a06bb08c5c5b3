"""What commands that are started again find: other options, and earlier failures."""

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import optuna
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna import Study

from recipes.command_line.arguments import option
from recipes.studies.process import FailedError
from recipes.studies.queue import Queue, begin_runs, file_storage, open_study
from recipes.studies.rows import Row
from recipes.tune.__main__ import _one_more_hour
from recipes.tune.answer import answer, chosen
from recipes.tune.search import Options, Run, Search

NOT_KEPT: Row = {"best": "", "last": None}


def test_a_folder_of_runs_with_other_options_is_not_used_again(tmp_path: Path) -> None:
    begin_runs(tmp_path / "runs", {"options": ["--wrong=1"]})  # no run has completed with these
    begin_runs(tmp_path / "runs", {"options": ["--a=1"]})
    (tmp_path / "runs" / "seed-0").mkdir()
    (tmp_path / "runs" / "seed-0" / "fit.json").touch()
    begin_runs(tmp_path / "runs", {"options": ["--a=1"]})
    # Whatever the study's name is, a run that is found in the folder is not trained again.
    with pytest.raises(MisconfigurationException, match=r"options was \['--a=1'\] and is \[\].*another --folder"):
        begin_runs(tmp_path / "runs", {"options": []})


def search_in(folder: Path, study: Study, rates: int = 10, **options: Any) -> Search:
    """A worker of a search of four trials."""
    space = {"model.lr": [f"1e-{power}" for power in range(rates)], "rho": ["0", "0.5"]}
    queue = Queue(study, lambda key: Run(**key))
    return Search(Options("my.cli", budget=4, **options), [], space, queue, folder, "val_loss", "min")


def work(search: Search) -> None:
    search.queue.work(search.open_runs, search.perform, print)


def fit_well(command: str, folder: Path, given: Sequence[str]) -> Row:
    last = float((option(given, "--model.lr") or "").removeprefix("1e-")) + int(folder.name[-1])
    return {"monitor": None, "mode": None, "validations": [{"val_loss": last}], "training_seconds": 1800.0} | NOT_KEPT


def fit_badly(*_: Any) -> Row:
    raise FailedError(1)


def test_a_search_that_never_worked_has_no_diverged_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    monkeypatch.setattr("recipes.tune.search.fit", fit_badly)
    for _ in range(9):  # as a cluster may start it again and again
        with pytest.raises(FailedError):
            work(search_in(tmp_path, study))
    assert not search_in(tmp_path, study).queue.rows


def test_a_worker_that_lacks_something_ends_by_its_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    monkeypatch.setattr("recipes.tune.search.fit", fit_well)
    good = search_in(tmp_path, study)
    good.queue.work(lambda: [] if good.queue.rows else good.open_runs(), good.perform, print)
    monkeypatch.setattr("recipes.tune.search.fit", fit_badly)
    with pytest.raises(FailedError):
        work(search_in(tmp_path, study))
    assert len(study.trials) == 2  # another machine may have what this one lacks


def test_an_offer_is_what_there_is_to_buy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.tune.search.fit", fit_well)
    search = search_in(tmp_path, optuna.create_study(), rates=2, fresh=2)
    work(search)
    rows = search.queue.rows
    rows[0]["value"] += 0.1  # so that the seeds differ
    rows[-1]["value"] += 0.1
    said = _one_more_hour(search, answer(rows, "min"))  # a run takes half an hour
    assert said.startswith("One more hour of one worker would buy about 2 runs: --fresh 3, by which")
    assert "--budget" not in said  # both settings have been tried
    rows[-1]["value"] = math.inf
    assert _one_more_hour(search, answer(rows, "min")).endswith("about 2 runs: all has been tried")
    rows[1].update(seconds=0.0)  # it has failed
    assert search.seconds_of_a_run() == 1800
    search.space = {"model.lr": ["1", "2", "3", "4"], "rho": ["0", "0.5"]}
    monkeypatch.setattr(search, "seconds_of_a_run", lambda: 7200)
    assert _one_more_hour(search, answer(rows, "min")).startswith("4 more hours of one worker would buy about 2 runs:")


def test_weights_that_are_not_kept_are_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.tune.search.fit", fit_well)
    search = search_in(tmp_path, optuna.create_study(), test=True)
    with pytest.raises(MisconfigurationException, match="has kept no checkpoint to test"):
        work(search)


def test_of_equal_settings_the_same_win_in_whatever_order() -> None:
    rows = []
    for rate, rho in product(("1e-3", "1e-2"), ("0", "0.5")):
        rows.append({"stage": "search", "config": {"lr": rate, "rho": rho}, "seed": 0, "value": 1.0})
    for mode in ("min", "max"):
        assert chosen(rows, mode) == chosen(rows[::-1], mode)


def test_options_with_which_all_has_failed_can_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = file_storage(tmp_path)
    study = open_study(url, "runs", "min", {"options": []}, {})
    monkeypatch.setattr("recipes.tune.search.fit", fit_badly)
    with pytest.raises(FailedError):
        work(search_in(tmp_path, study))
    mended = open_study(url, "runs", "min", {"options": ["--model.model=a"]}, {})
    monkeypatch.setattr("recipes.tune.search.fit", fit_well)
    work(search_in(tmp_path, mended))
    with pytest.raises(MisconfigurationException, match=r"options was \['--model.model=a'\] and is \[\]"):
        open_study(url, "runs", "min", {"options": []}, {})
