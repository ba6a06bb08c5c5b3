"""The ledger of runs: what it finds again, what a stop leaves, and several processes at one file."""

import os
import signal
import time
from pathlib import Path
from threading import Thread, Timer
from typing import Any, NamedTuple

import processes
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.studies.ledger import Ledger, Row, StoppedError, keep_options, read, run_process


class Run(NamedTuple):
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"

    def key(self) -> Row:
        return self._asdict()


RUNS = [Run("lora", 0), Run("lora", 1), Run("efmlora", 0)]


def ledger(folder: Path) -> Ledger:
    return Ledger(folder / "new" / "results.jsonl", ("method", "seed"))


def test_what_is_done_is_not_done_again_nor_by_two(tmp_path: Path) -> None:
    done: list[Run] = []

    def perform(run: Run) -> Row:
        done.append(run)
        if len(done) == 2:
            raise KeyboardInterrupt
        return {**run.key(), "accuracy": 0.5}

    rows = ledger(tmp_path)
    with ledger(tmp_path).claimed(RUNS[0]):
        assert rows.perform_first(RUNS, perform, print)
        assert not rows.perform_first(RUNS[:1], perform, print)
    with pytest.raises(KeyboardInterrupt):
        rows.perform_first(RUNS, perform, print)
    while rows.perform_first([run for run in RUNS if rows.find(run) is None], perform, print):
        pass
    assert done == [RUNS[1], RUNS[0], RUNS[0], RUNS[2]]
    assert rows.rows == ledger(tmp_path).rows == read(tmp_path / "new" / "results.jsonl")


def test_other_settings_are_another_run(tmp_path: Path) -> None:
    rows = Ledger(tmp_path / "results.jsonl", ("method", "settings"))
    rows.append({"method": "lora", "settings": {"rho": 0.1, "steps": 2}})

    class Other(NamedTuple):
        settings: dict[str, Any]

        def key(self) -> Row:
            return {"method": "lora", "settings": self.settings}

    assert rows.find(Other({"steps": 2, "rho": 0.1})) is not None  # the order of entries means nothing
    assert rows.find(Other({"rho": 0.2, "steps": 2})) is None


def test_processes_that_append_at_once_lose_no_row(tmp_path: Path) -> None:
    threads = []
    for seed in range(8):
        threads.append(Thread(target=ledger(tmp_path).append, args=({"method": "é\u2028", "seed": seed},)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(row["seed"] for row in ledger(tmp_path).rows) == list(range(8))


def _stopped(folder: Path) -> None:
    save = f"trap 'sleep 1; touch {folder}/saved; exit 1' INT; touch {folder}/started; sleep 9 & wait"
    with pytest.raises(StoppedError) as stop:
        run_process(["sh", "-c", save])
    assert stop.value.status == 130


def test_a_command_that_is_stopped_has_time_to_save(tmp_path: Path) -> None:
    process = processes.start(_stopped, tmp_path, output=tmp_path / "output.txt")
    while not (tmp_path / "started").exists():
        assert process.is_alive(), (tmp_path / "output.txt").read_text()
        time.sleep(0.05)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.join(timeout=60)
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_request_to_end_reaches_the_command(name: str) -> None:
    """Otherwise it would train on, beside the one that a new start begins in its folder. SLURM sends SIGUSR1."""
    number = signal.Signals[f"SIG{name}"]
    before = signal.getsignal(number)
    Timer(0.3, os.kill, (os.getpid(), number)).start()
    with pytest.raises(StoppedError) as stop:
        run_process(["sh", "-c", f"trap 'exit 0' {name}; sleep 9 & wait"])  # with status 0, as a Trainer ends
    assert stop.value.is_by_user
    assert StoppedError(128 + number).is_by_user  # as Requeue ends
    with pytest.raises(StoppedError, match="exit status 3"):
        run_process(["sh", "-c", "exit 3"])
    assert signal.getsignal(number) is before


def _claims(folder: Path) -> None:
    with ledger(folder).claimed(RUNS[0]):
        run_process(["sh", "-c", f"touch {folder}/started; while [ ! -e {folder}/end ]; do sleep 0.05; done"])


def test_a_run_that_outlives_its_killed_parent_is_still_claimed(tmp_path: Path) -> None:
    """Otherwise the next start would train in its folder at the same time."""
    process = processes.start(_claims, tmp_path, output=tmp_path / "output.txt")
    while not (tmp_path / "started").exists():
        assert process.is_alive(), (tmp_path / "output.txt").read_text()
        time.sleep(0.05)
    process.kill()
    process.join(timeout=60)
    with ledger(tmp_path).claimed(RUNS[0]) as is_mine:
        assert not is_mine
    (tmp_path / "end").touch()
    until = time.monotonic() + 60
    while time.monotonic() < until and not is_mine:
        with ledger(tmp_path).claimed(RUNS[0]) as is_mine:
            time.sleep(0.05)
    assert is_mine


def test_a_folder_keeps_to_its_options(tmp_path: Path) -> None:
    (tmp_path / "table.txt").touch()
    for _ in range(2):
        keep_options(tmp_path, ["--rate=1"], ["table.txt"])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["claims", "options.json", "table-1.txt"]
    with pytest.raises(MisconfigurationException, match="name another folder, or delete this one"):
        keep_options(tmp_path, ["--rate=2"], ["table.txt"])
