"""The demo in a process of its own; its methods run in forks of it, which need no imports again."""

import multiprocessing
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
from processes import CAN_FORK

from recipes.demo import __main__ as demo
from recipes.shared import ledger

_STARTED = [sys.executable, "-m", "recipes.demo"]
_CONTEXT: Any = multiprocessing.get_context("fork" if CAN_FORK else "spawn")


def main(arguments: list[str]) -> None:
    """What ``python -m recipes.demo`` does."""
    torch.set_num_threads(1)  # as in every test
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the tokenizer don't survive a fork
    ledger.subprocess = SimpleNamespace(run=_run)
    sys.exit(demo.main(arguments))


def _run(command: list[str], check: bool) -> Any:
    """What subprocess.run does with the command of one method; Ctrl-C reaches both, as members of one group."""
    assert command[: len(_STARTED)] == _STARTED
    process = _CONTEXT.Process(target=_one_method, args=(command[len(_STARTED) :],))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()
        raise
    return SimpleNamespace(returncode=process.exitcode)


def _one_method(arguments: list[str]) -> None:
    # The fork's copy of PyTorch's thread pool is replaced at its first use. That must not be by two threads at once,
    # and transformers loads weights in several.
    torch.set_num_threads(torch.get_num_threads())
    sys.exit(demo.main(arguments))
