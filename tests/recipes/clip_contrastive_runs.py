"""A tiny open_clip model, generated images with captions, and runs of the recipe through its command line."""

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import torch
from PIL import Image, ImageDraw
from strategies import FSDPOnCPU, full_weights
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FMLoRA
from recipes.clip_contrastive.data import ContrastiveData
from recipes.clip_contrastive.module import ContrastiveModel, ContrastiveModelFM
from recipes.shared.cli import RecipeCLI
from recipes.shared.configs import STRATEGIES, config_arguments
from recipes.shared.random_state import RandomState
from recipes.shared.sharding import FSDP2, BlocksAndFactors

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "line")
TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
CLIP = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
SIGLIP = CLIP | {"custom_text": True, "init_logit_bias": -10, "init_logit_scale": 2.3}
POOLING = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True}
COCA = CLIP | {
    "vision_cfg": VISION | POOLING,
    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
    "custom_text": True,
}


def save_model(folder: Path, config: dict[str, Any]) -> str:
    """A random model as open_clip keeps one in a folder; its name."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def draw(colour: str, shape: str) -> Image.Image:
    image = Image.new("RGB", (40, 40), "lightblue")
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((8, 8, 32, 32), fill=colour)
    elif shape == "square":
        pen.rectangle((8, 8, 32, 32), fill=colour)
    elif shape == "triangle":
        pen.polygon([(20, 6), (6, 34), (34, 34)], fill=colour)
    else:
        pen.line((4, 4, 36, 36), fill=colour, width=5)
    return image


def save_pictures(folder: Path) -> str:
    """A folder of 32 images, each with a text file of two captions."""
    folder.mkdir()
    for colour in COLOURS:
        for shape in SHAPES:
            draw(colour, shape).save(folder / f"{colour}-{shape}.png")
            (folder / f"{colour}-{shape}.txt").write_text(f"a {colour} {shape}\nthe {shape} is {colour}\n")
    return str(folder)


def run(command: str, folder: str, method: str, strategy: str, options: list[str]) -> dict[str, Any]:
    """One command of the recipe in a folder.

    Args:
        command: fit, validate or test.
        folder: in which it leaves what it leaves.
        method: whose configurations are taken.
        strategy: ddp, fsdp1 or fsdp2; or "one" for a single process. FSDP1 gets a class that Lightning lets run without
            a GPU, and keeps what the YAML says of it.
        options: more arguments.

    Returns:
        The trained weights, whole, by name; what was logged last; optimizer steps.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    arguments = [command, *config_arguments("clip_contrastive", method)]
    if strategy == "one":
        arguments.append("--trainer.devices=1")
    else:
        arguments += [f"--config={STRATEGIES / strategy}.yaml", f"--trainer.devices={os.environ['WORLD_SIZE']}"]
    if strategy == "fsdp1":
        arguments.append("--trainer.strategy.class_path=strategies.FSDPOnCPU")
    cli = RecipeCLI([*arguments, "--trainer.accelerator=cpu", *options])
    return {
        "weights": full_weights(cli.trainer.strategy, cli.model),
        "logged": {name: value.item() for name, value in cli.trainer.callback_metrics.items()},
        "steps": cli.trainer.global_step,
        "units": len(FullyShardedDataParallel.fsdp_modules(cli.trainer.strategy.model)),
    }


def fit(model: str, pictures: str, method: str, strategy: str, folder: str, **options: Any) -> dict[str, Any]:
    """Train for an epoch with plain gradient descent, whose steps show a gradient of the wrong size as Adam's don't.

    Args:
        model: name of an open_clip model.
        pictures: a folder of images and captions.
        method: "efmlora", "fmlora", "fmlora_manual" or "full".
        strategy: "one", "ddp", "fsdp1" or "fsdp2".
        folder: for checkpoints.
        options: ``batch_size``; ``save`` after every step; ``ckpt_path`` to go on from; ``dropout``; ``learn``, the
            scale.

    Returns:
        The trained weights, whole, by name; each step's loss; what was logged last.
    """
    L.seed_everything(options.get("seed", 0), verbose=False)
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": options.get("dropout", 0.0)}
    settings: dict[str, Any] = {"model": model, "lora": None if method == "full" else lora}
    settings["learn_logit_scale"] = options.get("learn")
    manual = method == "fmlora_manual"
    module = ContrastiveModelFM(rho=0.3, **settings) if manual else ContrastiveModel(**settings)
    module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [p for p in module.parameters() if p.requires_grad], lr=1.0, momentum=0.5
    )
    record = Losses()
    callbacks: list[L.Callback] = [record, RandomState()]
    callbacks += [EFMLoRA(rho=0.3)] if method == "efmlora" else [FMLoRA(rho=0.3)] if method == "fmlora" else []
    if "save" in options:
        callbacks.append(AdapterCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "one" else int(os.environ["WORLD_SIZE"]),
        strategy=strategy_named(strategy),
        callbacks=callbacks,
        max_epochs=1,
        logger=False,
        enable_checkpointing="save" in options,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = ContrastiveData(pictures, validation_share=0.25, test_share=0.0, batch_size=options["batch_size"])
    data.eval_batch_size = 3
    trainer.fit(module, data, ckpt_path=options.get("ckpt_path"))
    return {
        "weights": full_weights(trainer.strategy, module),
        "losses": record.losses,
        "logged": {name: value.item() for name, value in trainer.callback_metrics.items()},
    }


class Losses(L.Callback):
    """The joint loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.losses.append(trainer.callback_metrics["train_loss"].item())


def strategy_named(name: str) -> Any:
    if name == "fsdp1":
        policy = {"auto_wrap_policy": BlocksAndFactors(), "mixed_precision": MixedPrecision()}
        return FSDPOnCPU(process_group_backend="gloo", **policy)
    return {"one": "auto", "ddp": "ddp", "fsdp2": FSDP2("gloo")}[name]


def prepared(clip: Any, stage: str, dataset: str, **options: Any) -> ContrastiveData:
    data = ContrastiveData(dataset, **options)
    data.clip = clip
    data.prepare_data()
    data.setup(stage)
    return data
