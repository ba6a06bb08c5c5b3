"""The queue of runs: one of several workers does each run, however a worker ends, and studies are not mixed up."""

from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import optuna
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna import Trial
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from recipes.studies import queue as queues
from recipes.studies.process import FailedError, StoppedError
from recipes.studies.queue import Queue, file_storage, open_study, study_so_far
from recipes.studies.rows import Row


class Run(NamedTuple):
    seed: int

    @property
    def name(self) -> str:
        return f"seed-{self.seed}"

    def key(self) -> Row:
        return self._asdict()


RUNS = [Run(seed) for seed in range(6)]


def queue_of(folder: Path, rate: str = "1e-3") -> Queue[Run]:
    study = open_study(file_storage(folder), "runs", "min", {"rate": rate}, {"precision": "32-true"})
    return Queue(study, lambda key: Run(**key))


def found(run: Run) -> Row:
    return {"value": 10.0 * run.seed}


def work(queue: Queue[Run], runs: Sequence[Run] = RUNS) -> list[Run]:
    """The runs that this worker has done."""
    done: list[Run] = []
    queue.work(lambda: [run for run in runs if queue.find(run) is None], lambda run, trial: found(run), done.append)
    return done


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    assert work(queue_of(tmp_path), RUNS[:2]) == RUNS[:2]
    queue = queue_of(tmp_path)
    assert queue.rows == [{"seed": 0, "value": 0.0}, {"seed": 1, "value": 10.0}]
    assert work(queue) == RUNS[2:]
    assert queue.study.best_value == 0.0


def test_workers_that_start_together_share_the_runs(tmp_path: Path) -> None:
    done: list[Run] = []
    workers = [Thread(target=lambda: done.extend(work(queue_of(tmp_path)))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert sorted(done) == RUNS
    assert [row["seed"] for row in sorted(queue_of(tmp_path).rows, key=lambda row: row["seed"])] == list(range(6))


def test_a_run_that_another_worker_has_queued_finds_what_that_one_knew(tmp_path: Path) -> None:
    """Such as earlier rounds, with which its trial is compared."""
    queue, other = queue_of(tmp_path), queue_of(tmp_path)

    def open_runs() -> list[Run]:
        if not other.rows:  # between this worker's look at the queue and its taking of a trial
            work(other, RUNS[:1])
            other.study.enqueue_trial({}, user_attrs={"name": RUNS[1].name, "run": RUNS[1].key()})
        return [run for run in RUNS[:2] if queue.find(run) is None]

    def perform(run: Run, trial: Trial) -> Row:
        assert (run, queue.find(RUNS[0])) == (RUNS[1], {"seed": 0, "value": 0.0})
        return found(run)

    queue.work(open_runs, perform, print)
    assert len(queue.rows) == 2


def test_a_run_that_two_workers_have_queued_is_done_once(tmp_path: Path) -> None:
    queue = queue_of(tmp_path)
    for _ in range(2):
        queue.study.enqueue_trial({}, user_attrs={"name": RUNS[0].name, "run": RUNS[0].key()})
    queue.study.enqueue_trial({})  # put into the study by hand
    assert work(queue, RUNS[:2]) == RUNS[:2]
    assert len(queue.rows) == 2


def test_two_workers_never_take_the_same_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = queue_of(tmp_path), queue_of(tmp_path)
    first.study.enqueue_trial({})
    trial = first.study.trials[0]._trial_id
    taken: list[bool] = []

    def take(queue: Queue[Run]) -> None:
        taken.append(queue.study._storage.set_trial_state_values(trial, TrialState.RUNNING))

    other = Thread(target=take, args=(second,))

    def check(*_: object) -> None:
        if not other.ident:  # the first worker has read that the trial is waiting
            other.start()
            other.join(1)

    monkeypatch.setattr(RDBStorage, "check_trial_is_updatable", check)
    take(first)
    other.join(60)
    assert sorted(taken) == [False, True]


def test_a_worker_that_was_silent_too_long_goes_on_with_other_runs(tmp_path: Path, capsys: Any) -> None:
    queue, done = queue_of(tmp_path), []

    def perform(run: Run, trial: Trial) -> Row:
        if not done:  # as another worker does
            queue.study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        done.append(run)
        return found(run)

    queue.work(lambda: [run for run in RUNS[:2] if queue.find(run) is None], perform, print)
    assert done == [RUNS[0], RUNS[0], RUNS[1]]
    assert "This worker was silent for 60 s, so another does this run: Run(seed=0)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other"):
        queue.work(lambda: [RUNS[2]], perform_badly, print)


def perform_badly(run: Run, trial: Trial) -> Row:
    raise ValueError("other")


def test_the_run_of_a_killed_worker_is_done_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "HEARTBEAT", 1)
    monkeypatch.setattr(queues, "GRACE", 2)
    queue = queue_of(tmp_path)
    queue.study.enqueue_trial({}, user_attrs={"name": RUNS[0].name, "run": RUNS[0].key()})
    with pytest.warns(UserWarning, match="Heartbeat of storage is supposed to be used with"):
        lost = queue.study.ask()
    queue.study._storage.record_heartbeat(lost._trial_id)  # type: ignore[attr-defined] # its last one
    assert work(queue, RUNS[:2]) == [RUNS[1], RUNS[0]]
    assert queue.study.trials[lost.number].state == TrialState.FAIL


def test_a_stopped_run_is_queued_again_and_a_failed_one_counted(tmp_path: Path) -> None:
    queue = queue_of(tmp_path)
    ends: list[Exception] = [FailedError(3), StoppedError(), KeyboardInterrupt()]  # type: ignore[list-item]

    def perform(run: Run, trial: Trial) -> Row:
        if ends:
            raise ends.pop(0)
        return found(run)

    def open_runs() -> list[Run]:
        return [run for run in RUNS[:2] if queue.find(run) is None]

    for error in (FailedError, StoppedError, KeyboardInterrupt):  # the first failure ends the worker, too
        with pytest.raises(error):
            queue.work(open_runs, perform, print)
    queue.work(open_runs, perform, print)
    assert [queue.failures(run) for run in RUNS[:2]] == [1, 0]
    assert len(queue.rows) == 2


def test_a_later_failure_does_not_end_the_others(tmp_path: Path) -> None:
    queue = queue_of(tmp_path)

    def perform(run: Run, trial: Trial) -> Row:
        if run == RUNS[1] and queue.failures(run) < 2:
            raise FailedError(1)
        return found(run)

    queue.work(lambda: [run for run in RUNS[:3] if queue.find(run) is None], perform, print)
    assert [row["seed"] for row in queue.rows] == [0, 2, 1]  # the others come first
    assert queue.failures(RUNS[1]) == 2


def test_runs_of_other_options_are_not_mixed(tmp_path: Path) -> None:
    work(queue_of(tmp_path))
    with pytest.raises(
        MisconfigurationException,
        match=r"rate was 1e-3 and is 1e-4. Give the original ones, or another --folder",
    ):
        queue_of(tmp_path, rate="1e-4")
    optuna.create_study(storage=file_storage(tmp_path), study_name="own")
    with pytest.raises(MisconfigurationException, match=r"'own' was begun with other options: rate was None and is 1"):
        open_study(file_storage(tmp_path), "own", "min", {"rate": 1}, {})


def test_what_the_first_worker_has_decided_holds_for_all(tmp_path: Path) -> None:
    """On another machine, another precision may be fast."""
    for own in ("bf16-mixed", "32-true"):
        study = open_study(file_storage(tmp_path), "runs", "min", {}, {"precision": own})
        assert study.user_attrs["precision"] == "bf16-mixed"


def test_a_study_can_be_looked_at_without_its_settings(tmp_path: Path) -> None:
    assert not study_so_far(file_storage(tmp_path), "runs").trials  # not started yet
    assert not study_so_far("sqlite://", "runs").trials
    work(queue_of(tmp_path), RUNS[:2])
    assert len(study_so_far(file_storage(tmp_path), "runs").trials) == 2


@pytest.mark.parametrize("url", ["nonsense", "nothing://host/database", "sqlite:////no/such/folder/study.db"])
def test_a_storage_that_can_not_be_reached_is_said_in_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "_WAIT", 0.01)
    with pytest.raises(MisconfigurationException, match=r"the study's storage can't be opened: [^\n]+$"):
        open_study(url, "runs", "min", {}, {})
