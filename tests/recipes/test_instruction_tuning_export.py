"""A run's adapter as a plain transformers folder with a model card."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel

from recipes.language import export as exporting
from recipes.language.model import add_adapter

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
RUN = {
    "seed_everything": 3,
    "trainer": {
        "max_epochs": 2,
        "callbacks": [
            {"class_path": "lightning_flatlora.AdapterCheckpoint"},
            {"class_path": "lightning_flatlora.EFMLoRA", "init_args": {"rho": 0.03, "beta": 0.9, "finder": None}},
        ],
    },
    "model": {"init_args": {"learning_rate": 0.001}},
    "data": {"init_args": {"dataset": "openai/gsm8k", "config_name": "main", "chat_template": TEMPLATE}},
}


@pytest.fixture
def adapter(tiny: str, tmp_path: Path) -> Path:
    """The folder of an adapter with random factors, in the place where a run puts it."""
    net = add_adapter(transformers.AutoModelForCausalLM.from_pretrained(tiny), LORA)
    torch.manual_seed(0)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path / "version_0" / "checkpoints" / "last"
    net.save_pretrained(str(folder))
    (tmp_path / "version_0" / "config.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    return folder


def test_the_folder_is_a_plain_model_that_answers_alike(adapter: Path, tiny: str, tmp_path: Path, capsys: Any) -> None:
    exporting.export(adapter, tmp_path / "plain")
    assert "plain" in capsys.readouterr().out
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(20)[None]
    untuned = base(ids).logits
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(merged) is transformers.LlamaForCausalLM
    expected = PeftModel.from_pretrained(base, str(adapter))(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected - untuned).abs().max() > 1e-3
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.chat_template == TEMPLATE
    assert not list((tmp_path / "plain").glob("adapter*"))


def test_a_run_can_not_let_the_base_run_code(adapter: Path, tmp_path: Path) -> None:
    """The run may come from someone else, and these fields can contain transformers' own options."""
    run = {**RUN, "model": {"init_args": {"model_config": {"trust_remote_code": True}}}}
    (adapter.parents[1] / "config.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(MisconfigurationException, match=r"model_config .*trust_remote_code.* may run code"):
        exporting.export(adapter, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_programs_that_generate_stop_where_the_template_ends_an_answer(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, end in (("one token", "<file_sep>"), ("several", "END OF IT")):
        template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
        run = {**RUN, "data": {"init_args": {"chat_template": template}}}
        (adapter.parents[1] / "config.yaml").write_text(yaml.safe_dump(run))
        exporting.export(adapter, tmp_path / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        ends = tokenizer(end, add_special_tokens=False)["input_ids"]
        assert (len(ends) == 1) == (name == "one token")
        if len(ends) == 1:
            assert ends[0] in model.generation_config.eos_token_id
        else:
            assert f"Answers end with '{end}', which is not one token" in capsys.readouterr().out


def test_the_card_says_how_it_was_made(adapter: Path, tmp_path: Path) -> None:
    exporting.export(adapter, tmp_path / "plain", dtype="bfloat16")
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert card.data.datasets == ["openai/gsm8k"]
    assert card.data.base_model is None  # a folder of this machine is not a name on the Hub
    for line in ("fine-tuned with EFMLoRA", "rho: 0.03\n", "config_name: main", "r: 4\n  lora_alpha: 8"):
        assert line in card.text
    assert f"torch: {torch.__version__}" in card.text
    assert "finder" not in card.text
    assert str(tmp_path.parent) not in card.content
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert merged.dtype == torch.bfloat16


def test_a_vision_language_model_is_merged_too(tiny_vlm: str, tmp_path: Path) -> None:
    net = add_adapter(transformers.AutoModelForImageTextToText.from_pretrained(tiny_vlm), LORA)
    net.save_pretrained(str(tmp_path / "adapter"))
    exporting.export(tmp_path / "adapter", tmp_path / "plain")
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
    base = transformers.AutoModelForImageTextToText.from_pretrained(tiny_vlm)
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, merged.state_dict()[name]), name  # B is 0 at the start
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "plain").image_processor is not None


def test_bad_folders_are_named(adapter: Path, tiny: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="is not an adapter's folder: it has no adapter_config"):
        exporting.export(Path(tiny), tmp_path / "plain")
    with pytest.raises(MisconfigurationException, match="is not an empty folder"):
        exporting.export(adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"layer_replication": [[0, 1], [0, 1]]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MisconfigurationException, match="adapters with layer_replication are not supported"):
        exporting.export(tmp_path, tmp_path / "merged")
