"""The file of prompts that `predict` reads."""

from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.language.data import read_prompts


def test_a_prompt_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\u2028line\n\n  another \r\n", encoding="utf-8")
    assert read_prompts(str(path), "prompt") == ["one\u2028line", "another"]


def test_a_file_of_blank_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n \n", encoding="utf-8")
    with pytest.raises(MisconfigurationException, match="holds no meaning"):
        read_prompts(str(path), "meaning")
