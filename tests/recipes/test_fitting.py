"""A checkpoint of another model is refused with an explanation, before its weights are loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from clip_contrastive_runs import CLIP, VISION, save_model
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip_contrastive.module import ContrastiveModel
from recipes.vqa.model import DEFAULT_LORA
from recipes.vqa.module import VQA


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("clip_contrastive", r"\(weights of the image tower: \d+ there, \d+ here\): give the model, the data"),
        ("vqa", r"kind of model: 'idefics3' there, 'qwen2_5_vl' here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    recipe: str, message: str, folders: dict[str, str], small_clip: str, tmp_path: Path
) -> None:
    modules: list[Any] = [VQA(folders[kind], DEFAULT_LORA) for kind in ("idefics3", "qwen2_5_vl")]
    if recipe == "clip_contrastive":
        deep = save_model(tmp_path / "deep", CLIP | {"vision_cfg": VISION | {"layers": 3}})
        modules = [ContrastiveModel(name) for name in (small_clip, deep)]
    checkpoint: dict[str, Any] = {}
    for module in modules:
        module.configure_model()
        module._trainer = SimpleNamespace(state=SimpleNamespace(fn="test"), lr_scheduler_configs=[])
    modules[0].on_save_checkpoint(checkpoint)
    modules[0].on_load_checkpoint(checkpoint)
    with pytest.raises(MisconfigurationException, match=message):
        modules[1].on_load_checkpoint(checkpoint)
