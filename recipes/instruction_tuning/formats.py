"""The formats of conversations, each turned into rows of one format.

A row has ``messages`` (see :func:`turn`; the last one is an answer to learn), ``options`` (texts to choose the answer
from; empty for free answers), ``tools`` (tools that may be called, as JSON; usually empty), ``key`` (rows of equal keys
are always in the same part) and ``problem`` (why a row can't be used; usually empty).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.data.text_metrics import normalized
from recipes.language.conversation import leads

Row = dict[str, Any]
Message = dict[str, Any]
_TEXT = datasets.Value("string")
_MESSAGE = {"role": _TEXT, "content": _TEXT, "thoughts": _TEXT, "learnt": datasets.Value("bool"), "more": _TEXT}
FEATURES = datasets.Features(
    {"messages": [_MESSAGE], "options": [_TEXT], "tools": _TEXT, "key": _TEXT, "problem": _TEXT}
)
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
}
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # their names in Qwen, GPT-OSS and others
_LISTS = ("messages", "conversations")  # columns of whole conversations
_SYSTEM = ("system", "system_prompt")
_LEAVE_OUT = "Columns that --data.columns does not name are left out"


class Pair(NamedTuple):
    """Columns of a question and its answer.

    Attributes:
        question: column of the question.
        answers: columns of which the first that exists holds the answer.
        more: columns that may be missing or empty, and otherwise follow the question after an empty line.
    """

    question: str
    answers: tuple[str, ...]
    more: tuple[str, ...] = ()


PAIRS = (
    Pair("instruction", ("output", "response", "answer"), ("input", "context")),  # Alpaca, Dolly
    Pair("prompt", ("completion", "response")),  # trl; texts, or lists of messages
    Pair("query", ("response", "answer"), ("context",)),  # MetaMath
    Pair("question", ("answer", "response"), ("context",)),  # GSM8K; OpenOrca, with system_prompt
    Pair("input", ("output",)),
)


def turn(role: str, content: str, thoughts: str | None = None, learnt: bool = True, more: str = "") -> Message:
    """Return a message.

    Args:
        role: "system", "developer", "user", "assistant" or "tool".
        content: the text.
        thoughts: an answer's thoughts, which a thinking model writes before it.
        learnt: whether an answer is trained on.
        more: further fields that templates read, as JSON: an answer's ``tool_calls``, or the call that gave this
            result.
    """
    return {"role": role, "content": content, "thoughts": thoughts, "learnt": learnt, "more": more}


def conversation(question: str, answer: str, options: Sequence[str], key: str) -> Row:
    """Return a row of one question and its answer."""
    return _row([turn("user", question), turn("assistant", answer)], key, options)


def _row(messages: list[Message], key: str, options: Sequence[str] = (), problem: str = "") -> Row:
    return {"messages": messages, "options": list(options), "tools": "", "key": normalized(key), "problem": problem}


def converter(columns: Sequence[str], source: str) -> Callable[[Row], Row]:
    """Return a function that turns rows with these columns into rows of :data:`FEATURES`.

    Args:
        columns: columns of the table.
        source: source of the table, for messages.

    Raises:
        MisconfigurationException: the columns fit no known format.
    """
    found = _understood(columns)
    if found is not None:
        return partial(_converted, found=found)
    pairs = []
    for pair in PAIRS:
        pairs += [f"{pair.question!r} and {answer!r}" for answer in pair.answers]
    raise MisconfigurationException(
        f"{source} has the columns {sorted(columns)}. Known are 'messages' (a list of role and content), "
        f"'conversations' (a list of from and value), or {', '.join(pairs)}. Give other names in columns, for example "
        "--data.columns '{problem: question, solution: answer}'"
    )


def read_columns(columns: Sequence[str]) -> list[str]:
    """Return the columns that their :func:`converter` reads.

    Example:
        >>> read_columns(["id", "context", "question", "answer"])
        ['question', 'answer', 'context']
    """
    found = _understood(columns)
    wanted = [found.question, found.answers[0], *found.more] if isinstance(found, Pair) else [found]
    return [column for column in (*wanted, *_SYSTEM, "tools") if column in columns]


def _understood(columns: Sequence[str]) -> str | Pair | None:
    """Return the column of conversations, or the columns of a question and its answer."""
    for column in _LISTS:
        if column in columns:
            return column
    for pair in PAIRS:
        answers = [answer for answer in pair.answers if answer in columns]
        if pair.question in columns and answers:
            return pair._replace(answers=(answers[0],))
    return None


def _converted(row: Row, found: str | Pair) -> Row:
    # One unusable row must not stop a run; how many there are is printed.
    try:
        return _read(row, found)
    except ValueError as error:
        return _row([], "", problem=str(error))


def _read(row: Row, found: str | Pair) -> Row:
    """Return a conversation up to the last answer that is learnt."""
    messages = _read_pair(row, found) if isinstance(found, Pair) else _messages(row[found] or [], found)
    system = next((row[name] for name in _SYSTEM if row.get(name)), None)
    if system is not None and not leads(messages):
        messages.insert(0, turn("system", str(system)))
    while messages and not _is_learnt(messages[-1]):
        messages.pop()
    if not messages:
        raise ValueError("no answer in the data")
    for message in messages:
        if not (message["content"].strip() or message["more"]):
            if message["role"] == "user":
                raise ValueError("no question in the data")
            if _is_learnt(message):
                raise ValueError("no answer in the data")
    tools = [tool.get("function") or tool for tool in _objects(row.get("tools"))]
    listed = [{"type": "function", "function": tool} for tool in tools if tool.get("name")]
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    return _row(messages, question) | {"tools": json.dumps(listed) if listed else ""}


def _is_learnt(message: Message) -> bool:
    return bool(message["role"] == "assistant" and message["learnt"])


def _read_pair(row: Row, pair: Pair) -> list[Message]:
    question, (column,) = row[pair.question], pair.answers
    if isinstance(question, list):
        messages = _messages(question, pair.question, learnt=False)
    else:
        parts = [_text(row.get(name), f"the column {name!r}") for name in (pair.question, *pair.more)]
        messages = [turn("user", "\n\n".join(part for part in parts if part))]
    if isinstance(row[column], list):
        return messages + _messages(row[column], column)
    text = _text(row[column], f"the column {column!r}")
    # Completions of plain text often begin with the space that joins them to their prompt.
    return [*messages, turn("assistant", text.strip() if column == "completion" else text)]


def _text(value: Any, where: str) -> str:
    """Return a text, or a number as it is written; "" for none.

    Example:
        >>> _text(7.0, "the answer"), _text(0.5, "the answer"), _text(None, "the answer")
        ('7', '0.5', '')
    """
    if value is None or value == [] or value != value:  # a missing number, nan, is not equal to itself
        return ""
    if isinstance(value, float) and value.is_integer():  # a column of integers with a missing one
        return str(int(value))
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{where} must hold texts or numbers, but a row holds {value!r}. {_LEAVE_OUT}")
    return str(value)


def _messages(listed: Any, column: str, learnt: bool = True) -> list[Message]:
    if not isinstance(listed, list) or not all(isinstance(message, dict) for message in listed):
        raise ValueError(f"the column {column!r} must hold lists of role and content, but a row holds {listed!r}")
    return [_message(message, column, learnt) for message in listed]


def _message(given: Mapping[str, Any], column: str, learnt: bool) -> Message:
    name = given.get("role") or given.get("from")
    role = _ROLES.get(str(name))
    content = given["content"] if "content" in given else given.get("value")
    if role is None:
        raise ValueError(f"the column {column!r} has a message of {name!r}; the roles are {', '.join(_ROLES)}")
    thoughts = next((given[name] for name in _THOUGHTS if given.get(name)), None)
    # SlimOrca and OpenAI's files give answers that are only read a weight of 0.
    weight = given.get("weight")
    is_learnt = learnt and (weight is None or float(weight) != 0)
    more = {name: given[name] for name in ("name", "tool_call_id") if given.get(name) and role == "tool"}
    calls = [call for call in _objects(given.get("tool_calls")) if any(call.values())]
    if calls:
        more = {"tool_calls": [_call(call) for call in calls]}
    return turn(role, _joined(content), thoughts, is_learnt, json.dumps(more) if more else "")


def _joined(content: Any) -> str:
    """Return the text of a message, whose content may be a list of parts."""
    if not isinstance(content, list):
        return _text(content, "a message")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            raise ValueError("images or sounds in the data")
        texts.append(_text(part.get("text"), "a part of a message"))
    return "".join(texts)


def _call(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call in the form that chat templates take; its arguments may be JSON text."""
    function = given.get("function", given)
    if not isinstance(function, dict) or not function.get("name"):
        raise ValueError(f"a call of a tool must have a name, but a row holds {given!r}")
    arguments = _objects(function.get("arguments"))
    made = {"type": "function", "function": {"name": function["name"], "arguments": (arguments or [{}])[0]}}
    return made | ({"id": given["id"]} if given.get("id") else {})


def _objects(given: Any) -> list[dict[str, Any]]:
    """Return tools, calls or arguments as a list; they may be JSON text, or a single object without a list."""
    is_text = isinstance(given, str)
    try:
        value = json.loads(given) if is_text and given else given
    except ValueError:
        value = given
    listed = [value] if isinstance(value, dict) else value or []
    if not isinstance(listed, list) or not all(isinstance(part, dict) for part in listed):
        raise ValueError(
            f"tools, their calls and arguments must be JSON objects, but a row has {given!r}. {_LEAVE_OUT}"
        )
    # JSON text has no fields that a table filled in.
    return [part if is_text else _without_none(part) for part in listed]


def _without_none(value: Any) -> Any:
    """Return a value without the fields of other rows, which tables fill with None."""
    if isinstance(value, list):
        return [_without_none(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_none(part) for name, part in value.items() if part is not None}
