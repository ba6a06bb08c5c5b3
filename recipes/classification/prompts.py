"""Texts in a template, and the label words of the classes."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

_MASK = "mask"
_CHANGES = ("", "no_end", "lower")
_BEFORE = "It was"  # any text that a word may follow


@dataclass(frozen=True)
class Prompt:
    """Turn a row's texts into a prompt's tokens.

    Attributes:
        template: text with ``{column}`` for a column's text, ``{column:no_end}`` for it without its last character,
            ``{column:lower}`` for it with a lower-case start, and ``{mask}`` for a masked model's mask token. Spaces
            around a text are removed first.
        columns: names of the columns with the texts.
        tokenizer: the model's tokenizer.
        max_length: most tokens of a prompt; the longest text is cut at its end until the prompt fits.
        text_tokens: tokens kept of each text; None keeps all.

    Raises:
        MisconfigurationException: the template can't be read, names unknown columns or none, asks for an unknown change
            or for a mask that the model lacks, or ends in a space.
    """

    template: str
    columns: Sequence[str]
    tokenizer: Any
    max_length: int
    text_tokens: int | None = None

    def __post_init__(self) -> None:
        try:
            fields = _fields(self.template)
        except ValueError as error:
            raise MisconfigurationException(
                f"template={self.template!r} can't be read: {error}; write {{{{ or }}}} for a brace in the text"
            ) from error
        texts = [field for field in fields if field != (_MASK, "")]
        masks = 0 if self.tokenizer.mask_token is None else 1
        is_known = bool(texts) and set(texts) <= set(product(self.columns, _CHANGES))
        ends_in_space = self.template != self.template.rstrip()  # the label word brings its own
        if not is_known or ends_in_space or len(fields) - len(texts) > masks:
            raise MisconfigurationException(
                f"template={self.template!r} must hold texts out of {[f'{{{name}}}' for name in self.columns]}, each "
                "optionally with :no_end or :lower; it may hold {mask} once, if the model has a mask token, and must "
                "not end in a space"
            )

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the tokens, their number, and the index of the token whose prediction is the label word.

        Raises:
            MisconfigurationException: the template is too long even without texts, or a text holds the mask token.
        """
        columns = dict(zip(self.columns, row["texts"], strict=True))
        texts = []
        for name, change in _fields(self.template):
            if name != _MASK:
                texts.append(_changed(columns[name].strip(), change))
        if self.text_tokens is not None:
            texts = [self._cut(text, self.text_tokens) for text in texts]
        ids = self._ids(texts)
        while len(ids) > self.max_length:
            lengths = [len(self._offsets(text)) for text in texts]
            longest = lengths.index(max(lengths))
            shorter = self._cut(texts[longest], max(0, lengths[longest] - (len(ids) - self.max_length)))
            if len(shorter) >= len(texts[longest]):  # the loop would never end
                raise MisconfigurationException(
                    f"template={self.template!r} is longer than max_length={self.max_length}, and {texts[longest]!r} "
                    "can't be cut further"
                )
            texts[longest] = shorter
            ids = self._ids(texts)
        position = len(ids) - 1
        if is_masked(self.template):
            if ids.count(self.tokenizer.mask_token_id) != 1:
                raise MisconfigurationException(f"a text holds the mask token itself: {row['texts']}")
            position = ids.index(self.tokenizer.mask_token_id)
        return {"input_ids": ids, "length": len(ids), "position": position}

    def _ids(self, texts: Sequence[str]) -> list[int]:
        prompt = ""
        remaining = iter(texts)
        for literal, name, _, _ in string.Formatter().parse(self.template):
            prompt += literal
            if name is not None:
                prompt += self.tokenizer.mask_token if name == _MASK else next(remaining)
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        # In a causal model the label word follows the prompt, so an end token that the tokenizer appends is removed.
        if not is_masked(self.template) and ids and ids[-1] == self.tokenizer.eos_token_id:
            return ids[:-1]
        return ids

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["offset_mapping"]  # type: ignore[no-any-return]

    def _cut(self, text: str, tokens: int) -> str:
        """Return a text's first tokens, as written, without a character that the cut would split."""
        offsets = self._offsets(text)
        if len(offsets) <= tokens:
            return text
        if not tokens:
            return ""
        # All tokens of a character, such as the bytes of an emoji, have the offsets of the whole character.
        end = min(offsets[tokens - 1][1], offsets[tokens][0])
        return text[:end].rstrip()


def _fields(template: str) -> list[tuple[str, str | None]]:
    """Return the names in braces, each with its requested change.

    Example:
        >>> _fields("{premise:no_end}? {mask}, {hypothesis:lower}")
        [('premise', 'no_end'), ('mask', ''), ('hypothesis', 'lower')]
    """
    fields = []
    for _, name, change, conversion in string.Formatter().parse(template):
        if name is not None:
            fields.append((name, change if conversion is None else f"!{conversion}"))
    return fields


def _changed(text: str, change: str | None) -> str:
    if change == "no_end":
        return text[:-1]
    return text[:1].lower() + text[1:] if change == "lower" else text


def is_masked(template: str) -> bool:
    """Return whether a template is for a masked model; in a causal model the label word follows the prompt."""
    return (_MASK, "") in _fields(template)


def word_tokens(words: Mapping[str, str], classes: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the token of each class's label word, as written after a space.

    Raises:
        MisconfigurationException: there are words for other classes, a word has several tokens, or two classes share
            one.
    """
    if set(words) != set(classes):
        raise MisconfigurationException(f"label_words={dict(words)} must have a word for each of {list(classes)}")
    before = tokenizer(_BEFORE, add_special_tokens=False)["input_ids"]
    tokens: list[int] = []
    for name in classes:
        ids = tokenizer(f"{_BEFORE} {words[name]}", add_special_tokens=False)["input_ids"]
        is_one_token = ids[: len(before)] == before and len(ids) == len(before) + 1
        if not is_one_token or ids[-1] in tokens:
            pieces = tokenizer.convert_ids_to_tokens(ids[len(before) :])
            raise MisconfigurationException(
                f"label_words: {words[name]!r} must be one token, different for each class, but is {pieces} to "
                "this tokenizer: choose another"
            )
        tokens.append(ids[-1])
    return tokens
