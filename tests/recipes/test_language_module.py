"""Settings of training that the recipes with a language model share."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import trainer
from torch import Tensor

from lightning_flatlora import EFMLoRA
from recipes.instruction_tuning.data import InstructionData
from recipes.instruction_tuning.module import InstructionTuning
from recipes.language.model import positions

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}


def fitted(tiny: str, sums: str, folder: Path, **settings: Any) -> tuple[list[Tensor], L.Trainer]:
    L.seed_everything(0, verbose=False)
    module = InstructionTuning(model=tiny, lora=LORA, learning_rate=1e-2, exact_match_examples=0, **settings)
    fit = trainer(folder, EFMLoRA(rho=0.5), max_steps=4, limit_val_batches=0)
    fit.fit(module, InstructionData(sums, batch_size=4))
    return [p.detach().clone() for p in module.parameters() if p.requires_grad], fit


def test_activations_computed_twice_change_nothing(
    tiny: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = transformers.models.llama.modeling_llama.LlamaMLP
    forward = part.forward
    calls: list[bool] = []

    def counted(self: Any, hidden: Tensor) -> Tensor:
        calls.append(self.training)
        return forward(self, hidden)

    monkeypatch.setattr(part, "forward", counted)
    plain, _ = fitted(tiny, sums, tmp_path)
    once = len(calls)
    again, _ = fitted(tiny, sums, tmp_path, gradient_checkpointing=True)
    assert len(calls) == 3 * once  # forward once more, and again in backward
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_adamw_takes_the_betas_and_warms_up_over_a_share(tiny: str, sums: str, tmp_path: Path) -> None:
    _, fit = fitted(tiny, sums, tmp_path, betas=(0.8, 0.95), warmup_share=0.5)
    assert fit.optimizers[0].param_groups[0]["betas"] == (0.8, 0.95)
    (schedule,) = fit.lr_scheduler_configs
    shares = [schedule.scheduler.lr_lambdas[0](step) for step in range(5)]
    assert shares == [0, 0.5, 1, 0.5, 0]


SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "pad_token_id": 1}


def with_positions(kind: str, given: int) -> tuple[Any, int]:
    """A tiny model of a kind with so many learnt positions, and how many it can read."""
    if kind == "gpt2":
        options = {"n_positions": given, "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 40}
        return transformers.GPT2Model(transformers.GPT2Config(**options)), given
    if kind == "opt":
        options = {**SMALL, "ffn_dim": 8, "word_embed_proj_dim": 8}
        return transformers.OPTModel(transformers.OPTConfig(max_position_embeddings=given, **options)), given
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(max_position_embeddings=given, **SMALL)), given
    # These two begin to count behind the padding's place.
    config = getattr(transformers, f"{kind}Config")(max_position_embeddings=given, **SMALL)
    return getattr(transformers, f"{kind}Model")(config), given - 2


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert", "Roberta", "MPNet"])
def test_a_model_reads_as_many_tokens_as_it_has_positions(kind: str) -> None:
    model, readable = with_positions(kind, 20)
    assert positions(model) == readable
    model.eval()
    model(input_ids=torch.full((1, readable), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, readable + 1), 5))


def test_conversations_longer_than_a_model_reads_are_refused(tiny: str, sums: str, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path / "short")
    config = transformers.GPT2Config(n_positions=48, n_embd=8, n_layer=1, n_head=1, vocab_size=len(tokenizer))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    lora = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}

    def fit(exact_match_examples: int = 0, **options: Any) -> L.Trainer:
        model = InstructionTuning(model=str(tmp_path / "short"), lora=lora, exact_match_examples=exact_match_examples)
        runner = trainer(tmp_path, max_steps=1, limit_val_batches=0)
        runner.fit(model, InstructionData(sums, batch_size=4, **options))
        return runner

    with pytest.raises(MisconfigurationException, match=r"reads 48 tokens. The longest text .*data.max_length"):
        fit()
    # An answer of max_new_tokens has no room, which matters where one is written.
    with pytest.raises(MisconfigurationException, match=r"reads 48 tokens. .*max_new_tokens=64"):
        fit(max_length=48, exact_match_examples=1)
    assert fit(max_length=48).global_step == 1
