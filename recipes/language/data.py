"""The base class of data modules of texts: the tokenizer, and the file of prompts for `predict`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.data.files import read_lines
from recipes.data.parted_data import PartedData
from recipes.language.model import load_tokenizer


class TextData(PartedData):
    """A data module of texts that knows their lengths, so that a model which can't read them is refused."""

    longest_text = longest_prompt = 0

    def own_tokenizer(self, name: str | None) -> Any:
        """Load a tokenizer by its name or folder; None takes the trained module's."""
        return self.trained_module.tokenizer if name is None else load_tokenizer(name, option="tokenizer")

    def longest(self) -> tuple[int, int]:
        """Return the tokens of the longest text, and of the longest prompt to be answered; 0 if there is none."""
        return self.longest_text, self.longest_prompt

    def note_lengths(self, texts: Iterable[int], prompts: Iterable[int]) -> None:
        """Record the lengths of further texts and prompts, in tokens."""
        self.longest_text = max([self.longest_text, *texts])
        self.longest_prompt = max([self.longest_prompt, *prompts])

    def prompts_of(self, path: str | None, kind: str, encode: Callable[[str], list[int]]) -> list[dict[str, Any]]:
        """Return the lines of a text file, numbered, with their tokens; see :func:`read_prompts`."""
        rows: list[dict[str, Any]] = []
        for number, prompt in enumerate(read_prompts(path, kind)):
            rows.append({"indices": number, "prompt": prompt, "prompt_ids": encode(prompt)})
        self.note_lengths([], [len(row["prompt_ids"]) for row in rows])
        return rows


def read_prompts(path: str | None, kind: str, option: str = "prompts") -> list[str]:
    """Return the lines of a text file, without blank ones.

    Args:
        path: path of the file.
        kind: what a line holds, such as "prompt", for messages.
        option: the data module's option that names the file.

    Raises:
        MisconfigurationException: no file is given, there is no such file, or it is empty or a table.
    """
    if path is None:
        raise MisconfigurationException(f"predict needs --data.{option} FILE, a text file with one {kind} per line")
    if Path(path).suffix.lower() in (".json", ".jsonl", ".csv", ".parquet"):
        raise MisconfigurationException(f"--data.{option} {path} is a table: give a text file with one {kind} per line")
    if not Path(path).expanduser().is_file():
        raise MisconfigurationException(f"--data.{option} {path}: there is no such file")
    prompts = [line.strip() for line in read_lines(path) if line.strip()]
    if not prompts:
        raise MisconfigurationException(f"{option}={path!r} holds no {kind}: write one per line")
    return prompts
