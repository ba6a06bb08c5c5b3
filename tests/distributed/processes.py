"""Processes forked from one that has already imported the libraries, as importing them takes longer than most tests.

That process is multiprocessing's fork server, which imports them once per test session and computes nothing.
"""

import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ["lightning.pytorch.cli", "open_clip", "peft", "torch.distributed.fsdp"]
"""What is missing is left out; nothing that reads variables which tests set, as datasets does."""
CAN_FORK = not torch.cuda.is_available()
"""CUDA, which bitsandbytes starts as it is imported, does not survive a fork: with a GPU processes start anew."""
SERVER: Any = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
SERVER.set_forkserver_preload(LIBRARIES)


def start(
    function: Callable[..., Any],
    *arguments: Any,
    output: Path,
    environment: dict[str, str] | None = None,
) -> BaseProcess:
    """Call a function of a module in a new process, which leads its own group like one that is started from a terminal.

    Args:
        function: what the process does; sys.path, working directory and environment are this process's current ones.
        arguments: the function's arguments.
        output: the file for the process's output.
        environment: additional variables.
    """
    variables = {**os.environ, **(environment or {})}
    work = pickle.dumps((function, arguments))  # unpickled, and its module imported, after the variables are set
    process = SERVER.Process(target=_call, args=(str(output), variables, work))
    process.start()
    return process


def run(function: Callable[..., Any], *arguments: Any, output: Path, timeout: float = 500) -> int | None:
    """Call a function in a new process; returns its exit code, or None if it was killed because of the timeout."""
    process = start(function, *arguments, output=output)
    process.join(timeout)
    code = process.exitcode
    end(process)
    return code


def end(process: BaseProcess) -> None:
    """Kill a process of :func:`start` and those that it has started, if any is still running."""
    assert process.pid
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have had the time to become a group's leader
    process.join()


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Do what ``python -m name arguments`` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_code(code: str) -> None:
    """Do what ``python -c code`` does."""
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def _call(output: str, variables: dict[str, str], work: bytes) -> None:
    os.setpgid(0, 0)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it by default
    warnings.simplefilter("ignore")
    function, arguments = pickle.loads(work)
    function(*arguments)
