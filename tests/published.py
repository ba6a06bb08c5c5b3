"""Where the published rows and figures are, and the numbers of a text."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PUBLISHED = DOCS / "results"
STUDY = (DOCS / "study.md").read_text(encoding="utf-8")


def figures(text: str) -> list[str]:
    """All numbers of a text, in order."""
    return re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?", re.sub(r"(\d),(?!\d{3})", r"\1 ,", text))
