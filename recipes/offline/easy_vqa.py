"""The packaged questions: easy-vqa's coloured shapes, as a whole and in two parts."""

import json
from typing import Any

from recipes.data.reading import packaged_task
from recipes.offline import packaged

_PACKAGE = "easy-vqa"


def is_negated(question: str) -> bool:
    """Return whether a question of easy-vqa is negated.

    Example:
        >>> [is_negated(q) for q in ("is there a circle?", "is there not a circle?", "is no circle present?")]
        [False, True, True]
    """
    return bool({"not", "no"} & set(question.split()))


def _type_of(question: str) -> str:
    if not question.startswith("what"):
        return "absence" if is_negated(question) else "presence"
    return "colour" if "color" in question else "shape"


# For each task, whether its questions are negated (None for both), and the answer of which only every fifth is kept, to
# balance yes and no.
TASKS = {"easy_vqa": (None, ""), "easy_vqa_plain": (False, "no"), "easy_vqa_negated": (True, "yes")}
_EVERY = 5


def load_questions(name: str, split: str) -> list[dict[str, Any]]:
    """Load rows about coloured shapes of 64×64 pixels: what colour, what shape, and whether there is one.

    Raises:
        MisconfigurationException: there is no such task.
    """
    negated, thinned = packaged_task(name, TASKS)
    folder = packaged.packaged_file(_PACKAGE, f"easy_vqa/data/{split}")
    rows, frequent = [], 0
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        if negated is not None and is_negated(question) != negated:
            continue
        if answer == thinned:
            frequent += 1
            # By count, not by chance: every machine takes the same questions.
            if frequent % _EVERY:
                continue
        file = {"bytes": None, "path": str(folder / "images" / f"{image}.png")}
        asked = {"question": question, "answers": [answer], "choices": [], "type": _type_of(question)}
        rows.append({"image": file, "history": [], **asked})
    return rows
