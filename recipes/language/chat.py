"""From messages to tokens through the model's own chat template, with labels only on the answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from recipes.language.conversation import Message, thoughts_of
from recipes.language.templates import RefusedConversationError, TemplateEncoder

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


class Encoded(NamedTuple):
    """Tokens of a conversation, and their labels: the token itself inside an answer, else -100.

    Attributes:
        input_ids: the tokens.
        labels: their labels.
        cut: whether tokens were cut off.
        leaves_out: whether the chat template leaves out an answer's thoughts, or the list of tools.
    """

    input_ids: list[int]
    labels: list[int]
    cut: bool
    leaves_out: bool = False


class ChatEncoder(TemplateEncoder):
    """Encode conversations with a chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        max_length: tokens kept of a conversation.
        chat_template: see :class:`TemplateEncoder`.
        settings: ``system_prompt`` and ``template_arguments``, see there.
    """

    def __init__(self, tokenizer: Any, max_length: int, chat_template: str | None = None, **settings: Any) -> None:
        super().__init__(tokenizer, chat_template, **settings)
        self.max_length = max_length

    def encode(self, messages: Sequence[Message], ends: bool = True, tools: list[Any] | None = None) -> Encoded:
        """Return tokens and labels of a conversation, cut at ``max_length`` tokens.

        Args:
            messages: the messages, the answer last. Answers whose ``learnt`` is False are read but not learnt.
            ends: append the end token if the template does not end the answer, for models that generate answers.
            tools: tools that the model may call, as JSON schemas.

        Raises:
            RefusedConversationError: the template can't render the conversation, or leaves out a tool call.
        """
        wanted = [thoughts_of(message) for message in messages if message["role"] == "assistant"]
        wanted += [tool["function"]["name"] for tool in tools or []]
        messages = self._for_template(messages)
        if self.is_marked:
            text = self._render(messages, False, tools)
            ids, mask = self._marked(messages, tools)
            spans = {index: (0, len(text)) for index, _ in enumerate(messages)}
        else:
            text, spans = self._answers(messages, ends, tools)
            ids, mask = self._tokens(text, list(spans.values()))
        for index, (start, end) in spans.items():
            _refuse_lost_calls(messages[index], text[start:end])
        labels = [token if is_answer else IGNORED for token, is_answer in zip(ids, mask, strict=True)]
        return Encoded(
            ids[: self.max_length],
            labels[: self.max_length],
            cut=len(ids) > self.max_length,
            leaves_out=any(part not in text for part in wanted),
        )

    def encode_prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Return tokens of messages without an answer, with the template's opening of one.

        Args:
            messages: the messages, the question last.
            tools: tools that the model may call.
        """
        return self._tokens(self._prompt(self._for_template(messages), tools), [])[0]


def _refuse_lost_calls(answer: Message, text: str) -> None:
    """Refuse an answer whose tool calls, or the text before them, are missing from the rendered text."""
    calls = [call["function"] for call in answer.get("tool_calls") or []]
    parts = [str(answer["content"]).strip()] if calls else []
    for call in calls:
        parts += [call["name"], *call["arguments"]]
    if any(part not in text for part in parts):
        raise RefusedConversationError(
            "the chat template leaves out tool calls, or what an answer says before them: set "
            "chat_template to one that writes them"
        )
