"""The shapes in which people keep conversations, each turned into rows of one shape.

A row has ``messages`` (see :func:`turn`; the last one is an answer to learn), ``options`` (the texts an answer is
chosen from; empty for free answers), ``tools`` (that may be called, as JSON; usually empty), ``key`` (rows of one key
never part in a split) and ``problem`` (why a row can't be used; usually empty).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.language.conversation import leads
from recipes.shared.text_metrics import normalized

Row = dict[str, Any]
Message = dict[str, Any]
FEATURES = datasets.Features(
    {
        "messages": [
            {
                "role": datasets.Value("string"),
                "content": datasets.Value("string"),
                "thoughts": datasets.Value("string"),
                "learnt": datasets.Value("bool"),
                "more": datasets.Value("string"),
            }
        ],
        "options": [datasets.Value("string")],
        "tools": datasets.Value("string"),
        "key": datasets.Value("string"),
        "problem": datasets.Value("string"),
    }
)
MORE_THAN_TEXT = "images or sounds"
REFUSED = "refused: "  # how the problem of a row begins that can't be read or rendered; why follows
NO_QUESTION = "no question"
NO_ANSWER = "no answer"
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "ipython", "function", "observation", "tool_response"), "tool"),
}
_CALL_ROLES = ("function_call", "tool_call")  # of answers whose text is a call, as ShareGPT's files have them
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what Qwen, GPT-OSS and others call them
_LISTS = ("messages", "conversations")  # columns of whole conversations
_SYSTEM = ("system", "system_prompt")
_LEAVE_OUT = "Columns that --data.columns does not name are left out"
_TOOLS = "tools"


class Pair(NamedTuple):
    """Columns of a question and its answer.

    Attributes:
        question: column of the question.
        answer: column of the answer.
        more: columns that may be missing or empty, which follow the question after an empty line.
    """

    question: str
    answer: str
    more: tuple[str, ...] = ()


_MORE = ("input", "context")
PAIRS = (
    Pair("instruction", "output", _MORE),  # Alpaca
    Pair("instruction", "response", _MORE),  # Dolly
    Pair("instruction", "answer", _MORE),
    Pair("prompt", "completion"),  # trl; texts, or lists of messages
    Pair("prompt", "response"),
    Pair("query", "response", ("context",)),  # MetaMath
    Pair("query", "answer", ("context",)),
    Pair("question", "answer", ("context",)),  # GSM8K
    Pair("question", "response", ("context",)),  # OpenOrca, with system_prompt
    Pair("input", "output"),
)


class _UnusableError(Exception):
    """A row that can't be learnt; its text says why."""


def turn(role: str, content: str, thoughts: str | None = None, learnt: bool = True, more: str = "") -> Message:
    """A message.

    Args:
        role: "system", "developer", "user", "assistant" or "tool".
        content: the text.
        thoughts: of an answer, which a thinking model writes before it.
        learnt: whether an answer is trained on.
        more: further fields that templates read, as JSON: an answer's ``tool_calls``, or whose result this is.
    """
    return {"role": role, "content": content, "thoughts": thoughts, "learnt": learnt, "more": more}


def conversation(question: str, answer: str, options: Sequence[str], key: str) -> Row:
    """A row of one question and its answer."""
    return _row([turn("user", question), turn("assistant", answer)], key, options)


def _row(messages: list[Message], key: str, options: Sequence[str] = (), problem: str = "") -> Row:
    return {"messages": messages, "options": list(options), "tools": "", "key": normalized(key), "problem": problem}


def known_columns() -> str:
    """Return the columns that are understood, for messages."""
    pairs = ", ".join(f"{pair.question!r} and {pair.answer!r}" for pair in PAIRS)
    return f"'messages' (a list of role and content), 'conversations' (a list of from and value), or {pairs}"


def converter(columns: Sequence[str], source: str) -> Callable[[Row], Row]:
    """What turns rows with these columns into rows of :data:`FEATURES`.

    Args:
        columns: of the table.
        source: where the table is from, for messages.

    Raises:
        MisconfigurationException: the columns are not understood.
    """
    found = _understood(columns)
    if found is not None:
        return partial(_converted, found=found)
    raise MisconfigurationException(
        f"{source} has the columns {sorted(columns)}. Known are {known_columns()}. Give other names in columns, for "
        "example --data.columns '{problem: question, solution: answer}'"
    )


def read_columns(columns: Sequence[str]) -> list[str]:
    """Those of some columns that a :func:`converter` of them reads.

    Example:
        >>> read_columns(["id", "context", "question", "answer"])
        ['question', 'answer', 'context']
    """
    found = _understood(columns)
    wanted = [found.question, found.answer, *found.more] if isinstance(found, Pair) else [found]
    return [column for column in (*wanted, *_SYSTEM, _TOOLS) if column in columns]


def _understood(columns: Sequence[str]) -> str | Pair | None:
    """What a table's rows are read from: a column of conversations, or the columns of a question and its answer."""
    for column in _LISTS:
        if column in columns:
            return column
    for pair in PAIRS:
        if pair.question in columns and pair.answer in columns:
            return pair
    return None


def _converted(row: Row, found: str | Pair) -> Row:
    """Up to the last answer that is learnt; a conversation without one keeps no message, and is counted later."""
    try:
        messages = _read_pair(row, found) if isinstance(found, Pair) else _messages(row[found] or [], found)
        functions = [tool.get("function") or tool for tool in _objects(row.get(_TOOLS))]
        tools = [_function(function) for function in functions if function.get("name")]
    # One such row must not stop a run; how many there are is printed.
    except _UnusableError as error:
        return _row([], "", problem=str(error))
    except ValueError as error:
        return _row([], "", problem=f"{REFUSED}{error}")
    system = next((row[name] for name in _SYSTEM if row.get(name)), None)
    if system is not None and not leads(messages):
        messages.insert(0, turn("system", str(system)))
    while messages and not _is_learnt(messages[-1]):
        # What comes after the last answer that is learnt teaches nothing.
        messages.pop()
    problem = _lack(messages)
    if problem:
        return _row([], "", problem=problem)
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    return _row(messages, question) | {"tools": json.dumps(tools) if tools else ""}


def _is_learnt(message: Message) -> bool:
    return bool(message["role"] == "assistant" and message["learnt"])


def _lack(messages: Sequence[Message]) -> str:
    """Which of a conversation's messages is empty, of those that teach something; "" where none is."""
    for message in messages:
        if not (message["content"].strip() or message["more"]):
            if message["role"] == "user":
                return NO_QUESTION
            if _is_learnt(message):
                return NO_ANSWER
    return ""


def _read_pair(row: Row, pair: Pair) -> list[Message]:
    question, answer = row[pair.question], row[pair.answer]
    messages = []
    if isinstance(question, list):
        messages += _messages(question, pair.question, learnt=False)
    else:
        parts = [_text_of(row, column) for column in (pair.question, *pair.more)]
        asked = "\n\n".join(part for part in parts if part)
        if not asked.strip():
            raise _UnusableError(NO_QUESTION)
        messages.append(turn("user", asked))
    if isinstance(answer, list):
        return messages + _messages(answer, pair.answer)
    text = _text_of(row, pair.answer)
    # Completions of plain text often begin with the space that joins them to their prompt.
    return [*messages, turn("assistant", text.strip() if pair.answer == "completion" else text)]


def _text_of(row: Row, column: str) -> str:
    value = row.get(column)
    text = _written(value)
    if text is None:
        raise ValueError(f"the column {column!r} must hold texts or numbers, and a row holds {value!r}. {_LEAVE_OUT}")
    return text


def _written(value: Any) -> str | None:
    """A text, or a number as it is written; "" for none, and None for what is neither.

    Example:
        >>> _written(7.0), _written(0.5), _written(None), _written([]), _written([1])
        ('7', '0.5', '', '', None)
    """
    if value is None or value in ([], {}) or value != value:  # a missing number is not equal to itself
        return ""
    if isinstance(value, float) and value.is_integer():  # a column of integers in which one is missing
        return str(int(value))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number or isinstance(value, str) else None


def _messages(listed: Any, column: str, learnt: bool = True) -> list[Message]:
    if not isinstance(listed, list) or not all(isinstance(message, dict) for message in listed):
        raise ValueError(f"the column {column!r} must hold lists of role and content, and a row holds {listed!r}")
    return [_message(message, column, learnt) for message in listed]


def _message(given: Mapping[str, Any], column: str, learnt: bool) -> Message:
    role = given.get("role") or given.get("from")
    content = given["content"] if "content" in given else given.get("value")
    if role not in _ROLES:
        raise ValueError(f"the column {column!r} has a message of {role!r}; the roles are {', '.join(_ROLES)}")
    thoughts = next((given[name] for name in _THOUGHTS if given.get(name)), None)
    # SlimOrca and OpenAI's files mark answers that are only read with a weight of 0.
    weight = given.get("weight")
    is_learnt = learnt and (weight is None or float(weight) != 0)
    calls = _objects(content if role in _CALL_ROLES else given.get("tool_calls") or given.get("function_call"))
    calls = [call for call in calls if any(call.values())]
    more = {name: given[name] for name in ("name", "tool_call_id") if given.get(name) and _ROLES[role] == "tool"}
    if calls:
        more = {"tool_calls": [_call(call) for call in calls]}
    if _ROLES[role] == "tool" and isinstance(content, dict) and "type" not in content:
        content = json.dumps(_without_none(content), ensure_ascii=False)
    text = "" if role in _CALL_ROLES else _joined(content)
    return turn(_ROLES[role], text, thoughts, is_learnt, json.dumps(more) if more else "")


def _call(given: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a tool as chat templates know it, whose arguments may be a text of JSON."""
    function = given.get("function", given)
    if not isinstance(function, dict) or not function.get("name"):
        raise ValueError(f"a call of a tool must have a name, and a row holds {given!r}")
    arguments = _objects(function.get("arguments"))
    made = _function({"name": function["name"], "arguments": arguments[0] if arguments else {}})
    return made | ({"id": given["id"]} if given.get("id") else {})


def _function(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": given}


def _objects(given: Any) -> list[dict[str, Any]]:
    """Tools, calls or arguments, which may be a text of JSON, and one without a list around it."""
    is_text = isinstance(given, str)
    try:
        value = json.loads(given) if is_text and given else given
    except ValueError:
        value = given
    listed = [value] if isinstance(value, dict) else value or []
    if not isinstance(listed, list) or not all(isinstance(part, dict) for part in listed):
        raise ValueError(
            f"tools, their calls and arguments must be JSON objects, and a row has {given!r}. {_LEAVE_OUT}"
        )
    # In a text nobody has filled anything in.
    return [part if is_text else _without_none(part) for part in listed]


def _without_none(value: Any) -> Any:
    """A value without the fields that other rows have, which tables fill with None."""
    if isinstance(value, list):
        return [_without_none(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_none(part) for name, part in value.items() if part is not None}


def _joined(content: Any) -> str:
    """The text of a message, whose content may be a list of parts."""
    text = _written(content)
    if text is not None:
        return text
    if not isinstance(content, (list, dict)):
        raise ValueError(f"a message's content must be a text or a list of parts, and a row holds {content!r}")
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise _UnusableError(MORE_THAN_TEXT)
    return "".join(texts)
