"""Conversations about an image, in the formats of data sets, as a question and what was said before it.

These are LLaVA's ``conversations`` (turns with "from" and "value"), the ``messages`` of LLaMA-Factory, trl and
transformers ("role" and "content", a text or a list of parts), and the ``texts`` of the_cauldron ("user" and
"assistant").
"""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.data.left_out import UnusableRowError

COLUMNS = ("conversations", "messages", "texts")
MARK = "<image>"
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def last_question(conversation: Any) -> dict[str, Any]:
    """Return a conversation as a question with its answer and what was said before.

    The mark of the image is removed: the chat template places the image before the first question.

    Args:
        conversation: turns in one of the forms.

    Returns:
        ``history`` (messages before the last question), ``question``, ``answers`` (one) and ``choices`` (none).

    Raises:
        UnusableRowError: the turns are not an alternating conversation of user and assistant, or are empty; there are
            several images, or an image in a turn after the first.
        MisconfigurationException: a turn is in none of the forms.

    Example:
        >>> turns = [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
        >>> last_question(turns)
        {'history': [], 'question': 'What is it?', 'answers': ['A cat.'], 'choices': []}
    """
    messages = []
    for turn in conversation or []:
        if turn is not None:
            messages += _messages(turn)
    spoken = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in spoken]
    texts = [message["content"].replace(MARK, "").strip() for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) or not all(texts):
        raise UnusableRowError(
            "needs an alternating conversation of human and gpt (or user and assistant), each turn with a text, that "
            f"ends with the latter, optionally after a system message; got {[message['role'] for message in messages]}"
        )
    marks = sum(message["content"].count(MARK) for message in messages)
    if marks > 1 or marks != spoken[0]["content"].count(MARK):
        raise UnusableRowError(f"may have {MARK} once, in the first turn of the user")
    for message, text in zip(messages, texts, strict=True):
        message["content"] = text
    *history, question, answer = messages
    return {"history": history, "question": question["content"], "answers": [answer["content"]], "choices": []}


def _messages(turn: Any) -> list[dict[str, str]]:
    """Return the messages of a turn: two in the_cauldron's form, else one."""
    fields = turn if isinstance(turn, dict) else {}
    speaker = str(fields.get("from") or fields.get("role"))
    said = {_ROLES.get(speaker): fields.get("value", fields.get("content"))}
    if {"user", "assistant"} <= fields.keys():
        said = {role: fields[role] for role in ("user", "assistant")}
    messages = []
    for role, content in said.items():
        parts = [_text(part) for part in (content if isinstance(content, list) else [content])]
        if role is None or None in parts:
            raise MisconfigurationException(
                f"must have turns with 'from' or 'role', one of {', '.join(_ROLES)}, and 'value' or 'content', a text "
                f"or a list of parts that are texts and images; got {turn!r}"
            )
        messages.append({"role": role, "content": "".join(map(str, parts))})
    return messages


def _text(part: Any) -> str | None:
    """Return the text of a part of a message, or the mark of an image; None if it is anything else."""
    if isinstance(part, dict):
        part = MARK if part.get("type") == "image" else part.get("text")
    return part if isinstance(part, str) else None
