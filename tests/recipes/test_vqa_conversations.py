"""Conversations in LLaVA's form, and texts around questions."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from vqa_models import COLOURS, draw, first_batch, prepared

from recipes.language.chat import IGNORED
from recipes.vqa import sources
from recipes.vqa.images import open_image
from recipes.vqa.prompts import Prompt
from recipes.vqa.turns import last_question

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

# -- LLaVA's form


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    draw(folder / "images", 12)
    (folder / "chats.json").write_text(json.dumps(rows))
    return str(folder / "chats.json")


def conversations(folder: Path) -> str:
    """Two turns about each image; ids have two types, as in LLaVA's mixture of sources."""
    rows = []
    for i in range(12):
        said = turns("What is it?\n<image>", "A colour.", "Which?", f"It is {COLOURS[i % 3]}.")
        rows.append({"id": i if i % 2 else f"chat-{i}", "image": f"{i}.png", "conversations": said})
    return write(folder, rows)


def test_all_answers_of_a_conversation_are_learnt(model: str, tmp_path: Path) -> None:
    data = prepared("fit", model, dataset=conversations(tmp_path), image_folder=str(tmp_path / "images"), batch_size=4)
    tokenizer = data.encoder.tokenizer
    row = data.parts["train"][0]
    assert (row["question"], row["history"][0]["content"]) == ("Which?", "What is it?")
    # The image is placed before the first question only.
    mark = "<|image_pad|>" if "<|image_pad|>" in row["text"] else "<image>"
    assert row["text"].index(mark) < row["text"].index("What is it?")
    assert row["text"].count(mark) == row["prompt"].count(mark) == 1
    assert "A colour." in row["prompt"]
    assert row["answers"][0] not in row["prompt"]
    batch = first_batch(data)
    for ids, labels, answers in zip(batch["inputs"]["input_ids"], batch["labels"], batch["answers"], strict=True):
        said = tokenizer.decode(labels[labels != IGNORED])
        end = tokenizer.eos_token
        assert said.replace(" ", "") == f"A colour.{end}{answers[0]}{end}".replace(" ", "")
        assert (ids[labels != IGNORED] == labels[labels != IGNORED]).all()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([], r"needs an alternating conversation of human and gpt .*got \[\]"),
        (turns("<image> Why?"), r"ends with the latter.*got \['user'\]"),
        (turns("<image> Why?", "So.")[::-1], r"got \['assistant', 'user'\]"),
        ([*turns("<image> Why?"), *turns("Why?", "So.")], r"got \['user', 'user', 'assistant'\]"),
        (turns("<image> ", "So."), "each turn with a text"),
        (turns("<image><image> Which?", "One."), "may have <image> once, in the first turn of the user"),
        (turns("Why?", "So.", "<image> Why?", "So."), "may have <image> once, in the first turn of the user"),
        ([{"from": "bot", "value": "?"}], r"must have turns with 'from' or 'role', one of.*human.*got"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"a list of parts that are texts and images; got"),
    ],
)
def test_what_is_no_conversation_is_named(said: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        last_question(said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{question}?"}, r"holds conversations.*set prompt to null"),
        ({"type_column": "kind"}, "it needs 'kind'"),
    ],
)
def test_rows_that_can_not_be_used_are_named(
    options: dict[str, Any], message: str, tiny_vlm: str, tmp_path: Path
) -> None:
    name = write(tmp_path, [{"id": "1", "image": "0.png", "conversations": turns("<image>\nWhy?", "So.")}])
    with pytest.raises(MisconfigurationException, match=message):
        prepared("fit", tiny_vlm, dataset=name, image_folder=str(tmp_path / "images"), validation_share=0, **options)


# -- the forms of other programs

SAID = [("user", "<image>What is it?"), ("assistant", "A boat."), ("user", "Which colour?"), ("assistant", "Red.")]
PARTS = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
MESSAGES = [{"role": role, "content": text} for role, text in SAID]
IN_PARTS = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in SAID]
PAIRS = [(SAID[0][1][7:], "A boat."), ("Which colour?", "Red.")]
FORMS = {
    "LLaMA-Factory": {"messages": MESSAGES, "images": ["0.png"]},
    "its ShareGPT": {"conversations": [{"from": role, "value": text} for role, text in SAID], "images": ["0.png"]},
    "transformers": {"messages": [{"role": "user", "content": PARTS}, *IN_PARTS[1:]], "image": "0.png"},
    "the_cauldron": {
        "texts": [{"user": user, "assistant": assistant, "source": "made up"} for user, assistant in PAIRS],
        "images": ["0.png"],
    },
    "named columns": {"talk": MESSAGES, "picture": "0.png"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_conversations_in_the_forms_of_other_programs(form: str, ending: str, tmp_path: Path) -> None:
    """In a file of JSON lines with paths, and in one of `datasets` with the images themselves."""
    draw(tmp_path, 1)
    row = FORMS[form]
    path = tmp_path / f"data{ending}"
    if ending == ".jsonl":
        path.write_text(json.dumps(row))
    else:
        table = datasets.Dataset.from_list([row])
        for column in {"image", "images", "picture"} & set(row):
            embedded: Any = {"path": str(tmp_path / "0.png"), "bytes": None}
            feature: Any = datasets.Image()
            if column == "images":
                embedded, feature = [embedded], datasets.Sequence(feature)
            table = table.remove_columns(column).add_column(column, [embedded], feature=feature)
        table.to_parquet(path)
    names = {"talk": "messages", "picture": "image"} if form == "named columns" else None
    (read,) = sources.load_questions(str(path), "train", names=names)
    assert [message["content"] for message in read["history"]] == ["What is it?", "A boat."]
    assert (read["question"], read["answers"]) == ("Which colour?", ["Red."])
    assert open_image(read["image"], "it").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("names", [{"photo": "image"}, {"image": "subject"}, {"id": "image", "image": "image"}])
def test_wrong_names_of_columns_are_refused(names: dict[str, str], tmp_path: Path) -> None:
    name = write(tmp_path, [{"id": "1", "image": "0.png", "conversations": turns("Why?", "So.")}])
    with pytest.raises((MisconfigurationException, ValueError), match=r"[Cc]olumn"):
        sources.load_questions(name, "train", names=names)


# -- texts around questions


def test_a_line_whose_parts_are_empty_is_left_out() -> None:
    prompt = Prompt("Context: {hint}\nQuestion: {question}\nOptions: {choices}\nAnswer:", " ")
    assert prompt("Why?") == "Question: Why?\nAnswer:"
    assert (
        prompt("Why?", ["so", "{no}"], " Look. ") == "Context: Look.\nQuestion: Why?\nOptions: A. so B. {no}\nAnswer:"
    )
    assert Prompt()("Why {x}?") == "Why {x}?"
    assert Prompt("Say {{so}}: {question}")("why?") == "Say {so}: why?"


@pytest.mark.parametrize("template", ["Why?", "{question} {answer}", "{question} {}", "{question", "{question} {0}"])
def test_bad_texts_are_named(template: str) -> None:
    with pytest.raises(MisconfigurationException, match="Double all other braces"):
        Prompt(template)
