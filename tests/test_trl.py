"""trl's trainers with the callbacks of lightning_flatlora.transformers, on a small Llama."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import same, weights
from hf_runs import arguments, llama, processing_of_words
from loop_runs import METHODS
from peft import LoraConfig

from lightning_flatlora.transformers import EFMLoRA, FMLoRA, TwoPassTrainer

trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # trl's own warnings
STEPS = 4
OFFLINE = ("SFT", "DPO", "KTO", "Reward")
ONLINE = ("GRPO", "RLOO")


def rows_of(kind: str) -> Any:
    rows: list[dict[str, Any]] = []
    for i in range(16):
        prompt, chosen, rejected = f"w{i} w{i + 1}", f" w{i + 2} w{i + 3}", f" w{i + 9} w{i + 4}"
        row = {
            "SFT": {"text": prompt + chosen},
            "DPO": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
            "KTO": {"prompt": prompt, "completion": chosen, "label": i % 2 == 0},
            "Reward": {"chosen": prompt + chosen, "rejected": prompt + rejected},
        }
        rows.append(row.get(kind, {"prompt": prompt}))
    return datasets.Dataset.from_list(rows)


def trainer_of(kind: str, folder: Path, callback: Any = None, **settings: Any) -> Any:
    """One of trl's trainers, with FMLoRA as one of two passes."""
    base = getattr(trl, f"{kind}Trainer")
    if isinstance(callback, FMLoRA):
        base = type(f"TwoPass{kind}", (base, TwoPassTrainer), {})
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": STEPS, **settings}
    of_trainer: dict[str, Any] = {}
    if kind in ONLINE:
        settings |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        of_trainer["reward_funcs"] = lambda completions, **_: [float(len(set(each))) for each in completions]
    task = "SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
    return base(
        llama(num_labels=1 if kind == "Reward" else None),
        args=arguments(folder, getattr(trl, f"{kind}Config"), **settings),
        train_dataset=rows_of(kind),
        processing_class=processing_of_words(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task),
        callbacks=[callback] if callback else [],
        **of_trainer,
    )


def trained(kind: str, folder: Path, callback: Any, resume: str | None = None, **settings: Any) -> Any:
    trainer = trainer_of(kind, folder, callback, **settings)
    torch.manual_seed(0)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("kind", OFFLINE + ONLINE)
def test_steps_and_a_resumed_run(tmp_path: Path, kind: str) -> None:
    """rho = 0 equals trl's own run bit for bit, a larger rho doesn't, and a resumed run equals an uninterrupted one."""
    plain, zero = (weights(trained(kind, tmp_path, each).model) for each in (None, EFMLoRA(0.0)))
    assert same(plain, zero)
    saves = {"save_strategy": "steps", "save_steps": 2}
    first = weights(trained(kind, tmp_path / "flat", EFMLoRA(0.5), **saves).model)
    assert not same(plain, first)
    callback = EFMLoRA(0.5)
    resumed = trained(kind, tmp_path / "flat", callback, str(tmp_path / "flat" / "checkpoint-2"), **saves)
    assert same(weights(resumed.model), first)
    assert callback.flat.step == STEPS


class Spied:
    """What a trl trainer's step reads: the rollouts of each pass, and whether B is perturbed without gradients."""

    def __init__(self, trainer: Any) -> None:
        self.losses: list[Any] = []
        self.without_gradients: list[bool] = []
        own = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            read = {key: inputs[key].sum().item() for key in sorted(inputs) if "ids" in key}
            self.losses.append((getattr(trainer, "_step", None), read))
            return own(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        layer = next(module for name, module in trainer.model.named_modules() if name.endswith("lora_B.default"))
        layer.register_forward_hook(lambda module, *_: self.note(module))

    def note(self, module: Any) -> None:
        if not torch.is_grad_enabled():
            self.without_gradients.append(not same(module.weight, module._parameters["weight"]))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "KTO"])
def test_what_is_read_without_gradients_is_clean(tmp_path: Path, kind: str, name: str) -> None:
    """Both passes of FMLoRA see the rollouts of one pass of LoRA, which the clean weights have drawn."""
    spied = {}
    for rho in (0.0, 30.0):
        callback = EFMLoRA(rho) if name == "EFMLoRA" else FMLoRA(rho)
        trainer = trainer_of(kind, tmp_path, callback, max_steps=2)
        spied[rho] = Spied(trainer)
        torch.manual_seed(0)
        trainer.train()
        assert callback.flat.step == 2
    passes = 2 if name == "FMLoRA" else 1
    assert len(spied[0.0].losses) == 4
    # The first optimizer step, whose weights are equal: each micro-batch in each of its passes.
    for index, expected in enumerate(spied[0.0].losses[:2]):
        assert spied[30.0].losses[passes * index : passes * (index + 1)] == [expected] * passes
    assert len(spied[30.0].losses) == 4 * passes
    assert spied[30.0].without_gradients
    assert not any(spied[30.0].without_gradients)


@pytest.mark.parametrize("kind", OFFLINE + ONLINE)
def test_two_passes_log_once(tmp_path: Path, kind: str) -> None:
    """What trl logs of a step is what plain LoRA logs, since the first pass reads the clean weights."""
    logs = []
    for callback in (None, FMLoRA(0.5)):
        trainer = trained(kind, tmp_path, callback, max_steps=1, logging_strategy="steps", logging_steps=1)
        logs.append(trainer.state.log_history[0])
    plain, flat = logs
    varying = {"rho", "step_time", "grad_norm"}
    assert plain.keys() - varying == flat.keys() - varying
    for name in plain.keys() - varying:
        assert flat[name] == pytest.approx(plain[name], nan_ok=True), name
