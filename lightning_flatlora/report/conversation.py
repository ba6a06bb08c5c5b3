"""Where the answers of a conversation lie in the text that a chat template makes of it."""

from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""Messages as text, if asked for with the template's generation prompt, which opens an answer."""
Span = tuple[int, int]

_MARK = "5d1answer5d1"  # a text that no template changes, and that no template holds


class HiddenAnswerError(ValueError):
    """An answer that can't be located."""


def answer_opening(render: Render, context: Sequence[Message]) -> str:
    """What a template writes before an answer and not at the end of its generation prompt: "" for most.

    Qwen3's writes an empty block of thoughts before a last answer, which its generation prompt lacks unless
    ``enable_thinking`` is false. It is no part of the answer: who asks for one has to add it to the prompt.

    Args:
        render: of the template.
        context: messages that an answer may follow.

    Raises:
        HiddenAnswerError: the generation prompt is not what an answer follows.
    """
    before = render([*context, {"role": "assistant", "content": _MARK}], False).partition(_MARK)[0]
    prompt = render(context, True)
    if not before.startswith(prompt):
        raise HiddenAnswerError(_hidden(len(context), _other_opening(prompt, before)))
    opening = before[len(prompt) :]
    return opening if opening.strip() else ""  # a space is learnt: often it is the first token's own


def answer_end(render: Render, context: Sequence[Message], end_token: str | None) -> str:
    """What a template ends an answer with, if it is not the tokenizer's end token: "" for most.

    Args:
        render: of the template.
        context: messages that an answer may follow.
        end_token: the tokenizer's.
    """
    after = render([*context, {"role": "assistant", "content": _MARK}], False).partition(_MARK)[2]
    return "" if end_token and end_token in after else after.strip()


def answer_spans(
    render: Render, messages: Sequence[Message], end_token: str | None, ends: bool = True
) -> tuple[str, list[Span]]:
    """A conversation's text, and where in it each of the assistant's answers lies, with its end token.

    What the template writes before an answer belongs to the prompt, and what it writes after an answer's end to the
    next message.

    Args:
        render: of the template.
        messages: with ``role`` and ``content``.
        end_token: the tokenizer's.
        ends: give the end token to a last answer that the template ends with nothing: else nobody would learn to stop.

    Returns:
        The text, and for each answer the numbers of its first character and of the one after its last.

    Raises:
        HiddenAnswerError: a template that leaves an answer out, or opens the last one otherwise than it asks for one.
    """
    text = render(messages, False)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            text, span = _answer(render, messages, place, text, end_token, ends)
            spans.append(span)
    return text, spans


def _answer(
    render: Render, messages: Sequence[Message], place: int, text: str, end_token: str | None, ends: bool
) -> tuple[str, Span]:
    """One answer's place, by what stands there when a mark takes its place; and the text, perhaps with an end token."""
    context, later = messages[:place], messages[place + 1 :]
    mark = {**messages[place], "content": _MARK}
    marked = render([*context, mark, *later], False)
    if marked.count(_MARK) != 1:
        raise HiddenAnswerError(_hidden(place, "it leaves that one out, or repeats it"))
    before, after = marked.split(_MARK)
    prompt = render(context, True) if context else ""
    if not before.startswith(prompt):
        if not later:
            raise HiddenAnswerError(_hidden(place, _other_opening(prompt, before)))
        prompt = before
    opens = before[len(prompt) :]
    # A template may take an answer apart, as Qwen3's does with thoughts in it: then all after the prompt is learnt.
    start = len(before) if opens.strip() and text.startswith(before) else len(prompt)
    end = len(text) - len(after)
    own = _shared(after, render([*context, mark], False).partition(_MARK)[2]) if later else after
    if end_token and end_token in own:
        return text, (start, end + own.index(end_token) + len(end_token))
    if ends and end_token and not later and not own.strip():
        text = text[:end].rstrip() + end_token
        return text, (start, len(text))
    return text, (start, end + len(own.rstrip()))


def _shared(one: str, other: str) -> str:
    """The beginning that two texts share."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _other_opening(prompt: str, before: str) -> str:
    return f"it asks for an answer with {prompt[-40:]!r}, and writes {before[-40:]!r} before one"


def _hidden(place: int, problem: str) -> str:
    return (
        "the chat template rewrites earlier messages, or opens an answer otherwise than it writes one, so answer "
        f"{place} can't be located: {problem}"
    )
