"""Every recipe with a tiny model and little data: the arguments of its runs, in one process and in several."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from clip_contrastive_runs import CLIP, SIGLIP, save_model, save_pictures
from clip_fewshot_runs import filled, options_of, tiny_clip, write_set
from hub_sets import save_glue, save_roberta
from nlg_sets import save_e2e, save_gpt2
from vqa_models import COLOURS, draw
from vqa_models import save_model as save_vlm

from recipes.clip.images import read_image
from recipes.command_line.configs import RECIPES
from recipes.instruction_tuning.module import InstructionTuning
from recipes.vqa.conversation import QuestionEncoder
from recipes.vqa.metrics import normalized_answer
from recipes.vqa.model import DEFAULT_LORA
from recipes.vqa.module import VQA

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ACCUMULATED = ("--trainer.accumulate_grad_batches=2",)
PROMPTS = ["Add 1", "Add 2", "Add 3", "Why?", "How many are there?"]
NAMES: tuple[str, ...] = ("classification", "classification by prompts", "clip_contrastive", "clip_fewshot")
NAMES += ("instruction_tuning", "nlg", "vqa")
MODES = {"siglip": "efmlora", "all weights": "full"}
"""Of contrastive training, and the method of each: a learnt scale and bias, and no adapter."""


class Recipe(NamedTuple):
    """How to run a recipe: its folder, and the arguments of every run, of runs in two processes and of runs in one."""

    folder: str
    options: list[str]
    ranks: tuple[str, ...] = ()
    alone: tuple[str, ...] = ACCUMULATED
    rtol: float = 1e-4
    """Of weights of one process and of two."""


def classification(place: Path, name: str, task: str) -> Recipe:
    """With a classification head, or with prompts."""
    configs = RECIPES / "classification" / "configs" / name
    options = [
        f"--config={configs}.yaml",
        f"--config={configs / task}.yaml",
        f"--model.init_args.model={save_roberta(place / 'roberta')}",
        f"--data.init_args.dataset={save_glue(place / 'glue')}",
        "--trainer.max_epochs=1",
        "--trainer.max_steps=-1",
        "--trainer.val_check_interval=1.0",
        "--trainer.check_val_every_n_epoch=1",
        "--data.init_args.batch_size=4",
    ]
    return Recipe("classification", options + ["--data.init_args.shots=12"] * (name == "prompt"))


def clip_contrastive(place: Path, config: dict[str, Any]) -> Recipe:
    """With an epsilon so large that a wrongly scaled gradient shows, which it would not with Adam's default."""
    options = [
        f"--model.init_args.model={save_model(place / 'model', config)}",
        f"--data.init_args.dataset={save_pictures(place / 'pictures')}",
        "--trainer.max_epochs=1",
        "--model.init_args.pretrained=null",
        "--model.init_args.eps=1",
        "--model.init_args.learning_rate=1",
        "--model.init_args.warmup_steps=0",
        "--model.init_args.schedule=constant_with_warmup",
        "--data.init_args.validation_share=0.25",
        "--data.init_args.test_share=0",
        "--data.init_args.eval_batch_size=3",
        "--data.init_args.num_workers=0",
    ]
    ranks, alone = ("--data.init_args.batch_size=4",), ("--data.init_args.batch_size=8",)  # one joint batch
    return Recipe("clip_contrastive", options, ranks, alone, rtol=1e-3)


def clip_fewshot(place: Path) -> Recipe:
    """On one of CoOp's data sets, and images to predict."""
    write_set(place, "eurosat", train=6, val=3, test=4)
    options = [
        *options_of(tiny_clip(place / "tiny"), "eurosat"),
        "--model.init_args.learning_rate=0.01",
        f"--data.init_args.root={place}",
        "--data.init_args.templates=a centered satellite photo of {}.",
        "--data.init_args.eval_batch_size=3",
        f"--data.init_args.predict_folder={filled(place / 'images', 13)}",
    ]
    # As small as the batches of a rank, which gets half of the few images.
    alone = (*ACCUMULATED, "--trainer.val_check_interval=6", "--data.init_args.batch_size=3")
    return Recipe("clip_fewshot", options, alone=alone)


def instruction_tuning(place: Path, tiny: str, tokenizer: Any) -> Recipe:
    """A tiny model whose answers differ in words and length; half of the rows contain its own answers."""
    talker = str(place / "talker")
    config = transformers.AutoConfig.from_pretrained(tiny, tie_word_embeddings=False, initializer_range=0.3)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 4))
    model.save_pretrained(talker)
    tokenizer.save_pretrained(talker)
    module = InstructionTuning(model=talker, lora=LORA, max_new_tokens=6)
    module.configure_model()
    module.eval()
    rows = [{"instruction": f"Add {i}", "input": "one " * (i % 7), "output": f"It is {i}."} for i in range(61)]
    for row in rows[::2]:
        messages = [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["input"])))},
        ]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        row["output"] = module.generate([ids])[0] or "nothing"
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    options = [
        f"--model.init_args.model={talker}",
        "--model.init_args.dtype=float32",
        "--model.init_args.max_new_tokens=6",
        "--trainer.max_epochs=2",
        f"--data.init_args.dataset={saved(place / 'data.jsonl', rows)}",
        "--data.init_args.batch_size=4",
        f"--data.init_args.prompts={place / 'prompts.txt'}",
    ]
    return Recipe("instruction_tuning", options)


def nlg(place: Path) -> Recipe:
    options = [
        f"--config={RECIPES / 'nlg' / 'configs' / 'e2e.yaml'}",
        f"--model.init_args.model={save_gpt2(place / 'gpt2')}",
        "--model.init_args.max_new_tokens=6",
        "--model.init_args.metrics=[bleu,nist]",
        "--model.init_args.warmup_steps=2",
        f"--data.init_args.dataset={save_e2e(place / 'e2e')}",
        "--data.init_args.batch_size=4",
        "--data.init_args.validation_texts=6",
        "--trainer.max_epochs=1",
    ]
    alone = (*ACCUMULATED, "--trainer.limit_train_batches=8")
    return Recipe("nlg", options, ("--trainer.limit_train_batches=4",), alone)


def vqa(place: Path) -> Recipe:
    """Images of different sizes, half of them with the model's own answers, and five questions to predict."""
    model = save_vlm("qwen2_5_vl", place / "model")
    rows, asked = draw(place, 28), [{"image": f"{i}.png", "question": f"is it {COLOURS[i % 3]}?"} for i in range(5)]
    module = VQA(model, DEFAULT_LORA, "float32", max_new_tokens=4)
    module.configure_model()
    module.eval()
    encoder = QuestionEncoder(module.processor)
    for row in rows[::2]:
        prompt, image = encoder.prompt(row["question"]), read_image(place / row["image"])
        answer = module.answers(encoder([prompt], [image], padding_side="left"))[0]
        row["answer"] = answer if normalized_answer(answer) else row["answer"]
    options = [
        f"--model.init_args.model={model}",
        "--model.init_args.dtype=float32",
        "--model.init_args.gradient_checkpointing=true",
        "--model.init_args.max_new_tokens=4",
        "--model.init_args.validation_answers=7",
        "--trainer.max_epochs=1",
        f"--data.init_args.dataset={saved(place / 'data.jsonl', rows)}",
        f"--data.init_args.questions={saved(place / 'asked.jsonl', asked)}",
        "--data.init_args.validation_share=0.3",
        "--data.init_args.test_share=0.3",
        "--data.init_args.test_split=null",
        "--data.init_args.batch_size=3",
    ]
    return Recipe("vqa", options)


def saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def prepared(name: str, place: Path, tiny: str, tokenizer: Any) -> Recipe:
    """One of NAMES or MODES, with its model and data in a folder; tiny is the folder of a Llama with this tokenizer."""
    place.mkdir()
    if name == "classification":
        return classification(place, "glue", "mnli")
    if name == "classification by prompts":
        return classification(place, "prompt", "sst2")
    if name == "instruction_tuning":
        return instruction_tuning(place, tiny, tokenizer)
    if name == "siglip":
        recipe = clip_contrastive(place, SIGLIP)
        return recipe._replace(options=[*recipe.options, "--model.init_args.learn_logit_scale=true"])
    if name in ("clip_contrastive", "all weights"):
        return clip_contrastive(place, CLIP)
    return {"clip_fewshot": clip_fewshot, "nlg": nlg, "vqa": vqa}[name](place)
