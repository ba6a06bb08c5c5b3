"""A model's chat template: how it renders messages, and where answers lie in the text."""

import re
from collections.abc import Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from recipes.language.conversation import THOUGHTS, Message, leads, thoughts_of, with_thoughts_apart, without_system

Span = tuple[int, int]
"""An answer with its end token in a text: its first character, and the one after its last."""

_ASKED: list[Message] = [{"role": "user", "content": "Why?"}]  # to try templates with
_MARK = "5d1probe5d1"  # a text that no template holds or changes
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_REMEDY = (
    'Set template_arguments to {"enable_thinking": true} if answers have thoughts, or to false if they have none; '
    "otherwise use single-turn data, or set chat_template to one whose answers follow its generation prompt or, "
    "without images, lie in {% generation %} blocks, such as trl's training templates"
)


class RefusedConversationError(MisconfigurationException):
    """A conversation that a chat template can't render, or an answer that can't be found in its text."""


class TemplateEncoder:
    """The base class of encoders of conversations.

    If a template takes no system message, the first question begins with it. An answer is what follows the template's
    generation prompt. Some templates write more before an answer without thoughts: that is added to prompts, or learnt
    if ``enable_thinking`` is true.

    Attributes:
        is_marked: whether a given template has {% generation %} blocks, which then mark the answers.
        opening: text that prompts have after the template's generation prompt; "" for most.
        answer_end: the template's end of an answer, if it is not the tokenizer's end token; else "".

    Args:
        renderer: a fast Hugging Face tokenizer, or a processor with one.
        chat_template: a Jinja template, or a file with one; None takes the model's own.
        system_prompt: a system message for conversations that have none; None leaves that to the template.
        template_arguments: variables of the template, such as ``{"enable_thinking": False}`` for Qwen3.

    Raises:
        MisconfigurationException: there is no chat template, or its answers do not follow its generation prompt.
    """

    def __init__(
        self,
        renderer: Any,
        chat_template: str | None,
        system_prompt: str | None = None,
        template_arguments: dict[str, Any] | None = None,
    ) -> None:
        self.renderer = renderer
        self.tokenizer = getattr(renderer, "tokenizer", renderer)
        if chat_template is not None:
            chat_template = read_template(chat_template)
        # A processor may leave the template to its tokenizer.
        self.template = chat_template or renderer.chat_template or self.tokenizer.chat_template
        if not isinstance(self.template, str):
            raise MisconfigurationException(
                f"the model {self.tokenizer.name_or_path!r} has no single chat template: set chat_template to a Jinja "
                "template or to a file with one, or take an instruction-tuned model"
            )
        self.is_marked = bool(chat_template and _GENERATION.search(chat_template))
        self.system_prompt = system_prompt
        self.arguments = template_arguments or {}
        answer = {"role": "assistant", "content": "So.", **dict.fromkeys(THOUGHTS, _MARK)}
        self._writes_thoughts = _MARK in self._render([*_ASKED, answer], False)
        self._takes_system = self._finds_system()
        self.opening, self.answer_end = self._around_answer()

    def _finds_system(self) -> bool:
        """Return whether the template writes a system message, rather than refusing it or leaving it out."""
        system = {"role": "system", "content": _MARK}
        asked, answered = [system, *_ASKED], [system, *_ASKED, {"role": "assistant", "content": "So."}]
        try:
            # Mistral v0.3's and Nemo's write it only into a last question, before an answer is given.
            return _MARK in self._render(asked, True) and _MARK in self._render(answered, False)
        except RefusedConversationError:
            return False

    def _around_answer(self) -> tuple[str, str]:
        prompt = self._render(_ASKED, True)
        text = self._render([*_ASKED, {"role": "assistant", "content": _MARK}], False)
        before, _, after = text.partition(_MARK)
        if not (self.is_marked or before.startswith(prompt)):
            raise MisconfigurationException(
                f"the chat template asks for an answer with {prompt[-40:]!r}, and writes {before[-40:]!r} before one. "
                f"{_REMEDY}"
            )
        # A leading space belongs to the answer, because it is often a part of its first token.
        opening = before[len(prompt) :] if before[len(prompt) :].strip() else ""
        if self.is_marked or self.arguments.get("enable_thinking"):
            opening = ""
        elif opening:
            rank_zero_info(
                f"The chat template writes {opening!r} before an answer without thoughts, but not in its generation "
                "prompt. It is not learnt, and added to prompts. Prompt the trained model in the same way; for Qwen3, "
                "enable_thinking=False adds it"
            )
        self._ends_with_nothing = not after.strip()
        end_token = self.tokenizer.eos_token
        return opening, "" if end_token and end_token in after else after.strip()

    def _for_template(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages with the system message and the thoughts where the template reads them."""
        messages = list(messages)
        # GPT-OSS's template knows "developer". Others leave such a message out, or write it as a role without meaning.
        if not re.search(r"""["']developer["']""", self.template):
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        if self.system_prompt is not None and not leads(messages):
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if self._writes_thoughts:
            messages = [with_thoughts_apart(message) for message in messages]
        return messages if self._takes_system else without_system(messages)

    def _render(self, messages: Sequence[Message], opens_answer: bool, tools: list[Any] | None = None) -> str:
        return str(self._applied(messages, tools, tokenize=False, add_generation_prompt=opens_answer))

    def _applied(self, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> Any:
        options |= self.arguments | ({"tools": tools} if tools else {})
        try:
            return self.renderer.apply_chat_template(self._in_form(messages), chat_template=self.template, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise RefusedConversationError(
                f"the model's chat template can't render a conversation: {type(error).__name__}: {error}. Fix the data "
                "(many templates need user and assistant to alternate), or set chat_template to another one"
            ) from error

    def _marked(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[list[int], list[bool]]:
        """Return a conversation's tokens, and for each whether it is learnt, by the template's {% generation %} blocks.

        Raises:
            RefusedConversationError: no token is marked, or only some answers are learnt but blocks are not answers.
        """
        made = self._applied(messages, tools, return_assistant_tokens_mask=True, return_dict=True)
        mask = [bool(is_marked) for is_marked in made["assistant_masks"]]
        learnt = [message.get("learnt", True) for message in messages if message["role"] == "assistant"]
        blocks = [list(block) for _, block in groupby(range(len(mask)), key=mask.__getitem__)]
        blocks = [block for block in blocks if mask[block[0]]]
        if not blocks or not (all(learnt) or len(blocks) == len(learnt)):
            raise RefusedConversationError(
                "the chat template's {% generation %} blocks mark no token, or answers with a weight of 0 can't be "
                f"left out, since {len(learnt)} answers have {len(blocks)} blocks"
            )
        if not all(learnt):
            for block, is_learnt in zip(blocks, learnt, strict=True):
                for index in block:
                    mask[index] = is_learnt
        return list(made["input_ids"]), mask

    def _in_form(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages in the form that the template takes."""
        return list(messages)

    def _prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        return self._render(messages, True, tools) + self.opening

    def _answers(
        self, messages: Sequence[Message], ends: bool = True, tools: list[Any] | None = None
    ) -> tuple[str, dict[int, Span]]:
        """Return a conversation's text, and each answer's place in it, by the answer's index among the messages.

        Args:
            messages: the messages, the answer last; answers whose ``learnt`` is False are left out.
            ends: append the end token if the template does not end the last answer, since a model trained on it would
                otherwise not learn to stop.
            tools: tools that the model may call.

        Raises:
            RefusedConversationError: an answer can't be found.
        """
        text = self._render(messages, False, tools)
        spans = {}
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("learnt", True):
                spans[index] = self._span(messages, index, text, tools)
        last = len(messages) - 1
        if ends and self._ends_with_nothing and last in spans:
            start, end = spans[last]
            text = text[:end].rstrip() + (self.tokenizer.eos_token or "")
            spans[last] = start, len(text)
        return text, spans

    def _span(self, messages: Sequence[Message], index: int, text: str, tools: list[Any] | None) -> Span:
        """Find an answer by what the template writes before and after a mark in its place."""
        context, answer, later = messages[:index], messages[index], messages[index + 1 :]
        # A tool call takes the place of a text.
        mark = {name: value for name, value in answer.items() if name != "tool_calls"} | {"content": _MARK}
        before, *after = self._render([*context, mark, *later], False, tools).split(_MARK)
        if len(after) != 1 or not text.endswith(after[0]):
            raise _hidden(answer, "the template rewrites it, leaves it out or repeats it")
        prompt = self._render(context, True, tools) if context else before
        if later and not before.startswith(prompt):
            prompt = before  # Qwen3.5 asks with an opened block of thoughts, which earlier answers lack
        if text.startswith(prompt + self.opening):
            prompt += self.opening
        elif not text.startswith(prompt) or (self.opening and not later and not answer.get("tool_calls")):
            raise _hidden(answer, f"it does not follow its prompt, which ends with {(prompt + self.opening)[-40:]!r}")
        ending = after[0]
        if later:  # the answer's end and the next message; the end also follows without that message
            ending = _shared(ending, self._render([*context, mark], False, tools).partition(_MARK)[2])
        end = len(text) - len(after[0]) + len(ending.rstrip())
        # Gemma 4's template writes tool results inside answers.
        if answer.get("tool_calls") and text[len(prompt) : end] not in self._render([*context, answer], False, tools):
            raise _hidden(answer, "the template writes tool results inside it")
        return len(prompt), end

    def _tokens(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Return a text's tokens, and for each whether it overlaps one of the spans."""
        # The template writes the special tokens, so the tokenizer must add none.
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = []
        for start, end in encoded["offset_mapping"]:
            # Tokens often begin with the space before an answer.
            mask.append(any(first < end and start < last for first, last in spans))
        return encoded["input_ids"], mask


def _shared(one: str, other: str) -> str:
    """Return the common beginning of two texts, in whole special tokens.

    Example:
        >>> _shared("<|end|><|user|>", "<|end|><|endoftext|>")
        '<|end|>'
    """
    length = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
    # "<|" begins the mark of the next message as well as the end token: half of a mark would stand for all of it.
    return other if length == len(other) else re.sub(r"[<\[][^<>\[\]]*$", "", one[:length])


def _hidden(answer: Message, problem: str) -> MisconfigurationException:
    # Another argument of the template saves answers with thoughts, so this is an error; others must not stop a run.
    kind = MisconfigurationException if thoughts_of(answer) else RefusedConversationError
    return kind(f"an answer can't be found in the chat template's text: {problem}. {_REMEDY}")


def read_template(given: str) -> str:
    """Return a chat template that is given itself or as a file."""
    if "{" in given:  # no template lacks a brace
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MisconfigurationException(
            f"chat_template={given!r} is neither a Jinja template nor a file that can be read: {error}"
        ) from error
