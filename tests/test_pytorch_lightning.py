"""Everything under ``pytorch_lightning`` equals that under ``lightning.pytorch``, bit for bit."""

import inspect

import lightning.pytorch
import lightning.pytorch.callbacks
import lightning.pytorch.strategies
import pytest
import pytorch_lightning
import pytorch_lightning.utilities.exceptions
import torch
from helpers import Classifier, Losses, TwoPassClassifier, make_loader, same, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from pytorch_lightning.trainer.connectors import callback_connector

import lightning_flatlora
import lightning_flatlora.pytorch_lightning as flatlora
from lightning_flatlora import CosineRho, baselines

STEPS = 20
TAKES_OTHERS = "parent=Callback" in inspect.getsource(callback_connector._validate_callbacks_list)
"""Whether a Trainer of pytorch_lightning takes callbacks that are none by their class, as it does in newer releases."""


class OtherClassifier(Losses, pytorch_lightning.LightningModule):
    """Automatic optimization, under the other name."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch, batch_idx)


class OtherTwoPassClassifier(Losses, flatlora.FMLoRAModule):
    """The same loss on that library's FMLoRAModule."""

    def compute_loss(self, batch, batch_idx):
        return self.loss(batch, batch_idx)


def train(library, module, callbacks, tmp_path, ckpt_path=None, **settings):
    torch.manual_seed(3)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    settings = {"max_steps": STEPS, "enable_checkpointing": False, "default_root_dir": tmp_path, **quiet, **settings}
    trainer = library.Trainer(accelerator="cpu", callbacks=callbacks, **settings)
    trainer.fit(module, make_loader(), make_loader(1), ckpt_path=ckpt_path)
    assert trainer.global_step == STEPS
    return trainer


METHODS = {
    "EFMLoRA": lambda ours, others: ours.EFMLoRA(0.5),
    "FMLoRA": lambda ours, others: ours.FMLoRA(0.5),
    "LoRASAM": lambda ours, others: others.LoRASAM(0.1),
    "SAM": lambda ours, others: others.SAM(0.1),
    "RandomPerturbation": lambda ours, others: others.RandomPerturbation(0.3),
    "BiLoRA": lambda ours, others: others.BiLoRA(0.5),
    "BalancednessRegularization": lambda ours, others: others.BalancednessRegularization(1.0),
    "AdapterAveraging": lambda ours, others: ours.AdapterAveraging(0.8),
}


@pytest.mark.parametrize("method", METHODS)
def test_callbacks(tmp_path, method):
    """Those of that library, and those of lightning.pytorch, whose hooks also run there."""
    build, step = METHODS[method], {"accumulate_grad_batches": 2}
    module = Classifier()
    train(lightning.pytorch, module, [build(lightning_flatlora, baselines)], tmp_path, **step)
    doors = [(flatlora, flatlora)]
    if TAKES_OTHERS:
        doors.append((lightning_flatlora, baselines))
    for ours, others in doors:
        other = OtherClassifier()
        train(pytorch_lightning, other, [build(ours, others)], tmp_path, **step)
        assert same(weights(other), weights(module))
    plain = OtherClassifier()
    train(pytorch_lightning, plain, [], tmp_path, **step)
    assert not same(weights(other), weights(plain))


@pytest.mark.parametrize("beside", [False, True])
def test_the_module(tmp_path, beside):
    """Accumulation, clipping and schedulers are the module's own; EFMLoRA next to it schedules the passes."""
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    found = []
    for library, kind, callback in (
        (lightning.pytorch, TwoPassClassifier, lightning_flatlora.EFMLoRA),
        (pytorch_lightning, OtherTwoPassClassifier, flatlora.EFMLoRA),
        (pytorch_lightning, OtherTwoPassClassifier, (lightning_flatlora if TAKES_OTHERS else flatlora).EFMLoRA),
    ):
        module = kind(0.5, **settings)
        module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
        train(library, module, [callback(0.5, every_n_steps=2)] if beside else [], tmp_path)
        found.append(weights(module))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("method", ["EFMLoRA", "module"])
def test_a_run_goes_on_under_the_other_name(tmp_path, method):
    """From whole checkpoints and from those of the adapter, whose callback must be the last in the list."""

    def parts(automatic, manual, ours):
        if method == "module":
            return manual(0.5), [ours.EFMLoRA(0.5, every_n_steps=2)]
        return automatic(), [ours.EFMLoRA(0.5)]

    there = OtherClassifier, OtherTwoPassClassifier, flatlora
    here = Classifier, TwoPassClassifier, lightning_flatlora
    whole, callbacks = parts(*there)
    files = {"filename": "{step}", "every_n_epochs": 2, "save_top_k": -1}
    saver, plain = (
        flatlora.AdapterCheckpoint(tmp_path / "adapter", **files),
        ModelCheckpoint(tmp_path / "whole", **files),
    )
    trainer = train(pytorch_lightning, whole, [saver, plain, *callbacks], tmp_path, enable_checkpointing=True)
    assert trainer.callbacks[-2] is saver
    assert (tmp_path / "adapter" / "step=12" / "adapter_config.json").exists()
    for folder, library, kinds in (
        ("adapter", pytorch_lightning, there),
        ("adapter", lightning.pytorch, here),
        ("whole", lightning.pytorch, here),
    ):
        resumed, callbacks = parts(*kinds)
        if folder == "adapter":
            callbacks.append(kinds[2].AdapterCheckpoint(tmp_path / "more", save_top_k=0))
        path = tmp_path / folder / "step=12.ckpt"
        train(library, resumed, callbacks, tmp_path, ckpt_path=path, enable_checkpointing=bool(callbacks[1:]))
        assert same(weights(resumed), weights(whole))


@pytest.mark.skipif(not TAKES_OTHERS, reason="this release of pytorch_lightning refuses it itself")
def test_the_other_librarys_checkpoint_callback_is_refused(tmp_path):
    callbacks = [lightning_flatlora.AdapterCheckpoint(tmp_path)]
    with pytest.raises(MisconfigurationException, match=r"from lightning_flatlora\.pytorch_lightning"):
        train(pytorch_lightning, OtherClassifier(), callbacks, tmp_path)


def test_all_are_of_that_library():
    """A command line only takes its own library's callbacks, and checkpoint callbacks come last in a Trainer's list."""
    defined = [each for each in vars(flatlora).values() if getattr(each, "__module__", "") == flatlora.__name__]
    assert len(defined) == 12
    for each in defined:
        base = "LightningModule" if each is flatlora.FMLoRAModule else "Callback"
        assert issubclass(each, getattr(pytorch_lightning, base))


def test_what_can_not_work_is_refused_there_too(tmp_path):
    callbacks = [flatlora.EFMLoRA(CosineRho(1, 0)), GradientAccumulationScheduler({0: 2})]
    with pytest.raises(MisconfigurationException, match="the accumulation changes: set its total_steps"):
        train(pytorch_lightning, OtherClassifier(), callbacks, tmp_path)
    callbacks = [flatlora.FMLoRA(1.0), flatlora.EFMLoRA(1.0)]
    with pytest.raises(MisconfigurationException, match="it perturbs the same weights as EFMLoRA"):
        train(pytorch_lightning, OtherClassifier(), callbacks, tmp_path)
