"""transformers' Trainer and trl's, with one line: Lightning's weights, clean between steps, resumed, checkpointed."""

from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from float64_runs import BETA, Automatic, fit_in_float64, optimizer_of
from helpers import assert_no_trace, same, weights
from hf_runs import RHO, SIZE, Samples, trained_by, trainer_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from loop_runs import net_of
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from lightning_flatlora import EFMLoRA as LightningEFMLoRA
from lightning_flatlora import FMLoRA as LightningFMLoRA
from lightning_flatlora import LinearRho
from lightning_flatlora.loop_method import STATE_KEY
from lightning_flatlora.loops import EFMLoRA

WINDOW, STEPS = 2, 8


class Unscheduled(Automatic):
    def configure_optimizers(self) -> Any:
        return optimizer_of(self.net)


class Seeds(L.Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            torch.manual_seed(batch_idx // trainer.accumulate_grad_batches)


def by_lightning(callback: Any, window: int = 1, clip: float | None = None, dropout: float = 0.0) -> nn.Module:
    net = net_of(dropout=dropout)
    data = Samples(STEPS * window * SIZE)
    batches = list(zip(data.x.split(SIZE), data.y.split(SIZE), strict=True))
    settings = {"accumulate_grad_batches": window, "gradient_clip_val": clip}
    fit_in_float64(Unscheduled(net), 1, [Seeds(), callback], DataLoader(batches, batch_size=None), **settings)
    return net


RUNS = [("EFMLoRA", 1, None), ("EFMLoRA", WINDOW, None), ("EFMLoRA", 1, 0.05), ("FMLoRA", WINDOW, None)]


@pytest.mark.parametrize(("name", "window", "clip"), RUNS)
def test_weights_equal_the_lightning_callbacks(tmp_path: Path, name: str, window: int, clip: float | None) -> None:
    """Bit for bit, with dropout and a schedule over the run; clipping by norm changes no more than rounding."""
    net, rho = net_of(dropout=0.2), LinearRho(RHO, 0.1)
    settings = {"gradient_accumulation_steps": window, "max_grad_norm": clip or 0.0}
    _, flat = trained_by(name, tmp_path, rho=rho, net=net, **settings)
    theirs: Any = LightningEFMLoRA(rho, beta=BETA) if name == "EFMLoRA" else LightningFMLoRA(rho)
    expected = weights(by_lightning(theirs, window, clip, dropout=0.2))
    assert flat.step == STEPS
    if clip is None:
        assert same(weights(net), expected)
        ours = flat.perturbation.state_dict()["E"]
        assert same(list(ours.values()), list(theirs.perturbation.state_dict()["E"].values()))
    for key, value in weights(net).items():
        assert float((value - expected[key]).abs().max()) < 1e-10, key
    flat.close()
    assert_no_trace(net)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": WINDOW, "max_grad_norm": 0.05}])
@pytest.mark.parametrize("name", ["EFMLoRA", "FMLoRA"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """optimizer.pt carries the state, wherever the checkpoint lies."""
    saves = {"save_strategy": "steps", "save_steps": 3, **settings}
    whole, _ = trained_by(name, tmp_path / "whole", **saves)
    folder = tmp_path / "whole" / "checkpoint-3"
    assert STATE_KEY in torch.load(folder / "optimizer.pt", weights_only=True)
    second, flat = trained_by(name, tmp_path / "elsewhere", resume=str(folder), **saves)
    assert flat.step == STEPS
    assert same(weights(second.model), weights(whole.model))
    if name == "EFMLoRA":
        other = trainer_of(tmp_path / "elsewhere", **saves)
        EFMLoRA(other.model, other.create_optimizer(), RHO, beta=BETA, estimator="projected")
        with pytest.raises(MisconfigurationException, match="estimator must be 'average' as in the checkpoint"):
            other.train(resume_from_checkpoint=str(folder))


def test_compiled_by_the_trainer(tmp_path: Path) -> None:
    net, compiled = net_of(), net_of()
    trained_by("EFMLoRA", tmp_path, net=net, steps=3)
    trained_by("EFMLoRA", tmp_path, net=compiled, steps=3, torch_compile=True, torch_compile_backend="eager")
    assert same(weights(compiled), weights(net))


def test_a_trainer_that_makes_another_optimizer_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    flat = EFMLoRA(trainer.model, optimizer_of(trainer.model), RHO)
    with pytest.raises(RuntimeError, match="of which EFMLoRA knows another optimizer"):
        trainer.train()
    assert flat.step == 0


@pytest.mark.parametrize("kind", [LightningEFMLoRA, LightningFMLoRA])
def test_the_callback_of_the_other_trainer_names_the_line(tmp_path: Path, kind: type[Any]) -> None:
    trainer = trainer_of(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"loops\.EFMLoRA\(trainer\.model, trainer\.create_optimizer"):
        Trainer(trainer.model, trainer.args, callbacks=[kind(RHO)])


# -- a language model, by transformers and trl


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, pad_token_id=0, **sizes)).double()


def arguments(folder: Path, kind: type[Any] = TrainingArguments, **settings: Any) -> Any:
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "save_steps": 4}
    return kind(str(folder), max_steps=STEPS, learning_rate=0.01, bf16=False, **{**quiet, **settings})


def tokenizer() -> Any:
    words = ["<pad>", "</s>", *(f"w{index}" for index in range(30))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
@pytest.mark.filterwarnings("ignore")  # trl's own
def test_trls_trainers(tmp_path: Path, kind: str) -> None:
    """rho = 0 is their own run bit for bit, more is not, and a resumed run equals an uninterrupted one."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    rows = []
    for i in range(16):
        prompt, answers = f"w{i} w{i + 1}", {"chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i + 9} w{i + 4}"}
        rows.append({"text": prompt + answers["chosen"]} if kind == "SFT" else {"prompt": prompt, **answers})
    ends = []
    for place, rho in (("plain", None), ("zero", 0.0), ("flat", 0.5), ("resumed", 0.5)):
        trainer = getattr(trl, f"{kind}Trainer")(
            llama(),
            args=arguments(tmp_path / place, getattr(trl, f"{kind}Config"), gradient_accumulation_steps=2),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )
        if rho is not None:
            flat = EFMLoRA(trainer.model, trainer.create_optimizer(), rho)
        trainer.train(resume_from_checkpoint=str(tmp_path / "flat" / "checkpoint-4") if place == "resumed" else None)
        ends.append(weights(trainer.model))
    assert flat.step == STEPS
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])
    assert same(ends[2], ends[3])
