"""A conversation's row as token ids, and what became of it."""

import json
from typing import Any

from recipes.language.chat import IGNORED, ChatEncoder
from recipes.language.conversation import THOUGHTS
from recipes.language.templates import RefusedConversationError

Row = dict[str, Any]


def encode(row: Row, encoder: ChatEncoder, with_options: bool) -> Row:
    """Return token ids of a conversation, once for each option if they are to be ranked, and what became of it.

    Args:
        row: as ``formats`` gives it.
        encoder: of the model's chat template.
        with_options: encode each option, for an evaluation.

    Returns:
        ``input_ids`` and ``labels`` of each option, the greatest ``length`` in tokens, the index ``gold`` of the right
        option, ``answer`` and ``prompt_ids`` of a free answer that is to be generated, whether the template leaves
        thoughts or tools out (``leaves_out``), and the ``status``: "kept", "cut", or why the row can't be used.
    """
    # One such row must not stop a run, such as a conversation of ShareGPT that begins with an answer.
    try:
        return _unusable(row["problem"]) if row["problem"] else _usable(row, encoder, with_options)
    except RefusedConversationError as error:
        return _unusable(str(error))


def _usable(row: Row, encoder: ChatEncoder, with_options: bool) -> Row:
    messages = [template_message(message) for message in row["messages"]]
    context, answer = messages[:-1], messages[-1]
    tools = json.loads(row["tools"] or "[]")
    options = (row["options"] if with_options else None) or [answer["content"]]
    ends = not row["options"]  # options are ranked by their own tokens, and nobody generates them
    encoded = [encoder.encode([*context, {**answer, "content": option}], ends, tools) for option in options]
    if any(set(e.labels) <= {IGNORED} for e in encoded):
        return _unusable(f"no answer within max_length={encoder.max_length} tokens")
    # Answers with thoughts are not generated: how a template ends thoughts is its own affair, and so is comparing them.
    has_thoughts = row["messages"][-1]["thoughts"] or "</think>" in answer["content"]
    is_free = with_options and not row["options"] and not has_thoughts and "tool_calls" not in answer
    return {
        "input_ids": [e.input_ids for e in encoded],
        "labels": [e.labels for e in encoded],
        "length": max(len(e.input_ids) for e in encoded),
        "gold": options.index(answer["content"]),
        "answer": answer["content"] if is_free else "",
        "prompt_ids": encoder.encode_prompt(context, tools) if is_free else [],
        "leaves_out": any(e.leaves_out for e in encoded),
        "status": "cut" if any(e.cut for e in encoded) else "kept",
    }


def _unusable(status: str) -> Row:
    empty: Row = {"input_ids": [], "labels": [], "prompt_ids": [], "answer": ""}
    return {**empty, "leaves_out": False, "length": 0, "gold": 0, "status": status}


def template_message(message: Row) -> Row:
    """Return a message as chat templates know it.

    Example:
        >>> template_message({"role": "user", "content": "Why?", "thoughts": None, "learnt": True, "more": ""})
        {'role': 'user', 'content': 'Why?'}
    """
    given = {"role": message["role"], "content": message["content"], **json.loads(message["more"] or "{}")}
    if message["thoughts"]:
        given |= dict.fromkeys(THOUGHTS, message["thoughts"])
    if not message["learnt"]:
        given["learnt"] = False
    return given
