"""From messages to tokens through the model's own chat template, with labels on the answers alone."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

IGNORED = -100  # the label that PyTorch's cross entropy leaves out

Message = dict[str, str]


class Encoded(NamedTuple):
    """Tokens of a conversation, and their labels: the token itself inside an answer, else -100."""

    input_ids: list[int]
    labels: list[int]
    cut: bool


class ChatEncoder:
    """Encode conversations with a chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        max_length: tokens kept of a conversation.
        chat_template: a Jinja template, or a file with one; None takes the tokenizer's own.
        system_prompt: a system message for conversations that have none; None leaves that to the template.

    Raises:
        MisconfigurationException: there is no chat template, or the tokenizer can't tell where its tokens lie.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, chat_template: str | None = None, system_prompt: str | None = None
    ) -> None:
        if chat_template is not None and "{" not in chat_template:  # a file name: no template lacks a brace
            chat_template = read_template(chat_template)
        self.template = chat_template or tokenizer.chat_template
        if not isinstance(self.template, str):
            raise MisconfigurationException(
                f"the tokenizer of {tokenizer.name_or_path!r} has no single chat template: set chat_template to a "
                "Jinja template or to a file with one, or take an instruction-tuned model"
            )
        if not tokenizer.is_fast:
            raise MisconfigurationException(
                f"the tokenizer of {tokenizer.name_or_path!r} is not a fast one, so the answer's tokens can't be "
                "located: install `tokenizers` support for it or choose another model"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.system_prompt = system_prompt
        # Templates with this block mark the answers themselves.
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Tokens and labels of a conversation, cut at ``max_length`` tokens."""
        messages = self._with_system(messages)
        if self._marks_answers:
            ids, mask = self._marked(messages)
        else:
            ids, mask = self._located(messages)
        labels = [token if is_answer else IGNORED for token, is_answer in zip(ids, mask, strict=True)]
        return Encoded(ids[: self.max_length], labels[: self.max_length], len(ids) > self.max_length)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of messages without an answer, with the template's opening of one."""
        text = self._render(self._with_system(messages), opens_answer=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system_prompt is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _render(self, messages: list[Message], opens_answer: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=opens_answer
            )
        )

    def _marked(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, return_dict=True, return_assistant_tokens_mask=True
        )
        return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]

    def _located(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        text = self._render(messages, opens_answer=False)
        spans = [self._answer_span(text, messages, i) for i, m in enumerate(messages) if m["role"] == "assistant"]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [any(a < end and start < b for a, b in spans) for start, end in encoded["offset_mapping"]]
        return encoded["input_ids"], mask

    def _answer_span(self, text: str, messages: list[Message], index: int) -> tuple[int, int]:
        """Characters of one answer and its end token: what rendering one message more adds to the opened prompt."""
        before = self._render(messages[:index], opens_answer=True)
        after = self._render(messages[: index + 1], opens_answer=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise MisconfigurationException(
                f"the chat template rewrites earlier messages, so answer {index} can't be located: "
                "set chat_template to one with {% generation %} blocks around the answers, or use single-turn data"
            )
        end_token = self.tokenizer.eos_token
        last = after.rfind(end_token, len(before)) if end_token else -1
        # What follows the end token, a newline as a rule, opens the next message: nobody has to learn it.
        return len(before), last + len(end_token) if last >= 0 else len(after)


def read_template(path: str) -> str:
    """The chat template in a file."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise MisconfigurationException(
            f"chat_template={path!r} is neither a Jinja template nor a file that can be read: {error}"
        ) from error
