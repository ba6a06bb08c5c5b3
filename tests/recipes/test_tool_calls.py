"""Tools, calls and results, in the forms that data have and in those that models' own templates write."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from chat_templates import LLAMA3, MISTRAL, QWEN3, learnt_texts, messages, shipped, tokenizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import instruction_data

from recipes.instruction_tuning import sources
from recipes.instruction_tuning.data import encode, template_message
from recipes.language.chat import ChatEncoder

pytestmark = pytest.mark.usefixtures("own_datasets")
ARGUMENTS = {"city": "Paris", "days": 2}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
TOOL = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": TOOL}]
ASK, SAY = messages("Is it warm?", "It is.")
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "content": "20 degrees"}
TURNS = [ASK, CALLING, RESULT, SAY]
AS_TEXT = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
ROWS: dict[str, dict[str, Any]] = {
    "openai": {"messages": TURNS, "tools": TOOLS},
    "texts": {"messages": [ASK, {**CALLING, "tool_calls": [{"function": AS_TEXT}]}, *TURNS[2:]], "tools": TOOLS},
    "completion": {"prompt": [ASK], "completion": TURNS[1:], "tools": json.dumps(TOOLS)},
    "functions": {"messages": TURNS, "tools": json.dumps([TOOL])},
}


def learnt(encoder: ChatEncoder, row: dict[str, Any]) -> list[str]:
    encoded = encode(row, encoder, with_options=False)
    assert encoded["status"] == "kept", encoded["status"]
    return learnt_texts(encoder.tokenizer, encoded["labels"][0])


@pytest.fixture
def qwen3() -> ChatEncoder:
    return ChatEncoder(tokenizer(shipped("qwen3"), end="<|im_end|>"), 4000)


@pytest.mark.parametrize("name", ROWS)
def test_calls_are_learnt_and_results_are_not(name: str, jsonl: Any, qwen3: ChatEncoder) -> None:
    """What is learnt is what the template writes for messages in OpenAI's form."""
    (row,) = sources.load_chats(jsonl([ROWS[name]]), "train")
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call><|im_end|>'
    assert learnt(qwen3, row) == [call, "It is.<|im_end|>"]
    text = qwen3.tokenizer.apply_chat_template(
        [ASK, {**CALLING, "content": ""}, RESULT, SAY], tools=TOOLS, tokenize=False
    )
    ids = encode(row, qwen3, with_options=False)["input_ids"][0]
    assert qwen3.tokenizer.decode(ids) == text
    assert "20 degrees" in text
    assert "Tells it." in text


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'),
        ("llama3_1", '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}'),
        ("llama3_2", '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}'),
        ("glm4moe", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>"),
        ("lfm2_v2", "<|tool_call_start|>[weather(city='Paris', days=2)]<|tool_call_end|>"),
        ("qwen3_5_think", "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>"),
        ("qwen3_training", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'),
    ],
)
def test_models_own_templates_write_their_own_calls(name: str, call: str, jsonl: Any) -> None:
    encoder = ChatEncoder(tokenizer(shipped(name), end="<|im_end|>"), 4000)
    (row,) = sources.load_chats(jsonl([ROWS["openai"]]), "train")
    calling, saying = learnt(encoder, row)
    assert calling.startswith(call)
    assert saying.startswith("It is.")
    assert "20 degrees" not in calling + saying
    context = [template_message(message) for message in row["messages"][:-1]]
    prompt = encoder.encode_prompt(context, tools=TOOLS)
    assert encode(row, encoder, with_options=False)["input_ids"][0][: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LLAMA3, "the chat template leaves out tool calls"),
        (MISTRAL, "the model's chat template can't render a conversation: TemplateError: Conversation roles"),
        (QWEN3, "the chat template leaves out tool calls"),
    ],
    ids=["llama3", "mistral", "qwen3 without tools"],
)
def test_what_a_template_does_not_write_is_dropped_and_told(template: str, why: str, tiny: str, jsonl: Any) -> None:
    rows = [ROWS["openai"], {"messages": [ASK, SAY], "tools": TOOLS}, {"messages": [ASK, SAY]}, {"messages": TURNS}]
    settings: dict[str, Any] = {"chat_template": template, "validation_share": 0, "test_share": 0}
    data = instruction_data("fit", tiny, dataset=jsonl(rows), **settings)
    # Tools that are listed but never called are not a reason to drop a conversation.
    left_out = "1 of them without thoughts or tools of the data: the template leaves them out"
    assert f"train: 2 conversations; {left_out}; 2 dropped: {why}" in data.reports["train"]


@pytest.mark.parametrize(("name", "writes"), [("qwen3", True), ("qwen2_5", True), ("gptoss_training", False)])
def test_several_calls_in_an_answer_are_all_learnt_or_refused(name: str, writes: bool, jsonl: Any) -> None:
    """The training template of GPT-OSS writes only the first one."""
    encoder = ChatEncoder(tokenizer(shipped(name), end="<|im_end|>"), 4000)
    time = {"type": "function", "id": "c2", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    answer = {"role": "assistant", "tool_calls": [CALL, time]}
    (row,) = sources.load_chats(jsonl([{"messages": [ASK, answer], "tools": TOOLS}]), "train")
    if writes:
        (calling,) = learnt(encoder, row)
        assert "Paris" in calling
        assert "CET" in calling
    else:
        status = encode(row, encoder, with_options=False)["status"]
        assert status.startswith("an answer can't be found")


def test_what_is_empty_is_no_tool_and_nulls_of_a_text_stay(jsonl: Any) -> None:
    empty = ["null", "", "{}", "[{}]", '[{"type": "function", "function": null}]']
    rows = [{"messages": [ASK, SAY], "tools": tools} for tools in empty]
    assert [row["tools"] for row in sources.load_chats(jsonl(rows), "train")] == [""] * len(empty)
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris", "days": null}'}}
    rows = [{"messages": [ASK, {"role": "assistant", "tool_calls": [call]}, RESULT, SAY], "context": []}]
    (row,) = sources.load_chats(jsonl(rows, "nulls.jsonl"), "train")
    (read,) = template_message(row["messages"][1])["tool_calls"]
    assert read["function"]["arguments"] == {"city": "Paris", "days": None}


@pytest.mark.parametrize("name", ["gemma4", "llama3_1"])
def test_a_call_that_would_be_learnt_wrongly_is_refused(name: str, jsonl: Any) -> None:
    """Gemma 4's template puts results into answers, and Llama 3's drops text before a call."""
    encoder = ChatEncoder(tokenizer(shipped(name)), 4000)
    rows = [{"messages": [ASK, {**CALLING, "content": "Let me see."}, RESULT, SAY], "tools": TOOLS}]
    (row,) = sources.load_chats(jsonl(rows), "train")
    status = encode(row, encoder, with_options=False)["status"]
    assert "chat template" in status


def test_what_is_no_call_is_counted(tiny: str, jsonl: Any) -> None:
    whys = {
        "weather(Paris)": "tools, their calls and arguments must be JSON objects, but a row has 'weather",
        "{}": "no answer",
        '{"function": "weather"}': "a call of a tool must have a name, but a row",
        '{"name": "weather", "arguments": 3}': "tools, their calls and arguments must be JSON objects, but a row has 3",
    }
    rows = [{"messages": [ASK, {"role": "assistant", "tool_calls": call}]} for call in (*whys, '{"name": "now"}')]
    *broken, whole = sources.load_chats(jsonl(rows), "train")
    for row, why in zip(broken, whys.values(), strict=True):
        assert row["problem"].startswith(why)
    assert template_message(whole["messages"][1])["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}
    with pytest.raises(MisconfigurationException, match=r"has 'hammer'. Columns that --data.columns does not name"):
        sources.load_chats(jsonl([{"question": "Why?", "answer": "So.", "tools": "hammer"}], "other.jsonl"), "train")


def test_fields_of_other_rows_are_left_out(tmp_path: Path) -> None:
    """Tables fill in each call with the arguments of all calls."""
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    rows = [{"messages": [ASK, {**CALLING, "tool_calls": [call]}, SAY]} for call in (CALL, other)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "calls.parquet")
    read = sources.load_chats(str(tmp_path / "calls.parquet"), "train")
    calls = [template_message(row["messages"][1])["tool_calls"][0]["function"]["arguments"] for row in read]
    assert calls == [ARGUMENTS, {"zone": "CET"}]
