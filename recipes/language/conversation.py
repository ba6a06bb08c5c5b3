"""The messages of a conversation, and the thoughts of its answers."""

import re
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

THOUGHTS = ("reasoning_content", "thinking")
"""The fields in which chat templates look for an answer's thoughts: Qwen's name and GPT-OSS's."""
_BLOCK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # thoughts at the start of an answer


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


def leads(messages: Sequence[Message]) -> bool:
    """Return whether a conversation begins with a system message, under either of its names."""
    return bool(messages) and messages[0]["role"] in ("system", "developer")


def without_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the system message moved to the start of the first question.

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
