"""A tiny open_clip model, and generated images with captions."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image, ImageDraw

from recipes.clip_contrastive.data import ContrastiveData

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
    """Save a random model in open_clip's folder format; returns its name."""
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
    """Save a folder of 32 images, each with a text file of two captions."""
    folder.mkdir()
    for colour in COLOURS:
        for shape in SHAPES:
            draw(colour, shape).save(folder / f"{colour}-{shape}.png")
            (folder / f"{colour}-{shape}.txt").write_text(f"a {colour} {shape}\nthe {shape} is {colour}\n")
    return str(folder)


def prepared(clip: Any, stage: str, dataset: str, **options: Any) -> ContrastiveData:
    data = ContrastiveData(dataset, **options)
    data.clip = clip
    data.prepare_data()
    data.setup(stage)
    return data
