"""Rows in the schemas of well-known data sets, as conversations; the texts are our own."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.instruction_tuning import sources
from recipes.instruction_tuning.data import InstructionData
from recipes.language.chat import IGNORED

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

ASK = {"role": "user", "content": "Why?"}
SAY = {"role": "assistant", "content": "So."}
OPENHERMES = {
    "custom_instruction": None,
    "topic": None,
    "model_name": None,
    "conversations": [{"from": "human", "value": "Why?", "weight": None}, {"from": "gpt", "value": "So."}],
    "system_prompt": None,
    "source": "own",
}
SLIMORCA = {
    "conversations": [
        {"from": "system", "value": "Be brief.", "weight": None},
        {"from": "human", "value": "Who?", "weight": 0.0},
        {"from": "gpt", "value": "Me.", "weight": 0.0},
        {"from": "human", "value": "Why?", "weight": 0.0},
        {"from": "gpt", "value": "So.", "weight": 1.0},
    ]
}
ULTRACHAT = {"prompt": "Why?", "prompt_id": "1f", "messages": [ASK, SAY]}
ROWS: dict[str, dict[str, Any]] = {
    "openhermes": OPENHERMES,
    "ultrachat": ULTRACHAT,
    "trl-messages": {"prompt": [ASK], "completion": [SAY]},
    "metamath": {"type": "GSM_Rephrased", "query": "Why?", "original_question": "Why so?", "response": "So."},
    "alpaca": {"instruction": "Why?", "input": "", "output": "So.", "text": "Below is an instruction. Why? So."},
    "dolly": {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, SAY]},
    "prompt-response": {"prompt": "Why?", "response": "So.", "chosen": "x"},
    "input-output": {"input": "Why?", "output": "So."},
    "instruction-answer": {"instruction": "Why?", "input": None, "answer": "So."},
    "query-answer": {"query": "Why?", "answer": "So."},
    "magpie": {"conversations": OPENHERMES["conversations"], "instruction": "Why?", "response": "So.", "uuid": "2"},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_question_and_its_answer_are_read_in_every_schema(name: str, jsonl: Any) -> None:
    (row,) = sources.load_chats(jsonl([ROWS[name]]), "train")
    assert [(m["role"], m["content"]) for m in row["messages"]] == [("user", "Why?"), ("assistant", "So.")]
    assert row["messages"][-1]["learnt"]
    assert (row["key"], row["problem"], row["options"]) == ("why", "", [])


@pytest.mark.parametrize(("more", "answer"), [("context", "response"), ("input", "response"), ("context", "output")])
def test_more_of_a_question_follows_it(more: str, answer: str, jsonl: Any) -> None:
    (row,) = sources.load_chats(jsonl([{"instruction": "Add.", more: "1 2", answer: 3}]), "train")
    assert [message["content"] for message in row["messages"]] == ["Add.\n\n1 2", "3"]


def test_a_context_follows_the_question(jsonl: Any) -> None:
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
    data = InstructionData(dataset, tokenizer=tiny, validation_share=0, test_share=0, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def learnt(row: dict[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"][0] if label != IGNORED]))


def test_answers_without_weight_are_read_and_not_learnt(tiny: str, tokenizer: Any, jsonl: Any) -> None:
    (row,) = encoded(tiny, jsonl([SLIMORCA])).parts["train"]
    assert learnt(row, tokenizer) == "So.<|im_end|>"
    assert "Be brief." in tokenizer.decode(row["input_ids"][0])
    assert "Me." in tokenizer.decode(row["input_ids"][0])
    unlearnt = {"messages": [ASK, {**SAY, "weight": 0}]}
    kept = {"messages": [ASK, {**SAY, "weight": 1}]}
    assert "1 dropped: no answer" in encoded(tiny, jsonl([unlearnt, kept])).reports["train"]


def test_answers_in_a_prompt_are_not_learnt_either(tiny: str, tokenizer: Any, jsonl: Any) -> None:
    rows = [{"prompt": [ASK, SAY, {"role": "user", "content": "And?"}], "completion": [{**SAY, "content": "Then."}]}]
    (row,) = encoded(tiny, jsonl(rows)).parts["train"]
    assert learnt(row, tokenizer) == "Then.<|im_end|>"


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


def test_images_are_counted(tiny: str, jsonl: Any) -> None:
    image = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]}
    assert (
        "1 dropped: images or sounds in the data"
        in encoded(
            tiny, jsonl([{"messages": [image, SAY]}, {"messages": [{**image, "content": [image["content"][1]]}, SAY]}])
        ).reports["train"]
    )


def test_empty_messages_of_a_conversation_are_counted(tiny: str, jsonl: Any) -> None:
    """Learnt, an empty answer in the middle would teach the model to say nothing."""
    said, nothing = {"from": "gpt", "value": "So."}, {"from": "gpt", "value": " "}
    asked, silence = {"from": "human", "value": "Why?"}, {"from": "human", "value": None}
    of_no_answer = [[asked, nothing, asked, said], [asked, nothing]]
    of_no_question = [[silence, said], [asked, said, silence, said]]
    rows = [{"conversations": turns} for turns in (*of_no_answer, *of_no_question, [asked, said])]
    # What is not learnt, and what comes after the last answer, may be empty.
    rows += [
        {"conversations": [asked, {**nothing, "weight": 0}, asked, said]},
        {"conversations": [asked, said, silence]},
    ]
    report = encoded(tiny, jsonl(rows)).reports["train"]
    assert "3 conversations" in report
    assert "2 dropped: no answer in the data" in report
    assert "2 dropped: no question in the data" in report


def test_other_names_of_columns_are_given(jsonl: Any) -> None:
    path = jsonl([{"problem": "Why?", "solution": "So.", "answer": 4}])
    (row,) = sources.load_chats(path, "train", columns={"problem": "question", "solution": "answer"})
    assert [m["content"] for m in row["messages"]] == ["Why?", "So."]
    with pytest.raises(ValueError, match=r"'puzzle'.* not in the dataset. Current columns .*'problem', 'solution'"):
        sources.load_chats(path, "train", columns={"puzzle": "question"})
    with pytest.raises(MisconfigurationException, match=r"has the columns \['reply'\]"):
        sources.load_chats(path, "train", columns={"solution": "reply"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Why? So."}, r"columns \['text'\]. Known are 'messages'.*'query' and 'response'.*--data.columns"),
        ({"question": "Why?", "answer": True}, "'answer' must hold texts or numbers, and a row holds True"),
        ({"messages": [{"role": "narrator", "content": "Once"}]}, "a message of 'narrator'; the roles are system"),
        ({"conversations": ["Why?", "So."]}, "'conversations' must hold lists of role and content"),
        (
            {"messages": [{"role": "user", "content": True}]},
            "a message must hold texts or numbers, and a row holds True",
        ),
    ],
)
def test_what_is_not_understood_is_named(row: dict[str, Any], message: str, jsonl: Any) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        sources.load_chats(jsonl([row]), "train")


def test_one_row_that_is_not_understood_is_counted(tiny: str, jsonl: Any) -> None:
    told = {"role": "narrator", "content": "Once"}
    rows = [[ASK, SAY], [told, SAY], [told, ASK, SAY], [{**ASK, "content": True}, SAY]]
    report = encoded(tiny, jsonl([{"messages": turns} for turns in rows])).reports["train"]
    told = "2 dropped: the column 'messages' has a message of 'narrator'; the roles are system"
    assert f"train: 1 conversations; {told}" in report


# -- splits and configurations


@pytest.fixture
def gsm8k(tmp_path: Path) -> str:
    """A folder like the repository of openai/gsm8k: two configurations, each with a split to train and one to test."""
    lines = ["---", "configs:"]
    for config in ("main", "socratic"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, count in (("train", 30), ("test", 6)):
            path = tmp_path / "gsm8k" / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"question": f"{config} {split} {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(count)]
            datasets.Dataset.from_list(rows).to_parquet(path)
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (tmp_path / "gsm8k" / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(tmp_path / "gsm8k")


def asked(rows: Any, tokenizer: Any) -> set[str]:
    """The questions in rows of tokens."""
    texts = [tokenizer.decode(row["input_ids"][0]) for row in rows]
    return {text.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0] for text in texts}


def test_own_splits_leave_all_of_the_training_split(tiny: str, tokenizer: Any, gsm8k: str) -> None:
    data = InstructionData(gsm8k, config_name="main", test_split="test", validation_share=0.2, tokenizer=tiny)
    data.setup("fit")
    data.setup("test")
    train, validation, test = (asked(data.parts[part], tokenizer) for part in ("train", "validation", "test"))
    assert train | validation == {f"main train {i}?" for i in range(30)}
    assert not train & validation
    assert 0 < len(validation) < 15
    assert test == {f"main test {i}?" for i in range(6)}
    data = InstructionData(gsm8k, config_name="socratic", validation_split="test", test_share=0, tokenizer=tiny)
    data.setup("fit")
    assert asked(data.parts["train"], tokenizer) == {f"socratic train {i}?" for i in range(30)}
    assert asked(data.parts["validation"], tokenizer) == {f"socratic test {i}?" for i in range(6)}
    with pytest.raises(MisconfigurationException, match=r"nothing to test on.* Give --data.test_split"):
        data.setup("test")


def test_a_part_may_be_a_file_of_its_own(tiny: str, tokenizer: Any, jsonl: Any) -> None:
    mine = jsonl([{"question": f"q{i}", "answer": "a"} for i in range(12)], "mine.jsonl")
    other = jsonl([{"messages": [ASK, SAY]}, {"messages": [{**ASK, "content": "Q 3!"}, SAY]}], "other.jsonl")
    data = InstructionData(mine, validation_split=other, test_share=0, tokenizer=tiny)
    data.setup("fit")
    assert len(data.parts["train"]) == 12
    assert asked(data.parts["validation"], tokenizer) == {"Why?", "Q 3!"}
    assert data.reports["validation"] == f"{other}, validation: 2 conversations"


def test_conversations_that_begin_alike_can_not_be_divided(tiny: str, jsonl: Any) -> None:
    mine = jsonl([{"messages": [ASK, {**SAY, "content": f"So {i}."}]} for i in range(40)])
    for share in (None, 0.99):
        with pytest.raises(
            MisconfigurationException, match=r"40 rows .*first questions .1 different.*validation_split"
        ):
            InstructionData(mine, tokenizer=tiny, validation_share=share).setup("fit")
    data = InstructionData(mine, tokenizer=tiny, validation_share=0)
    data.setup("fit")
    assert len(data.parts["train"]) == 40
