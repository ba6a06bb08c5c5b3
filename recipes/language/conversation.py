"""Where the answers of a conversation lie in the text that a chat template makes of it."""

import re
from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""Messages as text; where the second argument is True, with the template's generation prompt, which opens an answer."""
Span = tuple[int, int]

THOUGHTS = ("reasoning_content", "thinking")
"""The fields of a message in which chat templates look for the thoughts before an answer: Qwen's name and GPT-OSS's."""
_BLOCK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # of thoughts, at the head of an answer
# A text that no template changes, and that no template holds.
_MARK = "5d1answer5d1"


def thoughts_of(message: Message) -> str:
    """Return the thoughts of an answer, from a field or from a block in its content; "" if there are none.

    Example:
        >>> thoughts_of({"role": "assistant", "content": "<think>\\nHm.\\n</think>\\n\\nSo."})
        'Hm.'
    """
    block = _BLOCK.match(str(message["content"]))
    given = next((message[name] for name in THOUGHTS if message.get(name)), block.group(1) if block else "")
    return str(given).strip()


def with_thoughts_apart(message: Message) -> Message:
    """Move a block of thoughts from an answer's content into the fields that templates read.

    Example:
        >>> with_thoughts_apart({"role": "assistant", "content": "<think>Hm.</think>So."})
        {'role': 'assistant', 'content': 'So.', 'reasoning_content': 'Hm.', 'thinking': 'Hm.'}
    """
    block = _BLOCK.match(str(message["content"])) if message["role"] == "assistant" else None
    if block is None:
        return message
    thoughts = thoughts_of(message)
    fields = dict.fromkeys(THOUGHTS, thoughts) if thoughts else {}
    return {**message, "content": message["content"][block.end() :], **fields}


class HiddenAnswerError(ValueError):
    """An answer that can't be located."""


def answer_opening(render: Render, context: Sequence[Message]) -> str:
    """What a template writes before an answer and not at the end of its generation prompt: "" for most.

    Qwen3's writes an empty block of thoughts before a last answer, which its generation prompt lacks unless
    ``enable_thinking`` is false. It is no part of the answer: whoever requests an answer must add it to the prompt.

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
    # A space belongs to the answer, because it often is a part of the answer's first token.
    return opening if opening.strip() else ""


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
        messages: with ``role`` and ``content``; answers whose ``learnt`` is False are left out.
        end_token: the tokenizer's.
        ends: give the end token to a last answer that the template does not end, since a model trained on it would
            otherwise not learn to stop.

    Returns:
        The text, and for each answer the numbers of its first character and of the one after its last.

    Raises:
        HiddenAnswerError: the template leaves an answer out, or its generation prompt differs from how it opens one, as
            where that prompt says that there are no thoughts and the answer has some.
    """
    text = render(messages, False)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("learnt", True):
            text, span = _answer(render, messages, place, text, end_token, ends)
            spans.append(span)
    return text, spans


def _answer(
    render: Render, messages: Sequence[Message], place: int, text: str, end_token: str | None, ends: bool
) -> tuple[str, Span]:
    """One answer's place, by what stands there when a mark takes its place; and the text, perhaps with an end token."""
    context, later = messages[:place], messages[place + 1 :]
    # A call of tools takes the place of a text.
    mark = {name: value for name, value in messages[place].items() if name != "tool_calls"} | {"content": _MARK}
    marked = render([*context, mark, *later], False)
    if marked.count(_MARK) != 1:
        raise HiddenAnswerError(_hidden(place, "it leaves that one out, or repeats it"))
    # What lies around the mark is what the template writes around the answer.
    before, after = marked.split(_MARK)
    prompt = render(context, True) if context else ""
    if not before.startswith(prompt):
        if not later:
            raise HiddenAnswerError(_hidden(place, _other_opening(prompt, before)))
        prompt = before
    opens = before[len(prompt) :]
    # What a template writes before an answer is the prompt's, unless it holds the message's thoughts. A template may
    # also take the answer apart, as Qwen3's does with thoughts in it. Then, too, all after the prompt is the answer.
    is_opening = opens.strip() and text.startswith(before) and not _holds_thoughts(opens, messages[place])
    beginning = before if is_opening else prompt
    if not text.startswith(beginning):
        # The text has thoughts where the prompt has closed their block: labels would begin amid the thoughts.
        raise HiddenAnswerError(
            _hidden(place, f"it may have thoughts, and the prompt for it ends with {prompt[-40:]!r}")
        )
    start = len(beginning)
    end = len(text) - len(after)
    # What follows is the answer's end and the next message. The end is what also follows without that message.
    ending = _shared(after, render([*context, mark], False).partition(_MARK)[2]) if later else after
    if end_token and end_token in ending:
        return text, (start, end + ending.index(end_token) + len(end_token))
    if ends and end_token and not later and not ending.strip():
        text = text[:end].rstrip() + end_token
        return text, (start, len(text))
    return text, (start, end + len(ending.rstrip()))


def _holds_thoughts(opens: str, message: Message) -> bool:
    """Whether the text before an answer holds the thoughts that come with it."""
    thoughts = thoughts_of(message)
    return bool(thoughts) and thoughts in opens


def _shared(one: str, other: str) -> str:
    """The beginning that two texts share, in whole special tokens.

    Args:
        one: what follows an answer where another message comes next.
        other: what follows it at the end of a conversation.

    Example:
        >>> _shared("<|end|><|user|>", "<|end|><|endoftext|>")
        '<|end|>'
        >>> _shared("<|end|><|user|>", "<|return|>")
        '<|end|>'
    """
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    if length == len(other):
        return other
    # "<|" begins the mark of the next message as well as the end token: half of a mark would stand for all of it.
    shared = re.sub(r"[<\[][^<>\[\]]*$", "", one[:length])
    if shared.strip():
        return shared
    # The end token of an earlier answer is another one than the last answer's, as with GPT-OSS.
    first = re.match(r"\s*[<\[][^<>\[\]]*[>\]]", one) if other.strip() else None
    return first.group() if first else shared


def _other_opening(prompt: str, before: str) -> str:
    return f"it asks for an answer with {prompt[-40:]!r}, and writes {before[-40:]!r} before one"


def _hidden(place: int, problem: str) -> str:
    return (
        "the chat template rewrites earlier messages, or opens an answer otherwise than it writes one, so answer "
        f"{place} can't be located: {problem}"
    )
