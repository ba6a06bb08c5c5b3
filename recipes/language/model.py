"""A pretrained causal language model with a LoRA adapter, and the likelihood it gives to answers."""

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from recipes.language.adapters import check_base
from recipes.language.batches import pad, padding_id
from recipes.language.chat import IGNORED
from recipes.offline import packaged
from recipes.training.sharding import is_sharded

PACKAGED = "packaged"
PACKAGED_ENCODER = "packaged:minilm"
_HINT = f"or a local directory, {PACKAGED!r} for SmolLM2-135M-Instruct, {PACKAGED_ENCODER!r} for all-MiniLM-L6-v2"
DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
Quantization = Literal["4bit", "8bit"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES: dict[str, DType] = {"bf16-mixed": "bfloat16", "bf16-true": "bfloat16", "16-true": "float16"}
"""The frozen weights' dtype by the Trainer's precision, so that no step casts them; float32 with other precisions.

With "16-mixed" they stay in float32: a model trained in bfloat16 may leave float16's range.
"""


def model_source(name: str) -> str:
    """Return what ``from_pretrained`` loads for a name; a packaged model is first downloaded and converted."""
    if name == PACKAGED:
        return str(packaged.smollm2())
    if name == PACKAGED_ENCODER:
        return str(packaged.minilm())
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def load_tokenizer(name: str, option: str = "model") -> Any:
    """Return the tokenizer of a model; for the name, which the user gave as ``option``, see :func:`load_base`."""
    return load_pretrained(AutoTokenizer, name, option=option)


def load_base(
    name: str, dtype: DType, quantization: Quantization | None, config: dict[str, Any] | None = None
) -> nn.Module:
    """Return the pretrained model in training mode.

    Args:
        name: a Hub name, a local directory, or "packaged" for SmolLM2-135M-Instruct.
        dtype: dtype of the weights; "auto" takes the checkpoint's.
        quantization: load the weights in 4 or 8 bits with bitsandbytes.
        config: fields of the model's configuration that replace its own, such as ``{"attn_pdrop": 0.0}``.

    Raises:
        MisconfigurationException: transformers can't load such a model or such fields, or the model is not causal.
    """
    options: dict[str, Any] = {"dtype": dtype, **(config or {})}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
    model = load_pretrained(AutoModelForCausalLM, name, **options)
    # transformers would only log a line, and the loss would fall to nearly 0.
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_decoder", True):
        raise MisconfigurationException(
            f"model={name!r} reads a text in both directions, and so sees the tokens that it is to predict: take a "
            "causal language model, such as GPT-2"
        )
    return trainable(model, quantization)


def trainable(model: Any, quantization: Quantization | None) -> nn.Module:
    """Prepare a model from ``from_pretrained`` for an adapter and training."""
    if quantization is not None:
        # peft would also switch gradient checkpointing on, which needs another forward in each step.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.train()  # from_pretrained returns it in eval mode, where LoRA's dropout would be off
    return model  # type: ignore[no-any-return]


def quantization_config(
    quantization: Quantization, dtype: DType, skipped: list[str] | None = None
) -> BitsAndBytesConfig:
    """Return bitsandbytes' settings: "4bit" is QLoRA's NF4 with quantized scales, "8bit" is LLM.int8().

    Args:
        quantization: format of the frozen weights.
        dtype: dtype in which 4-bit weights are computed; "auto" is bfloat16.
        skipped: names of modules that are not quantized; None is only the output layer.

    Example:
        >>> quantization_config("4bit", "float32").bnb_4bit_quant_type
        'nf4'
    """
    return BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        llm_int8_skip_modules=skipped,
        bnb_4bit_quant_type="nf4",  # bitsandbytes' own default is fp4
        bnb_4bit_use_double_quant=True,  # the scales are quantized too: 0.4 bits less per weight
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
    )


def load_pretrained(
    auto_class: Any,
    name: str,
    source: Callable[[str], str] = model_source,
    *,
    option: str = "model",
    hint: str = _HINT,
    **options: Any,
) -> Any:
    """Load a model, a tokenizer or a processor with one of transformers' auto classes.

    Args:
        auto_class: AutoTokenizer, AutoModelForCausalLM or another.
        name: a Hub name, a local directory, "packaged" for SmolLM2-135M-Instruct, or "packaged:minilm" for
            all-MiniLM-L6-v2.
        source: what ``from_pretrained`` loads for the name.
        option: option by which the user gave the name, for the message.
        hint: what else may be given, for the message.
        options: options of ``from_pretrained``.

    Raises:
        MisconfigurationException: there is no such model, or it does not support an option.
    """
    try:
        place = source(name)
        check_base(place)
        return auto_class.from_pretrained(place, **options)
    # A package such as flash_attn is missing, or a setting is not a field of the model's configuration.
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise MisconfigurationException(
            f"{option}={name!r} can't be loaded by {auto_class.__name__}: give a name on the Hub (reachable, or in the "
            f"local cache) {hint}. {type(error).__name__}: {error}"
        ) from error


def is_head(name: str) -> bool:
    """Return whether peft takes a sequence classifier's module for its head, or a part of it, and trains it.

    Example:
        >>> is_head("pre_classifier"), is_head("classifier.dense"), is_head("pooler.dense")
        (True, True, False)
    """
    return any(part.endswith(("classifier", "score")) for part in name.split("."))


def add_adapter(
    base: nn.Module, lora: dict[str, Any], task_type: str | None = "CAUSAL_LM", new: Sequence[str] = ()
) -> PeftModel:
    """Return the model with a LoRA adapter in float32, all else frozen but ``modules_to_save``, in float32 too.

    Args:
        base: the pretrained model.
        lora: fields of peft's LoraConfig.
        task_type: peft's; with "SEQ_CLS" the new head is trained too; None for masked models, for which peft has none.
        new: names of modules that the checkpoint lacks, which are trained without perturbation and saved.

    Raises:
        MisconfigurationException: peft refuses ``lora`` for this model, or would ignore a module that it names.
    """
    for field, dot in (("modules_to_save", ""), ("target_modules", ".")):
        names = lora.get(field)
        for wanted in names if isinstance(names, list) else ():  # a text is a pattern
            if not any(f".{name}".endswith(f"{dot}{wanted}") for name, _ in base.named_modules()):
                # peft would ignore it silently.
                raise MisconfigurationException(f"lora: {field} names {wanted!r}, which the model does not have")
    whole = [rf".*{re.escape(name)}" for name in new]
    if task_type == "SEQ_CLS" and lora.get("target_modules") == "all-linear":
        # The head is trained as a whole. DistilBERT's pre_classifier is a part of it to peft, which would adapt it too.
        whole.append(".*(classifier|score)")
    if whole:
        lora = {"exclude_modules": "|".join(whole), **lora}
    if new:
        rank_zero_info(f"The checkpoint lacks {', '.join(new)}: new, and trained with the adapter")
        lora = {**lora, "modules_to_save": [*(lora.get("modules_to_save") or []), *new]}
    try:
        config = LoraConfig(task_type=task_type, **lora)
        with warnings.catch_warnings():
            # peft sets it by itself for each layer; GPT-2 has both kinds.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set", UserWarning)
            net = get_peft_model(base, config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise MisconfigurationException(f"lora={lora!r} can't be used: {error}") from error
    for parameter in net.parameters():
        if parameter.requires_grad:
            # peft leaves modules to save in the base's dtype; AdamW's steps would vanish in bfloat16.
            parameter.data = parameter.data.float()
    return net


def positions(net: nn.Module) -> int | None:
    """Return how many tokens a model with learnt positions, such as GPT-2 or BERT, can read; None without them.

    Example:
        >>> from transformers import RobertaConfig, RobertaModel
        >>> config = RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> positions(RobertaModel(config))  # it has a table of 512, of which two are for padding
        510
    """
    tables = []
    for name, module in net.named_modules():
        of_text = "vision" not in name and ("position" in name or name.endswith("wpe"))
        if of_text and isinstance(module, nn.Embedding):
            # RoBERTa begins to count after its padding's index, and OPT has an offset.
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            tables.append(module.num_embeddings - padding - getattr(module, "offset", 0))
    return min(tables, default=None)


def checkpoint_activations(net: nn.Module) -> None:
    """Make each block compute its activations again in backward instead of keeping them; changes the model itself.

    Args:
        net: a peft model around one of transformers, or the latter.
    """
    base: Any = net.get_base_model() if isinstance(net, PeftModel) else net
    # The name since transformers 5.2x, in which the older one warns.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    # The reentrant kind gives the adapter no gradient, since nothing before the first block is trained.
    enable({"use_reentrant": False})


def answer_log_likelihood(
    net: nn.Module, inputs: dict[str, Tensor], labels_nt: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of each row's answer.

    Args:
        net: the model.
        inputs: the model's inputs: ``input_ids`` and ``attention_mask`` (rows, T), and images if it takes some.
        labels_nt: tokens to be learnt, else -100, (rows, T).
        label_smoothing: share of each token's log-likelihood that is replaced by the mean over the vocabulary.

    Returns:
        Its sum over the answer's tokens in nats, float32 or wider, and the number of these tokens, each (rows,).
    """
    targets_nt = labels_nt[:, 1:]
    # Most positions are prompt: the head, a third of a small model's work, runs only where some row has an answer.
    positions_k = (targets_nt != IGNORED).any(dim=0).nonzero().squeeze(1)
    base = net.get_base_model() if isinstance(net, PeftModel) else net
    # Not all models of transformers can leave out positions.
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        logits_nkv = net(**inputs, use_cache=False, logits_to_keep=positions_k).logits
    else:
        logits_nkv = net(**inputs, use_cache=False).logits[:, positions_k]
    targets_nk = targets_nt[:, positions_k]
    logits_kv = logits_nkv.flatten(0, 1)
    losses_nk = nn.functional.cross_entropy(
        logits_kv.to(torch.promote_types(logits_kv.dtype, torch.float32)),
        targets_nk.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    ).view_as(targets_nk)
    return -losses_nk.sum(dim=1), (targets_nk != IGNORED).sum(dim=1)


def ending(net: Any, tokenizer: Any, answer_end: str) -> dict[str, Any]:
    """Return the arguments of ``generate`` that end an answer.

    An answer ends at the end tokens of the model's generation settings, at the tokenizer's, and where the chat template
    ends it.

    Args:
        net: the model.
        tokenizer: the model's tokenizer.
        answer_end: the template's end of an answer, a token or a text; "" if it is one of those tokens.
    """
    model_ends = net.generation_config.eos_token_id
    tokens = [*(model_ends if isinstance(model_ends, list) else [model_ends]), tokenizer.eos_token_id]
    end_ids = tokenizer(answer_end, add_special_tokens=False)["input_ids"] if answer_end else []
    if len(end_ids) == 1:
        tokens += end_ids
    stops = sorted({int(token) for token in tokens if token is not None})
    options: dict[str, Any] = {"eos_token_id": stops or None}
    # generate ends at single tokens; an end of several tokens must be given as a text.
    return options | {"stop_strings": [answer_end], "tokenizer": tokenizer} if len(end_ids) > 1 else options


def generate_answers(
    net: PeftModel, prompt_ids: list[list[int]], tokenizer: Any, max_new_tokens: int, **options: Any
) -> list[str]:
    """Return the model's answers to prompts of token ids; see :func:`generated`."""
    # On a sharded model all ranks generate or none: every forward gathers weights from the others.
    if not prompt_ids and not is_sharded(net):
        return []
    pad_id = padding_id(tokenizer)
    device = next(net.parameters()).device
    rows = [torch.tensor(ids) for ids in prompt_ids or [[pad_id]]]  # a rank without prompts helps the others
    inputs = {
        # On the left, so that every row continues at its last token.
        "input_ids": pad(rows, pad_id, side="left").to(device),
        "attention_mask": pad([torch.ones_like(row) for row in rows], 0, side="left").to(device),
    }
    return generated(net, inputs, tokenizer, max_new_tokens, **options)[: len(prompt_ids)]


@torch.no_grad()
def generated(
    net: nn.Module,
    inputs: dict[str, Tensor],
    tokenizer: Any,
    max_new_tokens: int,
    answer_end: str = "",
    **decoding: Any,
) -> list[str]:
    """Return answers to prompts padded on the left; each token is the most likely one, unless ``decoding`` says more.

    ``decoding`` holds arguments of ``generate``, such as ``num_beams=10``. Answers end as :func:`ending` says. If the
    model is sharded, every rank must call this, and continues until all have their answers.
    """
    generate: Any = net.generate
    options = {"do_sample": False, **ending(net, tokenizer, answer_end), **decoding}
    options |= {"pad_token_id": padding_id(tokenizer), "synced_gpus": is_sharded(net)}
    tokens = generate(**inputs, max_new_tokens=max_new_tokens, **options)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [(text.partition(answer_end)[0] if answer_end else text).strip() for text in texts]
