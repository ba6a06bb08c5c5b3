"""Tiny random models of well-known kinds, with their own classes of tokenizer, image processor and processor.

The chat templates behave like the originals: Qwen2.5-VL writes a system message of its own, Gemma 3 has its own name
for the assistant and an end of turn that is not the tokenizer's end token, and a template may be in the tokenizer.
"""

import json
from collections.abc import Callable
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

QWEN_END = "<|im_end|>"
QWEN_MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
_CHATML = (
    "{% for m in messages %}DEFAULT_SYSTEM<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SYSTEM = (
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
_QWEN_IMAGE = "".join(QWEN_MARKS[:3])
QWEN2_VL = _CHATML.replace("DEFAULT_SYSTEM", _SYSTEM).replace("IMAGE", _QWEN_IMAGE)
QWEN3_VL = _CHATML.replace("DEFAULT_SYSTEM", "").replace("IMAGE", _QWEN_IMAGE)
INTERNVL = _CHATML.replace("DEFAULT_SYSTEM", "").replace("IMAGE", "<IMG_CONTEXT>\n")
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first if loop.first }}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT |= {"num_key_value_heads": 1, "initializer_range": 0.3}
_WORDS = "what colour is it? is it red green blue yes no Answer unanswerable question"


def learnt_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of bytes and a few words, with its merges, as transformers' own classes expect them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_WORDS], trainer)
    saved = json.loads(tokenizer.to_str())["model"]
    return saved["vocab"], [tuple(pair) for pair in saved["merges"]]


def qwen_tokenizer(template: str | None = None, **marks: str) -> Any:
    """Qwen2's class; each keyword argument becomes a special token and an attribute of the tokenizer."""
    vocabulary, merges = learnt_words()
    ends = {"eos_token": QWEN_END, "pad_token": "<|endoftext|>", "unk_token": None}
    tokenizer = transformers.Qwen2Tokenizer(vocabulary, merges, extra_special_tokens=marks, **ends)
    tokenizer.add_tokens(["<|im_start|>", *QWEN_MARKS], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return {"vocab_size": len(tokenizer), **_TEXT, **tokens, **more}


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    return {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in zip(names, QWEN_MARKS, strict=True)}


def _qwen_images(patch: int) -> Any:
    """Images keep their size, so the number of their tokens differs."""
    side = 2 * patch
    size = {"shortest_edge": side * side, "longest_edge": 4 * side * side}
    return transformers.Qwen2VLImageProcessor(size=size, patch_size=patch)


def qwen2_5_vl(width: int = 32) -> Any:
    tokenizer = qwen_tokenizer()
    own = transformers.Qwen2_5_VLProcessor(
        _qwen_images(14), tokenizer, transformers.Qwen2VLVideoProcessor(), chat_template=QWEN2_VL
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": width}
    rope = {"type": "mrope", "mrope_section": [width // 16, 3 * width // 32, 3 * width // 32]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(tokenizer, hidden_size=width, intermediate_size=2 * width, rope_scaling=rope),
        vision_config={**vision, "fullatt_block_indexes": [1]},
        **_qwen_ids(tokenizer),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), own


def qwen3_vl() -> Any:
    tokenizer = qwen_tokenizer()
    own = transformers.Qwen3VLProcessor(
        _qwen_images(16), tokenizer, transformers.Qwen3VLVideoProcessor(), chat_template=QWEN3_VL
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config=_text(tokenizer, head_dim=16, rope_scaling=rope),
        vision_config={**vision, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        **_qwen_ids(tokenizer),
    )
    return transformers.Qwen3VLForConditionalGeneration(config), own


def internvl() -> Any:
    """Only the tokenizer has the template."""
    tokenizer = qwen_tokenizer(
        INTERNVL,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    side = {"height": 32, "width": 32}
    images = transformers.GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=4)
    own = transformers.InternVLProcessor(
        images, tokenizer, transformers.InternVLVideoProcessor(size=side), image_seq_length=4
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.InternVLConfig(
        vision_config={**vision, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration(config), own


def gemma3() -> Any:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = transformers.GemmaTokenizer(vocabulary, [], extra_special_tokens=marks)
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    images = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    own = transformers.Gemma3Processor(images, tokenizer, chat_template=GEMMA3, image_seq_length=4)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=_text(tokenizer, head_dim=16, sliding_window=16, bos_token_id=tokenizer.bos_token_id),
        vision_config={**vision, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    return transformers.Gemma3ForConditionalGeneration(config), own


OWN_CLASSES: dict[str, Callable[[], Any]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "gemma3": gemma3,
}
