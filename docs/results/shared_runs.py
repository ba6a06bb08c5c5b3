"""Runs of a study that processes share; a queue of them, whose rows are written after each run."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from optuna import Trial
from optuna.trial import create_trial

from recipes.data.files import write_whole
from recipes.studies.queue import AnyRun, Queue, file_storage, open_study
from recipes.studies.rows import Row, read


def queue_of(folder: Path, name: str, kind: type[Any], shared: Row, finished: Path | None = None) -> Queue[Any]:
    """Return the queue of a study's runs in a folder.

    Args:
        folder: for the study's file.
        name: of the study.
        kind: named tuple of a run.
        shared: what all runs have in common.
        finished: file with rows of runs that another machine has done.

    Raises:
        ValueError: the file has no rows.
    """
    study = open_study(file_storage(folder), name, "min", shared, {})
    queue: Queue[Any] = Queue(study, lambda key: kind(**key))
    if finished:
        rows = read(finished)
        if not rows:
            raise ValueError(f"{finished} has no rows of finished runs.")
        add_finished(queue, rows, kind)
    return queue


def run_of(row: Row, kind: type[Any]) -> Any:
    """Return the run of a row, as a named tuple."""
    return kind(**{name: row[name] for name in kind._fields})


def add_finished(queue: Queue[Any], rows: Iterable[Row], kind: type[Any]) -> None:
    """Add rows of finished runs to a queue, except those of runs that it has."""
    for row in rows:
        run = run_of(row, kind)
        if queue.find(run) is None:
            known = {"name": run.name, "run": run.key(), "row": row}
            queue.study.add_trial(create_trial(value=row["value"], user_attrs=known))
    queue.reload()


def work(
    queue: Queue[AnyRun], left: Callable[[], Sequence[AnyRun]], perform: Callable[[AnyRun, Trial], Row], folder: Path
) -> None:
    """Do runs until none is left; ``FOLDER/results.jsonl`` has the rows so far.

    Args:
        queue: of the study.
        left: returns the runs that may start now.
        perform: does a run and returns its row.
        folder: for the rows.
    """

    def write() -> None:
        write_whole(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in queue.rows))

    def report(run: AnyRun) -> None:
        write()
        print(run, flush=True)

    queue.work(left, perform, report)
    write()


def open_runs(
    rows: Sequence[Row], is_done: Callable[[Any], bool], stages: Iterable[Callable[[Sequence[Row]], list[Any]]]
) -> list[Any]:
    """Return the runs that are left in the first unfinished stage; none at the end."""
    for stage in stages:
        missing = [run for run in stage(rows) if not is_done(run)]
        if missing:
            return missing
    return []


def work_in_stages(
    queue: Queue[Any],
    stages: Iterable[Callable[[Sequence[Row]], list[Any]]],
    perform: Callable[[Any], Row],
    folder: Path,
    table: Callable[[Sequence[Row]], str],
) -> None:
    """Do one stage after the other, and write ``FOLDER/table.md``.

    Args:
        queue: of the study.
        stages: each returns its runs, as far as the rows can tell.
        perform: does a run and returns its row.
        folder: for the rows and the table.
        table: returns the table of all rows.
    """

    def left() -> list[Any]:
        return open_runs(queue.rows, lambda run: queue.find(run) is not None, stages)

    work(queue, left, lambda run, trial: perform(run), folder)
    write_whole(folder / "table.md", table(queue.rows))
