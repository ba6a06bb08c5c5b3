"""From messages to tokens through the model's own chat template, with labels on the answers alone."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_flatlora.report.conversation import (
    HiddenAnswerError,
    Message,
    Render,
    answer_end,
    answer_opening,
    answer_spans,
)

IGNORED = -100  # the label that PyTorch's cross entropy leaves out
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{{ '\n' if message['role'] == 'user' }}{% endfor %}"
)
"""The question on a line, the answer on the next: half of the tokens of most models' own templates."""
ASKED: list[Message] = [{"role": "user", "content": "Why?"}]  # to try a template with
_PROBE = "5d1system5d1"  # a text that no template holds
_REMEDY = (
    "Set template_arguments so that both agree (as enable_thinking: false does for some templates), or chat_template "
    "to one with {% generation %} blocks around the answers, or use single-turn data"
)


class Encoded(NamedTuple):
    """Tokens of a conversation, and their labels: the token itself inside an answer, else -100."""

    input_ids: list[int]
    labels: list[int]
    cut: bool


class ChatEncoder:
    """Encode conversations with a chat template.

    A template that takes no system message gets it at the head of the first question instead. What a template writes
    before an answer, and not in its generation prompt, is not learnt and stands in prompts too.

    Attributes:
        answer_end: what the template ends an answer with, if it is not the tokenizer's end token; else "".

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        max_length: tokens kept of a conversation.
        chat_template: a Jinja template, or a file with one; None takes the tokenizer's own.
        system_prompt: a system message for conversations that have none; None leaves that to the template.
        template_arguments: variables of the template, as ``{"enable_thinking": False}`` for Qwen3.

    Raises:
        MisconfigurationException: there is no chat template or it can't be used, or the tokenizer can't tell where its
            tokens lie.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        template_arguments: dict[str, Any] | None = None,
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
        self.arguments = template_arguments or {}
        # Templates with this block mark the answers themselves.
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        self._takes_system = takes_system(self._render)
        self._opening = opening_of(self._render, must_agree=not self._marks_answers)
        self.answer_end = answer_end(self._render, ASKED, tokenizer.eos_token)

    def encode(self, messages: Sequence[Message], ends: bool = True) -> Encoded:
        """Tokens and labels of a conversation, cut at ``max_length`` tokens.

        Args:
            messages: the answer last.
            ends: give the end token to an answer that the template ends with nothing, for who generates some.
        """
        messages = self._with_system(messages)
        if self._marks_answers:
            ids, mask = self._marked(messages)
        else:
            ids, mask = self._located(messages, ends)
        labels = [token if is_answer else IGNORED for token, is_answer in zip(ids, mask, strict=True)]
        return Encoded(ids[: self.max_length], labels[: self.max_length], len(ids) > self.max_length)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of messages without an answer, with the template's opening of one."""
        return self._prompt(self._with_system(messages))

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        text = self._render(messages, True) + self._opening
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        messages = list(messages)
        if self.system_prompt is not None and not (messages and messages[0]["role"] == "system"):
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages if self._takes_system else without_system(messages)

    def _render(self, messages: Sequence[Message], opens_answer: bool) -> str:
        with template_errors():
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=opens_answer,
                    **self.arguments,
                )
            )

    def _marked(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        with template_errors():
            encoded = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **self.arguments,
            )
        ids, mask = encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]
        prompt = self._prompt(messages[:-1]) if len(messages) > 1 else []
        if ids[: len(prompt)] == prompt:
            forget_prompt(mask, len(prompt))
        return ids, mask

    def _located(self, messages: list[Message], ends: bool) -> tuple[list[int], list[bool]]:
        try:
            text, spans = answer_spans(self._render, messages, self.tokenizer.eos_token, ends)
        except HiddenAnswerError as error:
            raise MisconfigurationException(f"{error}. {_REMEDY}") from error
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [any(a < end and start < b for a, b in spans) for start, end in encoded["offset_mapping"]]
        return encoded["input_ids"], mask


def forget_prompt(mask: list[bool], prompt: int) -> None:
    """Take the last answer's marks off the prompt's tokens, in place.

    Example:
        >>> mask = [False, True, False, True, True, False]
        >>> forget_prompt(mask, 4)
        >>> mask
        [False, True, False, False, True, False]
    """
    place = len(mask) - 1
    while place >= 0 and not mask[place]:
        place -= 1
    while place >= 0 and mask[place]:
        mask[place] = place >= prompt
        place -= 1


@contextmanager
def template_errors() -> Iterator[None]:
    """What a template objects to, as a message about it, instead of a traceback through Jinja."""
    try:
        yield
    except TemplateError as error:
        raise MisconfigurationException(
            f"the model's chat template can't render a conversation: {type(error).__name__}: {error}. Mend the data "
            "(many templates want user and assistant in turns), or set chat_template to another one"
        ) from error


def takes_system(render: Render) -> bool:
    """Whether a template writes a system message, rather than refuse it or pass over it; what is done then is said."""
    render(ASKED, True)  # what is wrong with the template otherwise is told here
    try:
        return _PROBE in render([{"role": "system", "content": _PROBE}, *ASKED], True)
    except MisconfigurationException:
        return False


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The same messages with a system message at the head of the first question.

    Example:
        >>> without_system([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
        [{'role': 'user', 'content': 'Be brief.\\n\\nWhy?'}]
    """
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, *rest = messages
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system["content"]}, *rest]
    return [{"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def opening_of(render: Render, must_agree: bool) -> str:
    """What prompts need beyond the template's generation prompt, which is told; "" for most templates.

    Args:
        render: of the template.
        must_agree: whether a template whose generation prompt no answer follows is an error.

    Raises:
        MisconfigurationException: it is one.
    """
    try:
        opening = answer_opening(render, ASKED)
    except HiddenAnswerError as error:
        if must_agree:
            raise MisconfigurationException(f"{error}. {_REMEDY}") from error
        return ""
    if opening:
        rank_zero_info(
            f"The chat template writes {opening!r} before an answer, which its generation prompt lacks: prompts get it "
            "too, and it is not learnt. Use the model with a prompt that ends with it; for Qwen3, template_arguments "
            '{"enable_thinking": false} says the same'
        )
    return opening


def read_template(path: str) -> str:
    """The chat template in a file."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise MisconfigurationException(
            f"chat_template={path!r} is neither a Jinja template nor a file that can be read: {error}"
        ) from error
