"""A model's chat template: how it renders messages, what it does with a system message, and where it ends an answer."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from recipes.language.conversation import (
    THOUGHTS,
    HiddenAnswerError,
    Message,
    Render,
    answer_end,
    answer_opening,
    answer_spans,
    with_thoughts_apart,
)

ASKED: list[Message] = [{"role": "user", "content": "Why?"}]  # to try a template with
ANSWERED: list[Message] = [*ASKED, {"role": "assistant", "content": "So."}]
REMEDY = (
    "Set chat_template to one with {% generation %} blocks around the answers, or template_arguments so that both "
    "agree, or use single-turn data"
)
_PROBE = "5d1probe5d1"  # a text that no template holds
# What thinking templates call the variable that decides about thoughts.
_SWITCHES = ({"enable_thinking": False}, {"enable_thinking": True}, {"thinking": False}, {"thinking": True})


class RefusedConversationError(MisconfigurationException):
    """A conversation that a chat template can't render."""


class TemplateEncoder:
    """What encoders of conversations have in common.

    A template that takes no system message gets it at the head of the first question instead. What a template writes
    before an answer, and not in its generation prompt, is not learnt and stands in prompts too, except where
    ``enable_thinking`` is set to True: then a prompt leaves room for thoughts.

    Attributes:
        opening: what the template writes before an answer without thoughts and not in its generation prompt.
        leaves_room: whether the arguments ask for thoughts, for which prompts then leave room.
        answer_end: what the template ends an answer with, if it is not the tokenizer's end token; else "".
        writes_thoughts: whether it writes the thoughts that a message has beside its content.

    Args:
        renderer: a fast Hugging Face tokenizer, or a processor with one.
        chat_template: a Jinja template, or a file with one; None takes the model's own.
        system_prompt: a system message for conversations that have none; None leaves that to the template.
        template_arguments: variables of the template, such as ``{"enable_thinking": False}`` for Qwen3.
        reads_marks: whether a template that marks the answers itself, in {% generation %} blocks, is taken at its word.

    Raises:
        MisconfigurationException: there is no chat template or it can't be used, or the tokenizer does not give the
            places of its tokens in the text.
    """

    def __init__(
        self,
        renderer: Any,
        chat_template: str | None,
        system_prompt: str | None,
        template_arguments: dict[str, Any] | None,
        reads_marks: bool,
    ) -> None:
        self.renderer = renderer
        self.tokenizer = getattr(renderer, "tokenizer", renderer)
        name = self.tokenizer.name_or_path
        if chat_template is not None and "{" not in chat_template:  # a file name: no template lacks a brace
            chat_template = read_template(chat_template)
        # A processor may leave the template to its tokenizer.
        self.template = chat_template or renderer.chat_template or self.tokenizer.chat_template
        if not isinstance(self.template, str):
            raise MisconfigurationException(
                f"the model {name!r} has no single chat template: set chat_template to a Jinja template or to a file "
                "with one, or take an instruction-tuned model"
            )
        if not self.tokenizer.is_fast:
            raise MisconfigurationException(
                f"the tokenizer of {name!r} is not a fast one, so the answer's tokens can't be located: install "
                "`tokenizers` support for it or choose another model"
            )
        self.system_prompt = system_prompt
        self.arguments = template_arguments or {}
        self._marks_answers = reads_marks and re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        self._takes_system = takes_system(self._render)
        self.writes_thoughts = writes_thoughts(self._render)
        self.opening = self._find_opening()
        self.leaves_room = bool(self.arguments.get("enable_thinking"))
        self._opening = "" if self.leaves_room else self.opening
        self.answer_end = answer_end(self._render, ASKED, self.tokenizer.eos_token)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        messages = list(messages)
        # GPT-OSS's template knows "developer". Others leave such a message out, or write it as a role without meaning.
        if not re.search(r"""["']developer["']""", self.template):
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        if self.system_prompt is not None and not leads(messages):
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        of_thoughts = with_thoughts_apart if self.writes_thoughts else without_thoughts
        messages = [of_thoughts(message) for message in messages]
        return messages if self._takes_system else without_system(messages)

    def _find_opening(self) -> str:
        """What prompts need beyond the generation prompt.

        Raises:
            MisconfigurationException: no answer follows the generation prompt, and the answers are not marked.
        """
        try:
            opening = answer_opening(self._render, ASKED)
        except HiddenAnswerError as error:
            if not self._marks_answers:
                raise MisconfigurationException(f"{error}. {REMEDY}{self._agreeing_arguments(ANSWERED)}") from error
            rank_zero_warn(
                f"{error}. The template's own marks say what is learnt; but what the model is asked with in evaluation "
                "and prediction is not what answers follow in training"
            )
            return ""
        if opening:
            rank_zero_info(
                f"The chat template writes {opening!r} before an answer without thoughts, which its generation prompt "
                "lacks. It is not learnt, and prompts for such answers get it too. Ask the trained model for them in "
                "the same way; for Qwen3, enable_thinking=False adds it"
            )
        return opening

    def _agreeing_arguments(self, messages: Sequence[Message]) -> str:
        """The usual arguments of thinking templates that would help with a conversation, as a part of a message."""
        helpful = []
        for switch in _SWITCHES:
            try:
                with self._given(switch):
                    answer_opening(self._render, ASKED)
                    answer_spans(self._render, messages, self.tokenizer.eos_token)
            except (HiddenAnswerError, RefusedConversationError):
                continue
            helpful.append(json.dumps(switch))
        return f". Here template_arguments {' or '.join(helpful)} would do" if helpful else ""

    @contextmanager
    def _given(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Render with more arguments of the template."""
        given, self.arguments = self.arguments, self.arguments | arguments
        try:
            yield
        finally:
            self.arguments = given

    def _render(self, messages: Sequence[Message], opens_answer: bool) -> str:
        with template_errors():
            return str(
                self.renderer.apply_chat_template(
                    self._in_form(messages),
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=opens_answer,
                    **self.arguments,
                )
            )

    def _in_form(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the form that the template takes."""
        return list(messages)


@contextmanager
def template_errors() -> Iterator[None]:
    """Turn what a template objects to into a message, in place of a traceback through Jinja."""
    try:
        yield
    except (TemplateError, TypeError, ValueError) as error:
        raise RefusedConversationError(
            f"the model's chat template can't render a conversation: {type(error).__name__}: {error}. Mend the data "
            "(many templates want user and assistant alternately), or set chat_template to another one"
        ) from error


def takes_system(render: Render) -> bool:
    """Whether a template writes a system message, before an answer and with one, rather than refuse or leave it out."""
    render(ASKED, True)  # so that other problems of the template are not taken for a refusal
    system = {"role": "system", "content": _PROBE}
    try:
        # Gemma's template raises an error, others leave the message out without a word, and Mistral v0.3's and Nemo's
        # write it into a last question alone, which no question with an answer is.
        return _PROBE in render([system, *ASKED], True) and _PROBE in render([system, *ANSWERED], False)
    except MisconfigurationException:
        return False


def leads(messages: Sequence[Message]) -> bool:
    """Whether a conversation begins with a system message, by either of its names."""
    return bool(messages) and messages[0]["role"] in ("system", "developer")


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


def writes_thoughts(render: Render) -> bool:
    """Whether a template writes the thoughts of a last answer, from either of the fields that they may be in."""
    answer = {"role": "assistant", "content": "So.", **dict.fromkeys(THOUGHTS, _PROBE)}
    return _PROBE in render([*ASKED, answer], False)


def without_thoughts(message: Message) -> Message:
    """A message without the fields of thoughts.

    Example:
        >>> without_thoughts({"role": "assistant", "content": "So.", "thinking": "Hm."})
        {'role': 'assistant', 'content': 'So.'}
    """
    return {name: value for name, value in message.items() if name not in THOUGHTS}


def read_template(path: str) -> str:
    """The chat template in a file."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfigurationException(
            f"chat_template={path!r} is neither a Jinja template nor a file that can be read: {error}"
        ) from error
