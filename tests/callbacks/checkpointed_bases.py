"""A frozen base with a head and an adapter, and helpers that save, load and compare AdapterCheckpoint's files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import CLASSES, FEATURES, WIDTH, Classifier, fit, make_loader, same, trainer_of
from lightning.pytorch import Callback
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_flatlora import AdapterCheckpoint
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import HINT

HEAD = "net.base_model.model.head.weight"
WEIGHTS = "adapter_model.safetensors"


class Base(nn.Module):
    """A body that LoRA adapts, and a head that it doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("ema", torch.zeros(3000))
        self.register_buffer("codes", torch.zeros(4))
        self.register_buffer("never", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.ema.data[2000] += 1
            self.codes = self.codes + 1
        return self.head(torch.tanh(self.first(x)))


def network(head_seed: int = 0) -> Any:
    torch.manual_seed(0)
    base = Base()
    torch.manual_seed(head_seed)
    nn.init.normal_(base.head.weight)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))


def module_of(head_seed: int = 0, **kwargs: Any) -> Classifier:
    return Classifier(net=network(head_seed), **kwargs)


def saver(folder: Path, **kwargs: Any) -> AdapterCheckpoint:
    settings = {"save_top_k": -1, "every_n_train_steps": 3, "filename": "{step}", **kwargs}
    return AdapterCheckpoint(folder, **settings)


def epochs(folder: Path) -> AdapterCheckpoint:
    """Saves at the end of each epoch, so that a resumed run starts with a whole epoch."""
    return saver(folder, every_n_train_steps=None, every_n_epochs=1, filename="{epoch}")


def state(file: Path) -> dict[str, Any]:
    weights: dict[str, Any] = torch.load(file, weights_only=True)["state_dict"]
    weights.pop(HINT, None)  # Lightning's own files don't have it
    return weights


def assert_resumes(
    folder: Path,
    make: Callable[[], Any],
    *data: Any,
    callbacks: Callable[[], list[Callback]] = list,
    save: Callable[[Path], AdapterCheckpoint] = saver,
    file: str = "step=6.ckpt",
    **settings: Any,
) -> Any:
    """Train one module to the end, and another one from a file of the first: both end with the same bits.

    The first saves into the subfolder "1", the second into "2".

    Returns:
        The first module.
    """
    whole, resumed = make(), make()
    fit(folder, whole, [*callbacks(), save(folder / "1")], *data, **settings)
    fit(folder, resumed, [*callbacks(), save(folder / "2")], *data, ckpt_path=folder / "1" / file, **settings)
    assert same(resumed.state_dict(), whole.state_dict())
    return whole


def validate(folder: Path, module: Any, file: str = "step=6.ckpt", **data: Any) -> Any:
    """Load a file of a folder and validate with it; returns the metrics."""
    trainer = trainer_of(folder, [saver(folder)])
    (found,) = trainer.validate(module, make_loader(1, **data), ckpt_path=folder / file, verbose=False)
    return found
