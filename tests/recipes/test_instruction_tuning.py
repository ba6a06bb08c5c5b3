"""The recipe on a tiny random Llama with SmolLM2's tokenizer, and once on SmolLM2 itself."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import Tensor

datasets = pytest.importorskip("datasets", reason="the recipes' dependencies are not installed")
transformers = pytest.importorskip("transformers", reason="the recipes' dependencies are not installed")

from trainers import trainer  # noqa: E402

from lightning_flatlora import AdapterCheckpoint, EFMLoRA  # noqa: E402
from recipes.instruction_tuning.data import InstructionData  # noqa: E402
from recipes.instruction_tuning.module import InstructionTuning  # noqa: E402
from recipes.language.batches import Collate  # noqa: E402
from recipes.language.chat import IGNORED, ChatEncoder  # noqa: E402
from recipes.language.model import answer_log_likelihood  # noqa: E402
from recipes.shared import packaged  # noqa: E402
from recipes.shared.cli import RecipeCLI  # noqa: E402
from recipes.shared.configs import config_arguments, methods_of  # noqa: E402
from recipes.shared.random_state import RandomState, collect_random_state, restore_random_state  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("command_line", "own_datasets"),
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning"),  # runs of two steps
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
]

METHODS = methods_of("instruction_tuning")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}


def prepared(stage: str, tokenizer: str, **options: Any) -> InstructionData:
    data = InstructionData(tokenizer=tokenizer, **options)
    data.prepare_data()
    data.setup(stage)
    return data


# -- what the model is asked


def test_choices_are_ranked_by_mean_log_likelihood(tiny: str, tokenizer: Any) -> None:
    data = prepared("test", tiny, dataset="packaged:openbook_qa", batch_size=6)
    rows = data.parts["test"].select(range(6))
    batch = Collate(tokenizer.pad_token_id)(rows[:])
    module = InstructionTuning(model=tiny, lora=LORA)
    module.configure_model()
    module.eval()
    metrics = module.metrics["test"]
    with torch.no_grad():
        sums, tokens = module.log_likelihood(batch)
        metrics.update_choices(sums / tokens, batch)
        right, flat = [], []
        for row in rows:
            scores = [
                by_hand(module.net, ids, labels) for ids, labels in zip(row["input_ids"], row["labels"], strict=True)
            ]
            flat += scores
            right.append(max(range(len(scores)), key=scores.__getitem__) == row["gold"])
    torch.testing.assert_close(sums / tokens, torch.tensor(flat), rtol=1e-5, atol=1e-5)
    assert metrics.accuracy.compute().item() == pytest.approx(sum(right) / len(right))


def by_hand(net: Any, ids: list[int], labels: list[int]) -> float:
    """Mean log-likelihood of one row's answer, without padding, from the full logits."""
    log_probabilities: Tensor = net(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    scores = [log_probabilities[i - 1, label].item() for i, label in enumerate(labels) if label != IGNORED]
    return sum(scores) / len(scores)


def test_selected_logits_give_the_gradients_of_all(tiny: str, tokenizer: Any, sums: str) -> None:
    data = prepared("fit", tiny, dataset=sums)
    batch = Collate(tokenizer.pad_token_id)(data.parts["train"][:8])
    module = InstructionTuning(model=tiny, lora=LORA | {"lora_dropout": 0.0})
    module.configure_model()
    sum_, tokens = answer_log_likelihood(
        module.net, {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"]
    )
    (-sum_.sum() / tokens.sum()).backward()
    grads = [p.grad.clone() for p in module.net.parameters() if p.requires_grad]
    module.zero_grad()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    module.net(**inputs).loss.backward()  # transformers' own loss
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


def run(command: str, method: str, model: str, *options: str) -> None:
    RecipeCLI(
        [
            command,
            *config_arguments("instruction_tuning", method),
            f"--model.init_args.model={model}",
            "--trainer.accelerator=cpu",
            "--trainer.log_every_n_steps=1",
            "--data.init_args.batch_size=4",
            *options,
        ]
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_configuration_fits_tests_and_gives_a_peft_adapter(method: str, tiny: str, tmp_path: Path) -> None:
    run("fit", method, tiny, "--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2")
    folder = tmp_path / "runs" / "instruction_tuning" / method / "version_0"
    assert (folder / "config.yaml").is_file()
    assert "val_accuracy" in (folder / "metrics.csv").read_text()
    assert list(folder.glob("events.out.tfevents*"))
    checkpoint = folder / "checkpoints" / "last.ckpt"
    adapter = folder / "checkpoints" / "last"
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model = PeftModel.from_pretrained(base, str(adapter))
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    moved = {name: value for name, value in saved.items() if "lora_B" in name}
    assert any(value.abs().sum() > 0 for value in moved.values())
    for name, value in moved.items():
        torch.testing.assert_close(model.state_dict()[name.removeprefix("net.")], value)
    run("test", method, tiny, f"--ckpt_path={checkpoint}", "--trainer.limit_test_batches=1")
    run("validate", method, tiny, f"--ckpt_path={checkpoint}", "--trainer.limit_val_batches=1")


def test_predict_answers_the_lines_of_a_file(tiny: str, tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why?\n\n  How many?  \n")
    # The training data are not looked at.
    run("predict", "lora", tiny, f"--data.prompts={prompts}", "--model.max_new_tokens=3", "--data.dataset=gone.jsonl")
    (path,) = tmp_path.glob("runs/**/answers.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Why?", "How many?"]
    assert all(isinstance(row["answer"], str) for row in rows)
    assert "> How many?" in capsys.readouterr().out


def test_the_packaged_model_learns_and_its_checkpoint_is_small(tmp_path: Path) -> None:
    module = InstructionTuning(learning_rate=3e-3)
    data = InstructionData(batch_size=2)
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


# -- going on after a stop


class Record(L.Callback):
    """Batches, losses and weights of a run."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((batch["input_ids"].flatten().tolist(), trainer.callback_metrics["train_loss"].item()))


def savers(folder: Path) -> list[L.Callback]:
    """One that saves after every step, one that saves after every validation."""
    steps = AdapterCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    return [steps, AdapterCheckpoint(folder, filename="val-{step}", save_top_k=-1, monitor="val_loss")]


def fitted(
    tiny: str, sums: str, folder: Path, num_workers: int = 0, ckpt_path: str | None = None
) -> tuple[list[Tensor], Record]:
    """A run from one seed, or from a checkpoint after other random numbers have been drawn."""
    L.seed_everything(7 if ckpt_path is None else 99, verbose=False)
    record = Record()
    module = InstructionTuning(model=tiny, lora=LORA, learning_rate=1e-2, exact_match_examples=0)
    callbacks = [record, EFMLoRA(rho=0.5), RandomState(), *savers(folder)]
    fit = trainer(folder, *callbacks, enable_checkpointing=True, val_check_interval=3)
    fit.fit(module, InstructionData(sums, batch_size=4, num_workers=num_workers), ckpt_path=ckpt_path)
    return [p.detach().clone() for p in module.parameters() if p.requires_grad], record


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_equals_the_uninterrupted_one(num_workers: int, tiny: str, sums: str, tmp_path: Path) -> None:
    weights, whole = fitted(tiny, sums, tmp_path / "whole", num_workers)
    assert len(whole.steps) == 18  # two epochs
    # in the first epoch, in its validation, at its end; in the second
    names = ("step=2", "val-step=3", "step=9", "val-step=9", "step=10", "val-step=15")
    for name in names[2:5:2] if num_workers else names:
        checkpoint = str(tmp_path / "whole" / f"{name}.ckpt")
        again, rest = fitted(tiny, sums, tmp_path / name, num_workers, checkpoint)
        assert rest.steps == whole.steps[int(name.split("=")[1]) :], name
        assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True)), name


def test_the_random_state_decides_about_that(tiny: str, sums: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(RandomState, "load_state_dict", lambda self, state: None)
    _, whole = fitted(tiny, sums, tmp_path / "whole")
    _, rest = fitted(tiny, sums, tmp_path / "rest", ckpt_path=str(tmp_path / "whole" / "step=3.ckpt"))
    assert [batch for batch, _ in rest.steps] == [batch for batch, _ in whole.steps[3:]]
    assert rest.steps != whole.steps[3:]


def test_random_state_is_put_back(tmp_path: Path) -> None:
    import random

    import numpy as np

    torch.save(collect_random_state(), tmp_path / "state.pt")
    drawn = (random.random(), np.random.normal(), torch.rand(1).item())
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (random.random(), np.random.normal(), torch.rand(1).item()) == drawn


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "missing.jsonl"}, "missing.jsonl.*no such file"),
        ({"dataset": "packaged:chess"}, "unknown packaged task 'chess'.*packaged:commonsense_qa"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"validation_share": 0.5, "test_share": 0.5}, "leave something to train on, got 0.5 and 0.5"),
        ({"chat_template": "missing.jinja"}, "chat_template='missing.jinja'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str, tiny: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        prepared("fit", tiny, **options)


def test_bad_data_is_named(tiny: str, jsonl: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"columns \['question', 'reply'\].*'messages'"):
        prepared("fit", tiny, dataset=jsonl([{"question": "a", "reply": "b"}]))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(MisconfigurationException, match=r"empty.jsonl"):
        prepared("fit", tiny, dataset="empty.jsonl")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(MisconfigurationException, match=r"broken.json.*can't be read"):
        prepared("fit", tiny, dataset="broken.json")
    (tmp_path / "unanswered.json").write_text(json.dumps([{"instruction": f"q {i}", "output": ""} for i in range(9)]))
    with pytest.raises(MisconfigurationException, match=r"nothing is left.*dropped: no answer in the data"):
        prepared("fit", tiny, dataset="unanswered.json")


def test_prompts_are_needed_for_predict(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"predict needs --data.prompts"):
        prepared("predict", tiny)
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(MisconfigurationException, match="holds no prompt"):
        prepared("predict", tiny, prompts="blank.txt")


def test_a_tokenizer_without_chat_template_is_refused(tokenizer: Any) -> None:
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(MisconfigurationException, match=r"no single chat template.*set chat_template"):
        ChatEncoder(bare, 100)


def test_bad_models_are_named(tiny: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    with pytest.raises(MisconfigurationException, match=r"model='nowhere/at-all' can't be loaded.*'packaged'"):
        _ = InstructionTuning(model="nowhere/at-all").tokenizer
    with pytest.raises(MisconfigurationException, match="target_modules"):
        InstructionTuning(model=tiny, lora={"target_modules": ["nothing"]}).configure_model()
    with pytest.raises(MisconfigurationException, match="rank"):
        InstructionTuning(model=tiny, lora={"rank": 8}).configure_model()


def test_quantization_without_bitsandbytes_says_so(tiny: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match="pip install bitsandbytes"):
        InstructionTuning(model=tiny, quantization="4bit").configure_model()


def test_a_run_without_end_has_no_schedule(tiny: str, sums: str, tmp_path: Path) -> None:
    module = InstructionTuning(model=tiny, lora=LORA)
    with pytest.raises(MisconfigurationException, match="set max_steps or max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(module, InstructionData(sums))


def test_a_failing_pip_says_what_to_run(monkeypatch: Any) -> None:
    monkeypatch.setitem(packaged.REQUIREMENTS, "no-such-thing", "no-such-thing==0")
    monkeypatch.setattr(
        packaged.subprocess, "run", lambda command, check: packaged.subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(MisconfigurationException, match=r"pip install --no-deps no-such-thing==0"):
        packaged.fetch("no-such-thing")
