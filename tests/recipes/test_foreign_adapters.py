"""An adapter's folder of somebody else's ends in data or in words, and no code that it names runs."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from report_models import save_adapter, save_base, write_rows
from transformers import AutoModelForCausalLM

from recipes.language.export import export
from recipes.language.model import load_base
from recipes.language.warm_start import load_factors
from recipes.report.run import main

CONFIG = "adapter_config.json"
MEGATRON: dict[str, Any] = {"megatron_config": {"a": 1}, "megatron_core": "payload"}
PAYLOAD = 'from pathlib import Path\nPath("PWNED").touch()\n'


@pytest.fixture(autouse=True)
def _payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the working folder, which ``python -m`` puts on the path; peft 0.18 would import it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "payload.py").write_text(PAYLOAD)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"))


def change(folder: Path, **config: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def report(folder: Path) -> None:
    data = write_rows(Path("data.jsonl"), [{"text": "a b c"}] * 2)
    main(["--adapter", str(folder), "--data", str(data), "--surface=false", "--curvature=false", "--points=3"])


def merge(folder: Path) -> None:
    export(folder, Path("merged"))


def start(folder: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    load_factors(get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config), str(folder))


READERS = [report, merge, start]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (MEGATRON, "only what is known as plain data .* got {'megatron_config'"),
        ({"x_config": {"class": "payload"}}, "only what is known as plain data .* got {'x_config'"),
        ({"r": "8"}, "str|'8'"),
        ({"r": [8]}, r"list|\[8\]"),
        ({"r": -1}, "-1"),
        ({"target_modules": [1]}, "target_modules a text or a list of texts"),
        ({"target_modules": 3}, "can't be used by the installed peft"),
        ({"rank_pattern": ["a"]}, "list|a"),
        ({"auto_mapping": ["a"]}, "auto_mapping must be a dict"),
        ({"task_type": ["CAUSAL_LM"]}, "can't be used by the installed peft: .*Invalid task type"),
        ({"task_type": "payload"}, "can't be used by the installed peft: .*Invalid task type: 'payload'"),
        ({"peft_type": "XLORA"}, "must say peft_type LORA, got 'XLORA'"),
        ({"peft_type": ["LORA"]}, r"must say peft_type LORA, got \['LORA'\]"),
    ],
)
def test_a_foreign_adapter_ends_in_words(read: Any, changes: dict[str, Any], says: str, adapter: Path) -> None:
    change(adapter, **changes)
    with pytest.raises(MisconfigurationException, match=says):
        read(adapter)
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("read", [report, merge])
@pytest.mark.parametrize("changes", [{"target_modules": {"a": [1]}}, {"base_model_name_or_path": ["x"]}])
def test_what_is_no_start_but_part_of_the_model(read: Any, changes: dict[str, Any], adapter: Path) -> None:
    change(adapter, **changes)
    with pytest.raises(MisconfigurationException, match=r"can't be|does not fit"):
        read(adapter)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "must say peft_type LORA, got None"),
        ("3", "must say peft_type LORA, got None"),
        ("{", "can't be read: JSONDecodeError"),
        ("\xff", "can't be read: UnicodeDecodeError"),
        ("", "can't be read: JSONDecodeError"),
        ("[" * 100_000, "can't be read: RecursionError"),
        ('{"peft_type": ' + "[" * 60 + "]" * 60 + "}", "more than 100,000 values or 50 levels"),
        ('{"r": 1' + "0" * 5000 + "}", "can't be read: ValueError"),
        ('{"peft_type": "LORA", "x": "' + " " * 5_000_000 + '"}', "it is larger than 2,097,152 bytes"),
    ],
    ids=["list", "number", "half", "bytes", "empty", "deep", "levels", "digits", "large"],
)
def test_a_damaged_configuration_ends_in_words(read: Any, content: str, says: str, adapter: Path) -> None:
    (adapter / CONFIG).write_bytes(content.encode("latin-1"))
    with pytest.raises(MisconfigurationException, match=says):
        read(adapter)


def test_what_other_versions_of_peft_write_is_read(adapter: Path) -> None:
    """A byte order mark, and fields that are off."""
    change(adapter, enable_lora=None, merge_weights=False, new_config={}, corda_config=None)
    path = adapter / CONFIG
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    merge(adapter)
    assert Path("merged", "config.json").exists()


def test_a_base_with_an_adapter_in_it_is_looked_at_too(adapter: Path) -> None:
    """transformers would load the base together with that adapter."""
    second = Path(shutil.copytree(adapter, "second"))
    change(second, base_model_name_or_path=str(adapter))
    change(adapter, **MEGATRON)
    for read in (report, merge, lambda folder: load_base(str(adapter), "float32", None)):
        with pytest.raises(MisconfigurationException, match="plain data of LoRA is taken from an adapter"):
            read(second)
    assert not Path("PWNED").exists()


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("PWNED"),))


@pytest.mark.parametrize("read", [report, merge])
@pytest.mark.parametrize("content", [Evil(), [torch.ones(1)], {"a": 1}, None])
def test_a_pickle_of_weights_ends_in_words(read: Any, content: Any, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    if content is not None:
        torch.save(content, adapter / "adapter_model.bin")
    says = "holds no weights" if content is None else "the weights in"
    with pytest.raises(MisconfigurationException, match=says):
        read(adapter)
    assert not Path("PWNED").exists()


def test_weights_of_another_width_are_no_start(adapter: Path) -> None:
    wider = AutoModelForCausalLM.from_pretrained(save_base(Path("wider"), width=32))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    with pytest.raises(MisconfigurationException, match="adapts other layers than lora, or another model"):
        load_factors(get_peft_model(wider, config), str(adapter))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"init_args": {"model_config": ["a"]}}}, r"model_config \['a'\] in the run's config"),
        ({"data": {"init_args": {"tokenizer": ["a"]}}}, r"model=\['a'\] can't be loaded by AutoTokenizer"),
        ({"data": {"init_args": {"chat_template": 3}}}, "chat_template='3' in .* only a template or a .jinja"),
        ({"data": {"init_args": {"template_arguments": [1]}}}, r"template_arguments in .* must be a dict, got \[1\]"),
        ({"data": None}, "data and its init_args must be dicts, got None"),
        ({"data": {"init_args": {"dataset": ["a/b"]}}}, None),
        ({"data": {"init_args": {"dataset": "a/" + "b" * 5000}}}, None),
        ({"data": {"init_args": {"dataset": "a/\0"}}}, None),
        ({"trainer": {"callbacks": 3}}, None),
        ({"trainer": {"callbacks": [{"class_path": ["x"], "init_args": 3}]}}, None),
    ],
)
def test_the_settings_of_a_foreign_run_are_merged_or_refused(
    changes: dict[str, Any], says: str | None, adapter: Path
) -> None:
    folder = Path(shutil.copytree(adapter, "run/checkpoints/last"))
    Path("run/config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {}}} | changes))
    with pytest.raises(MisconfigurationException, match=says) if says else nullcontext():
        merge(folder)
    assert Path("merged", "README.md").exists() == (says is None)
