"""The recipe on tiny random vision-language models of three kinds, with drawn images of different sizes."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor
from trainers import trainer
from vqa_models import draw, prepared

from recipes.language.batches import LengthBatchSampler
from recipes.vqa import offline
from recipes.vqa.conversation import QuestionEncoder
from recipes.vqa.data import VQAData
from recipes.vqa.metrics import AnswerMetrics, expected_answer
from recipes.vqa.model import DEFAULT_LORA, load_processor
from recipes.vqa.module import VQA

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

# -- what is measured


def test_metrics_by_hand() -> None:
    metrics = AnswerMetrics()
    metrics.update_loss(torch.tensor([-2.0, -3.0]), torch.tensor([1, 3]))
    ten = ["red"] * 2 + ["dark red"] * 8
    metrics.update_answers(
        ["Yes.", "no", "red", "three"],
        [["yes"], ["yes"], ten, ["3"]],
        ["yes/no", "yes/no", "colour", ""],
        [[], [], [], []],
    )
    assert metrics.loss.compute() == pytest.approx(5 / 4)
    assert metrics.exact_match.compute() == pytest.approx(2 / 4)
    assert metrics.vqa_accuracy.compute() == pytest.approx(0.6)
    assert expected_answer(["a", "b", "b"]) == "b"
    assert expected_answer(["a", "b"]) == "a"
    assert {name: metric.compute().item() for name, metric in metrics.per_type.items()} == {
        "type_yes_no": 0.5,
        "type_colour": 0,
    }


def test_validation_answers_its_first_questions_and_testing_all(
    tiny_vlm: str, drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = VQAData(drawn, batch_size=4, validation_share=0.3, test_share=0.3)
    module = VQA(tiny_vlm, DEFAULT_LORA, validation_answers=5)
    asked: list[str] = []

    def answers(prompts: dict[str, Tensor]) -> list[str]:
        texts = module.processor.tokenizer.batch_decode(prompts["input_ids"])
        asked.extend(texts)
        return ["no" if "is it" in text else "red" for text in texts]

    monkeypatch.setattr(module, "answers", answers)
    (results,) = trainer(tmp_path).validate(module, data, verbose=False)
    first = len(asked)
    assert 5 <= first < 9  # whole batches are answered
    rows = data.parts["validation"]
    order = list(chain.from_iterable(LengthBatchSampler(rows["length"], 4, data.seed, shuffle=False)))
    compared = [rows[place] for place in order[:5]]
    right = [row["answers"][0] == ("no" if row["type"] == "yes/no" else "red") for row in compared]
    assert results["val_exact_match"] == pytest.approx(sum(right) / 5)  # and five answers compared
    assert set(results) == {"val_loss", "val_exact_match", "val_exact_match_colour", "val_exact_match_yes_no"}
    (results,) = trainer(tmp_path).test(module, data, verbose=False)
    rows = list(data.parts["test"])
    assert len(asked) == first + len(rows)
    colours = [row["answers"][0] == "red" for row in rows if row["type"] == "colour"]
    yes_no = [row["answers"][0] == "no" for row in rows if row["type"] == "yes/no"]
    assert results["test_exact_match_colour"] == pytest.approx(sum(colours) / len(colours))
    assert results["test_exact_match_yes_no"] == pytest.approx(sum(yes_no) / len(yes_no))
    assert results["test_exact_match"] == pytest.approx(sum(colours + yes_no) / len(rows))


# -- the offline model


def test_the_offline_model_is_trained_once_and_goes_on_after_a_stop(
    drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(offline, "BATCH", 4)
    monkeypatch.setattr(offline, "SAVE_EVERY", 2)
    with pytest.raises(MisconfigurationException, match=r"trained once.*python -m recipes.vqa.offline"):
        VQA(lora=DEFAULT_LORA).prepare_data()
    steps: list[int] = []
    learn = VQA.training_step

    def stopping(module: VQA, batch: Any, batch_idx: int) -> Tensor:
        steps.append(module.global_step)
        if len(steps) == 4:
            raise RuntimeError("no power")
        return learn(module, batch, batch_idx)

    monkeypatch.setattr(VQA, "training_step", stopping)
    with pytest.raises(RuntimeError, match="no power"):
        offline.build(steps=4, dataset=drawn)
    folder = offline.build(steps=4, dataset=drawn)
    assert steps == [0, 1, 2, 3, 2, 3]
    assert offline.build(steps=4, dataset=drawn) == folder
    assert len(steps) == 6  # nothing is trained again
    assert "delete" in capsys.readouterr().out
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}
    module = VQA("packaged", DEFAULT_LORA)
    module.configure_model()
    processor = load_processor("packaged")
    start = offline.build_model(processor.tokenizer).get_input_embeddings().weight
    assert module.net.get_input_embeddings().weight.shape == start.shape
    assert processor.tokenizer.decode(processor.tokenizer("Wörter, 多")["input_ids"]) == "Wörter, 多"  # any text


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "missing.jsonl"}, "missing.jsonl.*no such file"),
        ({"dataset": "packaged:chess"}, "unknown packaged task 'chess'.*packaged:easy_vqa"),
        ({"dataset": "packaged:easy_vqa", "split": "dev"}, "splits train and test, got 'dev'"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"validation_share": 0.5, "test_share": 0.5}, "leave something to train on, got 0.5 and 0.5"),
        ({"check_images": False, "skip_unreadable": True}, "skip_unreadable needs check_images"),
        ({"chat_template": "missing.jinja"}, "chat_template='missing.jinja'"),
        ({"max_length": 5}, "nothing is left.*30 left out: longer than max_length=5 tokens"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, tiny_vlm: str, drawn: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        prepared("fit", tiny_vlm, **{"dataset": drawn, **options})


ROW = {"image": "0.png", "question": "why?", "answer": "so"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "0.png", "reply": "b"}, r"columns \['image', 'reply'\].*'question', 'answer' or 'answers'"),
        (ROW | {"answer": " "}, r"data.jsonl', row 0 has no answer \(its question: 'why\?'\)"),
        (ROW | {"question": ""}, r"data.jsonl', row 0 has no question"),
        (ROW | {"image": None}, "1 of 1 questions have no image, the first in row 0"),
        (ROW | {"image": "missing.png"}, r"missing.png \(no such file\)"),
        (ROW | {"image": "broken.png"}, r"broken.png \(.*cannot identify"),
        (ROW | {"image": "line.jpg"}, r"line.jpg \(1 x 300 pixels: it may be 200 times as long as wide at most\)"),
        (ROW | {"question": "what is an <image>?"}, "holds '<image>', the mark of an image"),
        (ROW | {"answer": "an <image>"}, "the answer 'an <image>' holds '<image>', the mark of an image"),
        (ROW | {"question": 1}, "row 0: question must be a text, got 1"),
        (ROW | {"hint": 2}, "row 0: hint must be a text, got 2"),
        (ROW | {"image": 5}, "row 0: image must be an image or the name of a file, got 5"),
        (ROW | {"answer": None, "answers": [{"text": "so"}]}, r"or hold one as 'answer', got \{'text': 'so'\}"),
        (ROW | {"choices": ["so", None], "answer": 0}, r"choices must be a list of texts, got \['so', None\]"),
    ],
)
def test_bad_rows_are_named(row: Any, message: str, tiny_vlm: str, tmp_path: Path, jsonl: Any) -> None:
    draw(tmp_path, 1)
    (tmp_path / "broken.png").write_text("no image")
    Image.new("RGB", (1, 300)).save(tmp_path / "line.jpg")
    with pytest.raises(MisconfigurationException, match=message):
        prepared("fit", tiny_vlm, dataset=jsonl([row]), validation_share=0)


def test_one_unreadable_image_can_be_skipped(tiny_vlm: str, tmp_path: Path, jsonl: Any) -> None:
    rows = draw(tmp_path, 6)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])  # cut off
    name = jsonl(rows)
    with pytest.raises(MisconfigurationException, match=r"1 of 6 images can't be read: .*2.png.*skip_unreadable"):
        prepared("fit", tiny_vlm, dataset=name, validation_share=0)
    with pytest.warns(UserWarning, match=r"1 of 6 images can't be read: .*2.png"):
        data = prepared("fit", tiny_vlm, dataset=name, validation_share=0, skip_unreadable=True)
    assert data.reports["train"].endswith("10 questions; 2 left out: no image that can be read")


def test_predict_needs_questions(tiny_vlm: str, tmp_path: Path, jsonl: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"predict needs --data.questions"):
        prepared("predict", tiny_vlm)
    with pytest.raises(MisconfigurationException, match=r"line 1: no image"):
        prepared("predict", tiny_vlm, questions=jsonl([{"question": "why?"}]))
    with pytest.raises(MisconfigurationException, match=r"0.png.*no such file"):
        prepared("predict", tiny_vlm, questions=jsonl([{"image": "0.png", "question": "why?"}]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"image": ["0.png"]}, r"line 1: image must be the name of a file, got \['0.png'\]"),
        ({"question": 0}, "line 1: question must be a text, got 0"),
        ({"hint": 2}, "line 1: hint must be a text, got 2"),
        ({"choices": "yes,no"}, "line 1: choices must be a list of texts, got 'yes,no'"),
        ({"choices": [str(number) for number in range(40)]}, "line 1 has 40 choices, and there are 26 letters"),
    ],
)
def test_predict_names_bad_lines(more: Any, message: str, tiny_vlm: str, tmp_path: Path, jsonl: Any) -> None:
    draw(tmp_path, 1)
    with pytest.raises(MisconfigurationException, match=message):
        prepared("predict", tiny_vlm, questions=jsonl([{"image": "0.png", "question": "why?", **more}]))


def test_predict_asks_as_fit_does(tiny_vlm: str, tmp_path: Path, jsonl: Any) -> None:
    draw(tmp_path, 1)
    choices = {"text": ["a cat", "a dog"], "label": ["A", "B"]}
    line = {"image": "0.png", "question": "who?", "choices": choices}
    asked = prepared("predict", tiny_vlm, questions=jsonl([line])).parts["predict"]
    assert "A. a cat\nB. a dog" in asked[0]["prompt"]


def test_a_processor_without_chat_template_is_refused(tiny_vlm: str) -> None:
    processor = load_processor(tiny_vlm)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(MisconfigurationException, match=r"no single chat template.*set chat_template"):
        QuestionEncoder(processor)


def test_bad_models_are_named(tiny_vlm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    with pytest.raises(MisconfigurationException, match=r"model='nowhere/at-all' can't be loaded.*'packaged'"):
        _ = VQA("nowhere/at-all", DEFAULT_LORA).processor
    with pytest.raises(MisconfigurationException, match="target_modules"):
        VQA(tiny_vlm, {"target_modules": ["nothing"]}).configure_model()
    tokenizer = load_processor(tiny_vlm).tokenizer.backend_tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "text")
    transformers.LlamaConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(MisconfigurationException, match=r"takes no images and text.*vision-language model"):
        load_processor(str(tmp_path / "text"))
    with pytest.raises(MisconfigurationException, match=r"lora=null.*needs dtype='float32', got 'bfloat16'"):
        VQA(tiny_vlm, None, "bfloat16")
