"""The recipe on tiny random vision-language models of three kinds, with drawn images of different sizes."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from PIL import Image
from torch import Tensor

datasets = pytest.importorskip("datasets", reason="the recipes' dependencies are not installed")
transformers = pytest.importorskip("transformers", reason="the recipes' dependencies are not installed")

from trainers import trainer  # noqa: E402
from vqa_models import COLOURS, draw, prepared  # noqa: E402

from lightning_flatlora import AdapterCheckpoint, EFMLoRA  # noqa: E402
from recipes.language.batches import LengthBatchSampler  # noqa: E402
from recipes.shared.cli import RecipeCLI  # noqa: E402
from recipes.shared.configs import config_arguments, methods_of  # noqa: E402
from recipes.shared.random_state import RandomState  # noqa: E402
from recipes.vqa import offline  # noqa: E402
from recipes.vqa.conversation import QuestionEncoder  # noqa: E402
from recipes.vqa.data import VQAData  # noqa: E402
from recipes.vqa.metrics import AnswerMetrics, expected_answer, vqa_accuracy  # noqa: E402
from recipes.vqa.model import DEFAULT_LORA, load_processor  # noqa: E402
from recipes.vqa.module import VQA  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("command_line", "own_datasets"),
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning"),  # runs of two steps
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
]

METHODS = methods_of("vqa")


# -- what is measured


def test_vqa_accuracy_is_by_agreeing_annotators() -> None:
    answers = ["dog"] * 2 + ["A dog."] + ["two cats"] * 2 + ["puppy"] + ["unanswerable"] * 4
    assert vqa_accuracy("Dog", answers) == pytest.approx(0.9)
    assert vqa_accuracy("2 cats", answers) == pytest.approx(0.6)
    assert vqa_accuracy("puppy!", answers) == pytest.approx(0.3)
    assert vqa_accuracy("fox", answers) == 0.0
    assert vqa_accuracy("unanswerable", answers) == 1.0
    assert expected_answer(answers) == "unanswerable"
    assert expected_answer(["a", "b"]) == "a"


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


# -- the command line


def run(command: str, method: str, model: str, drawn: str, *options: str) -> None:
    RecipeCLI(
        [
            command,
            *config_arguments("vqa", method),
            f"--model.init_args.model={model}",
            f"--data.init_args.dataset={drawn}",
            "--data.init_args.validation_share=0.3",
            "--data.init_args.test_share=0.3",
            "--data.init_args.batch_size=4",
            "--trainer.accelerator=cpu",
            "--trainer.log_every_n_steps=1",
            *options,
        ]
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_configuration_fits_tests_and_gives_a_peft_adapter(
    method: str, tiny_vlm: str, drawn: str, tmp_path: Path
) -> None:
    own = ["--data.init_args.test_split=null"]
    limits = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
    run("fit", method, tiny_vlm, drawn, *limits, *own)
    folder = tmp_path / "runs" / "vqa" / method / "version_0"
    assert (folder / "config.yaml").is_file()
    assert "val_exact_match" in (folder / "metrics.csv").read_text()
    assert list(folder.glob("events.out.tfevents*"))
    checkpoint, adapter = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "last"
    base = transformers.AutoModelForImageTextToText.from_pretrained(tiny_vlm)
    model = PeftModel.from_pretrained(base, str(adapter))
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    moved = {name: value for name, value in saved.items() if "lora_B" in name}
    assert any(value.abs().sum() > 0 for value in moved.values())
    for name, value in moved.items():
        torch.testing.assert_close(model.state_dict()[name.removeprefix("net.")], value)
    run("test", method, tiny_vlm, drawn, f"--ckpt_path={checkpoint}", "--trainer.limit_test_batches=1", *own)
    run("validate", method, tiny_vlm, drawn, f"--ckpt_path={checkpoint}", "--trainer.limit_val_batches=1", *own)


def test_predict_answers_the_questions_of_a_file(tiny_vlm: str, drawn: str, tmp_path: Path, jsonl: Any) -> None:
    rows = [{"image": f"{i}.png", "question": f"is it {colour}?"} for i, colour in enumerate(COLOURS)]
    asked = jsonl(rows, "asked.jsonl")
    run("predict", "lora", tiny_vlm, drawn, f"--data.init_args.questions={asked}", "--model.init_args.max_new_tokens=3")
    (path,) = tmp_path.glob("runs/**/answers.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in found] == [row["question"] for row in rows]
    assert [row["image"] for row in found] == [row["image"] for row in rows]
    assert all(isinstance(row["answer"], str) for row in found)


# -- going on after a stop


class Record(L.Callback):
    """Batches and losses of a run."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        ids = batch["inputs"]["input_ids"].flatten().tolist()
        self.steps.append((ids, trainer.callback_metrics["train_loss"].item()))


def fitted(tiny_vlm: str, drawn: str, folder: Path, ckpt_path: str | None = None) -> tuple[list[Tensor], Record]:
    """A run from one seed, or from a checkpoint after other random numbers have been drawn."""
    L.seed_everything(7 if ckpt_path is None else 99, verbose=False)
    record = Record()
    module = VQA(tiny_vlm, DEFAULT_LORA | {"lora_dropout": 0.2}, learning_rate=1e-2, validation_answers=4)
    saver = AdapterCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit = trainer(folder, record, EFMLoRA(rho=0.5), RandomState(), saver, enable_checkpointing=True)
    fit.fit(module, VQAData(drawn, batch_size=6, validation_share=0.3), ckpt_path=ckpt_path)
    return [p.detach().clone() for p in module.parameters() if p.requires_grad], record


def test_a_resumed_run_equals_the_uninterrupted_one(tiny_vlm: str, drawn: str, tmp_path: Path) -> None:
    weights, whole = fitted(tiny_vlm, drawn, tmp_path / "whole")
    steps = len(whole.steps)
    assert steps == 10  # two epochs
    for step in (2, 5, 7):
        again, rest = fitted(tiny_vlm, drawn, tmp_path / str(step), str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert rest.steps == whole.steps[step:], step
        assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True)), step


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
