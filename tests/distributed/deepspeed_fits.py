"""Fits of Lightning's Trainer under DeepSpeedStrategy on CPU processes, which Lightning refuses."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from deepspeed_runs import OnCPU, start, trained_of, weights
from fits import own_share, places, single
from float64_runs import BETA, RHO, SIZE, Automatic, loss, network
from helpers import ResumableLoader, trainer_of
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FlatnessMonitor, FMLoRA
from lightning_flatlora.baselines import SAM
from lightning_flatlora.schedules import LearningRateRho

BATCHES, EPOCHS, MIDDLE = 10, 2, 12
STEPS = BATCHES * EPOCHS
"""Batches of an epoch, epochs, and the step of a checkpoint in the middle of the second epoch."""
METHODS: dict[str, Any] = {
    "flat": partial(EFMLoRA, RHO, beta=BETA),
    "zero": partial(EFMLoRA, 0.0),
    "follows": partial(EFMLoRA, LearningRateRho(RHO)),
    "FMLoRA": partial(FMLoRA, RHO),
    "SAM": partial(SAM, RHO),
    "AdapterCheckpoint": AdapterCheckpoint,
    "FlatnessMonitor": FlatnessMonitor,
}


class LightningOnCPU(OnCPU, DeepSpeedStrategy):
    """Lightning's."""

    ddp = DDPStrategy

    def __init__(self, stage: int, **settings: Any) -> None:
        settings = {"zero_allow_untested_optimizer": True, "process_group_backend": "gloo", **settings}
        super().__init__(stage=stage, **settings)
        # Lightning has no argument for it; by default ZeRO-3 would leave this network's factors whole.
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        self.config["zero_force_ds_cpu_optimizer"] = False  # or it refuses to offload PyTorch's

    @override
    def setup_distributed(self) -> None:
        start()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def trainer_for(
    stage: int | None, callbacks: list[L.Callback], window: int = 1, clip: float | None = None, **settings: Any
) -> L.Trainer:
    """A quiet Trainer under a stage of ZeRO, or in one process on the whole batches if it is None."""
    settings = {"max_epochs": EPOCHS, "limit_train_batches": BATCHES * window, **settings}
    settings |= {"accumulate_grad_batches": window, "gradient_clip_val": clip}
    if stage is not None:
        settings |= {"strategy": LightningOnCPU(stage, **settings.pop("strategy_settings", {})), **places()}
    return trainer_of(None, callbacks, **settings)


def fit(
    stage: int | None, method: str = "flat", window: int = 1, clip: float | None = None, **settings: Any
) -> dict[str, Any]:
    """Train on this rank's share of each batch; "LoRA" has no callback."""
    callbacks = [METHODS[method]()] if method in METHODS else []
    module = (DividedTwice if stage is None else Automatic)(network().float())
    loader = DataLoader(single(), batch_size=SIZE) if stage is None else own_share(single())
    trainer_for(stage, callbacks, window, clip, **settings).fit(module, loader)
    found: dict[str, Any] = {"weights": weights(module.net)}
    if callbacks:
        found |= {"step": callbacks[0].step, "E": callbacks[0].perturbation.state_dict()["E"]}
    return found


class DividedTwice(Automatic):
    """As under DeepSpeed: Lightning divides a loss by the window, and DeepSpeed does so again, also in plain LoRA."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss(self.net, batch) / self.trainer.accumulate_grad_batches


class Manual(Automatic):
    """Steps its optimizer itself."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(loss(self.net, batch))
        self.optimizers().step()
        self.optimizers().zero_grad()
        self.lr_schedulers().step()


def fit_manually(stage: int | None) -> dict[str, Any]:
    """Train in manual optimization."""
    efmlora = METHODS["flat"]()
    module = Manual(network().float())
    loader = DataLoader(single(), batch_size=SIZE) if stage is None else own_share(single())
    trainer_for(stage, [efmlora]).fit(module, loader)
    return {"weights": weights(module.net), "step": efmlora.step}


def resumed(stage: int, folder: str) -> dict[str, Any]:
    """Train, and once more from a checkpoint in the middle of an epoch, which lacks the frozen base."""
    saves: dict[str, Any] = {"every_n_train_steps": MIDDLE, "filename": "middle", "save_top_k": -1}
    settings = {"strategy_settings": {"exclude_frozen_parameters": True}}
    found: dict[str, Any] = {}
    for name, ckpt_path in (("whole", None), ("resumed", f"{folder}/middle.ckpt")):
        efmlora = METHODS["flat"]()
        module = Automatic(network().float())
        module.strict_loading = False  # as a checkpoint without the base needs
        trainer = trainer_for(stage, [efmlora, ModelCheckpoint(folder, **saves)], **settings)
        trainer.fit(module, ResumableLoader(list(own_share(single()))[:BATCHES]), ckpt_path=ckpt_path)
        found[name] = weights(module.net)
    deepspeed = start()
    with deepspeed.zero.GatheredParameters(trained_of(module.net)) if stage == 3 else nullcontext():
        if trainer.is_global_zero:
            module.net.save_pretrained(f"{folder}/adapter")
    (file,) = Path(folder).glob("middle.ckpt/checkpoint/*model_states.pt") if stage < 3 else [None]
    names = list(torch.load(file, weights_only=False)["module"]) if file else []
    return {**found, "step": efmlora.step, "saved": names, "folder": folder}


def refused(name: str) -> None:
    """Fit with a callback that can't work; the error is the result."""
    callback = METHODS[name]()
    trainer_for(2, [callback]).fit(Automatic(network().float()), own_share(single()))


def refused_offloading() -> None:
    """Fit with the optimizer's state on the CPU."""
    settings = {"offload_optimizer": True, "cpu_checkpointing": False}
    trainer_for(2, [METHODS["flat"]()], strategy_settings=settings).fit(
        Automatic(network().float()), own_share(single())
    )
