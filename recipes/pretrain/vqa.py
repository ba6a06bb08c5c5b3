"""`python -m recipes.pretrain.vqa`: a small vision-language model, trained here on packaged data, without any hub.

It is an Idefics3 (the class of SmolVLM) with a million parameters, trained from random weights to name the colours and
shapes of easy-vqa, and to say whether there is one. It never sees a negated question: the recipe fine-tunes it on
those. It knows nothing else.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import disable_possible_user_warnings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from recipes.offline.packaged import one_at_a_time, write_folder
from recipes.vqa import sources
from recipes.vqa.data import VQAData
from recipes.vqa.model import packaged_model
from recipes.vqa.module import VQA

DATASET = "packaged:easy_vqa_plain"
STEPS, BATCH = 3000, 32
_SIDE, _PATCH, _MERGED = 64, 8, 2  # pixels of an image and of a patch; patches side by side in a token
_END = "<end_of_utterance>"
_SPECIAL = ("<pad>", "<|im_start|>", _END, "<image>", "<fake_token_around_image>", "<global-img>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}" + _END + "\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>Assistant:{% endif %}"
)


def build_processor(texts: Iterable[str]) -> Idefics3Processor:
    """Build a processor for 64×64 pixels, with a byte-level BPE tokenizer trained on texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    # Sorted, since the order of a set differs between processes.
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[0],
        eos_token=_END,
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
    )
    size = {"longest_edge": _SIDE}
    images = Idefics3ImageProcessor(size=size, max_image_size=size, do_image_splitting=False)
    return Idefics3Processor(images, fast, image_seq_len=(_SIDE // _PATCH // _MERGED) ** 2, chat_template=_TEMPLATE)


def build_model(
    tokenizer: Any, width: int = 128, depth: int = 3, spread: float = 0.06
) -> Idefics3ForConditionalGeneration:
    """Build an Idefics3 with random weights for a processor.

    Args:
        tokenizer: the processor's tokenizer.
        width: width of the layers in both towers.
        depth: layers of the language model.
        spread: standard deviation of the weights; with the usual 0.02 so narrow a model takes four times as many steps.
    """
    common = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "initializer_range": spread,
    }
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "num_hidden_layers": depth, **common, **tokens}
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=_MERGED,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        vision_config={"image_size": _SIDE, "patch_size": _PATCH, "num_hidden_layers": 2, **common},
        text_config={"max_position_embeddings": 1024, "tie_word_embeddings": True, **text},
    )
    return Idefics3ForConditionalGeneration(config)


def write(folder: Path, steps: int, dataset: str) -> None:
    """Write the model and its processor into a folder, untrained; then train all weights, test them and write again.

    Args:
        folder: an empty folder.
        steps: optimizer steps.
        dataset: data set of the questions.
    """
    table = sources.load_questions(dataset, "train")
    pairs = zip(table["question"], table["answers"], strict=True)
    processor = build_processor(f"User: {question} Assistant: {answers[0]}" for question, answers in pairs)
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    build_model(processor.tokenizer).save_pretrained(folder)
    L.seed_everything(0, verbose=False)
    module = VQA(
        str(folder), None, "float32", learning_rate=1.5e-3, weight_decay=0.01, schedule="cosine", warmup_steps=100,
        max_new_tokens=4, validation_answers=500,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps,
        devices=1,
        gradient_clip_val=1.0,
        callbacks=[TQDMProgressBar(refresh_rate=10)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data = VQAData(dataset, test_split="test" if dataset == DATASET else None, test_share=0.1, batch_size=BATCH)
    trainer.fit(module, data)
    trainer.test(module, data)
    module.net.save_pretrained(folder)


def build(steps: int = STEPS, dataset: str = DATASET) -> Path:
    """Return the folder of the trained model; train it if it does not exist."""
    folder = packaged_model()
    with one_at_a_time(folder.name):
        if folder.exists():
            print(f"The model has been trained before; delete {folder} to train it again")
        else:
            write_folder(folder, partial(write, steps=steps, dataset=dataset))
    return folder


def main(steps: int = STEPS) -> None:
    """Train the model if it does not exist, and say where it is.

    Args:
        steps: optimizer steps of 32 questions.
    """
    disable_possible_user_warnings()
    print(f"The model is in {build(steps)}: give it to the recipe as --model.model packaged")


if __name__ == "__main__":
    auto_cli(main, prog="python -m recipes.pretrain.vqa", description=__doc__)
