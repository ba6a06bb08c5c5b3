"""Tiny random models and LoRA adapters in folders as users have them, and data in files."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "yes", "no", "is", "it", "good", "bad", "film"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer() -> Any:
    special = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def make_config(layers: int = 2, width: int = 16, **more: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **more,
    )


def save_base(folder: Path, **config: Any) -> Path:
    """A random causal language model with its tokenizer."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(make_config(**config)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path, base: Path, rank: int = 2, task: str = "CAUSAL_LM", classes: int = 3, **more: Any
) -> Path:
    """An adapter with nonzero B, in peft's format."""
    kinds = {"CAUSAL_LM": transformers.AutoModelForCausalLM, "SEQ_CLS": transformers.AutoModelForSequenceClassification}
    extra = {"num_labels": classes} if task == "SEQ_CLS" else {}
    torch.manual_seed(rank)
    model = kinds[task].from_pretrained(base, **extra)
    targets = more.pop("target_modules", ["q_proj", "v_proj", "down_proj"])
    given = {"task_type": TaskType(task), "r": rank, "lora_alpha": 4, "lora_dropout": 0.5, "target_modules": targets}
    config = LoraConfig(**given | more)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
