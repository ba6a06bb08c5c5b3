"""A pretrained causal language model with a LoRA adapter, and the likelihood it gives to answers."""

import importlib.util
import inspect
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from recipes import packaged
from recipes.instruction_tuning.batches import pad
from recipes.instruction_tuning.chat import IGNORED
from recipes.sharding import is_sharded

PACKAGED = "packaged"
DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
Quantization = Literal["4bit", "8bit"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES: dict[str, DType] = {"bf16-mixed": "bfloat16", "bf16-true": "bfloat16", "16-true": "float16"}


def model_source(name: str) -> str:
    """What ``from_pretrained`` takes for a name; "packaged" is converted first if it must be."""
    return str(packaged.smollm2()) if name == PACKAGED else name


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model; see :func:`load_base` for the name."""
    try:
        return AutoTokenizer.from_pretrained(model_source(name))
    except (OSError, ValueError) as error:
        raise MisconfigurationException(_not_found(name, error)) from error


def weights_dtype(precision: str | None) -> DType:
    """Which dtype frozen weights need with a Trainer's precision, so that no step casts them.

    With "16-mixed" they stay in float32: a model that was trained in bfloat16 may leave float16's range.
    """
    return _DTYPES.get(str(precision), "float32")


def load_base(name: str, dtype: DType, quantization: Quantization | None) -> nn.Module:
    """The pretrained model in training mode.

    Args:
        name: a Hub name, a local directory, or "packaged" for SmolLM2-135M-Instruct.
        dtype: of the weights; "auto" takes what the checkpoint has.
        quantization: load the weights in 4 or 8 bits through bitsandbytes.

    Raises:
        MisconfigurationException: there is no such model, or bitsandbytes is missing.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MisconfigurationException(
                f"quantization={quantization!r} needs bitsandbytes: pip install bitsandbytes, or set it to null"
            )
        options["quantization_config"] = quantization_config(quantization, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_source(name), **options)
    except (OSError, ValueError) as error:
        raise MisconfigurationException(_not_found(name, error)) from error
    if quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.train()  # from_pretrained gives it in eval mode, where LoRA's dropout would be off
    return model  # type: ignore[no-any-return]


def quantization_config(quantization: Quantization, dtype: DType) -> BitsAndBytesConfig:
    """bitsandbytes' settings: "4bit" is QLoRA's NF4 with quantised scales, "8bit" is LLM.int8().

    Args:
        quantization: of the frozen weights.
        dtype: that 4-bit weights are computed in; "auto" is bfloat16.

    Example:
        >>> quantization_config("4bit", "float32").bnb_4bit_quant_type
        'nf4'
    """
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # bitsandbytes' own default is fp4
        bnb_4bit_use_double_quant=True,  # the scales are quantised too: 0.4 bits a weight less
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
    )


def add_adapter(base: nn.Module, lora: dict[str, Any]) -> PeftModel:
    """The model with a LoRA adapter in float32, all else frozen; ``lora`` holds the fields of peft's LoraConfig."""
    try:
        config = LoraConfig(task_type="CAUSAL_LM", **lora)
        return get_peft_model(base, config)
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"lora={lora!r} can't be used: {error}") from error


def answer_log_likelihood(net: nn.Module, inputs: dict[str, Tensor], labels_nt: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each row's answer.

    Args:
        net: the model.
        inputs: what it takes: ``input_ids`` and ``attention_mask`` (rows, T), and images where it sees some.
        labels_nt: the tokens to be learnt, else -100, (rows, T).

    Returns:
        Its sum over the answer's tokens in nats, float32, and the number of those tokens, each (rows,).
    """
    targets_nt = labels_nt[:, 1:]
    # Most positions are prompt: the head, a third of a small model's work, runs only where some row has an answer.
    positions_k = (targets_nt != IGNORED).any(dim=0).nonzero().squeeze(1)
    base = net.get_base_model() if isinstance(net, PeftModel) else net
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        logits_nkv = net(**inputs, use_cache=False, logits_to_keep=positions_k).logits
    else:
        logits_nkv = net(**inputs, use_cache=False).logits[:, positions_k]
    targets_nk = targets_nt[:, positions_k]
    losses_nk = nn.functional.cross_entropy(
        logits_nkv.flatten(0, 1).float(), targets_nk.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets_nk)
    return -losses_nk.sum(dim=1), (targets_nk != IGNORED).sum(dim=1)


def padding_id(tokenizer: Any) -> int:
    """The token that fills up rows: the end token where the tokenizer has none for that, as Llama's and GPT-2's.

    Labels and attention masks go by places and not by tokens, so that end tokens are learnt all the same.

    Raises:
        MisconfigurationException: there is neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise MisconfigurationException(
        f"the tokenizer of {tokenizer.name_or_path!r} has neither a pad token nor an end token: set its eos_token, "
        "save it, and give the folder as tokenizer"
    )


def ending(net: Any, tokenizer: Any, answer_end: str) -> dict[str, Any]:
    """Arguments of ``generate`` that say where an answer ends.

    It ends at the tokens of the model's generation settings, at the tokenizer's end token, and where the chat template
    would end it.

    Args:
        net: the model.
        tokenizer: its own.
        answer_end: what the template ends an answer with, a token or a text; "" if it is one of those tokens.
    """
    settings = getattr(net, "generation_config", None)
    own = settings.eos_token_id if settings is not None else None
    tokens = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    told = tokenizer(answer_end, add_special_tokens=False)["input_ids"] if answer_end else []
    if len(told) == 1:
        tokens += told
    stops = sorted({int(token) for token in tokens if token is not None})
    options: dict[str, Any] = {"eos_token_id": stops or None}
    return options | {"stop_strings": [answer_end], "tokenizer": tokenizer} if len(told) > 1 else options


def decoded(tokens: Tensor, tokenizer: Any, answer_end: str) -> list[str]:
    """Generated tokens (rows, T) as texts, up to where the chat template would end each."""
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [(text.partition(answer_end)[0] if answer_end else text).strip() for text in texts]


@torch.no_grad()
def generate_answers(
    net: PeftModel, prompt_ids: list[list[int]], tokenizer: Any, max_new_tokens: int, answer_end: str = ""
) -> list[str]:
    """The model's most likely answers, token by token, to prompts that a chat template has opened.

    They end where the template would end them, see :func:`ending`.

    Where the model is sharded, every rank has to call it, and goes on until all have their answers.
    """
    synced = is_sharded(net)
    if not prompt_ids and not synced:
        return []
    device = next(net.parameters()).device
    pad_id = padding_id(tokenizer)
    rows = [torch.tensor(ids) for ids in prompt_ids or [[pad_id]]]  # a rank without prompts helps the others
    prompts = pad(rows, pad_id, side="left").to(device)
    answers = net.generate(
        input_ids=prompts,
        attention_mask=pad([torch.ones_like(row) for row in rows], 0, side="left").to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
        synced_gpus=synced,
        **ending(net, tokenizer, answer_end),
    )[: len(prompt_ids), prompts.shape[1] :]
    return decoded(answers, tokenizer, answer_end)


def _not_found(name: str, error: Exception) -> str:
    return (
        f"model={name!r} can't be loaded: give the name of a causal language model on the Hub (reachable, or in the "
        f"local cache), a local directory, or {PACKAGED!r} for SmolLM2-135M-Instruct. {type(error).__name__}: {error}"
    )
