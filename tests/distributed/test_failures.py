"""What fails on one rank alone ends every process, with an exit code that says so, whoever started them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing import main
from launch import HERE, run_on, torchrun

LONG = 150  # seconds; a hang lasts for gloo's half an hour
CASES = {  # launcher, and the arguments of failing.py
    # rank 0 waits in FMLoRA's own all-reduce, in a batch that DDP does not synchronize
    "the ascent of an accumulating batch": ("torchrun", "FMLoRA", "5"),
    "a callback": ("script", "EFMLoRA", "callback"),
}


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """All cases at once, each a launcher of its own."""
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    started = {}
    for name, (launcher, *arguments) in CASES.items():
        command = torchrun(2) if launcher == "torchrun" else [sys.executable, "-W", "ignore"]
        started[name] = subprocess.Popen(
            [*command, str(HERE / "failing.py"), *arguments],
            cwd=HERE,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    yield started
    for process in started.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # to torchrun, which ends its workers
            process.wait()
        if process.stdout and not process.stdout.closed:
            os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()


@pytest.mark.parametrize("case", CASES)
def test_a_failure_of_one_rank_ends_all(processes: dict[str, "subprocess.Popen[str]"], case: str) -> None:
    """The output of a launch ends only once every process that writes to it has ended."""
    output, _ = processes[case].communicate(timeout=LONG)
    assert processes[case].returncode not in (0, None)
    assert "ValueError: rank 1 fails" in output
    assert "trained to the end" not in output


def test_a_loss_that_only_one_rank_lacks_ends_that_rank(tmp_path: Path) -> None:
    """By itself, with a code by which its launcher, whichever it is, knows to end the other."""
    output = tmp_path / "output.txt"
    codes = run_on(2, main, "FMLoRAModule", "3", "None", output=output, timeout=LONG)
    said = output.read_text()
    assert codes[1] == 1, said
    assert "RuntimeError: compute_loss returned None on one of several ranks" in said
    assert "trained to the end" not in said
