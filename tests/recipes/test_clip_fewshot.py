"""The few-shot recipe on a tiny random CLIP and generated images in folders."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clip_contrastive_runs import CLIP, save_model
from clip_fewshot_runs import data_of, filled, options_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import config_arguments
from recipe_runs import trainer as plain_trainer
from torch import nn

from recipes.clip.export import export
from recipes.clip.images import image_files
from recipes.clip_fewshot import sources
from recipes.clip_fewshot.data import FewShotData
from recipes.clip_fewshot.evaluation import Evaluation
from recipes.clip_fewshot.module import FewShot
from recipes.command_line.cli import RecipeCLI
from recipes.language.evaluation import right_choices
from recipes.training.diverged import wrong_where_nan

pytestmark = pytest.mark.usefixtures("command_line")

OTHER_CLASSES = ["--data.class_names={red: rose}"]
LORA = {"r": 2, "lora_alpha": 8, "lora_dropout": 0.25}
trainer = partial(plain_trainer, max_epochs=1, num_sanity_val_steps=0)


# -- the model's inputs


def test_evaluation_ensembles_templates_and_training_takes_the_first(
    tiny_clip: str, images: Path, tmp_path: Path
) -> None:
    module = FewShot(tiny_clip, None, lora=LORA | {"lora_dropout": 0.0})
    assert any(isinstance(part, open_clip.transformer.QuickGELU) for part in module.clip.net.modules())
    templates = ["a photo of a {}.", "{} here.", "one {}"]
    data = data_of(images, templates=templates)
    fit = trainer(tmp_path)
    fit.validate(module, data, verbose=False)
    module.eval()
    batch = next(iter(data.val_dataloader()))
    net, scale = module.net.get_base_model(), module.net.get_base_model().logit_scale.exp()
    with torch.no_grad():
        encoded = net.encode_image(batch["images"], normalize=True)
        classifier = open_clip.build_zero_shot_classifier(net, module.clip.tokenizer, data.classes, templates)
        expected = (scale * encoded @ classifier).softmax(dim=1)
        torch.testing.assert_close(module.probabilities(batch["images"]), expected)
        first = net.encode_text(
            module.clip.tokenizer([f"a photo of a {name}." for name in data.classes]), normalize=True
        )
        loss = torch.nn.functional.cross_entropy(scale * encoded @ first.T, batch["labels"])
        module.log_dict = lambda *args, **kwargs: None
        torch.testing.assert_close(module.loss(batch), loss)
    assert not net.logit_scale.requires_grad


@pytest.mark.parametrize("towers", ["vision", "text", "both"])
def test_class_features_are_kept_only_where_training_leaves_them(
    towers: str, tiny_clip: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = FewShot._encode_texts
    monkeypatch.setattr(FewShot, "_encode_texts", lambda self, t: encoded.append(len(t)) or encode(self, t))
    module = FewShot(tiny_clip, None, lora=LORA | {"towers": towers}, learning_rate=0.05)
    data = data_of(images, iterations_per_shot=2, templates=["a {}", "the {}"])
    trainer(tmp_path, val_check_interval=2).fit(module, data)
    during = list(encoded)
    module.eval()
    stale = module.class_features().clone()
    module._class_features = None
    assert torch.equal(module.class_features(), stale)
    evaluations, steps = [6], [3, 3]
    whole = steps + evaluations + steps + evaluations
    assert during == ([6] if towers == "vision" else whole)
    trained = {name.split(".")[2] for name, p in module.net.named_parameters() if p.requires_grad}
    assert trained == {"vision": {"visual"}, "text": {"transformer"}, "both": {"visual", "transformer"}}[towers]


def test_running_statistics_of_a_frozen_tower_stay(images: Path, tmp_path: Path) -> None:
    resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    tower = {"vision_cfg": resnet, "text_cfg": CLIP["text_cfg"] | {"context_length": 16}}
    module = FewShot(save_model(tmp_path / "resnet", CLIP | tower), None, lora=LORA | {"towers": "text"})
    trainer(tmp_path, val_check_interval=2).fit(module, data_of(images, iterations_per_shot=2))
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
        assert int(norm.num_batches_tracked) == 0
    assert module.net.training  # dropout is on


def test_metrics_are_those_of_the_definitions() -> None:
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.3, 0.1, 0.6], [0.3, 0.6, 0.1]])
    metrics = Evaluation(3)
    metrics.update(probabilities, torch.tensor([0, 0, 0, 2, 1]))
    values, confusion = metrics.take()
    assert values["accuracy"].item() == pytest.approx(4 / 5)
    assert values["class_accuracy"].item() == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert values["calibration_error"].item() == pytest.approx((0.1 + 0.2 + 0.7 + (2 - 1.2)) / 5)
    assert confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_a_model_that_gives_no_numbers_is_never_right() -> None:
    """Although argmax would choose the first class."""
    evaluation, nan = Evaluation(3), float("nan")
    scores, labels = torch.tensor([[nan, nan, nan], [0.1, nan, 0.8], [0.1, 0.8, 0.1]]), torch.tensor([0, 2, 1])
    evaluation.update(wrong_where_nan(scores, labels), labels)
    assert evaluation.take()[0]["accuracy"] == pytest.approx(1 / 3)
    batch = {"options": [2, 2], "gold": torch.tensor([0, 3])}
    assert right_choices(torch.tensor([nan, nan, -2.0, -1.0]), batch) == [0.0, 1.0]


# -- the command line


def run(command: str, method: str, model: str, images: Path, *options: str) -> Any:
    given = [*options_of(model, str(images)), "--trainer.accelerator=cpu", *options]
    return RecipeCLI([command, *config_arguments("clip_fewshot", method), *given], recipe="clip_fewshot")


def test_a_run_follows_the_protocol(tiny_clip: str, images: Path, tmp_path: Path) -> None:
    method = "efmlora"
    fast = "--model.init_args.learning_rate=0.02"
    fitted = run("fit", method, tiny_clip, images, fast)
    assert fitted.trainer.global_step == 6
    folder = tmp_path / "runs" / "clip_fewshot" / method / "version_0"
    result = json.loads((folder / "result.json").read_text())
    assert result["zero_shot"] != result["test"]
    assert (result["shots"], result["steps"], result["classes"]) == (2, 6, 3)
    assert {"accuracy", "class_accuracy", "calibration_error"} == set(result["validation"]) == set(result["test"])
    for name in ("zero_shot_confusion.png", "test_confusion.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["zero_shot_accuracy"] or row["test_accuracy"]]
    assert float(rows[0]["zero_shot_accuracy"]) == pytest.approx(result["zero_shot"]["accuracy"])
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(result["test"]["accuracy"])
    checkpoint = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    assert (folder / "checkpoints" / "last" / "adapter_model.safetensors").is_file()
    tested = run("test", method, tiny_clip, images, checkpoint).trainer.callback_metrics
    assert tested["test_calibration_error"].item() == pytest.approx(result["test"]["calibration_error"], rel=1e-5)
    # The run stopped in its last test, so there is no validation after it resumes.
    run("fit", method, tiny_clip, images, fast, checkpoint)
    resumed = json.loads((folder.parent / "version_1" / "result.json").read_text())
    for part in ("zero_shot", "validation", "test"):
        assert resumed[part] == result[part] != {}
    assert export(folder / "checkpoints" / "last.ckpt", tmp_path / "plain") < 1e-5  # as open_clip loads it
    untuned = run("test", method, tiny_clip, images).trainer.callback_metrics
    assert untuned["test_calibration_error"].item() == pytest.approx(result["zero_shot"]["calibration_error"], rel=1e-5)
    photos = f"--data.predict_folder={images}"
    for command in ("fit", "test", "predict"):
        with pytest.raises(MisconfigurationException, match=r"classes: \['red'\] there, \['rose'\] here"):
            run(command, method, tiny_clip, images, fast, checkpoint, *OTHER_CLASSES, photos)


def test_predict_gives_each_image_of_a_folder_a_class(tiny_clip: str, images: Path, tmp_path: Path) -> None:
    options = [f"--data.init_args.predict_folder={images}", "--model.init_args.predictions=classes.csv"]
    made = run("predict", "lora", tiny_clip, images, *options, "--data.init_args.eval_batch_size=7")
    (path,) = tmp_path.glob("runs/**/classes.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(p) for p in image_files(images)]
    module, data = made.model.eval(), made.datamodule
    image = data.predict_dataloader().dataset[[(20, 0)]]["images"]
    with torch.no_grad():
        probability, label = module.probabilities(image)[0].max(dim=0)
    assert rows[20]["class"] == data.classes[label]
    assert float(rows[20]["probability"]) == pytest.approx(probability.item(), rel=1e-5)


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": None}, "FewShotData: dataset: give a folder with one folder per class"),
        ({"validation_shots": 5}, "'blue_grey' has 2 images in validation .*validation_shots=5"),
        ({"dataset": "missing"}, "dataset='missing' is not a folder, and not one of .*eurosat"),
        ({"shots": 11}, "'blue_grey' has 6 images in train .*shots=11, as 2 other classes have"),
        ({"templates": ["a photo"]}, "templates must be texts with one {}.*'a photo'"),
        ({"class_names": {"red": "r", "pink": "p"}}, r"class_names has names for \['pink'\], but .*'blue_grey'"),
        ({"class_names": {"red": "Green"}}, "several classes are called green, Green"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, images: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        FewShotData(**{"dataset": str(images)} | options).setup("fit")


def test_bad_folders_are_named(tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(MisconfigurationException, match=message):
            sources.load_source(str(folder))

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has the classes \[\]: it needs at least two")
    (filled(tmp_path / "one", 4) / "void").mkdir()
    refused(tmp_path / "one", "no images in train .* of the classes void")
    filled(tmp_path / "half" / "train", 2)
    refused(tmp_path / "half", "has the folders train: it needs train, test and optionally validation")
    filled(tmp_path / "half" / "test", 2)
    (tmp_path / "half" / "test" / "red").rename(tmp_path / "half" / "test" / "pink")
    refused(tmp_path / "half", "no images in test .* of the classes red")
    refused(filled(tmp_path / "few", 1), "no images in train .* of the classes blue_grey")


def test_a_text_that_does_not_fit_is_named(tiny_clip: str, images: Path, tmp_path: Path) -> None:
    data = data_of(images, templates=["a photo of a {}" + " and so on" * 4])
    module = FewShot(tiny_clip, None, lora=LORA)
    with pytest.raises(
        MisconfigurationException, match=r"3 text\(s\) are longer than the model's 16 tokens.*blue grey"
    ):
        trainer(tmp_path).fit(module, data)


def test_predict_needs_images(images: Path, tmp_path: Path) -> None:
    for folder in (None, str(tmp_path), "missing"):
        with pytest.raises(MisconfigurationException, match=f"needs --data.predict_folder FOLDER.*none in {folder!r}"):
            data_of(images, predict_folder=folder).setup("predict")
    with pytest.raises(MisconfigurationException, match=r"must end in .jsonl or .csv, got 'a.txt'"):
        FewShot(predictions="a.txt")
