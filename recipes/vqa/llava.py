"""Conversations about an image in LLaVA's form: turns of "human" and "gpt", with ``<image>`` where the image stands."""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

MARK = "<image>"
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def last_question(conversation: Any, where: str) -> dict[str, Any]:
    """A conversation as a question with its answer and what was said before.

    The mark of the image is taken off: the chat template places the image before the first question.

    Args:
        conversation: turns with ``from`` and ``value``.
        where: it stands in the data, for messages.

    Returns:
        ``history`` (messages before the last question), ``question``, ``answers`` (one) and ``choices`` (none).

    Raises:
        MisconfigurationException: turns that are not a conversation of human and gpt by turns, an empty one, several
            images, or an image in another turn than the first.

    Example:
        >>> turns = [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
        >>> last_question(turns, "row 0")
        {'history': [], 'question': 'What is it?', 'answers': ['A cat.'], 'choices': []}
    """
    turns = [turn for turn in conversation or [] if turn is not None]
    messages = [_message(turn, f"{where}, turn {place}") for place, turn in enumerate(turns)]
    spoken = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in spoken]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise MisconfigurationException(
            f"{where}: a conversation is human and gpt by turns and ends with gpt, perhaps after a system message; "
            f"got {[message['role'] for message in messages]}"
        )
    _check_marks(messages, where)
    for message in messages:
        message["content"] = message["content"].replace(MARK, "").strip()
        if not message["content"]:
            raise MisconfigurationException(f"{where} has a turn without a text")
    *history, question, answer = messages
    return {"history": history, "question": question["content"], "answers": [answer["content"]], "choices": []}


def _message(turn: Any, where: str) -> dict[str, str]:
    role, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if role not in _ROLES or not isinstance(value, str):
        raise MisconfigurationException(
            f"{where} must have a text as 'value', and as 'from' one of {', '.join(_ROLES)}; got {turn!r}"
        )
    return {"role": _ROLES[role], "content": value}


def _check_marks(messages: list[dict[str, str]], where: str) -> None:
    marks = [message["content"].count(MARK) for message in messages]
    first = [message["role"] for message in messages].index("user")
    if sum(marks) > 1:
        raise MisconfigurationException(f"{where} has {sum(marks)} {MARK} marks, and one image is possible")
    if sum(marks) != marks[first]:
        raise MisconfigurationException(f"{where}: {MARK} must stand in the first turn of the human")
