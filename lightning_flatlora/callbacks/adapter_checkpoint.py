"""Checkpoints of the size of the adapter, each with a folder that peft can load."""

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from peft import PeftModel
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle
from typing_extensions import override


class AdapterCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint without the frozen base: trainable weights, optimizer, schedulers, callbacks.

    Beside each ``NAME.ckpt`` lies a folder ``NAME`` that ``PeftModel.from_pretrained(base, folder)`` loads (with one
    subfolder for each adapter that is not called "default", as peft writes them). It works with any LightningModule
    that holds a peft model; while a Trainer runs, the module's ``state_dict()`` is the small one for every checkpoint
    callback, and ``strict_loading`` is off. A checkpoint that lacks a trainable weight is refused on loading.

    Args:
        args: as for ModelCheckpoint.
        kwargs: as for ModelCheckpoint.

    Example:
        >>> AdapterCheckpoint(every_n_train_steps=100, save_top_k=-1).best_model_path
        ''
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handle: RemovableHandle | None = None
        self._was_strict = True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if "://" in str(self.dirpath or ""):
            raise MisconfigurationException(
                f"AdapterCheckpoint: dirpath must be a local folder, where peft can write beside the checkpoint, "
                f"got {self.dirpath!r}"
            )
        self._release(pl_module)
        first = next(c for c in trainer.callbacks if isinstance(c, AdapterCheckpoint))  # type: ignore[attr-defined]
        if first is not self:  # several may save; one looks after the module
            return
        self._was_strict = pl_module.strict_loading
        pl_module.strict_loading = False
        self._handle = pl_module.register_state_dict_post_hook(_keep_trainable)  # type: ignore[no-untyped-call]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _peft_models(pl_module):
            raise MisconfigurationException(
                f"AdapterCheckpoint: {type(pl_module).__name__} holds no peft model: "
                "wrap its network with peft.get_peft_model, or use Lightning's ModelCheckpoint"
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._release(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            pl_module.strict_loading = self._was_strict

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("state_dict", {})
        lacking = [name for name in _trainable_names(pl_module) if name not in saved]
        if saved and lacking:
            raise MisconfigurationException(
                f"AdapterCheckpoint: the checkpoint lacks {len(lacking)} trainable weights, as {lacking[0]}: "
                "it is of another model or adapter"
            )

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._save_adapters(trainer.lightning_module, adapter_folder(filepath))

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        _remove_folder(adapter_folder(filepath))

    @staticmethod
    @override
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
        if trainer.is_global_zero:
            link, folder = adapter_folder(linkpath), adapter_folder(filepath)
            link.unlink() if link.is_symlink() else shutil.rmtree(link, ignore_errors=True)
            link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)

    @rank_zero_only
    def _save_adapters(self, pl_module: LightningModule, folder: Path) -> None:
        """peft's own format, written aside and then renamed, so that a crash leaves no half-written folder."""
        models = _peft_models(pl_module)
        partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        for name, model in models.items():
            model.save_pretrained(str(partial if len(models) == 1 else partial / name))
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def adapter_folder(checkpoint: str | Path) -> Path:
    """The peft folder beside a checkpoint file.

    Example:
        >>> adapter_folder("runs/epoch=0-step=10.ckpt").name
        'epoch=0-step=10'
    """
    path = Path(checkpoint)
    return path.with_name(path.name.removesuffix(".ckpt"))


@rank_zero_only
def _remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _peft_models(pl_module: nn.Module) -> dict[str, PeftModel]:
    """The outermost peft models of a module, by the name of their place."""
    found: dict[str, PeftModel] = {}
    for name, module in pl_module.named_modules():
        if isinstance(module, PeftModel) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _trainable_names(module: nn.Module) -> set[str]:
    """Names of the trained parameters, each as often as the state dict has it."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}


def _frozen_names(module: nn.Module) -> set[str]:
    """Names in the state dict of the frozen base: frozen parameters, and buffers inside peft models.

    Running statistics of norms stay in, since training changes them, and so do buffers outside of peft models.
    """
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    for outer, model in _peft_models(module).items():
        for name, part in model.named_modules(remove_duplicate=False):
            if not isinstance(part, _NormBase):
                buffers = part.named_buffers(recurse=False)
                frozen |= {".".join(filter(None, (outer, name, buffer))) for buffer, _ in buffers}
    return frozen


def _keep_trainable(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    if prefix:  # the module as a part of a larger one, whose state dict is not ours to cut
        return
    for name in _frozen_names(module):
        state_dict.pop(name, None)
