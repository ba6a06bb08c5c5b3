"""Tokens, labels, images and data sets of visual question answering."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from recipe_runs import trainer
from torch import Tensor
from vqa_models import first_batch, prepared

from recipes.language.chat import IGNORED
from recipes.vqa.conversation import QuestionEncoder
from recipes.vqa.data import VQAData
from recipes.vqa.model import DEFAULT_LORA, load_processor
from recipes.vqa.module import VQA
from recipes.vqa.prompts import Prompt
from recipes.vqa.sources import _Converter, load_questions

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")


# -- tokens, labels and images


def test_the_loss_is_on_the_answer_and_its_end_token(model: str, drawn: str) -> None:
    data = prepared("fit", model, dataset=drawn, batch_size=8)
    tokenizer = data.encoder.tokenizer
    start, _, opening = data.encoder.prompt("QUESTION").partition("QUESTION")
    batch = first_batch(data)
    seen = set()
    for ids, labels, answers in zip(batch["inputs"]["input_ids"], batch["labels"], batch["answers"], strict=True):
        learnt = labels != IGNORED
        assert torch.equal(labels[learnt], ids[learnt])
        assert tokenizer.decode(labels[learnt]).lstrip() == answers[0] + tokenizer.eos_token
        places = learnt.nonzero().squeeze(1)
        assert places[-1] - places[0] == len(places) - 1
        before = tokenizer.decode(ids[: places[0]])
        assert before.endswith(f"?{opening}")
        assert before.startswith(start.partition("<image>")[0].partition("<|image_pad|>")[0])
        assert tokenizer.decode(ids[places[-1] + 1 :]).replace(tokenizer.pad_token, "") == "\n"
        seen.add(answers[0])
    assert len(seen) > 1


def test_images_of_other_sizes_take_other_numbers_of_tokens(folders: dict[str, str], drawn: str) -> None:
    data = prepared("fit", folders["qwen2_5_vl"], dataset=drawn, batch_size=16)
    mark = data.encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    seen: set[int] = set()
    for batch in data.train_dataloader():
        counts = (batch["inputs"]["input_ids"] == mark).sum(dim=1)
        grids = batch["inputs"]["image_grid_thw"].prod(dim=1) // 4
        assert torch.equal(counts, grids)
        seen.update(counts.tolist())
    assert len(seen) > 2


def test_a_template_without_end_token_gets_one(tiny_vlm: str) -> None:
    template = "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"  # noqa: E501
    processor = load_processor(tiny_vlm)
    processor.tokenizer.pad_token = None
    encoder = QuestionEncoder(processor, template)
    assert encoder.tokenizer.pad_token == encoder.tokenizer.eos_token
    rendered = encoder.render("why?", "so")
    assert rendered.text == "<image>why? so<end_of_utterance>"
    ids = encoder.tokenizer(rendered.text)["input_ids"]
    learnt = [token for token, is_learnt in zip(ids, rendered.learnt, strict=True) if is_learnt]
    assert encoder.tokenizer.decode(learnt).strip() == "so<end_of_utterance>"


def test_the_likelihood_is_that_of_each_row_alone(model: str, drawn: str) -> None:
    data = prepared("fit", model, dataset=drawn, batch_size=6)
    batch = first_batch(data)
    module = VQA(model, DEFAULT_LORA)
    module.configure_model()
    module.eval()
    with torch.no_grad():
        sums, tokens = module.log_likelihood(batch)
        alone = [by_hand(module.net, data, row) for row in rows_of(data, batch)]
    torch.testing.assert_close(sums, torch.tensor(alone), rtol=1e-4, atol=1e-4)
    assert tokens.tolist() == (batch["labels"] != IGNORED).sum(dim=1).tolist()


def rows_of(data: VQAData, batch: Any) -> list[Any]:
    """The first batch's rows, in order."""
    (places,) = list(data.train_dataloader().sampler)[:1]
    rows = [data.parts["train"][place] for place in places]
    assert [row["answers"] for row in rows] == batch["answers"]
    return rows


def by_hand(net: Any, data: VQAData, row: Any) -> float:
    """Log-likelihood of one row's answer from all logits, without padding."""
    image = Image.open(row["image"]["path"]).convert("RGB")
    inputs = data.encoder.processor(text=[row["text"]], images=[[image]], return_tensors="pt")
    ids = inputs["input_ids"][0]
    space = " " if data.encoder.prompt("why?").endswith(":") else ""  # then the template adds one before the answer
    answer = data.encoder.tokenizer(f"{space}{row['answers'][0]}{data.encoder.tokenizer.eos_token}")["input_ids"]
    assert ids[-1 - len(answer) : -1].tolist() == answer
    log_probabilities: Tensor = net(**inputs).logits[0].log_softmax(-1)
    first = len(ids) - 1 - len(answer)
    return sum(log_probabilities[first + i - 1, token].item() for i, token in enumerate(answer))


def test_only_the_language_model_is_adapted_and_in_float32(model: str) -> None:
    module = VQA(model, DEFAULT_LORA, "bfloat16")
    module.configure_model()
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # blocks, q and v, A and B
    assert all("language_model" in name or "text_model" in name for name in trained)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_null_trains_all_weights(tiny_vlm: str, drawn: str, tmp_path: Path) -> None:
    module = VQA(tiny_vlm, None, "float32", learning_rate=1e-2)
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, VQAData(drawn, batch_size=4))
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert any("vision_model" in name for name in moved)
    assert any("text_model" in name for name in moved)


def test_padding_changes_no_generated_answer(model: str, drawn: str) -> None:
    data = prepared("fit", model, dataset=drawn, batch_size=32)
    module = VQA(model, DEFAULT_LORA, max_new_tokens=4)
    module.configure_model()
    module.eval()
    batch = next(iter(data.val_dataloader()))
    (places,) = list(data.val_dataloader().sampler)[:1]
    assert (batch["prompts"]["attention_mask"][:, 0] == 0).any()
    assert (batch["prompts"]["attention_mask"][:, -1] == 1).all()
    alone = []
    for row in (data.parts["validation"][place] for place in places):
        image = Image.open(row["image"]["path"]).convert("RGB")
        alone += module.answers(data.encoder([row["prompt"]], [image], padding_side="left"))
    assert module.answers(batch["prompts"]) == alone
    assert len(set(alone)) > 1


# -- data sets


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        (["hydrogen", "carbon"], "carbon", "B"),
        (["A", "B"], "B", "B"),
        (["red", "green"], "D", "must have as answer the number from 0, the letter or the text"),
        (["H", "C", "N"], "C", "and not of two different ones"),
        (["1", "2", "3"], 2, "and not of two different ones"),
        (["0", "1", "2"], 2, "C"),
        (["red", "green"], 1.0, "B"),
        (["red", "green"], True, "must have as answer .*got True"),
        ("['red', 'green']", "A", "must have a list of at most 26 texts as choices"),
        ([str(number) for number in range(30)], 0, "must have a list of at most 26 texts as choices"),
    ],
)
def test_choices_in_the_forms_that_data_sets_have(choices: Any, answer: Any, expected: str, tmp_path: Path) -> None:
    converter = _Converter("made-up", tmp_path, ["image", "question", "choices", "answer"], None, Prompt())
    image = {"bytes": None, "path": "a.png"}
    row = {"image": image, "question": "Which?", "choices": choices, "answer": answer}
    if len(expected) == 1:
        assert converter(row, 0)["answers"] == [expected]
        return
    with pytest.raises(MisconfigurationException, match=f"row 0.*{expected}"):
        converter(row, 0)


@pytest.mark.parametrize("answers", [0, [0], [{"answer": "red"}]])
def test_answers_may_be_numbers_too(answers: Any, tmp_path: Path) -> None:
    row = {"image": {"bytes": None, "path": "a.png"}, "question": "Which?", "answers": answers}
    converter = _Converter("made-up", tmp_path, ["image", "question", "answers"], None, Prompt())
    expected = "0" if answers in (0, [0]) else "red"
    assert converter(row, 0)["answers"] == [expected]
    converter = _Converter("made-up", tmp_path, ["image", "question", "choices", "answers"], None, Prompt())
    assert converter({**row, "choices": ["red", "green"]}, 0)["answers"] == ["A"]


def test_images_of_a_folder_of_tables_are_in_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("questions")  # datasets would take files below a "test_..." for the test's
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    row = {"image": "a.png", "question": "Which?", "answer": "red"}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    (question,) = load_questions(str(folder), "train")
    assert question["image"]["path"] == str(folder / "a.png")


def test_questions_about_an_image_stay_together(tiny_vlm: str, drawn: str) -> None:
    data = prepared("fit", tiny_vlm, dataset=drawn, validation_share=0.3, test_share=0.3)
    data.setup("test")
    parts = []
    for part in ("train", "validation", "test"):
        parts.append({Path(row["image"]["path"]).name for row in data.parts[part]})
    assert all(parts)
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 24
    assert sum(len(rows) for rows in data.parts.values()) == 48


def test_the_packaged_data_have_their_own_test_images(tiny_vlm: str) -> None:
    data = prepared("test", tiny_vlm, dataset="packaged:easy_vqa_negated", test_split="test", check_images=False)
    rows = data.parts["test"]
    answers = [row["answers"][0] for row in rows]
    assert set(rows["type"]) == {"absence"}
    assert answers.count("yes") / len(answers) == pytest.approx(0.5, abs=0.02)
    folders = {Path(row["image"]["path"]).parts[-3] for row in rows.select(range(0, len(rows), 50))}
    assert folders == {"test"}
