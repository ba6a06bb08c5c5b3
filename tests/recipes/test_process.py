"""A command in its own process: how it is stopped or resumed, and that it ends together with its worker."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Timer

import processes
import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from recipes.studies.process import FailedError, StoppedError, fit, resuming, run_process


def _stopped(folder: Path) -> None:
    save = f"trap 'sleep 1; touch {folder}/saved; exit 1' INT; touch {folder}/started; sleep 9 & wait"
    with pytest.raises(StoppedError):
        run_process(["sh", "-c", save])


def test_a_command_that_is_stopped_has_time_to_save(tmp_path: Path) -> None:
    process = processes.start(_stopped, tmp_path, output=tmp_path / "output.txt")
    while not (tmp_path / "started").exists():
        assert process.is_alive(), (tmp_path / "output.txt").read_text()
        time.sleep(0.05)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
    process.join(timeout=60)
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_request_to_end_reaches_the_command(name: str) -> None:
    """Otherwise it would go on next to the run that a new start begins in its folder. SLURM sends SIGUSR1."""
    number = signal.Signals[f"SIG{name}"]
    before = signal.getsignal(number)
    Timer(0.3, os.kill, (os.getpid(), number)).start()
    with pytest.raises(StoppedError):
        run_process(["sh", "-c", f"trap 'exit 0' {name}; sleep 9 & wait"])  # with status 0, as a Trainer ends
    with pytest.raises(StoppedError):
        run_process(["sh", "-c", f"exit {128 + number}"])  # as Requeue ends
    with pytest.raises(FailedError, match="exit status 3"):
        run_process(["sh", "-c", "exit 3"])
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("begins", [0, 1])
def test_a_run_ends_with_its_killed_worker(begins: int, tmp_path: Path) -> None:
    """Even if it is killed while the run still loads its libraries; otherwise the run would train next to a new one."""
    run = "\n".join(
        [
            "import threading, time",
            f"open({str(tmp_path / 'on')!r}, 'w').close()",
            f"time.sleep({begins})",
            "from recipes.studies.result import end_with_worker",
            "threading.Thread(target=end_with_worker, daemon=True).start()",
            "time.sleep(240)",
        ]
    )
    worker = (
        f"import sys; from recipes.studies.process import run_process; run_process([sys.executable, '-c', {run!r}])"
    )
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE) as process:
        while not (tmp_path / "on").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        assert process.stdout is not None
        assert process.stdout.read() == b""  # the run holds it open until it ends
    assert time.monotonic() - began < 120  # otherwise it would keep sleeping


@pytest.mark.usefixtures("command_line")
def test_a_command_line_of_lightnings_resumes_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_here(command: Sequence[str]) -> None:
        assert command[2] == "json.tool"
        LightningCLI(BoringModel, BoringDataModule, args=list(command[3:]))

    monkeypatch.setattr("recipes.studies.process.run_process", run_here)
    options = ["--seed_everything=0", "--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    options += ["--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    stopped = tmp_path / "fit" / "config.yaml"
    stopped.parent.mkdir()
    stopped.touch()
    assert fit("json.tool", tmp_path, options)["steps"] == 1
    assert stopped.read_text()


def test_a_run_resumes_from_its_newest_last_checkpoint(tmp_path: Path) -> None:
    """Saved by time within a long epoch, or at an epoch's end."""
    assert resuming(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    for age, name in enumerate(("last_by_time", "last", "epoch=9")):
        path = tmp_path / "checkpoints" / f"{name}.ckpt"
        path.touch()
        os.utime(path, (0, 1000 - age))
    assert resuming(tmp_path) == [f"--ckpt_path={tmp_path / 'checkpoints' / 'last_by_time.ckpt'}"]
