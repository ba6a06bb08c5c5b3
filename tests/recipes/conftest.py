"""Tiny random models, drawn images and files of rows, for tests that need a model but not a good one."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

for library in ("datasets", "jsonargparse", "open_clip", "rich", "transformers"):
    pytest.importorskip(library, reason="the recipes' dependencies are not installed")

import datasets  # noqa: E402
import transformers  # noqa: E402
from clip_contrastive_runs import CLIP, save_pictures  # noqa: E402
from clip_contrastive_runs import save_model as save_clip  # noqa: E402
from clip_fewshot_runs import filled  # noqa: E402
from clip_fewshot_runs import tiny_clip as save_tiny_clip  # noqa: E402
from hub_sets import save_glue, save_roberta  # noqa: E402
from nlg_sets import save_gpt2  # noqa: E402
from one_command import one_command  # noqa: E402
from report_models import WORDS, save_adapter, save_base, write_rows  # noqa: E402
from vqa_models import KINDS, draw, save_model  # noqa: E402

from recipes.clip_contrastive.module import ContrastiveModel  # noqa: E402
from recipes.offline import packaged  # noqa: E402

OF_SHORT_RUNS = (
    "The dirpath has changed",  # a checkpoint of another run's folder
    "Experiment logs directory",
    ".*is smaller than the logging interval",
    ".*could not find the monitored key",
    "Precision bf16-mixed is not supported by the model summary",
    "Only .* optimizer steps",  # the recipes' own warning
)
"""What is remarked of runs of a few steps, and of those that go on in another folder."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for remark in OF_SHORT_RUNS:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{remark}:UserWarning"))


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A command line that silences Lightning must not do so for later tests."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _one_command() -> Iterator[None]:
    with one_command():
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(packaged.smollm2())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """Folder of a random Llama of two layers."""
    folder = tmp_path_factory.mktemp("tiny")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random RoBERTa of two layers."""
    return save_roberta(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random GPT-2 of two layers."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the layout of GLUE's repository."""
    return save_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random CLIP for contrastive training."""
    return save_clip(tmp_path_factory.mktemp("small") / "clip", CLIP)


@pytest.fixture(scope="session")
def clip(small_clip: str) -> Any:
    """The model in that folder."""
    return ContrastiveModel(small_clip).clip


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of drawn shapes, each with a file of captions."""
    return save_pictures(tmp_path_factory.mktemp("drawn") / "pictures")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random CLIP for classification."""
    return save_tiny_clip(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, twelve images each."""
    return filled(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of random vision-language models of two kinds."""
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, folders: dict[str, str]) -> str:
    """Each of these folders in turn."""
    return folders[request.param]


@pytest.fixture
def tiny_vlm(folders: dict[str, str]) -> str:
    return folders["idefics3"]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows into a file of JSON lines."""

    def write(rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write


@pytest.fixture
def drawn(tmp_path: Path, jsonl: Callable[..., str]) -> str:
    """A file of questions about drawn images."""
    return jsonl(draw(tmp_path))


@pytest.fixture
def sums(jsonl: Callable[..., str]) -> str:
    """A file of sixty free questions of different lengths."""
    return jsonl([{"instruction": f"Add {i}", "input": "one " * (i % 7), "output": f"It is {i}."} for i in range(60)])


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a new folder, and without warnings about this process's own arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])  # LightningCLI warns if there are arguments besides those it is given
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # caused by Lightning


@pytest.fixture
def own_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A separate cache of `datasets`, and no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# -- for the report


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="session")
def base(root: Path) -> Path:
    return save_base(root / "base")


@pytest.fixture(scope="session")
def adapters(root: Path, base: Path) -> tuple[Path, Path]:
    """Two adapters of a causal language model, with different ranks."""
    return save_adapter(root / "small", base), save_adapter(root / "large", base, rank=4)


@pytest.fixture(scope="session")
def classifiers(root: Path, base: Path) -> tuple[Path, Path]:
    """Two adapters of a classifier with three classes, each with its own head."""
    return (
        save_adapter(root / "classifier", base, task="SEQ_CLS"),
        save_adapter(root / "classifier_large", base, rank=4, task="SEQ_CLS"),
    )


@pytest.fixture(scope="session")
def texts(root: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (3, 9, 5, 7, 4, 6):
        words = [WORDS[index] for index in torch.randint(len(WORDS), (length,), generator=generator)]
        rows.append({"text": " ".join(words), "label": length % 3})
    return write_rows(root / "texts.jsonl", rows)
