"""The configurations of the paper's rows, on files with the Hub's schemas and real classes of models and processors."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from PIL import Image
from recipe_runs import config_arguments
from vqa_kinds import OWN_CLASSES, qwen2_5_vl
from vqa_models import COLOURS

from recipes.command_line.cli import RecipeCLI
from recipes.command_line.configs import RECIPES
from recipes.vqa.model import load_processor
from recipes.vqa.module import VQA

pytestmark = [
    pytest.mark.usefixtures("command_line", "own_datasets"),
    pytest.mark.filterwarnings("ignore:.*4 of 12 rows can't be used. row 2 has 0 images, but needs one:UserWarning"),
]

CONFIGS = RECIPES / "vqa" / "configs"
QUICK = ["--trainer.precision=32-true", "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
QUICK += ["--trainer.val_check_interval=2", "--trainer.accumulate_grad_batches=1", "--trainer.log_every_n_steps=1"]
QUICK += ["--model.init_args.lora.r=2", "--model.init_args.max_new_tokens=3"]
QUICK += ["--data.init_args.batch_size=4", "--data.init_args.num_workers=0"]
TEXT, TEXTS = datasets.Value("string"), [datasets.Value("string")]
SCIENCEQA = datasets.Features(
    {
        "image": datasets.Image(),
        "question": TEXT,
        "choices": TEXTS,
        "answer": datasets.Value("int8"),
        **dict.fromkeys(
            ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), TEXT
        ),
    }
)
VIZWIZ = datasets.Features(
    {"question_id": TEXT, "image": datasets.Image(), "question": TEXT, "answers": TEXTS, "category": TEXT}
)


def saved(folder: Path, build: Callable[[], Any]) -> str:
    torch.manual_seed(0)
    model, processor = build()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def drawn(place: int) -> Image.Image:
    return Image.new("RGB", (28 + 14 * (place % 4), 28 + place), COLOURS[place % 3])


def save_scienceqa(folder: Path, rows: int = 12) -> str:
    """A folder with the layout of derek-thomas/ScienceQA; every third question has no image."""
    for number, split in enumerate(("train", "validation", "test")):
        table: list[dict[str, Any]] = []
        for place in range(rows):
            row: dict[str, Any] = dict.fromkeys(SCIENCEQA, "")
            row |= {"question": "Which is it?", "choices": list(COLOURS), "answer": place % 3, "task": "closed choice"}
            row |= {"subject": ("natural science", "language science")[place % 2], "category": f"Colours {place}"}
            row["image"] = None if place % 3 == 2 else drawn(place + 20 * number)
            table.append(row)
        path = folder / "data" / f"{split}-00000-of-00001-1028f23e353fbe3e.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(table, features=SCIENCEQA).to_parquet(path)
    return str(folder)


def people(place: int) -> list[str]:
    return ["unanswerable"] * 10 if place % 4 == 0 else [COLOURS[place % 3]] * 6 + ["It's a colour."] * 4


def save_vizwiz_hub(folder: Path) -> str:
    """A folder with the layout of lmms-lab/VizWiz-VQA, whose test split has no answers."""
    for split, rows in (("val", 24), ("test", 3)):
        table = []
        for place in range(rows):
            row = {"question_id": f"VizWiz_{split}_{place:08}", "image": drawn(place), "question": "what colour is it?"}
            row["answers"] = people(place) if split == "val" else None
            row["category"] = "unanswerable" if place % 4 == 0 else "other"
            table.append(row)
        path = folder / "data" / f"{split}-00000-of-00001-7775fd61bc6a3d98.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(table, features=VIZWIZ).to_parquet(path)
    return str(folder)


def save_vizwiz(folder: Path) -> None:
    """A folder "vizwiz" with the layout of vizwiz.org's files."""
    (folder / "vizwiz" / "Annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "vizwiz" / split).mkdir()
        rows = []
        for place in range(24):
            name = f"VizWiz_{split}_{place:08}.jpg"
            drawn(place).save(folder / "vizwiz" / split / name)
            given = [{"answer_confidence": "yes", "answer": answer} for answer in people(place)]
            row = {"image": name, "question": "what colour is it?", "answers": given, "answerable": int(place % 4 > 0)}
            rows.append(row | {"answer_type": "other" if place % 4 else "unanswerable"})
        (folder / "vizwiz" / "Annotations" / f"{split}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of all random models."""
    found = {}
    for kind, build in OWN_CLASSES.items():
        found[kind] = saved(tmp_path_factory.mktemp(kind), build)
    return found


def run(command: str, model: str, overlays: list[str], *options: str, method: str = "efmlora") -> RecipeCLI:
    """Run a command with a method's configurations on top of those of the data."""
    base, *rest = config_arguments("vqa", method)
    laid = [f"--config={CONFIGS / name}.yaml" for name in overlays]
    return RecipeCLI([command, base, *laid, *rest, f"--model.init_args.model={model}", *QUICK, *options])


def logged(folder: Path) -> str:
    (file,) = folder.glob("runs/vqa/efmlora/version_0/metrics.csv")
    return file.read_text().splitlines()[0]


def test_scienceqa_from_the_hub(kinds: dict[str, str], tmp_path: Path) -> None:
    dataset = f"--data.init_args.dataset={save_scienceqa(tmp_path / 'hub')}"
    cli = run("fit", kinds["qwen2_5_vl"], ["scienceqa"], dataset)
    row = cli.datamodule.parts["train"][0]
    assert row["question"] == "Which is it? A. red, B. green, C. blue"
    assert (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>" in row["text"]
    )
    assert cli.datamodule.reports["train"].endswith("8 questions")
    names = logged(tmp_path)
    assert {"val_exact_match", "val_lmms_eval_match", "val_exact_match_natural_science"} <= set(names.split(","))
    assert "colours" not in names
    (group,) = cli.trainer.optimizers[0].param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.1)


def test_vizwiz_from_its_files(kinds: dict[str, str], tmp_path: Path) -> None:
    save_vizwiz(tmp_path)
    cli = run("fit", kinds["qwen2_5_vl"], ["vizwiz"], "--data.init_args.validation_share=0.3")
    row = cli.datamodule.parts["train"][0]
    assert row["question"] == (
        'Question: what colour is it? When the information is insufficient, respond with "Unanswerable". '
        "Answer the question using a single word or phrase."
    )
    assert {"val_vqa_accuracy", "val_exact_match_unanswerable"} <= set(logged(tmp_path).split(","))


@pytest.mark.parametrize("kind", [kind for kind in OWN_CLASSES if kind != "qwen2_5_vl"])
def test_vizwiz_from_the_hub(kind: str, kinds: dict[str, str], tmp_path: Path) -> None:
    dataset = f"--data.init_args.dataset={save_vizwiz_hub(tmp_path / 'hub')}"
    share = "--data.init_args.validation_share=0.3"
    cli = run("fit", kinds[kind], ["vizwiz", "vizwiz_hub"], dataset, share)
    adapted = {name.rpartition(".lora_A")[0] for name, _ in cli.model.net.named_parameters() if "lora_A" in name}
    linear = set()
    for name, module in transformers.AutoModelForImageTextToText.from_pretrained(kinds[kind]).named_modules():
        if isinstance(module, torch.nn.Linear) and ".language_model." in name:
            linear.add(f"base_model.model.{name}")
    assert adapted == linear
    assert len(linear) == 14
    assert type(load_processor(kinds[kind])).__name__.lower().startswith(kind.replace("_", ""))


# -- what is trained, and how


def trained(cli: RecipeCLI) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in cli.model.net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "connector"), [("qwen2_5_vl", "merger"), ("internvl", "multi_modal_projector")])
def test_the_connector_may_be_trained(kind: str, connector: str, kinds: dict[str, str], tmp_path: Path) -> None:
    dataset = f"--data.init_args.dataset={save_scienceqa(tmp_path / 'hub')}"
    options = [f"--model.init_args.lora.modules_to_save=[{connector}]", "--trainer.precision=bf16-mixed"]
    cli = run("fit", kinds[kind], ["scienceqa"], dataset, *options)
    weights = trained(cli)
    outside = {name: weight for name, weight in weights.items() if "lora_" not in name}
    assert outside
    assert all(f".{connector}.modules_to_save." in name for name in outside)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    base = transformers.AutoModelForImageTextToText.from_pretrained(kinds[kind])
    start = base.state_dict()
    changed = {}
    for name, weight in outside.items():
        plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        changed[plain] = not torch.equal(weight, start[plain].bfloat16().float())
    assert all(changed.values()), changed
    (adapter,) = tmp_path.glob("runs/vqa/efmlora/version_0/checkpoints/last")
    loaded = PeftModel.from_pretrained(base, str(adapter)).state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(loaded[name], weight)


def test_the_language_model_alone_is_quantized(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    dataset = f"--data.init_args.dataset={save_scienceqa(tmp_path / 'hub')}"
    # bitsandbytes' CPU kernel needs at least as many columns as a block has.
    model = saved(tmp_path / "wide", partial(qwen2_5_vl, width=64))
    cli = run("fit", model, ["scienceqa"], dataset, "--model.init_args.quantization=4bit")
    quantized = [n for n, module in cli.model.net.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == 14
    assert all(".language_model.layers." in name for name in quantized)
    with pytest.raises(MisconfigurationException, match=r"lora=null.*got None and '4bit'"):
        VQA(model, None, quantization="4bit")
