"""A base and its adapter are loaded completely, or one line says what doesn't fit; the same for wrong command lines."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from report_models import make_tokenizer, save_adapter, save_base, transformers, write_rows

from recipes.report.adapters import Adapted, load_adapter
from recipes.report.options import AdapterFolder, Options
from recipes.report.run import main

SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16}
SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", [{"text": "a"}])


def loaded(adapter: Path, data: Path, **options: Any) -> Adapted:
    folder = AdapterFolder(adapter.name, adapter)
    return load_adapter(folder, Options([str(adapter)], data, **options))


def changed(adapter: Path, to: Path, **config: Any) -> Path:
    """A copy with a changed configuration."""
    shutil.copytree(adapter, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return to


def test_the_base_is_what_the_adapter_names_or_the_user(adapters: tuple[Path, Path], base: Path, data: Path) -> None:
    own, given = loaded(adapters[0], data), loaded(adapters[0], data, base=str(base))
    assert (own.base, own.task, own.label) == (str(base), "CAUSAL_LM", "small")
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(own.model(tokens).logits, given.model(tokens).logits)


def test_it_is_ready_to_be_measured(adapters: tuple[Path, Path], data: Path) -> None:
    model = loaded(adapters[0], data, dtype="float64").model
    assert not any(module.training for module in model.modules())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_the_number_of_classes_is_the_heads(base: Path, tmp_path: Path, data: Path) -> None:
    """Trained tokens, a fully trained layer and the head's first layer have fewer rows than there are classes."""
    torch.manual_seed(0)
    transformers.RobertaModel(transformers.RobertaConfig(**SIZES)).save_pretrained(tmp_path / "roberta")
    make_tokenizer().save_pretrained(tmp_path / "roberta")
    more: dict[str, Any] = {"trainable_token_indices": [1, 2], "modules_to_save": ["norm"]}
    saved = save_adapter(tmp_path / "a", base, task="SEQ_CLS", classes=20, **more)
    other = save_adapter(tmp_path / "b", tmp_path / "roberta", task="SEQ_CLS", classes=20, target_modules=["query"])
    for adapter in (saved, other):
        assert loaded(adapter, data).model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 20)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_without_a_task_the_class_of_the_base_says_it(task: str, base: Path, tmp_path: Path, data: Path) -> None:
    """As in adapters of trl's trainers, unless their LoraConfig is given a task."""
    more: dict[str, Any] = {"modules_to_save": ["score"]} if task == "SEQ_CLS" else {}
    adapter = save_adapter(tmp_path / "adapter", base, task=task, task_type=None, **more)
    assert loaded(adapter, data).task == task
    with pytest.raises(MisconfigurationException, match="got None and "):
        loaded(changed(adapter, tmp_path / "other", auto_mapping={"base_model_class": "Mine"}), data)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"task_type": "SEQ_CLS"}, "neither base nor adapter holds score.weight, which SEQ_CLS needs"),
        ({"task_type": None}, "must say task_type CAUSAL_LM or SEQ_CLS .* got None and "),
    ],
)
def test_tasks_that_can_not_be_measured(
    config: dict[str, Any], says: str, adapters: tuple[Path, Path], tmp_path: Path, data: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        loaded(changed(adapters[0], tmp_path / "other", **config), data)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"layers": 3}, r"it was trained on another base, with or without .*layers\.2\."),
        ({"width": 32}, r"can't be measured: RuntimeError.*size mismatch for .*lora_A.*\[2, 16\].*\[2, 32\]"),
    ],
)
def test_an_adapter_of_another_base(
    config: dict[str, int], says: str, adapters: tuple[Path, Path], tmp_path: Path, data: Path
) -> None:
    other = save_base(tmp_path / "base", **config)
    with pytest.raises(MisconfigurationException, match=says) as raised:
        loaded(adapters[0], data, base=str(other))
    assert "\n" not in str(raised.value)


def test_no_such_base(adapters: tuple[Path, Path], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    says = "small on --base .*nowhere can't be measured: "
    with pytest.raises(MisconfigurationException, match=says):
        loaded(adapters[0], data, base="runs/nowhere")


@pytest.mark.parametrize(("classes", "problem"), [(1, None), (3, "multi_label_classification")])
def test_other_losses_than_the_cross_entropy_of_a_class(
    classes: int, problem: str | None, tmp_path: Path, data: Path
) -> None:
    other = save_base(tmp_path / "base", problem_type=problem)
    adapter = save_adapter(tmp_path / "adapter", other, task="SEQ_CLS", classes=classes)
    with pytest.raises(MisconfigurationException, match="it predicts numbers or several classes at once"):
        loaded(adapter, data)


@pytest.mark.parametrize("content", [None, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"])
def test_a_damaged_adapter(content: bytes | None, adapters: tuple[Path, Path], tmp_path: Path, data: Path) -> None:
    """Without weights, or with a pointer of git-lfs."""
    damaged = changed(adapters[0], tmp_path / "damaged")
    weights = damaged / "adapter_model.safetensors"
    weights.unlink()
    if content:
        weights.write_bytes(content)
    with pytest.raises(MisconfigurationException, match="base can't be measured: "):
        loaded(damaged, data)


# -- the command line


def folder_with(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_labels_are_given_or_the_folders_names(tmp_path: Path) -> None:
    with_equals = folder_with(tmp_path / "epoch=2-step=414", {})
    assert AdapterFolder.parse(str(with_equals)).label == "epoch=2-step=414"
    assert AdapterFolder.parse(f"mine={with_equals}") == AdapterFolder("mine", with_equals)
    assert AdapterFolder.parse(f"{tmp_path}/no=such").path == tmp_path / "no=such"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--rho", "0.1", "0"], r"--rho and --sigma must be finite and > 0.* rho=\[0.1, 0.0\]"),
        (["--points", "4"], "--points 3 or more and odd: got .* points=4"),
        (["--samples", "1"], "--samples and --max_length 2 or more.* samples=1"),
        (["--batch_size", "0"], "--batch_size 1 or more.* batch_size=0"),
        (["--adapter", "adapter", "x/adapter"], "labels must differ"),
        (["--adapter", "ia3"], "ia3: its adapter_config.json must say peft_type LORA, got 'IA3'"),
        (["--adapter", "mine"], "mine is not an adapter's folder: it has no adapter_config.json"),
        (["--output", "adapter"], "--output adapter holds adapter_config.json: give another folder"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(
    given: list[str], says: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_with(Path("adapter"), {"peft_type": "LORA", "task_type": "CAUSAL_LM"})
    folder_with(Path("ia3"), {"peft_type": "IA3"})
    Path("mine").mkdir()
    with pytest.raises(MisconfigurationException, match=says):
        main(["--adapter", str(tmp_path / "adapter"), "--data", str(data), *given])
    assert not list(Path().glob("**/report.md"))
