"""`python -m recipes.tune.verdict SOURCE --metric val_loss`: does the perturbation pay off in this sweep?

SOURCE is a table (.csv, .json, .jsonl or .parquet), as Weights & Biases exports it, the URL of an Optuna storage, or a
folder of Hydra's multirun with Lightning's CSV logs. A run with rho 0, or without rho, counts as LoRA. On each side the
settings with the best mean win; their runs are compared by seed. Example: python -m recipes.tune.verdict
runs/tune/classification/results.csv --metric val_score --mode max
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
import pandas
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.study import StudyDirection
from optuna.trial import TrialState
from pandas import DataFrame, Series

from recipes.command_line.mistakes import without_traceback
from recipes.command_line.options import parse_known_options
from recipes.data.files import set_aside
from recipes.data.foreign import read_yaml
from recipes.studies.queue import Queue, open_storage
from recipes.studies.rows import Row
from recipes.tune.answer import answer, draw
from recipes.tune.search import Run, finite_or_worst
from recipes.tune.space import RHO

_MODES = {"loss": "min", "acc": "max"}
_PERHAPS = "if they diverged, leaving them out favors their side"


@dataclass
class Options:
    """The sweep and its columns.

    Attributes:
        source: the sweep.
        metric: column to judge by; for an Optuna study of another program it is called value.
        mode: min or max of the metric; by default a study's direction, and for a table min for a loss and max for an
            accuracy. For other metrics of a table it must be given.
        rho: column of the radius; by default the one whose name ends in rho.
        seed: column of the seed; by default the one whose name ends in seed or seed_everything.
        settings: columns of the other settings; by default those that Optuna or Hydra has set, and in a table those
            with a dot in their names.
        fresh: seeds that were not used to choose; by default those of rows whose column stage is final.
        study: name of the Optuna study, if the storage has several.
        picture: file for a picture of the trials.
    """

    source: str
    metric: str = "val_loss"
    mode: Literal["min", "max"] | None = None
    rho: str | None = None
    seed: str | None = None
    settings: list[str] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    study: str | None = None
    picture: Path = Path("verdict.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the sentence, draw the picture, and return the exit status."""
    options, others = parse_known_options(Options, arguments, "python -m recipes.tune.verdict", __doc__)
    if others:
        raise MisconfigurationException(f"there is no option {others[0]}; see --help")
    if "://" in options.source:
        sweep, mode = _of_optuna(options.source, options)
    else:
        mode = options.mode or _mode_of(options.metric)
        sweep = _of_files(options, mode)
    rows = _rows(sweep, options, mode)
    print(answer(rows, mode).text(options.metric))
    set_aside(options.picture)
    drawn = [row for row in rows if row["stage"] == "search"] or rows
    draw(drawn, next(iter(rows[0]["config"])), options.metric, mode).savefig(options.picture, dpi=130)
    print(f"The trials are drawn in {options.picture}")
    return 0


def _mode_of(metric: str) -> str:
    """Return the mode that a metric's name tells."""
    for name, mode in _MODES.items():
        if name in metric.lower():
            return mode
    raise MisconfigurationException(f"say whether less or more of {metric} is better, by --mode min or --mode max")


def _of_files(options: Options, mode: str) -> DataFrame:
    """Read a sweep as one table with a line per run."""
    source = options.source
    path = Path(source)
    if path.is_dir():
        return _of_hydra(path, options, mode)
    readers = {
        ".csv": lambda path: _of_csv(path, options.metric),
        ".json": pandas.read_json,
        ".jsonl": lambda path: pandas.read_json(path, lines=True),
        ".parquet": pandas.read_parquet,
    }
    if path.suffix not in readers:
        known = ", ".join(readers)
        raise MisconfigurationException(f"{source} must be a file ({known}), a folder, or the URL of a storage")
    if not path.exists():
        raise MisconfigurationException(f"there is no {source}")
    return _table(path, readers[path.suffix])


def _table(path: Path, read: Callable[[Path], DataFrame]) -> DataFrame:
    try:
        return read(path)
    except Exception as error:  # pandas and pyarrow raise many types
        raise MisconfigurationException(f"{path} can't be read: {error}"[:400]) from error


def _of_csv(path: Path, metric: str) -> DataFrame:
    """Read a table as text, so that 1e-2 keeps its spelling, with inf for a metric that is NaN."""
    found = pandas.read_csv(path, dtype=str)
    if metric in found:
        # A run that diverged has the word NaN, which pandas takes for a missing number.
        written = pandas.read_csv(path, dtype=str, usecols=[metric], keep_default_na=False)[metric]
        found.loc[written.str.strip().str.lower() == "nan", metric] = "inf"
    return found


def _of_optuna(url: str, options: Options) -> tuple[DataFrame, str]:
    """Return settings, user attributes and values of a study's finished trials, and the mode of the values."""
    storage = open_storage(url)
    names = optuna.get_all_study_names(storage)
    name = names[0] if options.study is None and len(names) == 1 else options.study
    if name not in names:
        raise MisconfigurationException(f"--study must be one of {names}, which the storage has, got {options.study}")
    study = optuna.load_study(study_name=name, storage=storage)
    mode = options.mode or ("min" if study.direction == StudyDirection.MINIMIZE else "max")
    trials = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    if not trials:
        raise MisconfigurationException(f"the study {name!r} has no finished trial yet")
    if "run" in trials[0].user_attrs:  # of recipes.tune
        return table_of(Queue(study, lambda key: Run(**key)).rows), mode
    failed = len(study.get_trials(states=(TrialState.FAIL,)))
    if failed:
        print(f"{failed} trials failed and are left out: {_PERHAPS}")
    options.settings = options.settings or list(trials[0].params)
    return DataFrame([{**trial.params, **trial.user_attrs, "value": trial.value} for trial in trials]), mode


def _of_hydra(folder: Path, options: Options, mode: str) -> DataFrame:
    """Return each run's overrides and the best value in its CSV logs."""
    runs, metric = [], options.metric
    for path in sorted(folder.rglob(".hydra/overrides.yaml")):
        given = read_yaml(path)
        if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
            raise MisconfigurationException(f"{path} must be a list of texts, as Hydra writes it, got {given!r:.100}")
        pairs = [each.lstrip("+~").split("=", 1) for each in given if "=" in each]  # not ~callbacks.efmlora
        overrides: dict[str, Any] = dict(pairs)
        for log in path.parent.parent.rglob("metrics.csv"):
            logged = _table(log, lambda path: pandas.read_csv(path, dtype={metric: float}))
            if metric in logged:
                best = logged[metric].min() if mode == "min" else logged[metric].max()
                overrides[metric] = finite_or_worst(float(best), mode)  # no number if it was never one
        runs.append(overrides)
    if not runs:
        raise MisconfigurationException(f"{folder} has no Hydra run, that is, no folder with .hydra/overrides.yaml")
    found = DataFrame(runs)
    options.settings = options.settings or [name for name in found if found[name].nunique(dropna=False) > 1]
    return found


def table_of(rows: Sequence[Row]) -> DataFrame:
    """Return the rows of a search as a table: stage, trial, seed, the settings, the metric, and the rest."""
    lines = DataFrame([{**row, **row["config"], row["metric"]: row["value"]} for row in rows])
    names = ["stage", "trial", "seed", *rows[0]["config"], rows[0]["metric"], "seconds", "commit"]
    # Not in the order in which they were done, so that equal searches have equal tables.
    return lines[names].sort_values(["stage", "trial", "seed", RHO], ascending=[False, True, True, True])


def _rows(sweep: DataFrame, options: Options, mode: str) -> list[Row]:
    """Return the runs of a sweep as :func:`recipes.tune.answer.answer` takes them.

    Raises:
        MisconfigurationException: a column is missing, a seed or a radius is none, or two runs have the same settings
            and seed.
    """
    sweep = sweep.map(lambda cell: cell if pandas.api.types.is_scalar(cell) else str(cell))  # of JSON, or Parquet
    if options.metric not in sweep:
        raise MisconfigurationException(f"there is no column {options.metric}: {_columns(sweep)}")
    rho = _column(sweep, "rho", options.rho)
    seed = _column(sweep, "seed", options.seed, "seed_everything")
    settings = options.settings or [name for name in sweep if "." in name]
    settings = [name for name in settings if name not in (rho, seed, options.metric)]
    unknown = [name for name in settings if name not in sweep]
    if unknown:
        raise MisconfigurationException(f"--settings: there is no column {', '.join(unknown)}: {_columns(sweep)}")
    for name in (rho, seed, options.metric):
        try:
            sweep[name] = pandas.to_numeric(sweep[name])
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"the column {name} must hold numbers: {error}") from error
    sweep = _finished(sweep, options.metric, seed)
    for name, wrong in ((seed, sweep[seed] % 1 != 0), (rho, sweep[rho] < 0)):
        if wrong.any():
            kind = "whole numbers" if name == seed else "radii of 0 or more, where 0 is LoRA"
            raise MisconfigurationException(f"the column {name} must hold {kind}, got {sweep[name][wrong].iloc[0]}")
    rows: list[Row] = []
    for line in sweep.to_dict("records"):
        config = {name: "null" if pandas.isna(line[name]) else str(line[name]) for name in settings}
        config[RHO] = f"{0.0 if pandas.isna(line[rho]) else float(line[rho]):g}"
        is_final = line["stage"] == "final" if "stage" in line and not options.fresh else line[seed] in options.fresh
        stage = "final" if is_final else "search"
        value = finite_or_worst(float(line[options.metric]), mode)
        rows.append({"config": config, "seed": int(line[seed]), "stage": stage, "value": value})
    runs = [str([row["config"], row["seed"], row["stage"]]) for row in rows]
    if len(set(runs)) < len(runs):
        equal = sweep.groupby(runs).nunique().max()
        # Without what differs in every run, such as its name.
        differing = [name for name in sweep if equal[name] > 1 and sweep[name].nunique() < len(sweep) / 2]
        raise MisconfigurationException(
            f"several runs have the same seed and the same settings ({', '.join(settings) or 'none'}): name by "
            f"--settings what else was set. They differ in {', '.join(differing) or 'nothing'}; {_columns(sweep)}"
        )
    return rows


def _finished(sweep: DataFrame, *needed: str) -> DataFrame:
    """Leave out runs without metric or seed, and those that did not finish by Weights & Biases' column State."""
    found = sweep
    for name in needed:
        complete = found[found[name].notna()]
        if len(complete) < len(found):
            print(f"{len(found) - len(complete)} runs have no {name} and are left out: {_PERHAPS}")
        found = complete
    states = found.get("State", Series("finished", found.index))
    others = states[states != "finished"]
    if not others.empty:
        print(
            f"{len(others)} runs have not finished (State: {', '.join(sorted(set(map(str, others))))}) and are left out"
        )
    return found[states == "finished"]


def _column(sweep: DataFrame, option: str, given: str | None, *others: str) -> str:
    """Return the name of a column: the given one, or the only one whose last part is the option's name."""
    names = [name for name in sweep if name.replace("/", ".").rpartition(".")[2] in (option, *others)]
    names = [name for name in sweep if name == given] if given else names
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise MisconfigurationException(f"--{option} must name one column, found {found}: {_columns(sweep)}")
    return str(names[0])


def _columns(sweep: DataFrame) -> str:
    return f"the columns are {', '.join(map(str, sweep))}"


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
