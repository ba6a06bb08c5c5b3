"""The recipe on tiny random vision-language models of three kinds, with drawn images of different sizes."""

import json
from collections.abc import Callable, Iterator
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

from vqa_models import COLOURS, KINDS, draw, save_model  # noqa: E402

from lightning_flatlora import AdapterCheckpoint, EFMLoRA  # noqa: E402
from recipes.cli import RecipeCLI  # noqa: E402
from recipes.instruction_tuning.chat import IGNORED  # noqa: E402
from recipes.random_state import RandomState  # noqa: E402
from recipes.vqa import offline, sources  # noqa: E402
from recipes.vqa.conversation import QuestionEncoder  # noqa: E402
from recipes.vqa.data import VQAData  # noqa: E402
from recipes.vqa.metrics import AnswerMetrics, expected_answer, vqa_accuracy  # noqa: E402
from recipes.vqa.model import DEFAULT_LORA, load_processor  # noqa: E402
from recipes.vqa.module import VQA  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning"),  # runs of two steps
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
]

CONFIGS = Path(sources.__file__).parent / "configs"
METHODS = ("efmlora", "fmlora", "fmlora_manual", "lora")


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])  # LightningCLI warns of other arguments beside its own
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# -- models and data


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, folders: dict[str, str]) -> str:
    return folders[request.param]


@pytest.fixture
def tiny(folders: dict[str, str]) -> str:
    return folders["idefics3"]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[list[dict[str, Any]]], str]:
    def write(rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write


@pytest.fixture
def drawn(tmp_path: Path, jsonl: Any) -> str:
    return jsonl(draw(tmp_path))


def prepared(stage: str, processor: str, **options: Any) -> VQAData:
    data = VQAData(**{"processor": processor, "validation_share": 0.3, **options})
    data.prepare_data()
    data.setup(stage)
    return data


def first_batch(data: VQAData) -> Any:
    return next(iter(data.train_dataloader()))


def trainer(tmp_path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | options
    return L.Trainer(
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


# -- tokens, labels and images


def test_the_loss_is_on_the_answer_and_its_end_token(model: str, drawn: str) -> None:
    data = prepared("fit", model, dataset=drawn, batch_size=8)
    tokenizer = data.encoder.tokenizer
    batch = first_batch(data)
    seen = set()
    for ids, labels, answers in zip(batch["inputs"]["input_ids"], batch["labels"], batch["answers"], strict=True):
        learnt = labels != IGNORED
        assert torch.equal(labels[learnt], ids[learnt])
        assert tokenizer.decode(labels[learnt]) == f" {answers[0]}<end_of_utterance>"
        places = learnt.nonzero().squeeze(1)
        assert places[-1] - places[0] == len(places) - 1
        before = tokenizer.decode(ids[: places[0]])
        assert before.endswith("?<end_of_utterance>\n<|im_start|>Assistant:")
        assert before.startswith("<|im_start|>User:<")
        assert tokenizer.decode(ids[places[-1] + 1 :]).replace("<pad>", "") == "\n"
        seen.add(answers[0])
    assert len(seen) > 1


def test_images_of_other_sizes_take_other_numbers_of_tokens(folders: dict[str, str], drawn: str) -> None:
    data = prepared("fit", folders["qwen2_vl"], dataset=drawn, batch_size=16)
    batch = first_batch(data)
    mark = data.encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    counts = (batch["inputs"]["input_ids"] == mark).sum(dim=1)
    grids = batch["inputs"]["image_grid_thw"].prod(dim=1) // 4
    assert torch.equal(counts, grids)
    assert len(counts.unique()) > 2


def test_a_template_without_end_token_gets_one(tiny: str) -> None:
    template = "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"  # noqa: E501
    encoder = QuestionEncoder(load_processor(tiny), template)
    rendered = encoder.render("why?", "so")
    assert rendered.text == "<image>why? so<end_of_utterance>"
    ids = encoder.tokenizer(rendered.text)["input_ids"]
    assert encoder.tokenizer.decode(ids[-rendered.learnt :]) == "so<end_of_utterance>"
    assert (rendered.rest, rendered.length) == (0, len(ids))


def test_a_system_prompt_comes_first(tiny: str) -> None:
    encoder = QuestionEncoder(load_processor(tiny), system_prompt="Be brief.")
    assert encoder.prompt("why?").startswith(
        "<|im_start|>System: Be brief.<end_of_utterance>\n<|im_start|>User:<image>"
    )


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
    """The rows of the first batch, in its order."""
    (places,) = list(data.train_dataloader().sampler)[:1]
    rows = [data.parts["train"][place] for place in places]
    assert [row["answers"] for row in rows] == batch["answers"]
    return rows


def by_hand(net: Any, data: VQAData, row: Any) -> float:
    """Log-likelihood of one row's answer from all logits, without padding."""
    image = Image.open(row["image"]["path"]).convert("RGB")
    inputs = data.encoder.processor(text=[row["text"]], images=[[image]], return_tensors="pt")
    ids = inputs["input_ids"][0]
    answer = data.encoder.tokenizer(f" {row['answers'][0]}<end_of_utterance>")["input_ids"]
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


def test_null_trains_all_weights(tiny: str, drawn: str, tmp_path: Path) -> None:
    module = VQA(tiny, None, "float32", learning_rate=1e-2)
    fit = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit.fit(module, VQAData(drawn, batch_size=4))
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
    assert {name: metric.compute().item() for name, metric in metrics.per_type.items()} == {"yes_no": 0.5, "colour": 0}


def test_validation_answers_its_first_questions_and_testing_all(
    tiny: str, drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = VQAData(drawn, batch_size=4, validation_share=0.3, test_share=0.3)
    module = VQA(tiny, DEFAULT_LORA, validation_answers=5)
    asked: list[str] = []

    def answers(prompts: dict[str, Tensor]) -> list[str]:
        texts = module.processor.tokenizer.batch_decode(prompts["input_ids"])
        asked.extend(texts)
        return ["no" if "is it" in text else "red" for text in texts]

    monkeypatch.setattr(module, "answers", answers)
    (results,) = trainer(tmp_path).validate(module, data, verbose=False)
    first = len(asked)
    assert 5 <= first < 9  # whole batches are answered
    assert (results["val_exact_match"] * 5) % 1 == pytest.approx(0, abs=1e-5)  # and five answers compared
    assert set(results) == {"val_loss", "val_exact_match", "val_exact_match_colour", "val_exact_match_yes_no"}
    (results,) = trainer(tmp_path).test(module, data, verbose=False)
    rows = list(data.parts["test"])
    assert len(asked) == first + len(rows)
    colours = [row["answers"][0] == "red" for row in rows if row["type"] == "colour"]
    yes_no = [row["answers"][0] == "no" for row in rows if row["type"] == "yes/no"]
    assert results["test_exact_match_colour"] == pytest.approx(sum(colours) / len(colours))
    assert results["test_exact_match_yes_no"] == pytest.approx(sum(yes_no) / len(yes_no))
    assert results["test_exact_match"] == pytest.approx(sum(colours + yes_no) / len(rows))


# -- data sets


def test_answers_of_ten_people(tiny: str, tmp_path: Path, jsonl: Any) -> None:
    draw(tmp_path / "train", 4)
    people = [{"answer": a, "answer_confidence": "yes"} for a in ["soda"] * 6 + ["cola"] * 4]
    rows = [
        {"image": f"{i}.png", "question": "what is it?", "answers": people, "answer_type": "other"} for i in range(4)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    options = {"dataset": str(tmp_path / "{split}.json"), "image_folder": str(tmp_path / "{split}")}
    data = prepared("fit", tiny, **options, validation_share=0)
    row = data.parts["train"][0]
    assert row["answers"] == ["soda"] * 6 + ["cola"] * 4
    assert "Assistant: soda<" in row["text"]
    assert row["type"] == "other"


def test_choices_become_lines_and_the_answer_a_letter(tiny: str, tmp_path: Path) -> None:
    """In the columns of ScienceQA, with images inside the file, half of them missing."""
    images = [Image.new("RGB", (30, 40), colour) for colour in COLOURS]
    rows = {
        "image": [*images, None, None, None],
        "question": ["Which is it?"] * 6,
        "choices": [["red", "green", "blue"]] * 6,
        "answer": [0, 1, 2] * 2,
        "hint": ["Look.", "", "", "", "", ""],
        "subject": ["natural science"] * 6,
    }
    text = datasets.Value("string")
    features = {"image": datasets.Image(), "question": text, "choices": [text], "answer": datasets.Value("int8")}
    features = datasets.Features({**features, "hint": text, "subject": text})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    name = str(tmp_path / "train.parquet")
    with pytest.raises(
        MisconfigurationException, match=r"3 of 6 questions have no image, the first in row 3.*skip_unr"
    ):
        prepared("fit", tiny, dataset=name, validation_share=0)
    data = prepared("fit", tiny, dataset=name, validation_share=0, skip_unreadable=True)
    assert data.reports["train"].endswith("for train: 3 questions; 3 left out: no image that can be read")
    row = data.parts["train"][0]
    assert row["question"] == (
        "Look.\nWhich is it?\nA. red\nB. green\nC. blue\nAnswer with the letter of the right choice."
    )
    assert (row["answers"], row["type"]) == (["A"], "natural science")
    assert first_batch(data)["inputs"]["pixel_values"].shape[0] == 3


def test_questions_about_an_image_stay_together(tiny: str, drawn: str) -> None:
    data = prepared("fit", tiny, dataset=drawn, validation_share=0.3, test_share=0.3)
    data.setup("test")
    parts = [{Path(row["image"]["path"]).name for row in data.parts[part]} for part in ("train", "validation", "test")]
    assert all(parts)
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 24
    assert sum(len(rows) for rows in data.parts.values()) == 48


def test_the_packaged_data_have_their_own_test_images(tiny: str) -> None:
    data = prepared("test", tiny, dataset="packaged:easy_vqa_negated", test_split="test", check_images=False)
    rows = data.parts["test"]
    answers = [row["answers"][0] for row in rows]
    assert set(rows["type"]) == {"absence"}
    assert answers.count("yes") / len(answers) == pytest.approx(0.5, abs=0.02)
    folders = {Path(row["image"]["path"]).parts[-3] for row in rows.select(range(0, len(rows), 50))}
    assert folders == {"test"}


def test_the_packaged_tasks_part_the_questions() -> None:
    whole, plain, negated = (sources.load(f"packaged:{name}", "test") for name in sources.TASKS)
    assert len(whole) == 9_673
    kinds = [set(table["type"]) for table in (whole, plain, negated)]
    assert kinds == [{"colour", "shape", "presence", "absence"}, {"colour", "shape", "presence"}, {"absence"}]
    known, some, others = (
        {(file["path"], *asked) for file, *asked in zip(table["image"], table["question"], strict=True)}
        for table in (whole, plain, negated)
    )
    assert some | others < known
    assert not some & others


# -- the command line


def run(command: str, methods: str | tuple[str, ...], model: str, drawn: str, *options: str) -> None:
    """A command with a method's configuration, or with one and an overlay."""
    RecipeCLI(
        [
            command,
            *(f"--config={CONFIGS / method}.yaml" for method in ((methods,) if isinstance(methods, str) else methods)),
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
    method: str, tiny: str, drawn: str, tmp_path: Path
) -> None:
    own = ["--data.init_args.test_split=null"]
    limits = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
    run("fit", method, tiny, drawn, *limits, *own)
    folder = tmp_path / "runs" / "vqa" / method / "version_0"
    assert (folder / "config.yaml").is_file()
    assert "val_exact_match" in (folder / "metrics.csv").read_text()
    assert list(folder.glob("events.out.tfevents*"))
    checkpoint, adapter = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "last"
    base = transformers.AutoModelForImageTextToText.from_pretrained(tiny)
    model = PeftModel.from_pretrained(base, str(adapter))
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    moved = {name: value for name, value in saved.items() if "lora_B" in name}
    assert any(value.abs().sum() > 0 for value in moved.values())
    for name, value in moved.items():
        torch.testing.assert_close(model.state_dict()[name.removeprefix("net.")], value)
    run("test", method, tiny, drawn, f"--ckpt_path={checkpoint}", "--trainer.limit_test_batches=1", *own)
    run("validate", method, tiny, drawn, f"--ckpt_path={checkpoint}", "--trainer.limit_val_batches=1", *own)


@pytest.mark.parametrize("overlay", ["scienceqa", "vizwiz"])
def test_the_overlays_train_on_data_in_their_columns(
    overlay: str, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_like(overlay, tmp_path)
    limits = ["--trainer.max_steps=1", "--trainer.accumulate_grad_batches=1", "--trainer.val_check_interval=1"]
    limits.append("--data.init_args.num_workers=0")
    run("fit", ("efmlora", overlay), folders["qwen2_vl"], str(tmp_path / "{split}.parquet"), *limits)
    (logged,) = tmp_path.glob("runs/vqa/efmlora/version_0/metrics.csv")
    assert "val_exact_match" in logged.read_text()
    assert ("val_vqa_accuracy" in logged.read_text()) == (overlay == "vizwiz")
    config = (logged.parent / "config.yaml").read_text()
    assert f"rho: {0.2 if overlay == 'scienceqa' else 0.05}" in config
    assert config.count("rho:") == 1


def hub_like(name: str, folder: Path) -> None:
    """A few rows in the columns of the Hub's data set, in files of its splits."""
    images = [Image.new("RGB", (28 + i, 40), COLOURS[i % 3]) for i in range(12)]
    if name == "scienceqa":
        splits = ("train", "validation", "test")
        columns = {"question": "Which?", "choices": ["red", "green"], "answer": 1, "hint": "", "subject": "biology"}
        images[3] = None
    else:
        splits = ("val",)
        columns = {"question_id": "7.jpg", "question": "What?", "answers": ["red"] * 10, "category": "other"}
    features = datasets.Dataset.from_list([columns]).features | {"image": datasets.Image()}
    rows = {key: [value] * 12 for key, value in columns.items()} | {"image": images}
    for split in splits:
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(folder / f"{split}.parquet")


def test_predict_answers_the_questions_of_a_file(tiny: str, drawn: str, tmp_path: Path, jsonl: Any) -> None:
    rows = [{"image": f"{i}.png", "question": f"is it {colour}?"} for i, colour in enumerate(COLOURS)]
    asked = jsonl(rows, "asked.jsonl")
    run("predict", "lora", tiny, drawn, f"--data.init_args.questions={asked}", "--model.init_args.max_new_tokens=3")
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


def fitted(tiny: str, drawn: str, folder: Path, ckpt_path: str | None = None) -> tuple[list[Tensor], Record]:
    """A run from one seed, or from a checkpoint after other random numbers have been drawn."""
    L.seed_everything(7 if ckpt_path is None else 99, verbose=False)
    record = Record()
    module = VQA(tiny, DEFAULT_LORA | {"lora_dropout": 0.2}, learning_rate=1e-2, validation_answers=4)
    saver = AdapterCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit = trainer(folder, record, EFMLoRA(rho=0.5), RandomState(), saver, enable_checkpointing=True)
    fit.fit(module, VQAData(drawn, batch_size=6, validation_share=0.3), ckpt_path=ckpt_path)
    return [p.detach().clone() for p in module.parameters() if p.requires_grad], record


def test_a_resumed_run_equals_the_uninterrupted_one(tiny: str, drawn: str, tmp_path: Path) -> None:
    weights, whole = fitted(tiny, drawn, tmp_path / "whole")
    steps = len(whole.steps)
    assert steps == 10  # two epochs
    for step in (2, 5, 7):
        again, rest = fitted(tiny, drawn, tmp_path / str(step), str(tmp_path / "whole" / f"step={step}.ckpt"))
        assert rest.steps == whole.steps[step:], step
        assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True)), step


# -- the offline model


def test_the_offline_model_is_trained_once_and_goes_on_after_a_stop(
    drawn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
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
def test_bad_arguments_are_named(options: dict[str, Any], message: str, tiny: str, drawn: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        prepared("fit", tiny, **{"dataset": drawn, **options})


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
        (ROW | {"question": "what is an <image>?"}, "holds '<image>', the mark of an image"),
    ],
)
def test_bad_rows_are_named(row: Any, message: str, tiny: str, tmp_path: Path, jsonl: Any) -> None:
    draw(tmp_path, 1)
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(MisconfigurationException, match=message):
        prepared("fit", tiny, dataset=jsonl([row]), validation_share=0)


def test_one_unreadable_image_can_be_skipped(tiny: str, tmp_path: Path, jsonl: Any) -> None:
    rows = draw(tmp_path, 6)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])  # cut off
    name = jsonl(rows)
    with pytest.raises(MisconfigurationException, match=r"1 of 6 images can't be read: .*2.png.*skip_unreadable"):
        prepared("fit", tiny, dataset=name, validation_share=0)
    with pytest.warns(UserWarning, match=r"1 of 6 images can't be read: .*2.png"):
        data = prepared("fit", tiny, dataset=name, validation_share=0, skip_unreadable=True)
    assert data.reports["train"].endswith("10 questions; 2 left out: no image that can be read")


def test_predict_needs_questions(tiny: str, tmp_path: Path, jsonl: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"predict needs --data.questions"):
        prepared("predict", tiny)
    with pytest.raises(MisconfigurationException, match=r"line 1: no image"):
        prepared("predict", tiny, questions=jsonl([{"question": "why?"}]))
    with pytest.raises(MisconfigurationException, match=r"0.png.*no such file"):
        prepared("predict", tiny, questions=jsonl([{"image": "0.png", "question": "why?"}]))


def test_a_processor_without_chat_template_is_refused(tiny: str) -> None:
    processor = load_processor(tiny)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(MisconfigurationException, match=r"no single chat template.*set chat_template"):
        QuestionEncoder(processor)


def test_bad_models_are_named(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    with pytest.raises(MisconfigurationException, match=r"model='nowhere/at-all' can't be loaded.*'packaged'"):
        _ = VQA("nowhere/at-all", DEFAULT_LORA).processor
    with pytest.raises(MisconfigurationException, match="target_modules"):
        VQA(tiny, {"target_modules": ["nothing"]}).configure_model()
    tokenizer = load_processor(tiny).tokenizer.backend_tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "text")
    transformers.LlamaConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(MisconfigurationException, match=r"takes no images and text.*vision-language model"):
        load_processor(str(tmp_path / "text"))
    with pytest.raises(MisconfigurationException, match=r"lora=null.*needs dtype='float32', got 'bfloat16'"):
        VQA(tiny, None, "bfloat16")
