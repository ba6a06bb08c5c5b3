"""Texts in a template, and the words that stand for the classes."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

_MASK = "mask"
_BEFORE = "It was"  # any text that a word may follow
_CHANGES = ("", "no_end", "lower")


@dataclass(frozen=True)
class Prompt:
    """Turns a row's texts into a prompt's tokens.

    Attributes:
        template: with ``{column}`` for a text, ``{column:no_end}`` without its last character, ``{column:lower}``
            beginning in lower case, and ``{mask}`` for the mask token of a masked model. Spaces around a text are
            left out first.
        columns: names of the texts.
        tokenizer: the model's.
        max_length: tokens of a prompt; the longest text is cut at its end until the prompt fits.
        text_tokens: tokens kept of each text; None keeps all.
    """

    template: str
    columns: Sequence[str]
    tokenizer: Any
    max_length: int
    text_tokens: int | None = None

    def check(self) -> None:
        """Refuse a template that no row can fill.

        Raises:
            MisconfigurationException: it can't be read, names other columns or none, asks for an unknown change, or
                ends in a space; or the tokenizer is a slow one.
        """
        try:
            fields = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise MisconfigurationException(
                f"template={self.template!r} can't be read: {error}; write {{{{ or }}}} for a brace in the text"
            ) from error
        if not getattr(self.tokenizer, "is_fast", False):
            raise MisconfigurationException(
                f"template={self.template!r} needs a fast tokenizer, which knows the place of each token in the text, "
                f"and {type(self.tokenizer).__name__} is a slow one"
            )
        names = template_fields(self.template)
        texts = [name for name in names if name != _MASK]
        problem = None
        if not texts or not set(texts) <= set(self.columns):
            problem = f"must have fields for texts, out of {list(self.columns)}, and has {texts}"
        elif names.count(_MASK) > 1 or (_MASK in names and self.tokenizer.mask_token is None):
            problem = "may have {mask} once, for a model with a mask token"
        elif not all(_is_known_change(*field[1:]) for field in fields):
            problem = f"may change a text by :{' or :'.join(_CHANGES[1:])}, and in no other manner"
        elif self.template != self.template.rstrip():
            problem = "must not end in a space: the label word brings its own"
        if problem:
            raise MisconfigurationException(f"template={self.template!r} {problem}")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The tokens, their number, and the place whose prediction is the label word.

        Raises:
            MisconfigurationException: the template alone is too long, or a text holds the mask token.
        """
        texts = self._texts(row)
        if self.text_tokens is not None:
            texts = [self._cut(text, self.text_tokens) for text in texts]
        ids = self._ids(texts)
        while len(ids) > self.max_length:
            lengths = [len(self._offsets(text)) for text in texts]
            longest = lengths.index(max(lengths))
            if not lengths[longest]:
                raise MisconfigurationException(f"template={self.template!r} is longer than max_length by itself")
            shorter = self._cut(texts[longest], max(0, lengths[longest] - (len(ids) - self.max_length)))
            if len(shorter) >= len(texts[longest]):  # the loop would never end
                raise MisconfigurationException(f"this tokenizer can't cut the text {texts[longest]!r}")
            texts[longest] = shorter
            ids = self._ids(texts)
        position = len(ids) - 1
        if is_masked(self.template):
            if ids.count(self.tokenizer.mask_token_id) != 1:
                raise MisconfigurationException(f"a text holds the mask token itself: {row['texts']}")
            position = ids.index(self.tokenizer.mask_token_id)
        return {"input_ids": ids, "length": len(ids), "position": position}

    def _texts(self, row: dict[str, Any]) -> list[str]:
        """The texts of the template's fields in its order, changed as it says."""
        columns = dict(zip(self.columns, row["texts"], strict=True))
        texts = []
        for _, name, change, _ in string.Formatter().parse(self.template):
            if name is not None and name != _MASK:
                texts.append(_changed(columns[name].strip(), change))
        return texts

    def _ids(self, texts: Sequence[str]) -> list[int]:
        prompt = ""
        remaining = iter(texts)
        for literal, name, _, _ in string.Formatter().parse(self.template):
            prompt += literal
            if name is not None:
                prompt += self.tokenizer.mask_token if name == _MASK else next(remaining)
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        # The label word follows the prompt of a causal model, not the end token that some tokenizers append.
        if not is_masked(self.template) and ids and ids[-1] == self.tokenizer.eos_token_id:
            return ids[:-1]
        return ids

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["offset_mapping"]  # type: ignore[no-any-return]

    def _cut(self, text: str, tokens: int) -> str:
        """The first tokens of a text, as it is written, without a character that the cut would split."""
        offsets = self._offsets(text)
        if len(offsets) <= tokens:
            return text
        if not tokens:
            return ""
        # All tokens of a character, such as the bytes of an emoji, have the place of the whole character.
        end = min(offsets[tokens - 1][1], offsets[tokens][0])
        return text[:end].rstrip()


def _is_known_change(name: str | None, change: str | None, conversion: str | None) -> bool:
    if name is None:
        return True
    known = ("",) if name == _MASK else _CHANGES
    return conversion is None and change in known


def _changed(text: str, change: str | None) -> str:
    if change == "no_end":
        return text[:-1]
    return text[:1].lower() + text[1:] if change == "lower" else text


def template_fields(template: str) -> list[str]:
    """The names in braces.

    Example:
        >>> template_fields("{premise:no_end}? {mask}, {hypothesis:lower}")
        ['premise', 'mask', 'hypothesis']
    """
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def is_masked(template: str) -> bool:
    """Whether a template is for a masked model; for a causal one the label word follows the prompt."""
    return _MASK in template_fields(template)


def word_tokens(words: Mapping[str, str], classes: Sequence[str], tokenizer: Any) -> list[int]:
    """The token of each class's label word, as it stands after a space.

    Raises:
        MisconfigurationException: words for other classes, a word of several tokens, or one for two classes.
    """
    if set(words) != set(classes):
        raise MisconfigurationException(f"label_words={dict(words)} must have a word for each of {list(classes)}")
    before = tokenizer(_BEFORE, add_special_tokens=False)["input_ids"]
    tokens: list[int] = []
    for name in classes:
        ids = tokenizer(f"{_BEFORE} {words[name]}", add_special_tokens=False)["input_ids"]
        if ids[: len(before)] != before or len(ids) != len(before) + 1:
            pieces = tokenizer.convert_ids_to_tokens(ids[len(before) :])
            raise MisconfigurationException(
                f"label_words: {words[name]!r} must be one token, and is {pieces} to this tokenizer: choose another"
            )
        tokens.append(ids[-1])
    if len(set(tokens)) < len(tokens):
        raise MisconfigurationException(f"label_words={dict(words)} must be another word for each class")
    return tokens
