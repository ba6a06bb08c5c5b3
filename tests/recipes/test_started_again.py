"""What is found by commands that are started again: with other options, and after failures."""

from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.studies.queue import begin_runs


def test_a_folder_of_runs_with_other_options_is_not_used_again(tmp_path: Path) -> None:
    begin_runs(tmp_path / "runs", {"options": ["--a=1"]})
    begin_runs(tmp_path / "runs", {"options": ["--a=1"]})
    # Whatever the study is called: a run that is found in the folder is not trained again.
    with pytest.raises(MisconfigurationException, match=r"options was \['--a=1'\] and is \[\].*another --folder"):
        begin_runs(tmp_path / "runs", {"options": []})
