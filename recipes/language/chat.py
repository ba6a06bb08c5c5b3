"""From messages to tokens through the model's own chat template, with labels on the answers alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.language.conversation import HiddenAnswerError, Message, answer_spans, thoughts_of
from recipes.language.templates import ASKED, REMEDY, RefusedConversationError, TemplateEncoder, template_errors

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


class Encoded(NamedTuple):
    """Tokens of a conversation, and their labels: the token itself inside an answer, else -100."""

    input_ids: list[int]
    labels: list[int]
    cut: bool


class EncodedChat(Encoded):
    """What a chat template has made of a conversation.

    Attributes:
        thinks: whether an answer is learnt with the thoughts that the template's opening would leave no room for.
        leaves_thoughts: whether the template leaves an answer's thoughts out.
    """

    thinks = False
    leaves_thoughts = False


class ChatEncoder(TemplateEncoder):
    """Encode conversations with a chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        max_length: tokens kept of a conversation.
        chat_template: see :class:`TemplateEncoder`.
        system_prompt: see there.
        template_arguments: see there.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        template_arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template, system_prompt, template_arguments, reads_marks=True)
        self.max_length = max_length
        self._takes: dict[int, bool] = {}

    def encode(self, messages: Sequence[Message], ends: bool = True, tools: list[Any] | None = None) -> EncodedChat:
        """Tokens and labels of a conversation, cut at ``max_length`` tokens.

        Args:
            messages: the answer last. Answers whose ``learnt`` is False are read and not learnt.
            ends: give the end token to an answer that the template ends with nothing, for who generates some.
            tools: that the model may call, as JSON schemas.

        Raises:
            RefusedConversationError: the template can't render the conversation, or leaves out what is about tools.
        """
        calls = max((len(message.get("tool_calls") or []) for message in messages), default=0)
        if (calls or any(message["role"] == "tool" for message in messages)) and not self.takes_calls(min(calls, 2)):
            raise RefusedConversationError(
                f"the chat template does not write {'several calls of tools' if calls > 1 else 'tools, their calls'} "
                "and results: set chat_template to one that does"
            )
        with self._given({"tools": tools} if tools and self.takes_calls(1) else {}):
            return self._encoded(messages, ends)

    def _encoded(self, messages: Sequence[Message], ends: bool) -> EncodedChat:
        thoughts = [thoughts_of(message) for message in messages if message["role"] == "assistant"]
        messages = self._with_system(messages)
        ids, mask = self._tokens(messages, ends)
        labels = [token if is_answer else IGNORED for token, is_answer in zip(ids, mask, strict=True)]
        spoken = [str(message["content"] or "").strip() for message in messages if message.get("tool_calls")]
        text = self._render(messages, False) if any(thoughts) or any(spoken) else ""
        if any(said not in text for said in spoken):
            raise RefusedConversationError("the chat template leaves out what an answer says before it calls a tool")
        encoded = EncodedChat(ids[: self.max_length], labels[: self.max_length], len(ids) > self.max_length)
        encoded.thinks = self._thinks(ids, mask, messages)
        encoded.leaves_thoughts = any(thought not in text for thought in thoughts)
        return encoded

    def takes_calls(self, count: int) -> bool:
        """Return whether the template writes tools, that many calls in an answer and results, and learns only calls."""
        if count not in self._takes:
            self._takes[count] = self._writes_calls(max(count, 1))
        return self._takes[count]

    def _writes_calls(self, count: int) -> bool:
        argument, description = "5d1probe0d1", "5d1probe1d1"
        calls, tools, returned, learns, reads = [], [], [], [argument], [description]
        for number in range(count):
            name, value, result, identity = (f"5d1{what}{number}d1" for what in ("call", "value", "result", "id"))
            function = {"name": name, "arguments": {argument: value}}
            calls.append({"type": "function", "id": identity, "function": function})
            about = {"name": name, "description": description, "parameters": {"type": "object", "properties": {}}}
            tools.append({"type": "function", "function": about})
            returned.append({"role": "tool", "name": name, "tool_call_id": identity, "content": result})
            learns += [name, value]
            reads.append(result)
        answer = {"role": "assistant", "content": "", "tool_calls": calls}
        try:
            with self._given({"tools": tools}):
                ids, mask = self._tokens([*ASKED, answer, *returned, {"role": "assistant", "content": "So."}], True)
        except MisconfigurationException:
            return False
        read = self.tokenizer.decode(ids)
        learnt = self.tokenizer.decode([token for token, is_answer in zip(ids, mask, strict=True) if is_answer])
        has_all = all(part in learnt for part in learns) and all(part in read for part in reads)
        return has_all and not any(result in learnt for result in reads[1:])

    def _tokens(self, messages: list[Message], ends: bool) -> tuple[list[int], list[bool]]:
        """The tokens of a conversation, and which of them are learnt."""
        return self._marked(messages) if self._marks_answers else self._located(messages, ends)

    def encode_prompt(
        self, messages: Sequence[Message], thinks: bool = False, tools: list[Any] | None = None
    ) -> list[int]:
        """Tokens of messages without an answer, with the template's opening of one.

        Args:
            messages: the question last.
            thinks: leave room for thoughts.
            tools: that the model may call.
        """
        with self._given({"tools": tools} if tools and self.takes_calls(1) else {}):
            return self._prompt(self._with_system(messages), thinks)

    def _prompt(self, messages: Sequence[Message], thinks: bool = False) -> list[int]:
        # The template writes special tokens itself, so that the tokenizer must add none. An opening that leaves no room
        # for thoughts is not what an answer with thoughts follows.
        text = self._render(messages, True) + ("" if thinks else self._opening)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _thinks(self, ids: list[int], mask: list[bool], messages: list[Message]) -> bool:
        """Whether an answer is learnt right after the generation prompt, without the template's opening."""
        for place, message in enumerate(messages):
            # Of answers without thoughts the last one speaks for all.
            if self.opening and message["role"] == "assistant" and (thoughts_of(message) or message is messages[-1]):
                prompt = self._prompt(messages[:place], thinks=True)
                if ids[: len(prompt)] == prompt and True in mask[len(prompt) : len(prompt) + 1]:
                    return True
        return False

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
        forget_answers(mask, [m.get("learnt", True) for m in messages if m["role"] == "assistant"])
        for place, message in enumerate(messages):
            if message["role"] == "assistant" and place:
                self._forget_opening(ids, mask, messages[:place])
        if not any(mask):
            raise MisconfigurationException(
                "the chat template's {% generation %} blocks hold no token of a conversation's answers: set "
                "chat_template to another one. Templates of vision-language models may want contents as lists"
            )
        return ids, mask

    def _forget_opening(self, ids: list[int], mask: list[bool], context: list[Message]) -> None:
        """Take the marks off what opens the answer after a context: prompts hold it, and the model need not write it.

        Some templates mark the opening of an answer too.
        """
        for thinks in (False, True):
            prompt = self._prompt(context, thinks)
            if ids[: len(prompt)] == prompt:
                forget_opening(mask, len(prompt))
                return

    def _located(self, messages: list[Message], ends: bool) -> tuple[list[int], list[bool]]:
        try:
            text, spans = answer_spans(self._render, messages, self.tokenizer.eos_token, ends)
        except HiddenAnswerError as error:
            helpful = self._agreeing_arguments(messages)
            # With other arguments no conversation is lost. Without any, one must not stop a run.
            kind = MisconfigurationException if helpful else RefusedConversationError
            raise kind(f"{error}. {REMEDY}{helpful}") from error
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = []
        for start, end in encoded["offset_mapping"]:
            # A token counts if a part of it is in an answer, such as one that begins with the space before.
            mask.append(any(first < end and start < last for first, last in spans))
        return encoded["input_ids"], mask


def forget_answers(mask: list[bool], learnt: Sequence[bool]) -> None:
    """Take the marks off the answers that are not learnt, in place.

    Args:
        mask: a mark for each token of an answer.
        learnt: for each answer, whether it is learnt.

    Raises:
        MisconfigurationException: the template has not marked each answer by itself.

    Example:
        >>> mask = [False, True, True, False, True]
        >>> forget_answers(mask, [False, True])
        >>> mask
        [False, False, False, False, True]
    """
    if all(learnt):
        return
    starts = [place for place, mark in enumerate(mask) if mark and not (place and mask[place - 1])]
    if len(starts) != len(learnt):
        raise MisconfigurationException(
            f"the chat template marks {len(starts)} answers of {len(learnt)} by itself, so those that are not to be "
            "learnt can't be told from the others: set chat_template to one without {% generation %} blocks"
        )
    for place, is_learnt in zip(starts, learnt, strict=True):
        while not is_learnt and place < len(mask) and mask[place]:
            mask[place] = False
            place += 1


def forget_opening(mask: list[bool], prompt: int) -> None:
    """Take the marks off the opening of an answer, in place.

    Args:
        mask: a mark for each token of an answer.
        prompt: tokens of the prompt for that answer, its opening included.

    Example:
        >>> mask = [True, False, True, True, True, False]
        >>> forget_opening(mask, 4)
        >>> mask
        [True, False, False, False, True, False]
    """
    place = prompt - 1
    while place >= 0 and mask[place]:
        mask[place] = False
        place -= 1
