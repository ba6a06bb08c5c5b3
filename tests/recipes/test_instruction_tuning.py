"""The recipe on a tiny random Llama with SmolLM2's tokenizer, and once on SmolLM2 itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import config_arguments, instruction_data, packaged_arguments, quick, trained, trainer
from torch import Tensor

from lightning_flatlora import AdapterCheckpoint, EFMLoRA
from recipes.command_line.configs import RECIPES
from recipes.instruction_tuning.data import InstructionData
from recipes.instruction_tuning.module import InstructionTuning
from recipes.language.batches import collate
from recipes.language.chat import IGNORED
from recipes.language.evaluation import right_choices
from recipes.language.model import answer_log_likelihood
from recipes.training.random_state import RandomState

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}


# -- the module


def test_the_pages_module_in_manual_optimization_gives_the_callbacks_weights(
    tiny: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = RECIPES.parent / "docs" / "recipes" / "instruction_tuning.md"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    given = [f"--model.model={tiny}", f"--data.dataset={sums}", "--model.lora.lora_dropout=0", "--trainer.max_steps=3"]
    given += ["--data.validation_share=0.1", "--data.batch_size=4", "--model.warmup_share=0"]
    manual = ["--model=mine.ManualTuning", "--model.rho=0.05", "--model.gradient_clip_val=1"]
    weights = []
    for method in (["--method=fmlora", "--rho=0.05"], [*manual, "--trainer.gradient_clip_val=null"]):
        weights.append(trained(quick("fit", config_arguments("instruction_tuning", "lora"), *method, *given)))
    assert any(weight.any() for name, weight in weights[0].items() if "lora_B" in name)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)


# -- the model's inputs


def test_choices_are_ranked_by_mean_log_likelihood(tiny: str, tokenizer: Any) -> None:
    data = instruction_data("test", tiny, dataset="packaged:openbook_qa", batch_size=6)
    rows = data.parts["test"].select(range(6))
    batch = collate(rows[:], tokenizer.pad_token_id)
    module = InstructionTuning(model=tiny, lora=LORA)
    module.configure_model()
    module.eval()
    with torch.no_grad():
        sums, tokens = module.log_likelihood(batch)
        right, flat = [], []
        for row in rows:
            scores = [
                by_hand(module.net, ids, labels) for ids, labels in zip(row["input_ids"], row["labels"], strict=True)
            ]
            flat += scores
            right.append(max(range(len(scores)), key=scores.__getitem__) == row["gold"])
    torch.testing.assert_close(sums / tokens, torch.tensor(flat), rtol=1e-5, atol=1e-5)
    assert right_choices(sums / tokens, batch) == right


def by_hand(net: Any, ids: list[int], labels: list[int]) -> float:
    """Mean log-likelihood of one row's answer, without padding, from the full logits."""
    log_probabilities: Tensor = net(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    scores = [log_probabilities[i - 1, label].item() for i, label in enumerate(labels) if label != IGNORED]
    return sum(scores) / len(scores)


def test_selected_logits_give_the_gradients_of_all(tiny: str, tokenizer: Any, sums: str) -> None:
    data = instruction_data("fit", tiny, dataset=sums)
    batch = collate(data.parts["train"][:8], tokenizer.pad_token_id)
    module = InstructionTuning(model=tiny, lora=LORA | {"lora_dropout": 0.0})
    module.configure_model()
    sum_, tokens = answer_log_likelihood(
        module.net, {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"]
    )
    (-sum_.sum() / tokens.sum()).backward()
    grads = [p.grad.clone() for p in module.net.parameters() if p.requires_grad]
    module.zero_grad()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    module.net(**inputs).loss.backward()  # computed by transformers itself
    for grad, parameter in zip(grads, (p for p in module.net.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-7)


def test_free_answers_are_generated_and_compared(tiny: str, sums: str, tmp_path: Path, monkeypatch: Any) -> None:
    data = InstructionData(sums, batch_size=4, validation_share=0.3)
    module = InstructionTuning(model=tiny, lora=LORA, max_new_tokens=3, exact_match_examples=6)
    asked: list[list[int]] = []

    def generate(prompts: list[list[int]]) -> list[str]:
        asked.extend(prompts)
        return [module.tokenizer.decode(ids).split("Add ")[1].split("\n")[0].split("<")[0] for ids in prompts]

    monkeypatch.setattr(module, "generate", lambda prompts: [f"it is {a}" for a in generate(prompts)])
    (results,) = trainer(tmp_path).validate(module, data, verbose=False)
    assert len(asked) == 6
    assert results["val_exact_match"] == 1.0
    assert "val_accuracy" not in results
    assert results["val_perplexity"] == pytest.approx(torch.tensor(results["val_loss"]).exp().item(), rel=1e-5)


# -- the command line


def test_predict_answers_the_lines_of_a_file(tiny: str, tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why?\n\n  How many?  \n")
    # The training data are not read.
    options = [f"--model.model={tiny}", f"--data.prompts={prompts}", "--model.max_new_tokens=3"]
    quick("predict", packaged_arguments("instruction_tuning"), *options, "--data.dataset=gone.jsonl")
    (path,) = tmp_path.glob("runs/**/answers.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Why?", "How many?"]
    assert all(isinstance(row["answer"], str) for row in rows)
    assert "> How many?" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*are in the training split too:UserWarning")
def test_the_base_configuration_trains_any_model_on_any_file(tiny: str, tokenizer: Any, sums: str) -> None:
    """Without the settings of the toy run: no system message, all linear layers, no held-out test part."""
    options = [f"--model.model={tiny}", f"--data.dataset={sums}", "--data.validation_share=0.2"]
    base = config_arguments("instruction_tuning", "lora")
    cli = quick("fit", base, *options, "--trainer.max_steps=1", "--trainer.limit_val_batches=1")
    rows = cli.datamodule.parts["train"]
    assert len(rows) + len(cli.datamodule.parts["validation"]) == 60
    assert "briefly" not in tokenizer.decode(rows[0]["input_ids"][0])
    assert cli.model.learning_rate == 2e-4
    assert {name.split(".")[-1] for name in cli.model.net.targeted_module_names} == {
        *(f"{letter}_proj" for letter in "qkvo"),
        *(f"{name}_proj" for name in ("gate", "up", "down")),
    }
    options.append(f"--ckpt_path={cli.trainer.checkpoint_callback.last_model_path}")
    for held_out_late, message in (
        ("--data.test_share=0.2", r"was trained on .*, except for the shares .*'test': 0.0"),
        (f"--data.test_split={sums}", "the checkpoint's run was trained on"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            quick("test", base, *options, held_out_late)
    with pytest.raises(MisconfigurationException, match=r"nothing to test on.*Give --data.test_split"):
        quick("test", base, *options)
    Path(sums).write_text(2 * Path(sums).read_text())
    with pytest.warns(UserWarning, match=f"had {len(rows)} examples, but this one has {2 * len(rows)}"):
        quick("fit", base, *options, "--trainer.max_steps=2")


def test_the_packaged_model_learns_and_its_checkpoint_is_small(tmp_path: Path) -> None:
    module = InstructionTuning(
        model="packaged", lora={**LORA, "r": 8, "lora_alpha": 16, "lora_dropout": 0.0}, learning_rate=3e-3
    )
    data = InstructionData("packaged:commonsense_qa", batch_size=2)
    saver = AdapterCheckpoint(tmp_path, save_last=True)
    callbacks = (EFMLoRA(rho=0.5), saver, RandomState())
    fit = trainer(tmp_path, *callbacks, max_steps=2, limit_val_batches=0, enable_checkpointing=True)
    fit.fit(module, data)
    adapter = tmp_path / "last" / "adapter_model.safetensors"
    assert (tmp_path / "last.ckpt").stat().st_size < 5 * adapter.stat().st_size
    assert sum(p.numel() for p in module.net.parameters()) > 134e6
    assert 0 < fit.callback_metrics["train_loss"] < 8
    assert module.net.training
    questions = ("Name a colour.", "What is the capital of France?")
    prompts = [data.encoder.encode_prompt([{"role": "user", "content": question}]) for question in questions]
    module.eval()
    module.max_new_tokens = 4
    assert module.generate(prompts) == [module.generate([prompt])[0] for prompt in prompts]  # padding changes nothing


# -- what is refused


def test_bad_data_is_named(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"chat_template='missing\.jinja'"):
        instruction_data("fit", tiny, dataset="packaged:openbook_qa", chat_template="missing.jinja")
    (tmp_path / "unanswered.json").write_text(json.dumps([{"instruction": f"q {i}", "output": ""} for i in range(9)]))
    with pytest.raises(MisconfigurationException, match=r"unanswered.json.*no answer in the data"):
        instruction_data("fit", tiny, dataset="unanswered.json")


def test_prompts_are_needed_for_predict(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"predict needs --data.prompts"):
        instruction_data("predict", tiny, dataset="packaged:openbook_qa")
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(MisconfigurationException, match="holds no prompt"):
        instruction_data("predict", tiny, dataset="packaged:openbook_qa", prompts="blank.txt")


def test_bad_models_are_named(tiny: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    with pytest.raises(MisconfigurationException, match=r"model='nowhere/at-all' can't be loaded.*'packaged'"):
        _ = InstructionTuning(model="nowhere/at-all").tokenizer
    for lora in ({"target_modules": ["nothing"]}, {"rank": 8}):
        with pytest.raises(MisconfigurationException, match=next(iter(lora))):
            InstructionTuning(model=tiny, lora=lora).configure_model()
