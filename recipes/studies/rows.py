"""Rows of figures: a file of JSON lines, one per run."""

import json
from pathlib import Path
from typing import Any

from recipes.data.files import write_whole

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Return the rows of a file; none if there is no file."""
    if not path.exists():
        return []
    # Not splitlines(), which also splits at characters that may occur in a row, such as U+2028.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def append(path: Path, row: Row) -> None:
    """Add a row, so that a stop leaves all of it or nothing in the file."""
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in (*read(path), row)]
    write_whole(path, "".join(lines))
