"""What data modules of texts have in common: the tokenizer, and the file of prompts for `predict`."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.language.model import load_tokenizer
from recipes.shared.files import read_lines
from recipes.shared.resumable import ResumableData


def tokenizer_of(data: ResumableData, name: str | None) -> Any:
    """Return a data module's tokenizer.

    Args:
        data: the data module.
        name: or folder of a tokenizer; None takes that of the module which is trained.

    Raises:
        MisconfigurationException: there is no tokenizer of this name.
    """
    if name is not None:
        return load_tokenizer(name, option="tokenizer")
    return data.trained_module.tokenizer


def read_prompts(path: str | None, kind: str, option: str = "prompts") -> list[str]:
    """Return the lines of a text file, without blank ones.

    Args:
        path: of the file.
        kind: what a line holds, for the messages, such as "prompt".
        option: of the data module that names the file.

    Raises:
        MisconfigurationException: there is no such file, it can't be read, or it is empty.
    """
    if path is None:
        raise MisconfigurationException(f"predict needs --data.{option} FILE, a text file with one {kind} a line")
    try:
        lines = read_lines(path)
    except OSError as error:
        raise MisconfigurationException(f"{option}={path!r} can't be read: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise MisconfigurationException(f"{option}={path!r} holds no {kind}: write one a line")
    return prompts


def encoded_prompts(path: str | None, kind: str, encode: Callable[[str], list[int]]) -> list[dict[str, Any]]:
    """Return the lines of a text file, numbered, with their tokens; the arguments are those of :func:`read_prompts`."""
    rows = []
    for number, prompt in enumerate(read_prompts(path, kind)):
        rows.append({"places": number, "prompt": prompt, "prompt_ids": encode(prompt)})
    return rows
