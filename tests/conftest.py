"""Every test is deterministic and uses one thread, so that two cores give the same result as sixty-four.

`make test` splits the files between two processes: a file's tests run in one of them, one after another, and share
its fixtures of wider scope. Starting Python with all libraries takes about ten seconds, longer than most tests:
`launch.launch` runs many cases on a few ranks, and `processes.start` starts a process that already has the imports.
"""

import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SLOW = (
    "_distributed",
    "test_recipes.py",
    "test_compile",
    "test_fsdp",
    "test_tutorial",
    "test_demo",
    "distributed/",
    "test_wheel",
)
"""Parts of the names of files that take longest; they go first, lest one of them be all that is left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((i for i, part in enumerate(SLOW) if part in item.nodeid.partition("::")[0]), len(SLOW))

    items.sort(key=rank)


def pytest_configure() -> None:
    """Take Ctrl-C, which shells make their background jobs ignore, since tests send it to themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exclude the libraries' million objects, which live until the end, from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


# -- folders of checkpoints that many tests of callbacks/ read and none changes


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A classifier, and the folder with its files."""
    from checkpointed_bases import saver
    from helpers import Classifier, fit

    module, folder = Classifier(), tmp_path_factory.mktemp("trained")
    fit(folder, module, [saver(folder)])
    return module, folder


@pytest.fixture(scope="session")
def trained_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a module on the base of checkpointed_bases.py."""
    from checkpointed_bases import module_of, saver
    from helpers import fit

    folder = tmp_path_factory.mktemp("trained-base")
    fit(folder, module_of(), [saver(folder)])
    return folder
