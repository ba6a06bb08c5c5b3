"""Processes that tests stop as Ctrl-C would."""

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path


def start_listening(command: Sequence[str], cwd: Path) -> "subprocess.Popen[str]":
    """Start a process, in a session of its own, that hears SIGINT even where this one was told to ignore it.

    A shell tells that to what it starts in the background, and children inherit it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
