"""A small LoRA classifier, in the variants that callbacks and module may meet, and questions that tests ask of it."""

import copy
import io
import os
import pickle
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatlora import EFMLoRA, FMLoRA, FMLoRAModule, perturbed_read
from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation
from lightning_flatlora.class_overlay import Overlay
from lightning_flatlora.loops.forward_gate import GATES
from lightning_flatlora.perturbed_read import READINGS


def since_lightning(version: str, reason: str) -> pytest.MarkDecorator:
    """Skip the test with older versions of Lightning, because of a problem in Lightning itself."""
    return pytest.mark.skipif(Version(L.__version__) < Version(version), reason=reason)


needs_weight_averaging = since_lightning("2.6.0", "WeightAveraging came with Lightning 2.6")

FEATURES, WIDTH, CLASSES = 6, 12, 3
FRONT_ENDS = ("efmlora", "fmlora", "module", "efmlora+module")
"""EFMLoRA and FMLoRA over automatic optimization, FMLoRAModule alone, and EFMLoRA beside FMLoRAModule."""
BASELINES: dict[str, Any] = {
    "SAM": SAM,
    "LoRASAM": LoRASAM,
    "nBAR": BalancednessRegularization,
    "oBAR": partial(BalancednessRegularization, kind="oBAR"),
    "RandomPerturbation": partial(RandomPerturbation, seed=5),
    "BiLoRA": partial(BiLoRA, rank=4, seed=5),
}
"""Each is called with a size, and maybe other settings."""
SIZES: dict[str, float] = defaultdict(lambda: 0.4, nBAR=2.0, oBAR=2.0, RandomPerturbation=0.3, BiLoRA=0.1)
"""At which a baseline's run is clearly another one than plain LoRA's."""
TWO_PASSES = ("fmlora", "module", "LoRASAM", "SAM")
CALLBACKS: dict[str, Any] = {"efmlora": EFMLoRA, "fmlora": FMLoRA, **BASELINES}


def make_net(dropout: float = 0.0, seed: int = 0, rank: int = 2) -> nn.Module:
    """Three linear layers under peft; the last has a trained bias, so that not only LoRA is trained."""
    torch.manual_seed(seed)
    layers = [nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)]
    config = LoraConfig(r=rank, lora_alpha=4, lora_dropout=dropout, target_modules=["0", "2", "4"])
    net = get_peft_model(nn.Sequential(*layers), config)
    net.base_model.model[4].base_layer.bias.requires_grad_(True)
    return net


def make_loader(batches: int = 6, batch_size: int = 4, seed: int = 1, dtype: torch.dtype = torch.float32) -> DataLoader:
    return DataLoader(make_dataset(batches * batch_size, seed, dtype), batch_size=batch_size, shuffle=False)


def make_dataset(samples: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Inputs, labels, and a factor of the loss for each sample, which is 1 except in batches that should overflow."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, FEATURES, generator=generator, dtype=dtype)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    return TensorDataset(inputs, labels, torch.ones(samples))


class Losses:
    """What both modules share: cross-entropy, times the batch's factor; a test can add functions that run inside."""

    net: nn.Module

    def __init__(self, *args: Any, net: nn.Module | None = None, lr: float = 0.02, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.net = make_net() if net is None else net
        self.lr = lr
        self.batch_size = 4
        self.scheduler: Callable[[Any], Any] | None = None
        self.optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW
        self.inside: list[Callable[[Any, int], Any]] = []

    def loss(self, batch: Any, batch_idx: int) -> Tensor | None:
        inputs, labels, factor = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels) * factor[0]
        for look in self.inside:
            answer = look(self, batch_idx)
            if answer == "skip":
                return None
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch, batch_idx))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.optimizer_class(parameters, lr=self.lr)
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        config = scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Classifier(Losses, LightningModule):
    """Automatic optimization."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(batch, batch_idx)


class ByHand(Classifier):
    """Manual optimization: steps each optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        self.manual_backward(self.loss(batch, batch_idx))
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
            optimizer.zero_grad()


class FromIterator:
    """A mix-in for a module that takes its batches from the iterator itself."""

    def training_step(self: Any, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        return self.loss(batch, batch_idx)


class TwoPassClassifier(Losses, FMLoRAModule):
    """The same loss on FMLoRAModule."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(batch, batch_idx)


def with_own(own: type[Any]) -> tuple[type[Any], type[Any]]:
    """Both modules with the methods of a test's own class."""
    if own is object:
        return Classifier, TwoPassClassifier
    return type("Automatic", (own, Classifier), {}), type("Manual", (own, TwoPassClassifier), {})


def trains(chosen: Callable[[str, nn.Parameter], bool]) -> type[Any]:
    """A mix-in whose optimizer holds the chosen parameters."""

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.AdamW([p for name, p in self.named_parameters() if chosen(name, p)], lr=self.lr)

    return type("Chosen", (), {"configure_optimizers": configure_optimizers})


def build(
    front_end: str,
    rho: Any = 0.5,
    *,
    net: nn.Module | None = None,
    lr: float = 0.02,
    accumulate: int = 1,
    own: type[Any] = object,
    classes: tuple[type[Any], type[Any]] | None = None,
    every_n_steps: int | None = None,
    **settings: Any,
) -> tuple[Any, list[Callback], dict[str, Any]]:
    """One front end or baseline, or plain LoRA.

    Returns:
        The module, its flatness callbacks, and further arguments of the Trainer (accumulation).
    """
    automatic, manual = classes or with_own(own)
    every = {} if every_n_steps is None else {"every_n_steps": every_n_steps}
    if "module" not in front_end:
        module = automatic(net=net, lr=lr)
        callbacks = [] if front_end == "plain" else [CALLBACKS[front_end](rho, **every, **settings)]
        return module, callbacks, {"accumulate_grad_batches": accumulate}
    shared = {name: value for name, value in settings.items() if name != "beta"}
    module = manual(
        rho, net=net, lr=lr, accumulate_grad_batches=accumulate, **(every if front_end == "module" else {}), **shared
    )
    if front_end == "module":
        return module, [], {}
    return module, [EFMLoRA(rho, **({"every_n_steps": 2} | every), **settings)], {}


def trainer_of(tmp_path: Any, callbacks: list[Callback], **kwargs: Any) -> Trainer:
    """A quiet Trainer on one CPU."""
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
        "callbacks": callbacks,
    }
    return Trainer(**(defaults | kwargs))


def fit(
    tmp_path: Any,
    module: LightningModule,
    callbacks: list[Callback],
    loader: Any = None,
    *,
    val: Any = None,
    ckpt_path: Any = None,
    seed: int = 3,
    **kwargs: Any,
) -> Trainer:
    """Train from a fixed seed and return the Trainer."""
    torch.manual_seed(seed)
    if val is None:
        val, kwargs = make_loader(1), {"limit_val_batches": 0, **kwargs}
    trainer = trainer_of(tmp_path, callbacks, **kwargs)
    trainer.fit(module, make_loader() if loader is None else loader, val, ckpt_path=ckpt_path)
    return trainer


def calling(**functions: Callable[..., Any]) -> Callback:
    """A callback that calls the given function in each of these hooks, with Lightning's arguments."""

    def method_of(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: function(*args, **kwargs)

    return type("Calling", (Callback,), {hook: method_of(function) for hook, function in functions.items()})()


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all stored weights, by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(left: Any, right: Any) -> bool:
    """Whether two nested states hold the same bits."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return (
            isinstance(left, Tensor)
            and isinstance(right, Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.detach()
            .contiguous()
            .view(-1)
            .view(torch.uint8)
            .equal(right.detach().contiguous().view(-1).view(torch.uint8))
        )
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def E_hat(callback: Any) -> dict[str, Tensor]:
    """Copies of a callback's perturbations, by the name of B; empty for a baseline."""
    return {} if callback.perturbation is None else callback.perturbation.state_dict()["E"]


def driver_of(trainer: Trainer) -> Any:
    """The callback that holds the perturbation in use: EFMLoRA, FMLoRA, the module's own, or a baseline."""
    return next(each for each in trainer.callbacks if hasattr(each, "perturbation"))


def is_perturbed(module: nn.Module) -> bool:
    """Whether any layer currently reads B + E."""
    return any(perturbed_read.shown(m) is not None for m in module.modules())


def is_installed(module: nn.Module) -> bool:
    """Whether any part of a module still has a reading class."""
    return any(READINGS in part.__dict__ for part in module.modules())


def assert_no_trace(module: nn.Module) -> None:
    """No overlaid class, and no attribute of one, is left in a module."""
    hidden = {READINGS, GATES}
    assert not [name for name, m in module.named_modules() if isinstance(m, Overlay) or hidden & m.__dict__.keys()]


def assert_same_run(trainer: Trainer, other: Trainer) -> None:
    """Two Trainers have ended with the same weights, step counts and averages, and left no trace."""
    assert same(weights(trainer.lightning_module), weights(other.lightning_module))
    assert trainer.global_step == other.global_step
    if any(hasattr(callback, "perturbation") for callback in trainer.callbacks):
        assert driver_of(trainer).step == driver_of(other).step
        assert same(E_hat(driver_of(trainer)), E_hat(driver_of(other)))
    assert_no_trace(trainer.lightning_module)


def assert_copies_are_plain(net: nn.Module) -> None:
    """Copies and pickles made now have plain classes, the stored weights and no trace of E."""
    stored = net.state_dict()
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False))
    for other in copies:
        assert_no_trace(other)
        assert same(other.state_dict(), stored)


class Send(Callback):
    """Sends a signal to this process at a given call of a hook."""

    def __init__(self, hook: str, call: int = 0, number: int = signal.SIGUSR1) -> None:
        self.left = call

        def method(*args: Any) -> None:
            self.left -= 1
            if self.left == -1:
                os.kill(os.getpid(), number)

        setattr(self, hook, method)


class At(Callback):
    """Changes the model at the start of one batch, counted over the whole fit."""

    def __init__(self, step: int, change: Any) -> None:
        self.step, self.change, self.seen = step, change, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.seen == self.step:
            self.change(pl_module)
        self.seen += 1


def moved(module: nn.Module) -> list[str]:
    """The adapters and layers that currently read something other than their stored weight."""
    names = []
    for name, part in module.named_modules():
        if ".lora_B." in name and not torch.equal(part.weight, part._parameters["weight"]):
            names.append(".".join(name.split(".")[-3::2]))
    return names


def two_adapters() -> Any:
    net = make_net()
    net.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2", "4"]))
    return net


class ResumableLoader:
    """A loader that shuffles each epoch and resumes where it was, as torchdata's StatefulDataLoader does.

    Lightning only restores its state within an epoch; between epochs it passes the epoch's number to samplers.
    """

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.epoch, self.position = 0, 0

    @property
    def sampler(self) -> "ResumableLoader":
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if self.position >= len(self.batches):
            self.position = 0
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[order[self.position - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
