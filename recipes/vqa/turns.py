"""Conversations about an image, in the forms that data sets have them, as a question and what was said before it.

There are LLaVA's ``conversations`` (turns with "from" and "value"), the ``messages`` of LLaMA-Factory, trl and
transformers ("role" and "content", a text or a list of parts), and the ``texts`` of the_cauldron ("user" and
"assistant").
"""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.shared.left_out import UnusableRowError

COLUMNS = ("conversations", "messages", "texts")
MARK = "<image>"
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def last_question(conversation: Any, has_image: bool, where: str) -> dict[str, Any]:
    """A conversation as a question with its answer and what was said before.

    The mark of the image is taken off: the chat template places the image before the first question.

    Args:
        conversation: turns in one of the forms.
        has_image: whether an image belongs to it.
        where: it stands in the data, for messages.

    Returns:
        ``history`` (messages before the last question), ``question``, ``answers`` (one) and ``choices`` (none).

    Raises:
        UnusableRowError: turns that are not a conversation of user and assistant by turns, an empty one, several
            images, or an image in another turn than the first.
        MisconfigurationException: a turn is in none of the forms.

    Example:
        >>> turns = [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
        >>> last_question(turns, True, "row 0")
        {'history': [], 'question': 'What is it?', 'answers': ['A cat.'], 'choices': []}
    """
    messages = []
    for number, turn in enumerate(conversation or []):
        if turn is not None:
            messages += _messages(turn, f"{where}, turn {number}")
    spoken = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in spoken]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UnusableRowError(
            f"{where}: a conversation is human and gpt (or user and assistant) by turns and ends with the latter, "
            f"perhaps after a system message; got {[message['role'] for message in messages]}"
        )
    _check_marks(messages, has_image, where)
    for message in messages:
        message["content"] = message["content"].replace(MARK, "").strip()
        if not message["content"]:
            raise UnusableRowError(f"{where} has a turn without a text")
    *history, question, answer = messages
    return {"history": history, "question": question["content"], "answers": [answer["content"]], "choices": []}


def _messages(turn: Any, where: str) -> list[dict[str, str]]:
    """The messages of a turn: two in the_cauldron's form, else one."""
    fields = turn if isinstance(turn, dict) else {}
    speaker = str(fields.get("from") or fields.get("role"))
    said = [(_ROLES.get(speaker), fields.get("value", fields.get("content")))]
    if {"user", "assistant"} <= fields.keys():
        said = [("user", fields["user"]), ("assistant", fields["assistant"])]
    messages = []
    for role, content in said:
        text = _text(content)
        if role is None or text is None:
            raise MisconfigurationException(
                f"{where} must have 'from' or 'role', one of {', '.join(_ROLES)}, and 'value' or 'content', a text or "
                f"a list of parts that are texts and images; got {turn!r}"
            )
        messages.append({"role": role, "content": text})
    return messages


def _text(content: Any) -> str | None:
    """A message's text, with the mark where a part is an image; None if it is anything else."""
    if isinstance(content, str):
        return content
    text = ""
    for part in content if isinstance(content, list) else [None]:
        fields = part if isinstance(part, dict) else {}
        if fields.get("type") == "image":
            text += MARK
        elif fields.get("type") == "text" and isinstance(fields.get("text"), str):
            text += fields["text"]
        else:
            return None
    return text


def _check_marks(messages: list[dict[str, str]], has_image: bool, where: str) -> None:
    marks = [message["content"].count(MARK) for message in messages]
    first = [message["role"] for message in messages].index("user")
    if sum(marks) > 1:
        raise UnusableRowError(f"{where} has {sum(marks)} {MARK} marks, and one image is possible")
    if sum(marks) != marks[first]:
        raise UnusableRowError(f"{where}: {MARK} must stand in the first turn of the user")
    if sum(marks) and not has_image:
        raise UnusableRowError(f"{where} has the mark {MARK}, and no image")
