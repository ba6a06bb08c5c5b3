"""Where questions about images come from: any data set that ``datasets`` reads, and a packaged one.

Every source gives rows of seven columns: ``image`` (bytes, or a path), ``has_image`` (False where it is None),
``history`` (messages before the question, mostly none), ``question``, ``answers`` (of one or several people),
``choices`` (options' texts; none where the answer is free) and ``type`` (of the question, "" where the data don't say).
"""

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.shared.data import is_packaged, mapped, packaged_names, read_table, renamed, say_what_is_left_out
from recipes.shared.left_out import UnusableRowError, warn_of_left_out
from recipes.shared.parts import is_file
from recipes.vqa import easy_vqa, turns
from recipes.vqa.choices import MOST_CHOICES, letter
from recipes.vqa.prompts import Prompt

Row = dict[str, Any]
PACKAGED = packaged_names(easy_vqa.TASKS)
FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "has_image": datasets.Value("bool"),
        "history": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "question": datasets.Value("string"),
        "answers": [datasets.Value("string")],
        "choices": [datasets.Value("string")],
        "type": datasets.Value("string"),
    }
)
_IMAGES = ("image", "images")
_QUESTIONS = ("question", "answers", "answer", "choices", "options", "hint")
_OPTION = re.compile(r"[A-Z]|(?i:(option|choice)[_ ]?[a-z])")  # A of MMBench, choice_a of SEED-Bench
TYPE_COLUMNS = ("type", "question_type", "answer_type", "category", "subject")


def load_questions(
    name: str,
    split: str,
    image_folder: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    type_column: str | None = None,
    prompt: Prompt | None = None,
    names: Mapping[str, str] | None = None,
    answered: bool = True,
) -> Any:
    """Questions of a data set, as a ``datasets.Dataset`` with the columns of :data:`FEATURES`.

    Args:
        name: a Hub name, a local .json, .jsonl or .parquet file, or "packaged:" and a task.
        split: the split to read, or the file itself. "{split}" in ``image_folder`` stands for it.
        image_folder: where relative image paths start; None is the file's own folder.
        config_name: which of a Hub data set's configurations; None where it has one.
        revision: of a Hub data set.
        type_column: the column with the questions' types; None takes the first of :data:`TYPE_COLUMNS` that is there.
        prompt: what the model is asked; None is the question, and its choices where there are some.
        names: the data's own names of columns, each with the name by which this module knows it.
        answered: whether there have to be answers.

    Raises:
        MisconfigurationException: there is no such file, folder, data set, task, split or column, no row in it that can
            be used, or one that says two things.
    """
    folder = image_folder_of(name, split, image_folder)
    if image_folder is not None and not folder.is_dir():
        raise MisconfigurationException(f"image_folder={image_folder!r}: there is no folder {folder}")
    if is_packaged(name):
        return datasets.Dataset.from_list(easy_vqa.load(name, split), features=FEATURES)
    table = read_table(name, split, PACKAGED, config_name, revision)
    table = renamed(table, names or {})
    _check_columns(name, table.column_names, type_column, answered)
    for column in set(_IMAGES) & set(table.column_names):
        # Not decoded: an image is opened when its batch is made.
        table = table.cast_column(column, _undecoded(table.features[column]))
    convert = _Converter(name, folder, table.column_names, type_column, prompt or Prompt(), answered)
    say_what_is_left_out(f"dataset={name!r}", table.column_names, convert.used)
    features = datasets.Features({**FEATURES, "fault": datasets.Value("string")})
    options = {"with_indices": True, "remove_columns": table.column_names, "features": features}
    questions = mapped(table, convert, desc="Reading questions", **options)
    faults = questions["fault"][:]
    warn_of_left_out(f"dataset={name!r}", [fault for fault in faults if fault], len(faults))
    questions = questions.select([row for row, fault in enumerate(faults) if not fault]).remove_columns("fault")
    if not any(questions["has_image"]):
        raise MisconfigurationException(f"dataset={name!r}: no question has an image")
    return questions


def image_folder_of(name: str, split: str, image_folder: str | None) -> Path:
    """Where relative image paths start: in the folder that is given, or in that of the file which is read.

    A file that is given as a split has no name that could stand in a folder of splits.
    """
    if image_folder is None or ("{split}" in image_folder and is_file(split)):
        return Path(name).expanduser().parent
    return Path(image_folder.replace("{split}", split)).expanduser()


def _undecoded(feature: Any) -> Any:
    """The type of a column of images, or of lists of them, as `datasets` stores them."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inside = getattr(feature, "feature", None)
    return datasets.List(datasets.Image(decode=False)) if isinstance(inside, datasets.Image) else feature


def _check_columns(name: str, columns: list[str], type_column: str | None, answered: bool) -> None:
    has_turns = answered and bool(set(turns.COLUMNS) & set(columns))
    missing = []
    if not set(_IMAGES) & set(columns):
        missing.append("'image' or 'images'")
    if not has_turns and "question" not in columns:
        missing.append("'question' (or 'conversations', 'messages' or 'texts')")
    if answered and not has_turns and not {"answers", "answer"} & set(columns):
        missing.append("'answer' or 'answers'")
    if type_column is not None and type_column not in columns:
        missing.append(f"'{type_column}', which type_column names")
    if not missing:
        return
    raise MisconfigurationException(
        f"dataset={name!r} has the columns {sorted(columns)}: it needs {', '.join(missing)}. If others hold these, "
        "name them, such as --data.columns '{picture: image}'"
    )


@dataclass
class _Converter:
    """From a row of a data set to one of :data:`FEATURES`."""

    name: str
    folder: Path
    columns: Sequence[str]
    type_column: str | None
    prompt: Prompt
    answered: bool = True

    def __post_init__(self) -> None:
        self.images = str(_first(_IMAGES, self.columns))
        self.turns = _first(turns.COLUMNS, self.columns) if self.answered else None
        self.type_column = self.type_column or _first(TYPE_COLUMNS, self.columns)
        asked = _QUESTIONS if self.turns is None else (self.turns,)
        self.options = [] if "choices" in self.columns else _option_columns(self.columns)
        if self.turns is None:
            asked = (*asked, *self.options)
        self.used = [column for column in (self.images, *asked, self.type_column) if column in self.columns]
        if self.turns is not None and self.prompt.template is not None:
            raise MisconfigurationException(
                f"dataset={self.name!r} holds conversations, which say themselves what the model is asked: set prompt "
                "to null"
            )

    def __call__(self, row: Row, index: int) -> Row:
        """The row, or an empty one with the fault for which it is left out."""
        where = f"dataset={self.name!r}, row {index}"
        try:
            return {**self._converted(row, where), "fault": ""}
        except UnusableRowError as error:
            return {**dict.fromkeys(FEATURES), "fault": str(error).removeprefix(f"dataset={self.name!r}, ")}

    def _converted(self, row: Row, where: str) -> Row:
        image = self._image(row[self.images], where)
        kind = row[self.type_column] if self.type_column else None
        if self.turns is None:
            asked = self._asked(row, where)
        else:
            asked = turns.last_question(row[self.turns], image is not None, where)
        return {"image": image, "has_image": image is not None, **asked, "type": "" if kind is None else str(kind)}

    def _asked(self, row: Row, where: str) -> Row:
        if self.options:  # MMBench's form, in which "nan" is missing
            row = {name: None if value == "nan" else value for name, value in row.items()}
        options = [row[column] for column in self.options]
        while options and options[-1] in (None, ""):
            options.pop()
        if None in options or "" in options:
            raise UnusableRowError(f"{where} has no option in one of the columns {', '.join(self.options)}")
        choices = _choices(options or row.get("choices") or row.get("options"), where)
        question = _text(row, "question", where)
        if not question:
            raise UnusableRowError(f"{where} has no question")
        answers = _answers(row, where) if self.answered else []
        if self.answered and not answers:
            raise UnusableRowError(f"{where} has no answer (its question: {question!r})")
        if self.answered and choices:
            right = row.get("answer")
            answers = [_letter_of(answers[0] if right is None else right, choices, where)]
        question = self.prompt(question, choices, _text(row, "hint", where))
        return {"history": [], "question": question, "answers": answers, "choices": choices}

    def _image(self, image: Any, where: str) -> Any:
        if isinstance(image, dict):  # datasets' own form
            return image if image.get("bytes") else self._image(image.get("path"), where)
        if isinstance(image, list):
            if len(image) > 1:
                raise UnusableRowError(f"{where} has {len(image)} images, and one is possible")
            return self._image(image[0] if image else None, where)
        if image is not None and not isinstance(image, str):
            raise MisconfigurationException(
                f"{where}: image must be an image or the name of a file, got {reprlib.repr(image)}"
            )
        return {"bytes": None, "path": str(self.folder / image)} if image else None


def _option_columns(columns: Sequence[str]) -> list[str]:
    """The columns that hold an option each, in the order of their letters; none without A and B.

    Example:
        >>> _option_columns(["B", "A", "answer", "C", "F"]), _option_columns(["A"]), _option_columns(["a", "b"])
        (['A', 'B', 'C'], [], [])
    """
    by_letter = {column[-1].upper(): column for column in columns if _OPTION.fullmatch(column)}
    found = [by_letter[mark] for mark in takewhile(by_letter.__contains__, ascii_uppercase)]
    return found if len(found) > 1 else []


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """The first of some names that a table has as a column."""
    return next((name for name in names if name in columns), None)


def _text(row: Row, name: str, where: str) -> str:
    """A column's text without the spaces around it; "" where there is none."""
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise MisconfigurationException(f"{where}: {name} must be a text, got {value!r}")
    return (value or "").strip()


def _answers(row: Row, where: str) -> list[str]:
    """The answers of a row: texts, or texts in the form of the VQA challenges."""
    answers = row.get("answers") or row.get("answer")
    answers = answers if isinstance(answers, list) else [answers]
    texts = []
    for answer in answers:
        if isinstance(answer, dict) and "answer" not in answer:
            raise MisconfigurationException(
                f"{where}: an answer must be a text, or hold one as 'answer', got {answer!r}"
            )
        texts.append(answer["answer"] if isinstance(answer, dict) else answer)
    written = [_written(text).strip() for text in texts if text is not None]
    return [text for text in written if text]


def _choices(value: Any, where: str) -> list[str]:
    """The texts of the options; also in ARC's form, which names the letters beside them."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if value is not None and not isinstance(value, list):
        raise MisconfigurationException(f"{where}: choices must be a list of texts, got {value!r}")
    for choice in value or []:
        if choice is None or isinstance(choice, (list, dict)):
            raise MisconfigurationException(f"{where}: choices must be a list of texts, got {value!r}")
    choices = [_written(choice) for choice in value or []]
    if len(choices) > MOST_CHOICES:
        raise MisconfigurationException(f"{where} has {len(choices)} choices, and there are {MOST_CHOICES} letters")
    return choices


def _written(value: Any) -> str:
    """An answer or a choice as a text; a whole number that stands among others of a column without a point."""
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if is_whole else str(value)


def _letter_of(answer: Any, choices: list[str], where: str) -> str:
    """Return the letter of the right choice, which the data give as its number from 0, its letter or its text."""
    letters = [letter(number) for number in range(len(choices))]
    if isinstance(answer, float) and answer.is_integer():  # a column of numbers in which some are missing
        answer = int(answer)
    text = str(answer)
    meant = set()
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        meant.add(letters[answer])
    if text in letters:
        meant.add(text)
    if text in choices:
        meant.add(letters[choices.index(text)])
    if len(meant) != 1:
        raise MisconfigurationException(
            f"{where}: answer={answer!r} must be the number from 0, the letter or the text of one of {choices}, and "
            "not of two different ones"
        )
    return meant.pop()
