"""Where questions about images come from: any data set that ``datasets`` reads, and a packaged one.

Every source gives rows of six columns: ``image`` (bytes, or a path), ``history`` (messages before the question, mostly
none), ``question``, ``answers`` (of one or several people), ``choices`` (texts of the options; none for a free answer)
and ``type`` (type of the question, "" if unknown).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.data.left_out import UnusableRowError, warn_of_left_out
from recipes.data.parts import is_file
from recipes.data.reading import is_packaged, mapped, packaged_names, read_errors, read_table, renamed
from recipes.offline import easy_vqa
from recipes.vqa import turns
from recipes.vqa.prompts import Prompt

Row = dict[str, Any]
PACKAGED = packaged_names(easy_vqa.TASKS)
FEATURES = datasets.Features(
    {
        "image": datasets.Image(decode=False),
        "history": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "question": datasets.Value("string"),
        "answers": [datasets.Value("string")],
        "choices": [datasets.Value("string")],
        "type": datasets.Value("string"),
    }
)
_IMAGES = ("image", "images")
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
    """Load the questions of a data set as a ``datasets.Dataset`` with the columns of :data:`FEATURES`.

    Args:
        name: a Hub name, a local .json, .jsonl or .parquet file, or "packaged:" and a task.
        split: split to read, or the file itself. "{split}" in ``image_folder`` is replaced by it.
        image_folder: where relative image paths start; None is the file's own folder.
        config_name: configuration of a Hub data set; None if it has only one.
        revision: revision of a Hub data set.
        type_column: column with the questions' types; None takes the first of :data:`TYPE_COLUMNS` that exists.
        prompt: text put to the model; None is the question and, if there are any, its choices.
        names: the data's own names of columns, each with the one that this module knows.
        answered: whether there must be answers.

    Raises:
        MisconfigurationException: there is no such file, folder, data set, task, split or column, no usable row, or a
            row that says two things.
    """
    folder = image_folder_of(name, split, image_folder)
    if image_folder is not None and not folder.is_dir():
        raise MisconfigurationException(f"image_folder={image_folder!r}: there is no folder {folder}")
    if is_packaged(name):
        return datasets.Dataset.from_list(easy_vqa.load_questions(name, split), features=FEATURES)
    table = renamed(read_table(name, split, PACKAGED, config_name, revision), names or {})
    _check_columns(name, table.column_names, type_column, answered)
    for column in set(_IMAGES) & set(table.column_names):
        # Not decoded: an image is opened when its batch is made. Names of files become images, too.
        feature = datasets.Image(decode=False)
        is_list = isinstance(table.features[column], datasets.List)
        with read_errors(name, split, PACKAGED):
            table = table.cast_column(column, datasets.List(feature) if is_list else feature)
    convert = _Converter(name, folder, table.column_names, type_column, prompt or Prompt(), answered)
    features = datasets.Features({**FEATURES, "fault": datasets.Value("string")})
    options = {"with_indices": True, "remove_columns": table.column_names, "features": features}
    questions = mapped(table, convert, desc="Reading questions", **options)
    faults = questions["fault"][:]
    warn_of_left_out(f"dataset={name!r}", [fault for fault in faults if fault], len(faults))
    return questions.select([row for row, fault in enumerate(faults) if not fault]).remove_columns("fault")


def image_folder_of(name: str, split: str, image_folder: str | None) -> Path:
    """Return where relative image paths start: in the given folder, or in that of the data.

    A file that is given as a split has no name to put into a folder of splits.
    """
    if image_folder is None or ("{split}" in image_folder and is_file(split)):
        path = Path(name).expanduser()
        return path if path.is_dir() else path.parent
    return Path(image_folder.replace("{split}", split)).expanduser()


def _check_columns(name: str, columns: list[str], type_column: str | None, answered: bool) -> None:
    said = turns.COLUMNS if answered else ()
    needed = [_IMAGES, ("question", *said)]
    if answered:
        needed.append(("answers", "answer", *said))
    if type_column is not None:
        needed.append((type_column,))
    missing = [" or ".join(map(repr, names)) for names in needed if not set(names) & set(columns)]
    if missing:
        raise MisconfigurationException(
            f"dataset={name!r} has the columns {sorted(columns)}: it needs {'; '.join(missing)}. If others hold these, "
            "name them, such as --data.columns '{picture: image}'"
        )
    if "choices" not in columns and ({"A", "B"} <= set(columns) or "choice_a" in columns):
        raise MisconfigurationException(f"dataset={name!r}: write the options' columns into one list 'choices'")


@dataclass
class _Converter:
    """Turns a row of a data set into one of :data:`FEATURES`."""

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
        if self.turns is not None and self.prompt.template is not None:
            raise MisconfigurationException(
                f"dataset={self.name!r} holds conversations, which themselves say what the model is asked: set prompt "
                "to null"
            )

    def __call__(self, row: Row, index: int) -> Row:
        """Return the row, or an empty one with the fault for which it is left out."""
        try:
            image = self._image(row[self.images])
            kind = _written(row[self.type_column], "type") if self.type_column else ""
            asked = turns.last_question(row[self.turns]) if self.turns else self._asked(row)
        except UnusableRowError as error:
            return {**dict.fromkeys(FEATURES), "fault": f"row {index} {error}"}
        except MisconfigurationException as error:
            raise MisconfigurationException(f"dataset={self.name!r}, row {index} {error}") from error
        return {"image": image, **asked, "type": kind, "fault": ""}

    def _image(self, given: Any) -> Row:
        several = given if isinstance(given, list) else [given]
        images = [image for image in several if image and (image["bytes"] or image["path"])]
        if len(images) != 1:
            raise UnusableRowError(f"has {len(images)} images, but needs one")
        image: Row = images[0]
        return image if image["bytes"] else {"bytes": None, "path": str(self.folder / image["path"])}

    def _asked(self, row: Row) -> Row:
        choices = _choices(row.get("choices") or row.get("options"))
        question = _written(row["question"], "question")
        answers = _answers(row) if self.answered else []
        if not question or (self.answered and not answers):
            raise UnusableRowError(f"has no question or no answer (its question: {question!r})")
        if self.answered and choices:
            right = row.get("answers") if row.get("answer") is None else row["answer"]
            first = right[0] if isinstance(right, list) and right else right
            answers = [_letter_of(answers[0] if isinstance(first, dict) else first, choices)]
        question = self.prompt(question, choices, _written(row.get("hint"), "hint"))
        return {"history": [], "question": question, "answers": answers, "choices": choices}


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """Return the first of some names that a table has as a column."""
    return next((name for name in names if name in columns), None)


def _written(value: Any, name: str) -> str:
    """Return a text, or a number as one; in a column with missing numbers a whole number has no point."""
    if isinstance(value, list | dict):
        raise MisconfigurationException(f"must have a text as {name}, got {value!r}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def _answers(row: Row) -> list[str]:
    """Return the answers of a row: texts, or texts in the form of the VQA challenges."""
    given = row.get("answers")
    if given is None or given in ("", []):  # 0 is an answer
        given = row.get("answer")
    texts = []
    for answer in given if isinstance(given, list) else [given]:
        text = answer.get("answer", answer) if isinstance(answer, dict) else answer
        texts.append(_written(text, "answer"))
    return [text for text in texts if text]


def _choices(given: Any) -> list[str]:
    """Return the texts of the options."""
    given = [] if given is None else given
    if not isinstance(given, list) or None in given or len(given) > len(ascii_uppercase):
        raise MisconfigurationException(f"must have a list of at most {len(ascii_uppercase)} texts as choices: {given}")
    return [_written(choice, "choice") for choice in given]


def _letter_of(answer: Any, choices: list[str]) -> str:
    """Return the letter of the right choice, which the data give by its number from 0, its letter or its text."""
    letters = ascii_uppercase[: len(choices)]
    text = _written(answer, "answer")
    meant = set()
    if isinstance(answer, int | float) and not isinstance(answer, bool) and answer in range(len(choices)):
        meant.add(letters[int(answer)])
    if text in list(letters):
        meant.add(text)
    if text in choices:
        meant.add(letters[choices.index(text)])
    if len(meant) != 1:
        raise MisconfigurationException(
            f"must have as answer the number from 0, the letter or the text of one of {choices}, and not of two "
            f"different ones; got {answer!r}"
        )
    return meant.pop()
