"""The few-shot recipe on a tiny random CLIP and generated images in folders."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("open_clip", reason="the recipes' dependencies are not installed")

import clip_fewshot_runs
from clip_contrastive_runs import CLIP, save_model
from clip_fewshot_runs import CONFIGS, filled, options_of, picture

import recipes
from lightning_flatlora import AdapterCheckpoint, EFMLoRA
from recipes.clip.export import export
from recipes.clip.images import read_image, readable
from recipes.clip_fewshot import sources, sweep
from recipes.clip_fewshot.__main__ import main
from recipes.clip_fewshot.batches import Images, InTurn, Stream
from recipes.clip_fewshot.data import FewShotData, few_shots
from recipes.clip_fewshot.evaluation import Evaluation, plot_confusion
from recipes.clip_fewshot.module import FewShot
from recipes.clip_fewshot.prompts import class_names, prompts, tokenise
from recipes.clip_fewshot.protocol import Protocol
from recipes.random_state import RandomState

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory:UserWarning"),
]

METHODS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
LORA = {"r": 2, "lora_alpha": 8, "lora_dropout": 0.25}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, twelve images each."""
    return filled(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return clip_fewshot_runs.tiny_clip(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])  # LightningCLI warns of other arguments beside its own
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it


def trainer(tmp_path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    return L.Trainer(
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def data_of(images: Path, **options: Any) -> FewShotData:
    given = {"shots": 2, "batch_size": 4, "iterations_per_shot": 4, "eval_batch_size": 5} | options
    return FewShotData(str(images), **given)


# -- which images


def test_parts_are_divided_by_class_and_seed(images: Path) -> None:
    one, again, other = (sources.load(str(images), split_seed=seed) for seed in (0, 0, 1))
    assert one.parts == again.parts != other.parts
    assert [len(one.parts[part]) for part in sources.PARTS] == [18, 6, 12]
    paths = [path for part in sources.PARTS for path, _ in one.parts[part]]
    assert len(set(paths)) == 36
    assert {path.parent.name: label for part in one.parts.values() for path, label in part} == {
        "blue_grey": 0,
        "green": 1,
        "red": 2,
    }


def test_folders_of_parts_are_taken_as_they_are(tmp_path: Path) -> None:
    for part, number in (("train", 5), ("val", 3), ("test", 2)):
        filled(tmp_path / part, number)
    source = sources.load(str(tmp_path))
    assert [len(source.parts[part]) for part in sources.PARTS] == [15, 9, 6]
    assert all(path.parts[-3] == "val" for path, _ in source.parts["validation"])
    pooled = sources.load(str(tmp_path), split="seeded")
    assert [len(pooled.parts[part]) for part in sources.PARTS] == [15, 6, 9]


def test_fewer_shots_are_among_more(images: Path) -> None:
    source = sources.load(str(images))
    drawn = {shots: few_shots(source, shots, 2, seed=3) for shots in (1, 2, 4)}
    assert set(drawn[1][0]) < set(drawn[2][0]) < set(drawn[4][0])
    for shots, (train, validation) in drawn.items():
        assert [label for _, label in train] == sorted([0, 1, 2] * shots)
        assert [label for _, label in validation] == [0, 0, 1, 1, 2, 2]
        assert not set(train) & set(validation)
        assert set(train) <= set(source.parts["train"])
        assert set(validation) <= set(source.parts["validation"])
    assert few_shots(source, 2, 2, seed=3) == drawn[2]
    assert few_shots(source, 2, 2, seed=4) != drawn[2]


def test_without_a_validation_part_the_rest_of_train_serves(tmp_path: Path) -> None:
    for part, number in (("train", 5), ("test", 2)):
        filled(tmp_path / part, number)
    source = sources.load(str(tmp_path))
    train, validation = few_shots(source, 3, 2, seed=0)
    assert len(set(train) | set(validation)) == 15
    assert few_shots(source, 1, 2, seed=0)[1] == validation
    with pytest.raises(
        MisconfigurationException, match=r"'blue_grey' has 1 images in train beside 4 .*lidation_shots=2"
    ):
        few_shots(source, 4, 2, seed=0)
    assert [len(few_shots(source, shots, None, seed=0)[1]) for shots in (1, 2, 3, 4, 5)] == [3, 6, 6, 3, 0]


def test_an_unreadable_image_is_named_or_another_is_drawn(images: Path, tmp_path: Path) -> None:
    filled(tmp_path, 12)
    source = sources.load(str(tmp_path))
    victim = few_shots(source, 2, 2, seed=0)[0][0][0]
    victim.write_bytes(victim.read_bytes()[:200])  # cut in the middle
    with pytest.raises(MisconfigurationException, match=rf"{victim.name} \(.*truncated.*skip_unreadable"):
        few_shots(source, 2, 2, seed=0)
    with pytest.warns(UserWarning, match=rf"skip_unreadable: 1 of 12 images can't be read: .*{victim.name}"):
        train, _ = few_shots(source, 2, 2, seed=0, skip_unreadable=True)
    assert [label for _, label in train] == [0, 0, 1, 1, 2, 2]
    assert victim not in [path for path, _ in train]
    with pytest.raises(MisconfigurationException, match=f"{victim.name} can't be read as an image"):
        read_image(victim)


def test_transparent_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert readable([tmp_path / "clear.png"]) == [0]


# -- torchvision's data sets, as their archives lie on the disk


def test_eurosat(tmp_path: Path) -> None:
    for name in ("AnnualCrop", "SeaLake"):
        for i in range(10):
            picture(tmp_path / "eurosat" / "2750" / name / f"{name}_{i}.jpg", (9, 99, 9), i)
    source = sources.load("eurosat", str(tmp_path))
    assert [len(source.parts[part]) for part in sources.PARTS] == [10, 4, 6]
    assert class_names(source.classes, None, "eurosat") == ["Annual Crop Land", "Sea or Lake"]
    assert "split_seed=0" in source.note


def test_dtd(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part, number in (("train", 1), ("val", 2), ("test", 3)):
        names = [f"{name}/{name}_{part}{i}.jpg" for name in ("banded", "dotted") for i in range(number)]
        (base / "labels" / f"{part}1.txt").write_text("\n".join(names))
        for name in names:
            picture(base / "images" / name, (9, 9, 9), 0)
    source = sources.load("dtd", str(tmp_path))
    assert [len(source.parts[part]) for part in sources.PARTS] == [2, 4, 6]
    assert list(source.templates) == ["a photo of a {}."]  # CLIP-LoRA's for all sets
    assert source.parts["test"][3] == (base / "images" / "dotted" / "dotted_test0.jpg", 1)


def test_flowers102(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scipy_io = pytest.importorskip("scipy.io", reason="torchvision's Flowers102 needs scipy")
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    labels = np.tile(np.arange(1, 103), 3)
    parts = {"trnid": range(1, 103), "valid": range(103, 205), "tstid": range(205, 307)}
    scipy_io.savemat(base / "imagelabels.mat", {"labels": labels})
    scipy_io.savemat(base / "setid.mat", {name: np.array(ids) for name, ids in parts.items()})
    monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)  # compares checksums
    source = sources.load("flowers102", str(tmp_path))
    assert [len(source.parts[part]) for part in sources.PARTS] == [102, 102, 102]
    assert source.parts["validation"][1] == (base / "jpg" / "image_00104.jpg", 1)
    assert class_names(source.classes, None, "flowers102")[1] == "hard-leaved pocket orchid"


def test_oxford_pets(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    (base / "images").mkdir()
    for part in ("trainval", "test"):
        lines = [
            f"{name}_{i if part == 'test' else 10 + i} {label} 1 1"
            for label, name in ((1, "Abyssinian"), (2, "great_dane"))
            for i in (1, 2)
        ]
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines))
    source = sources.load("oxford_pets", str(tmp_path))
    assert {part: len(found) for part, found in source.parts.items()} == {"train": 4, "test": 4}
    assert list(source.classes) == ["Abyssinian", "Great Dane"]
    assert source.parts["test"][2] == (base / "images" / "great_dane_1.jpg", 1)


def test_caltech101(tmp_path: Path) -> None:
    base = tmp_path / "caltech101" / "101_ObjectCategories"
    for name in ("BACKGROUND_Google", "Faces", "Faces_easy", "airplanes", "sea_horse"):
        for i in range(1, 5):
            picture(base / name / f"image_{i:04d}.jpg", (9, 9, 99), i)
    source = sources.load("caltech101", str(tmp_path))
    assert class_names(source.classes, None, "caltech101") == ["face", "airplane", "sea horse"]
    paths = [path for part in source.parts.values() for path, _ in part]
    assert len(paths) == 12
    assert all(path.is_file() for path in paths)


# -- prompts


def test_prompts_fill_templates_with_readable_names() -> None:
    names = class_names(["AnnualCrop", "great_masterwort"], None, "folder")
    assert prompts(names, ["a {}.", "the {}."])[1] == ["a great masterwort.", "the great masterwort."]
    assert class_names(["a", "b"], {"b": "bee", "a": "ant"}, "folder") == ["ant", "bee"]


# -- batches


def test_a_stream_uses_each_example_as_often_and_all_batches_are_full() -> None:
    stream = Stream(10, batch_size=4, batches=25, seed=1)
    batches = list(stream)
    assert [len(batch) for batch in batches] == [4] * 25 == [4] * len(stream)
    drawn = [example for batch in batches for example, _ in batch]
    assert sorted(drawn) == sorted([*range(10)] * 10)
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == [*range(10)]
    assert drawn[:10] != drawn[10:20]
    assert [number for batch in batches for _, number in batch] == [*range(100)]
    stream.set_epoch(1)
    assert next(iter(stream))[0][1] == 100
    assert [len(batch) for batch in Stream(3, batch_size=8, batches=2)] == [3, 3]


def test_ranks_share_what_one_rank_would_see() -> None:
    alone = list(Stream(10, batch_size=8, batches=5, seed=1))
    shares = [list(Stream(10, batch_size=4, batches=5, seed=1, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert [one + other for one, other in zip(*shares, strict=True)] == alone
    for ranks in (1, 2, 3, 7):
        turns = [list(InTurn(23, 4, ranks, rank)) for rank in range(ranks)]
        assert len({len(turn) for turn in turns}) == 1
        seen = [place for turn in zip(*turns, strict=True) for batch in turn for place, _ in batch]
        assert seen == [*range(23)]


def test_augmentation_depends_on_seed_and_draw_alone(images: Path) -> None:
    examples = sources.load(str(images)).parts["train"]

    def transform(image: Image.Image) -> Tensor:
        return torch.rand(2)

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    batch = Images(examples, transform, seed=1)[[(0, 7), (0, 8), (1, 7)]]
    assert torch.equal(torch.rand(1), expected)  # nobody else's random numbers are touched
    assert torch.equal(batch["images"][0], batch["images"][2])
    assert not torch.equal(batch["images"][0], batch["images"][1])
    assert not torch.equal(Images(examples, transform, seed=2)[[(0, 7)]]["images"], batch["images"][:1])


# -- what the model is asked


def test_evaluation_ensembles_templates_and_training_takes_the_first(
    tiny_clip: str, images: Path, tmp_path: Path
) -> None:
    module = FewShot(tiny_clip, None, lora=LORA | {"lora_dropout": 0.0})
    data = data_of(images, templates=["a photo of a {}.", "{} here.", "one {}"])
    fit = trainer(tmp_path)
    fit.validate(module, data, verbose=False)
    module.eval()
    batch = next(iter(data.val_dataloader()))
    net, scale = module.net.get_base_model(), module.net.get_base_model().logit_scale.exp()
    with torch.no_grad():
        encoded = net.encode_image(batch["images"], normalize=True)
        means = []
        for name in data.classes:
            tokens = module.clip.tokenizer([f"a photo of a {name}.", f"{name} here.", f"one {name}"])
            mean = net.encode_text(tokens, normalize=True).mean(dim=0)
            means.append(mean / mean.norm())
        expected = (scale * encoded @ torch.stack(means).T).softmax(dim=1)
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


def test_confusion_is_a_picture(tmp_path: Path) -> None:
    for number in (3, 40):
        path = tmp_path / f"{number}.png"
        plot_confusion(torch.eye(number, dtype=torch.int64), [f"class {i}" for i in range(number)], path, "title")
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[0] > 300
        assert (pixels[..., 2] > pixels[..., 0] + 60).any()  # blue cells


# -- the command line


def run(command: str, method: str, model: str, images: Path, *options: str) -> Any:
    given = [*options_of(model, str(images)), "--trainer.accelerator=cpu", *options]
    return main([command, f"--config={CONFIGS / method}.yaml", *given])


@pytest.mark.parametrize("method", METHODS)
def test_every_configuration_follows_the_protocol(method: str, tiny_clip: str, images: Path, tmp_path: Path) -> None:
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
    assert export(folder / "checkpoints" / "last.ckpt", tmp_path / "plain") < 1e-5  # as open_clip loads it
    untuned = run("test", method, tiny_clip, images).trainer.callback_metrics
    assert untuned["test_calibration_error"].item() == pytest.approx(result["zero_shot"]["calibration_error"], rel=1e-5)


def test_a_fast_dev_run_takes_few_batches_and_leaves_no_file(
    tiny_clip: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[int] = []
    step = FewShot.test_step

    def counted(module: FewShot, batch: Any, number: int) -> None:
        tested.append(number)
        step(module, batch, number)

    monkeypatch.setattr(FewShot, "test_step", counted)
    run("fit", "lora", tiny_clip, images, "--data.init_args.eval_batch_size=2", "--trainer.fast_dev_run=1")
    assert tested == [0, 0]  # before and after training
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["classes.csv", "classes.jsonl"])
def test_predict_gives_each_image_of_a_folder_a_class(name: str, tiny_clip: str, images: Path, tmp_path: Path) -> None:
    options = [f"--data.init_args.predict_folder={images}", f"--model.init_args.predictions={name}"]
    made = run("predict", "lora", tiny_clip, images, *options, "--data.init_args.eval_batch_size=7")
    (path,) = tmp_path.glob(f"runs/**/{name}")
    with path.open() as file:
        rows = list(csv.DictReader(file)) if name.endswith("csv") else [json.loads(line) for line in file]
    assert [row["image"] for row in rows] == [str(p) for p in sources.image_files(images)]
    module, data = made.model.eval(), made.datamodule
    image = data.predict_dataloader().dataset[[(20, 0)]]["images"]
    with torch.no_grad():
        probability, label = module.probabilities(image)[0].max(dim=0)
    assert rows[20]["class"] == data.classes[label]
    assert float(rows[20]["probability"]) == pytest.approx(probability.item(), rel=1e-5)


def test_sweep_resumes_and_writes_a_table(
    tiny_clip: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(recipes.__file__).parent.parent))  # the runs are other processes
    folder = tmp_path / "sweep"
    options = [
        f"--model.init_args.model={tiny_clip}",
        "--model.init_args.pretrained=null",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.val_check_interval=2",
        f"--data.init_args.dataset={images}",
        "--data.init_args.iterations_per_shot=2",
    ]
    wanted = ["sweep", f"--folder={folder}", "--methods", "lora", "--shots", "1", "--seeds"]
    assert main([*wanted, "0", *options]) == 0
    first = json.loads((folder / "lora-1-shot" / "seed-0" / "result.json").read_text())
    other = first | {"seed": 1, "test": {"accuracy": first["test"]["accuracy"] / 2 + 0.1}}
    (folder / "lora-1-shot" / "seed-1").mkdir()
    (folder / "lora-1-shot" / "seed-1" / "result.json").write_text(json.dumps(other))
    capfd.readouterr()
    assert main([*wanted, "0", "1", *options]) == 0
    out = capfd.readouterr().out
    assert "LoRA, 1 shot, seed" not in out  # nothing is trained again
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(row["method"], row["shots"], row["seed"]) for row in rows] == [("lora", 1, 0), ("lora", 1, 1)]
    assert {"recipe", "commit", "device", "seconds_per_step"} <= set(rows[0])
    accuracies = [100 * row["test"]["accuracy"] for row in rows]
    error = abs(accuracies[0] - accuracies[1]) / 2
    table = (folder / "table.md").read_text()
    assert f"| LoRA | {sum(accuracies) / 2:.1f} ± {error:.1f} (2) | 1.00 |" in table
    assert table in out
    with pytest.raises(MisconfigurationException, match="name another folder"):
        main([*wanted, "0", *options[:-1]])


def test_a_stopped_run_of_a_sweep_goes_on(tmp_path: Path) -> None:
    run = sweep.Run("lora", None, 1, 0)
    assert not any("ckpt_path" in part for part in sweep.command(run, tmp_path, []))
    last = run.folder(tmp_path) / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    assert f"--ckpt_path={last}" in sweep.command(run, tmp_path, [])


@pytest.mark.parametrize("method", [method for method in METHODS if method != "lora"])
def test_a_sweep_over_rho_changes_it_in_the_configuration(method: str, tmp_path: Path) -> None:
    run = sweep.Run(method, 0.7, 1, 0)
    given, changed = ((CONFIGS / f"{method}.yaml").read_text(), sweep.configuration(run, tmp_path).read_text())
    parts = [yaml.safe_load(text) for text in (given.replace("rho: 0.03", "rho: 0.7"), changed)]
    assert parts[0] == parts[1] != yaml.safe_load(given)
    assert "rho-0.7" in str(run.folder(tmp_path))
    assert run.name.endswith("rho 0.7")


# -- going on after a stop


class Record(L.Callback):
    """Images, losses and weights of a run."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((batch["images"].double().sum().item(), trainer.callback_metrics["train_loss"].item()))


def fitted(
    model: str, images: Path, folder: Path, num_workers: int = 0, ckpt_path: str | None = None
) -> tuple[list[Tensor], Record, dict[str, float]]:
    """A run from one seed, or from a checkpoint after other random numbers have been drawn."""
    L.seed_everything(7 if ckpt_path is None else 99, verbose=False)
    record, protocol = Record(), Protocol()
    saver = AdapterCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module = FewShot(model, None, lora=LORA, learning_rate=1e-2)
    callbacks = [record, EFMLoRA(rho=0.5), RandomState(), protocol, saver]
    fit = trainer(folder, *callbacks, enable_checkpointing=True, val_check_interval=3, max_epochs=2)
    fit.fit(module, data_of(images, num_workers=num_workers), ckpt_path=ckpt_path)
    return [p.detach().clone() for p in module.parameters() if p.requires_grad], record, protocol.zero_shot


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_equals_the_uninterrupted_one(
    num_workers: int, tiny_clip: str, images: Path, tmp_path: Path
) -> None:
    weights, whole, zero_shot = fitted(tiny_clip, images, tmp_path / "whole", num_workers)
    assert len(whole.steps) == len(set(whole.steps)) == 16  # two epochs
    for step in (5,) if num_workers else (2, 3, 8, 11):  # in the first epoch, at its validation, its end; in the second
        checkpoint = str(tmp_path / "whole" / f"step={step}.ckpt")
        again, rest, measured = fitted(tiny_clip, images, tmp_path / str(step), num_workers, checkpoint)
        assert rest.steps == whole.steps[step:], step
        assert measured == zero_shot
        assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True)), step


def test_a_run_that_was_stopped_goes_on_from_its_last_validation(
    tiny_clip: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("fit", "efmlora", tiny_clip, images)
    runs = tmp_path / "runs" / "clip_fewshot" / "efmlora"
    whole = json.loads((runs / "version_0" / "result.json").read_text())

    def stop(self: Any, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(RandomState, "on_train_batch_start", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            run("fit", "efmlora", tiny_clip, images)
    last = runs / "version_1" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    run("fit", "efmlora", tiny_clip, images, f"--ckpt_path={last}")
    resumed = json.loads((runs / "version_2" / "result.json").read_text())
    assert resumed["test"] == whole["test"]
    assert resumed["zero_shot"] == whole["zero_shot"]


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "shots must be an integer >= 1, got 0"),
        ({"crop_scale": (0.9, 0.1)}, "crop_scale must be two shares"),
        ({"validation_shots": -1}, "validation_shots must be null or an integer >= 0, got -1"),
        ({"validation_shots": 5}, "'blue_grey' has 2 images in validation .*validation_shots=5"),
        ({"flip": 2}, "flip must be a probability, got 2"),
        ({"dataset": "missing"}, "dataset='missing' is no folder, and not one of .*eurosat"),
        ({"dataset": "eurosat"}, "'eurosat' is not complete in root='data': .*download to true"),
        ({"shots": 11}, "'blue_grey' has 6 images in train .*shots=11, and so have 2 other classes"),
        ({"templates": ["a photo"]}, "templates must be texts with one {}.*'a photo'"),
        ({"class_names": {"red": "r", "pink": "p"}}, r"no name for \['blue_grey', 'green'\], not a class: \['pink'\]"),
        ({"class_names": "missing.json"}, "class_names='missing.json' can't be read"),
        ({"class_names": {"red": "a", "green": "A", "blue_grey": "b"}}, "'green' and 'red' are both called 'a'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, images: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        FewShotData(**{"dataset": str(images)} | options).setup("fit")


def test_bad_folders_are_named(tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(MisconfigurationException, match=message):
            sources.load(str(folder))

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no folder")
    (filled(tmp_path / "one", 4) / "void").mkdir()
    refused(tmp_path / "one", "class 'void' is empty")
    filled(tmp_path / "half" / "train", 2)
    refused(tmp_path / "half", "no folder 'test'")
    filled(tmp_path / "half" / "test", 2)
    (tmp_path / "half" / "test" / "red").rename(tmp_path / "half" / "test" / "pink")
    refused(tmp_path / "half", r"missing \['red'\], unknown \['pink'\]")
    refused(filled(tmp_path / "few", 1), "class 'blue_grey' has no image in train")


def test_unreadable_test_images_stop_a_run_before_training(images: Path, tmp_path: Path) -> None:
    filled(tmp_path, 12)
    victim = sources.load(str(tmp_path)).parts["test"][0][0]
    victim.write_text("no image")
    with pytest.raises(MisconfigurationException, match=rf"1 of 12 images can't be read: .*{victim.name}"):
        data_of(tmp_path).setup("fit")
    data = data_of(tmp_path, skip_unreadable=True)
    with pytest.warns(UserWarning, match=victim.name):
        data.setup("fit")
    assert len(data.parts["test"]) == 11


def test_a_text_that_does_not_fit_is_named(tiny_clip: str, images: Path, tmp_path: Path) -> None:
    data = data_of(images, templates=["a photo of a {}" + " and so on" * 4])
    module = FewShot(tiny_clip, None, lora=LORA)
    with pytest.raises(
        MisconfigurationException, match=r"3 text\(s\) are longer than the model's 16 tokens.*blue grey"
    ):
        trainer(tmp_path).fit(module, data)
    fits = tokenise(["one " * 14], module.clip.tokenizer, 16)
    assert fits[0, -1] == module.clip.tokenizer.eot_token_id
    with pytest.raises(MisconfigurationException, match="longer"):
        tokenise(["one " * 15], module.clip.tokenizer, 16)


def test_predict_needs_images(images: Path, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"predict needs --data.init_args.predict_folder"):
        data_of(images).setup("predict")
    with pytest.raises(MisconfigurationException, match="holds no image"):
        data_of(images, predict_folder=str(tmp_path)).setup("predict")
    with pytest.raises(MisconfigurationException, match=r"must end in .jsonl or .csv, got 'a.txt'"):
        FewShot(predictions="a.txt")


def test_a_module_without_its_data_says_so(tiny_clip: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="takes its classes from FewShotData"):
        trainer(tmp_path).test(FewShot(tiny_clip, None), [0])
