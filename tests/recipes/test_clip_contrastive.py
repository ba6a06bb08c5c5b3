"""Contrastive fine-tuning on a tiny random open_clip model and drawn shapes."""

import csv
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

open_clip = pytest.importorskip("open_clip", reason="the recipes' dependencies are not installed")

from clip_contrastive_runs import CLIP, COCA, CONFIGS, SIGLIP, run, save_model, save_pictures  # noqa: E402
from torchmetrics.retrieval import RetrievalHitRate  # noqa: E402

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FMLoRA  # noqa: E402
from recipes.clip.export import export  # noqa: E402
from recipes.clip.export import main as export_main  # noqa: E402
from recipes.clip_contrastive import sources  # noqa: E402
from recipes.clip_contrastive.batches import Draw, PictureBatchSampler  # noqa: E402
from recipes.clip_contrastive.data import ContrastiveData, too_long  # noqa: E402
from recipes.clip_contrastive.loss import ContrastiveLoss  # noqa: E402
from recipes.clip_contrastive.module import ContrastiveModel, ContrastiveModelFM  # noqa: E402
from recipes.clip_contrastive.retrieval import Retrieval  # noqa: E402
from recipes.clip_demo import emoji  # noqa: E402
from recipes.random_state import RandomState  # noqa: E402
from recipes.sharding import BlocksAndFactors  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning"),  # runs of two steps
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
]

METHODS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
COLUMNS = ("image", "caption")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])  # LightningCLI warns of other arguments beside its own
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contrastive")


@pytest.fixture(scope="module")
def tiny(place: Path) -> str:
    return save_model(place / "tiny", CLIP)


@pytest.fixture(scope="module")
def pictures(place: Path) -> str:
    return save_pictures(place / "pictures")


@pytest.fixture(scope="module")
def clip(tiny: str) -> Any:
    return ContrastiveModel(tiny).clip


def prepared(clip: Any, stage: str, dataset: str, **options: Any) -> ContrastiveData:
    data = ContrastiveData(dataset, **options)
    data.clip = clip
    data.prepare_data()
    data.setup(stage)
    return data


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


def random_features(number: int, seed: int, size: int = 8) -> Tensor:
    return F.normalize(torch.randn(number, size, generator=torch.Generator().manual_seed(seed)), dim=-1)


# -- loss


def test_the_loss_of_clip_is_the_mean_cross_entropy_both_ways() -> None:
    images, texts = random_features(5, 0), random_features(5, 1)
    logits = 10 * images @ texts.T
    expected = -(logits.log_softmax(0).diagonal().mean() + logits.log_softmax(1).diagonal().mean()) / 2
    loss = ContrastiveLoss(torch.tensor(10.0).log(), None)
    torch.testing.assert_close(loss(images, texts), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(images, texts), expected)


def test_the_loss_of_siglip_is_a_sigmoid_of_each_pair() -> None:
    images, texts = random_features(5, 0), random_features(5, 1)
    logits = 10 * images @ texts.T - 3
    signs = 2 * torch.eye(5) - 1
    loss = ContrastiveLoss(torch.tensor(10.0).log(), torch.tensor(-3.0))
    torch.testing.assert_close(loss(images, texts), -F.logsigmoid(signs * logits).sum() / 5)


@pytest.mark.parametrize(("kind", "bias"), [("clip", torch.tensor(-10.0)), ("siglip", None)])
def test_a_loss_that_does_not_fit_the_model_is_refused(kind: Any, bias: Tensor | None) -> None:
    with pytest.raises(MisconfigurationException, match=f"loss='{kind}' does not fit.*'auto'"):
        ContrastiveLoss(torch.tensor(1.0), bias, kind)


# -- retrieval


def by_torchmetrics(queries: Tensor, answers: Tensor, right: Tensor, k: int) -> float:
    """torchmetrics' own hit rate of each query's answers."""
    indexes = torch.arange(len(queries))[:, None].expand(right.shape)
    return RetrievalHitRate(top_k=k)(queries @ answers.T, right, indexes=indexes).item()


def test_recall_is_torchmetrics_hit_rate_with_several_captions_an_image() -> None:
    images, texts = random_features(30, 0), random_features(65, 1)
    owners = torch.cat([torch.arange(30), torch.randint(30, (35,))])
    right = owners[None] == torch.arange(30)[:, None]
    right[3, 7] = True  # a text of two images
    metric = Retrieval()
    for chunk in (torch.arange(9, 30), torch.arange(0, 10)):  # image 9 twice
        image, text = right[chunk].nonzero(as_tuple=True)
        metric.update(images[chunk], chunk, texts[text], text, torch.stack([chunk[image], text], dim=1))
    found = metric.compute()
    for k in (1, 5, 10):
        assert found[f"image_to_text_recall@{k}"].item() == pytest.approx(by_torchmetrics(images, texts, right, k))
        assert found[f"text_to_image_recall@{k}"].item() == pytest.approx(by_torchmetrics(texts, images, right.T, k))
    assert 0 < found["image_to_text_recall@1"] < found["image_to_text_recall@10"] < 1


def test_a_model_with_one_answer_to_everything_finds_nothing() -> None:
    metric, ids = Retrieval(), torch.arange(20)
    same = F.normalize(torch.ones(20, 4), dim=-1)
    metric.update(same, ids, same, ids, torch.stack([ids, ids], dim=1))
    assert {value.item() for value in metric.compute().values()} == {0.0}


# -- where images and captions come from


def described(dataset: str, **columns: str) -> dict[str, tuple[str, ...]]:
    return {Path(str(p.file)).stem: p.captions for p in sources.load(dataset, **columns)}


@pytest.fixture
def write_table(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[tuple[str, ...]], name: str = "table.csv", header: tuple[str, ...] = COLUMNS) -> str:
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",").writerows([header, *rows])
        return str(tmp_path / name)

    return write


def test_all_sources_give_the_same_pictures(pictures: str, write_table: Callable[..., str], tmp_path: Path) -> None:
    expected = described(pictures)
    assert len(expected) == 32
    assert expected["red-circle"] == ("a red circle", "the circle is red")
    rows = [(str(Path(pictures) / f"{name}.png"), text) for name, texts in expected.items() for text in texts]
    assert described(write_table(rows)) == expected
    tabs = write_table([("x", *row) for row in rows], "tabs.tsv", ("other", "filepath", "title"))
    assert described(tabs, image_column="filepath", caption_column="title") == expected
    beside = tmp_path / "beside"
    beside.mkdir()
    for path in Path(pictures).glob("*.png"):
        (beside / path.name).symlink_to(path)
    write_table([(Path(image).name, text) for image, text in rows], "beside/captions.csv")
    assert described(str(beside)) == expected
    names = sorted(expected)
    for number, share in enumerate((names[:20], names[20:])):
        with tarfile.open(tmp_path / f"shard-{number:03d}.tar", "w") as shard:
            for name in share:
                for suffix in ("png", "txt"):
                    shard.add(Path(pictures) / f"{name}.{suffix}", f"{name}.{suffix}")
    shards = sources.load(str(tmp_path / "shard-{000..001}.tar"))
    assert {p.key.split("/")[1]: p.captions for p in shards} == expected
    assert shards[21].file.read() == (Path(pictures) / f"{names[21]}.png").read_bytes()
    assert sources.load(str(tmp_path / "shard-*.tar")) == shards


def test_images_are_read_from_shards(clip: Any, pictures: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name in ("blue-circle", "broken", "red-circle"):
            image, text = tmp_path / f"{name}.png", tmp_path / f"{name}.txt"
            text.write_text("a circle")
            whole = (Path(pictures) / f"{name.replace('broken', 'red-circle')}.png").read_bytes()
            image.write_bytes(whole[:60] if name == "broken" else whole)
            shard.add(image, image.name)
            shard.add(text, text.name)
    with pytest.warns(UserWarning, match=r"1 of 3 images can't be read: shard.tar/broken.png .*left out"):
        data = prepared(clip, "fit", "shard.tar", skip_unreadable=True, validation_share=0.0, test_share=0.0)
    files = [str(picture.file) for picture in data.parts["train"]]
    batch = data.train_dataloader().dataset[Draw(0, [files.index("shard.tar/blue-circle.png")])]
    assert batch["images"].shape == (1, 3, 32, 32)
    assert batch["images"][0, 2].mean() > batch["images"][0, 0].mean()


def test_an_emoji_stays_in_one_part_in_all_styles(
    pictures: str, write_table: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for style in ("google", "twitter", "fluent/train/face"):
        (tmp_path / style).mkdir(parents=True)
        for code in ("1f600", "1f601"):
            shutil.copy(Path(pictures) / "red-circle.png", tmp_path / style / f"{code}.png")
    rows = [(f"{style}/{code}.png", name) for style in ("google", "twitter") for code, name in (("1f600", "grin"),)]
    folders = emoji.Folders(Path(write_table(rows)), Path(write_table(rows[:1], "held.csv")), tmp_path / "fluent")
    monkeypatch.setattr(emoji, "prepare", lambda: folders)
    assert [(p.key, p.captions) for p in sources.load("packaged:emoji")] == [("1f600", ("grin",))] * 2
    assert len(sources.load("packaged:emoji-held-out")) == 1
    (fluent,) = sources.load("packaged:emoji-fluent")  # the other has no caption
    assert fluent == sources.Picture(tmp_path / "fluent/train/face/1f600.png", ("grin",), "1f600")


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("a.png", "b")], ("file", "caption"), r"columns \['file', 'caption'\].*image_column='image'"),
        ([("a.png", "x"), ("a.png", " ")], COLUMNS, "line 3 has an empty 'caption'"),
        ([("", "x")], COLUMNS, "line 2 has an empty 'image'"),
        ([("a.png",)], COLUMNS, "line 2 has an empty 'caption'"),
        ([("nowhere.png", "x")], COLUMNS, "there is no .*nowhere.png"),
        ([], COLUMNS, "holds no image with a caption"),
    ],
)
def test_faults_of_a_table_are_named(rows: Any, header: Any, message: str, write_table: Callable[..., str]) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        sources.load(write_table(rows, header=header))


def test_faults_of_a_folder_are_named(pictures: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(MisconfigurationException, match=r"folder holds no image ending in .*\.png"):
        sources.load(str(folder))
    (folder / "one.png").symlink_to(Path(pictures) / "red-circle.png")
    with pytest.raises(MisconfigurationException, match=r"one.png has neither a one.txt.*captions.csv"):
        sources.load(str(folder))
    (folder / "one.txt").write_text(" \n")
    with pytest.raises(MisconfigurationException, match=r"one.txt is empty"):
        sources.load(str(folder))
    (folder / "one.txt").write_bytes(b"caf\xe9")
    with pytest.raises(MisconfigurationException, match=r"one.txt is not UTF-8"):
        sources.load(str(folder))


def test_faults_of_shards_are_named(pictures: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"'no-\{0..1\}.tar': there is no no-0.tar, no-1.tar"):
        sources.load("no-{0..1}.tar")
    (tmp_path / "broken.tar").write_text("no archive")
    with pytest.raises(MisconfigurationException, match=r"broken.tar can't be read as an uncompressed .tar"):
        sources.load("broken.tar")
    (tmp_path / "blank.txt").write_text(" ")
    with tarfile.open(tmp_path / "bare.tar", "w") as shard:
        shard.add(Path(pictures) / "red-circle.png", "some/red-circle.png")
        shard.add(tmp_path / "blank.txt", "blank.txt")
    message = r"some/red-circle has no .txt; .*blank has a .txt, but no image; .*blank.txt is empty"
    with pytest.raises(MisconfigurationException, match=message):
        sources.load("bare.tar")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "missing.csv"}, "missing.csv.*no such file"),
        ({"dataset": "missing"}, "'missing' is not a folder.*packaged:emoji"),
        ({"dataset": "packaged:chess"}, "unknown package 'packaged:chess', give one of packaged:emoji"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"validation_share": 0.5, "test_share": 0.5}, "leave something to train on, got 0.5 and 0.5"),
        ({"skip_unreadable": True, "check_images": False}, "skip_unreadable needs check_images"),
        ({"validation_dataset": "missing.tsv"}, "missing.tsv.*no such file"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, clip: Any, pictures: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        prepared(clip, "fit", **{"dataset": pictures} | options)


def test_a_broken_image_is_named_or_skipped_and_counted(
    clip: Any, pictures: str, write_table: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes((Path(pictures) / "red-circle.png").read_bytes()[:60])
    rows = [(str(path), "a thing") for path in sorted(Path(pictures).glob("*.png"))] + [("broken.png", "b")]
    table = write_table(rows)
    shares = {"validation_share": 0.0, "test_share": 0.0}
    with pytest.raises(MisconfigurationException, match=r"1 of 33 images can't be read: .*broken.png.*skip_unreadable"):
        prepared(clip, "fit", table, **shares)
    with pytest.warns(UserWarning, match=r"1 of 33 images can't be read: .*broken.png.*left out"):
        data = prepared(clip, "fit", table, skip_unreadable=True, **shares)
    assert len(data.parts["train"]) == 32


def test_long_captions_are_counted_and_cut_or_refused(
    clip: Any, pictures: str, write_table: Callable[..., str]
) -> None:
    fits, long = "one " * 10, "one " * 11  # with start and end 12 and 13 tokens
    assert too_long([fits, "", long], clip.tokenizer) == [long]
    image = str(Path(pictures) / "red-circle.png")
    table = write_table([(image, fits), (image, long)])
    shares = {"validation_share": 0.0, "test_share": 0.0}
    data = prepared(clip, "fit", table, **shares)
    assert "1 images, 2 captions, 1 of them longer than the context_length of 12 tokens" in data.reports["train"]
    with pytest.raises(MisconfigurationException, match=r"1 of them longer.*'one .*refuse_long_captions"):
        prepared(clip, "fit", table, refuse_long_captions=True, **shares)


# -- parts and batches


def test_no_image_is_on_two_sides(clip: Any, pictures: str, write_table: Callable[..., str]) -> None:
    expected = described(pictures)
    rows = [(str(Path(pictures) / f"{name}.png"), text) for name, texts in expected.items() for text in texts]

    def parts(rows: list[tuple[str, str]], **options: Any) -> dict[str, set[str]]:
        data = prepared(clip, "fit", write_table(rows), validation_share=0.25, **options)
        data.setup("test")
        return {part: {str(p.file) for p in chosen} for part, chosen in data.parts.items()}

    found = parts(rows)
    assert {part: len(files) for part, files in found.items()} == {"train": 21, "validation": 8, "test": 3}
    assert len(set.union(*found.values())) == 32
    assert parts(random.sample(rows, len(rows))) == found
    assert parts(rows, seed=1) != found


def test_validation_may_be_given(clip: Any, pictures: str, write_table: Callable[..., str]) -> None:
    table = write_table([(str(Path(pictures) / "red-circle.png"), "a red circle")])
    data = prepared(clip, "fit", pictures, validation_dataset=table, test_share=0.0)
    assert len(data.parts["train"]) == 32
    assert len(data.parts["validation"]) == 1
    with pytest.raises(MisconfigurationException, match="set test_dataset, or test_share above 0"):
        data.setup("test")


def test_ranks_share_each_joint_batch() -> None:
    one = list(PictureBatchSampler(50, 8, seed=3))
    shares = [list(PictureBatchSampler(50, 4, seed=3, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert [len(draw.places) for draw in one] == [8] * 6
    assert [[*a.places, *b.places] for a, b in zip(*shares, strict=True)] == [draw.places for draw in one]
    assert len(PictureBatchSampler(50, 4, num_replicas=2)) == len(shares[0])
    few = [list(PictureBatchSampler(5, 4, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert [len(draw.places) for draws in few for draw in draws] == [2, 2]
    sampler = PictureBatchSampler(50, 8, seed=3)
    sampler.set_epoch(1)
    assert next(iter(sampler)) != one[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_an_evaluation_sees_each_picture_once_on_any_number_of_ranks(ranks: int) -> None:
    shares = [list(PictureBatchSampler(10, 3, num_replicas=ranks, rank=rank, shuffle=False)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert len(PictureBatchSampler(10, 3, num_replicas=ranks, shuffle=False)) == len(shares[0])
    turns = [draw for turn in zip(*shares, strict=True) for draw in turn]
    assert [place for draw in turns if not draw.repeats for place in draw.places] == list(range(10))


def test_captions_and_crops_depend_on_seed_epoch_and_place_alone(clip: Any, pictures: str) -> None:
    batches = prepared(clip, "fit", pictures).train_dataloader().dataset
    state = random.getstate(), torch.get_rng_state()
    two, one = batches[Draw(4, [2, 5])], batches[Draw(4, [5])]
    assert state[0] == random.getstate()
    assert torch.equal(state[1], torch.get_rng_state())
    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    again = batches[Draw(4, [2, 5])]
    for name, value in two.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value[1:], one[name])
    later = [batches[Draw(epoch, [2])] for epoch in range(6)]
    assert len({batch["images"].sum().item() for batch in later}) > 3
    assert len({tuple(batch["tokens"].flatten().tolist()) for batch in later}) == 2


# -- training


def test_all_weights_are_trained_from_scratch_with_a_plain_trainer(tiny: str, pictures: str, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    module = ContrastiveModel(model=tiny, pretrained=None, lora=None, learning_rate=3e-3, warmup_steps=5)
    data = ContrastiveData(pictures, batch_size=16, validation_share=0.0, test_dataset=pictures)
    before = {name: value.clone() for name, value in module.clip.net.state_dict().items()}
    fit = trainer(tmp_path, max_epochs=40, limit_val_batches=0)
    fit.fit(module, data)
    (results,) = fit.test(module, data, verbose=False)
    assert results["test_loss"] < torch.tensor(32.0).log() / 2  # half of chance
    assert results["test_image_to_text_recall@1"] > 0.4
    assert results["test_text_to_image_recall@1"] > 0.4
    still = {name for name, value in module.net.state_dict().items() if torch.equal(value, before.get(name, value + 1))}
    assert still <= {"logit_scale", "attn_mask"}
    assert module.contrastive.logit_scale.item() != before["logit_scale"].item()
    assert module.open_clip_state()["logit_scale"] == module.contrastive.logit_scale.squeeze()


@pytest.mark.parametrize("config", [SIGLIP, COCA], ids=["siglip", "coca"])
def test_other_models(config: dict[str, Any], pictures: str, tmp_path: Path) -> None:
    name = save_model(tmp_path / "model", config)
    module = ContrastiveModel(name, learning_rate=1e-2)
    data = ContrastiveData(pictures, batch_size=16)
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, data)
    assert module.contrastive.kind == ("siglip" if config is SIGLIP else "clip")
    before = open_clip.create_model(name).state_dict()
    after = module.open_clip_state()
    assert before.keys() == after.keys()
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert ("logit_bias" in after) == (config is SIGLIP)
    assert not still & {"logit_bias", "logit_scale"}
    assert all(name.startswith("text_decoder.") or name.endswith("attn_mask") for name in still)
    assert any(name.startswith("text_decoder.") for name in still) == (config is COCA)


def test_the_scale_is_frozen_beside_an_adapter_and_clamped_where_it_is_learnt(
    tiny: str, pictures: str, tmp_path: Path
) -> None:
    data = ContrastiveData(pictures, batch_size=16)
    frozen = ContrastiveModel(tiny, lora=LORA, learning_rate=1.0)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(frozen, data)
    assert frozen.contrastive.logit_scale.item() == pytest.approx(np.log(1 / 0.07))
    learnt = ContrastiveModel(tiny, lora=LORA, learn_logit_scale=True, learning_rate=1.0)
    learnt.configure_model()
    learnt.contrastive.logit_scale.data.fill_(np.log(100) - 0.01)
    seen = []

    class Seen(L.Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            seen.append(learnt.contrastive.logit_scale.item())

    trainer(tmp_path, Seen(), max_steps=4, limit_val_batches=0).fit(learnt, data)
    assert max(seen) <= np.log(100) + 1e-6
    assert len(set(seen)) > 1
    siglip = ContrastiveLoss(torch.tensor(4.7), torch.tensor(-10.0), learnt=True)
    siglip.clamp()
    assert siglip.logit_scale.item() == pytest.approx(4.7)


def test_vectors_have_no_weight_decay(tiny: str, pictures: str, tmp_path: Path) -> None:
    module = ContrastiveModel(tiny, weight_decay=0.5)
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fit.fit(module, ContrastiveData(pictures, batch_size=16))
    for group in fit.optimizers[0].param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.5}
    assert sum(len(group["params"]) for group in fit.optimizers[0].param_groups) == sum(
        p.requires_grad for p in module.parameters()
    )


def test_gradient_checkpointing_changes_no_gradient(tiny: str) -> None:
    batch = {"images": torch.randn(4, 3, 32, 32), "tokens": torch.randint(1, 1000, (4, 12))}
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = ContrastiveModel(tiny, lora=LORA, gradient_checkpointing=checkpointing)
        module.configure_model()
        torch.manual_seed(1)  # dropout
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        module.loss(batch).backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
        flags = [m.grad_checkpointing for m in module.modules() if hasattr(m, "grad_checkpointing")]
        assert flags
        assert all(flags) == checkpointing
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("method", [FMLoRA(rho=0.1, sync_ascent=False), None])
def test_an_ascent_of_each_rank_is_refused(
    method: Any, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ContrastiveModel(tiny, lora=LORA)
    if method is None:
        module = ContrastiveModelFM(tiny, lora=LORA, rho=0.1, sync_ascent=False)
    module.trainer = trainer(tmp_path, *filter(None, [method]))
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    with pytest.raises(MisconfigurationException, match="sync_ascent=False has no meaning"):
        module.configure_model()


def test_all_weights_under_fsdp1_are_refused(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ContrastiveModel(tiny)
    module.trainer = L.Trainer(accelerator="cpu", logger=False)
    strategy = FSDPStrategy(auto_wrap_policy=BlocksAndFactors())
    monkeypatch.setattr(module.trainer._accelerator_connector, "strategy", strategy)
    with pytest.raises(MisconfigurationException, match=r"lora=None trains all weights.*use FSDP2 or ddp"):
        module.configure_model()


def test_a_run_without_end_has_no_schedule(tiny: str, pictures: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="set max_steps or max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(ContrastiveModel(tiny), ContrastiveData(pictures))


# -- the command line and the export


@pytest.mark.parametrize("method", METHODS)
def test_every_configuration_fits_tests_and_exports(
    method: str, tiny: str, pictures: str, tmp_path: Path, capsys: Any
) -> None:
    common = [
        f"--model.init_args.model={tiny}",
        "--model.init_args.pretrained=null",
        f"--data.init_args.dataset={pictures}",
        "--data.init_args.batch_size=8",
        "--data.init_args.num_workers=0",
        "--model.init_args.warmup_steps=0",
        "--trainer.log_every_n_steps=1",
    ]
    run("fit", str(tmp_path), method, "one", [*common, "--trainer.max_steps=2", "--trainer.val_check_interval=2"])
    folder = tmp_path / "runs" / "clip_contrastive" / method / "version_0"
    assert "val_text_to_image_recall@10" in (folder / "metrics.csv").read_text()
    assert list(folder.glob("events.out.tfevents*"))
    checkpoint = folder / "checkpoints" / "last.ckpt"
    tested = run("test", str(tmp_path), method, "one", [*common, f"--ckpt_path={checkpoint}"])
    assert tested["logged"]["test_loss"] > 0

    capsys.readouterr()
    export_main([str(checkpoint), "exported"])
    assert "local-dir:exported" in capsys.readouterr().out
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    plain = open_clip.create_model(tiny).state_dict()
    model = open_clip.create_model("local-dir:exported")  # unmodified open_clip
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, plain[name])}
    assert any("resblocks.1.attn" in name for name in moved)
    assert any("ln_2" in name for name in moved) == (method == "full")
    assert any("lora_B" in name for name in weights) == (method != "full")
    with pytest.raises(SystemExit):
        export_main([str(checkpoint), "exported"])
    assert "exported holds an open_clip model already" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_not_exported(tiny: str, pictures: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    model = {"class_path": f"{ContrastiveModel.__module__}.ContrastiveModel", "init_args": {"model": tiny}}
    config.write_text(json.dumps({"model": model}))
    checkpoint = tmp_path / "run" / "other.ckpt"
    with pytest.raises(MisconfigurationException, match=r"checkpoint: there is no file .*other.ckpt"):
        export(checkpoint, tmp_path / "out", config)
    checkpoint.parent.mkdir()
    torch.save({"state_dict": {"net.other": torch.ones(1)}}, checkpoint)
    with pytest.raises(MisconfigurationException, match=r"other.ckpt is not of the model.*net.other"):
        export(checkpoint, tmp_path / "out", config)
    config.write_text("model: {class_path: nowhere.Model}")
    with pytest.raises(MisconfigurationException, match=r"config.yaml has no model that can be built"):
        export(checkpoint, tmp_path / "out")


# -- going on after a stop


class Record(L.Callback):
    """Batches and losses of a run."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, list[int], float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen = batch["images"].double().sum().item(), batch["tokens"].flatten().tolist()
        self.steps.append((*seen, trainer.callback_metrics["train_loss"].item()))


def fitted(
    tiny: str, pictures: str, folder: Path, num_workers: int = 0, ckpt_path: str | None = None
) -> tuple[list[Tensor], Record]:
    """A run from one seed, or from a checkpoint after other random numbers have been drawn."""
    L.seed_everything(7 if ckpt_path is None else 99, verbose=False)
    record = Record()
    module = ContrastiveModel(tiny, lora=LORA, learning_rate=1e-2)
    savers = [
        AdapterCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1),
        AdapterCheckpoint(folder, filename="val-{step}", save_top_k=-1, monitor="val_loss"),
    ]
    callbacks = [record, EFMLoRA(rho=0.5), RandomState(), *savers]
    fit = trainer(folder, *callbacks, enable_checkpointing=True, val_check_interval=2)
    fit.fit(module, ContrastiveData(pictures, batch_size=6, num_workers=num_workers), ckpt_path=ckpt_path)
    return [p.detach().clone() for p in module.parameters() if p.requires_grad], record


def test_a_resumed_run_equals_the_uninterrupted_one(tiny: str, pictures: str, tmp_path: Path) -> None:
    weights, whole = fitted(tiny, pictures, tmp_path / "whole")
    assert len(whole.steps) == 8  # two epochs of 26 images in batches of 6
    # in the first epoch, in its validation, at its end; in the second
    for name in ("step=1", "val-step=2", "step=4", "step=7"):
        checkpoint = str(tmp_path / "whole" / f"{name}.ckpt")
        again, rest = fitted(tiny, pictures, tmp_path / name, 0, checkpoint)
        assert rest.steps == whole.steps[int(name.split("=")[1]) :], name
        assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True)), name


def test_worker_processes_change_nothing(tiny: str, pictures: str, tmp_path: Path) -> None:
    _, alone = fitted(tiny, pictures, tmp_path / "alone")
    weights, whole = fitted(tiny, pictures, tmp_path / "whole", num_workers=1)
    assert whole.steps == alone.steps
    again, rest = fitted(tiny, pictures, tmp_path / "rest", 1, str(tmp_path / "whole" / "step=3.ckpt"))
    assert rest.steps == whole.steps[3:]
    assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True))


def test_bad_models_are_named() -> None:
    with pytest.raises(MisconfigurationException, match="ViT-Nothing"):
        _ = ContrastiveModel("ViT-Nothing").clip
    with pytest.raises(MisconfigurationException, match="no-such-tag"):
        _ = ContrastiveModel("ViT-B-32", pretrained="no-such-tag").clip
