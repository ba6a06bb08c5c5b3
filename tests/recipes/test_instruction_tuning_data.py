"""Rows in the schemas of well-known data sets, with our own texts, as conversations; tokens, parts and batches."""

from itertools import chain
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import instruction_data

from recipes.data.parts import part_of
from recipes.data.text_metrics import normalized
from recipes.instruction_tuning import sources
from recipes.language.batches import LengthBatchSampler
from recipes.language.chat import IGNORED

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

ASK = {"role": "user", "content": "Why?"}
SAY = {"role": "assistant", "content": "So."}
CONVERSATION = [{"from": "human", "value": "Why?", "weight": None}, {"from": "gpt", "value": "So."}]
SLIMORCA = {
    "conversations": [
        {"from": "system", "value": "Be brief.", "weight": None},
        {"from": "human", "value": "Who?", "weight": 0.0},
        {"from": "gpt", "value": "Me.", "weight": 0.0},
        {"from": "human", "value": "Why?", "weight": 0.0},
        {"from": "gpt", "value": "So.", "weight": 1.0},
    ]
}
ROWS: dict[str, dict[str, Any]] = {
    "openhermes": {"topic": None, "conversations": CONVERSATION, "system_prompt": None, "source": "own"},
    "ultrachat": {"prompt": "Why?", "prompt_id": "1f", "messages": [ASK, SAY]},
    "trl-messages": {"prompt": [ASK], "completion": [SAY]},
    "metamath": {"type": "GSM_Rephrased", "query": "Why?", "original_question": "Why so?", "response": "So."},
    "alpaca": {"instruction": "Why?", "input": "", "output": "So.", "text": "Below is an instruction. Why? So."},
    "dolly": {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, SAY]},
    "prompt-response": {"prompt": "Why?", "response": "So.", "chosen": "x"},
    "input-output": {"input": "Why?", "output": "So."},
    "instruction-answer": {"instruction": "Why?", "input": None, "answer": "So."},
    "query-answer": {"query": "Why?", "answer": "So."},
    "magpie": {"conversations": CONVERSATION, "instruction": "Why?", "response": "So.", "uuid": "2"},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_question_and_its_answer_are_read_in_every_schema(name: str, jsonl: Any) -> None:
    (row,) = sources.load_chats(jsonl([ROWS[name]]), "train")
    assert [(m["role"], m["content"]) for m in row["messages"]] == [("user", "Why?"), ("assistant", "So.")]
    assert row["messages"][-1]["learnt"]
    assert (row["key"], row["problem"], row["options"]) == ("why", "", [])


def test_a_context_follows_the_question(jsonl: Any) -> None:
    for more, answer in (("context", "response"), ("input", "output")):
        (row,) = sources.load_chats(jsonl([{"instruction": "Add.", more: "1 2", answer: 3}], f"{more}.jsonl"), "train")
        assert [message["content"] for message in row["messages"]] == ["Add.\n\n1 2", "3"]
    rows = [{"id": 1, "context": context, "question": "Who?", "answer": "Me."} for context in ("I came.", None)]
    table = sources.load_chats(jsonl(rows), "train")
    assert [row["messages"][0]["content"] for row in table] == ["Who?\n\nI came.", "Who?"]
    assert [row["key"] for row in table] == ["who i came", "who"]
    rows[1]["context"] = {"title": ["a"]}
    with pytest.raises(MisconfigurationException, match=r"'context' must hold texts.*--data.columns"):
        sources.load_chats(jsonl(rows[1:], "dict.jsonl"), "train")


def test_numbers_are_the_texts_that_they_are_written_as(tiny: str, jsonl: Any) -> None:
    answers = [4, "four", 0.5, 7.0, -1, None]
    table = sources.load_chats(jsonl([{"question": "How many?", "answer": answer} for answer in answers]), "train")
    assert [row["messages"][-1]["content"] for row in table if row["messages"]] == ["4", "four", "0.5", "7", "-1"]
    (row,) = sources.load_chats(
        jsonl([{"messages": [{**ASK, "content": 1}, {**SAY, "content": 2}]}], "m.jsonl"), "train"
    )
    assert [message["content"] for message in row["messages"]] == ["1", "2"]


def encoded(tiny: str, dataset: str, **options: Any) -> Any:
    return instruction_data("fit", tiny, dataset=dataset, validation_share=0, test_share=0, **options)


def learnt(row: dict[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"][0] if label != IGNORED]))


def test_answers_without_weight_and_those_of_a_prompt_are_read_and_not_learnt(
    tiny: str, tokenizer: Any, jsonl: Any
) -> None:
    asked = {"prompt": [{**ASK, "content": "Who?"}, {**SAY, "content": "Me."}, ASK], "completion": [SAY]}
    for row in ({**asked, "system": "Be brief."}, SLIMORCA):
        (row,) = encoded(tiny, jsonl([row], f"{len(row)}.jsonl")).parts["train"]
        assert learnt(row, tokenizer) == "So.<|im_end|>"
        assert "Be brief." in tokenizer.decode(row["input_ids"][0])
        assert "Me." in tokenizer.decode(row["input_ids"][0])
    unlearnt = {"messages": [ASK, {**SAY, "weight": 0}]}
    kept = {"messages": [ASK, {**SAY, "weight": 1}]}
    assert "1 dropped: no answer" in encoded(tiny, jsonl([unlearnt, kept])).reports["train"]


def test_a_system_column_is_a_system_message(jsonl: Any) -> None:
    rows = [{"id": "niv.1", "system_prompt": "Be brief.", "question": "Why?", "response": "So."}]
    (row,) = sources.load_chats(jsonl(rows), "train")
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_column_gives_way_to_a_leading_message_only(role: str, jsonl: Any) -> None:
    own = {"role": role, "content": "Be long."}
    rows = [{"messages": turns, "system": "Be brief."} for turns in ([own, ASK, SAY], [ASK, SAY, own, ASK, SAY])]
    roles = [[m["role"] for m in row["messages"]] for row in sources.load_chats(jsonl(rows), "train")]
    assert roles == [[role, "user", "assistant"], ["system", "user", "assistant", role, "user", "assistant"]]


SILENCE, NOTHING = {**ASK, "content": None}, {**SAY, "content": " "}
NARRATED = {"role": "narrator", "content": "Once"}
IMAGE = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]}
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)
LAST_ONLY = (
    "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.role + ':' + m.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "told", "dropped"),
    [
        (None, "images or sounds in the data", [[IMAGE, SAY]]),
        (None, "no answer in the data", [[ASK, NOTHING, ASK, SAY], [ASK, NOTHING]]),
        (None, "no question in the data", [[SILENCE, SAY], [ASK, SAY, SILENCE, SAY]]),
        (None, "the column 'messages' has a message of 'narrator'", [[NARRATED, SAY], [NARRATED, ASK, SAY]]),
        (ALTERNATING, "the model's chat template can't render a conversation: TemplateError: ", [[SAY, ASK, SAY]]),
        (LAST_ONLY, "an answer can't be found in the chat template's text", [[ASK, SAY, ASK, SAY]]),
    ],
)
def test_conversations_that_can_not_be_learnt_are_counted(
    template: str | None, told: str, dropped: list[Any], tiny: str, jsonl: Any
) -> None:
    """An empty answer in the middle, if learnt, would teach the model to say nothing."""
    kept = [[ASK, SAY], [ASK, SAY, SILENCE]]  # text after the last answer may be empty
    if template != LAST_ONLY:
        kept.append([ASK, {**NOTHING, "weight": 0}, ASK, SAY])  # and so may what is not learnt
    rows = [{"messages": turns} for turns in [*dropped, *kept]]
    report = encoded(tiny, jsonl(rows), chat_template=template).reports["train"]
    assert f"train: {len(kept)} conversations; {len(dropped)} dropped: {told}" in report
    with pytest.raises(MisconfigurationException, match=told):
        encoded(tiny, jsonl(rows[: len(dropped)], "dropped.jsonl"), chat_template=template)


def test_other_names_of_columns_are_given(jsonl: Any) -> None:
    path = jsonl([{"problem": "Why?", "solution": "So.", "answer": 4}])
    (row,) = sources.load_chats(path, "train", columns={"problem": "question", "solution": "answer"})
    assert [m["content"] for m in row["messages"]] == ["Why?", "So."]
    for wrong in ({"puzzle": "question"}, {"problem": "question", "solution": "question"}):
        with pytest.raises(MisconfigurationException, match=r"the table, whose columns are \['problem', 'solution'"):
            sources.load_chats(path, "train", columns=wrong)
    with pytest.raises(MisconfigurationException, match=r"has the columns \['reply'\]"):
        sources.load_chats(path, "train", columns={"solution": "reply"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Why? So."}, r"columns \['text'\]. Known are 'messages'.*'query' and 'response'.*--data.columns"),
        ({"question": "Why?", "answer": True}, "'answer' must hold texts or numbers, but a row holds True"),
        ({"messages": [{"role": "narrator", "content": "Once"}]}, "a message of 'narrator'; the roles are system"),
        ({"conversations": ["Why?", "So."]}, "'conversations' must hold lists of role and content"),
        ({"messages": [{**ASK, "content": True}]}, "a message must hold texts or numbers, but a row holds True"),
    ],
)
def test_what_is_not_understood_is_named(row: dict[str, Any], message: str, jsonl: Any) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        sources.load_chats(jsonl([row]), "train")


# -- tokens and labels


def test_the_loss_is_on_the_answer_and_its_end_token(tiny: str, tokenizer: Any, sums: str) -> None:
    data = instruction_data("fit", tiny, dataset=sums)
    row = data.parts["train"][0]
    assert learnt(row, tokenizer).startswith("It is ")
    assert learnt(row, tokenizer).endswith(".<|im_end|>")
    text = tokenizer.decode(row["input_ids"][0])
    assert text.startswith("<|im_start|>system")
    assert "Add" in text
    assert text.endswith("<|im_end|>\n")


def test_what_is_cut_or_dropped_is_told(tiny: str, jsonl: Any) -> None:
    rows = [
        {"instruction": "short", "output": "yes"},
        {"instruction": "long answer", "output": "yes " * 100},
        {"instruction": "long question " * 100, "output": "yes"},
        {"instruction": "no answer", "output": ""},
        {"instruction": "null", "output": None},
        {"instruction": None, "output": "yes"},
    ]
    data = encoded(tiny, jsonl(rows), max_length=60)
    assert len(data.parts["train"]) == 2
    assert data.reports["train"].endswith(
        "train: 2 conversations; 1 of them cut at max_length=60 tokens; "
        "2 dropped: no answer in the data; 1 dropped: no answer within max_length=60 tokens; "
        "1 dropped: no question in the data"
    )


# -- parts and batches


@pytest.mark.parametrize("task", sorted(sources.TASKS))
def test_packaged_tasks_are_split_without_leaks(task: str) -> None:
    table = sources.load_chats(f"packaged:{task}", "train")
    shares = {"validation": 0.15, "test": 0.25}
    questions: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for row in table:
        assert row["messages"][-1]["content"] in row["options"]
        questions[part_of(row["key"], shares)].add(normalized(row["messages"][0]["content"]))
    assert all(questions.values())
    assert not questions["train"] & questions["test"]
    assert not questions["train"] & questions["validation"]
    assert not questions["validation"] & questions["test"]
    assert len(questions["test"]) / len(table) == pytest.approx(0.25, abs=0.05)


def test_batches_are_of_similar_length_and_new_in_each_epoch() -> None:
    lengths = torch.randint(1, 500, (1000,)).tolist()
    sampler = LengthBatchSampler(lengths, batch_size=8, seed=1)
    first = list(sampler)
    assert sorted(chain.from_iterable(first)) == list(range(1000))
    assert len(first) == len(sampler)
    assert first == list(sampler)
    padded = 0
    for batch in first:
        padded += max(lengths[i] for i in batch) * len(batch)
    assert padded / sum(lengths) < 1.15  # random batches of 8 would give 1.7
    sampler.set_epoch(1)
    assert first != list(sampler)
