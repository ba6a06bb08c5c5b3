"""Folders of checkpoints that many tests read and none changes."""

from pathlib import Path
from typing import Any

import pytest
from checkpointed_bases import module_of, saver
from helpers import Classifier, fit


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A classifier, and the folder with its files."""
    module, folder = Classifier(), tmp_path_factory.mktemp("trained")
    fit(folder, module, [saver(folder)])
    return module, folder


@pytest.fixture(scope="session")
def trained_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a module on the base of checkpointed_bases.py."""
    folder = tmp_path_factory.mktemp("trained-base")
    fit(folder, module_of(), [saver(folder)])
    return folder
