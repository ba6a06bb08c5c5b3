"""Checkpoints of the size of the adapter, each with a folder that peft can load."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_flatlora.callbacks.adapter_state import peft_models, read_adapters, unwrapped, written_as_adapter
from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.lightning_names import MisconfigurationException


class AdapterCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint without the frozen base: adapters, trained weights, optimizer, schedulers, callbacks.

    Its files are the same under every strategy: one ``NAME.ckpt``, whole values on the CPU, written by rank zero. So a
    run may be resumed on another number of processes, or under another strategy, as long as its Trainer has an
    AdapterCheckpoint too. The frozen base is neither saved nor gathered. Beside each file lies a folder ``NAME`` that
    ``PeftModel.from_pretrained(base, folder)`` loads (with one subfolder for each adapter that is not called "default",
    as peft writes them).

    It works with any LightningModule that holds a peft model. A checkpoint that lacks an adapter's weight, frozen ones
    as LoRA-FA's A included, or a trained one is refused on loading, and one that has others too (unless the module's
    ``strict_loading`` is off). Files appear whole or not at all, the folder before the file, and a file is removed only
    after the next one is there; so a process killed at any moment leaves a checkpoint to resume from. Rank zero writes
    directly, not through a CheckpointIO plugin. Other checkpoint callbacks beside it write what they always do.

    Args:
        args: as for ModelCheckpoint.
        kwargs: as for ModelCheckpoint.

    Example:
        >>> AdapterCheckpoint(every_n_train_steps=100, save_top_k=-1).best_model_path
        ''
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stop_reading: Callable[[], None] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if "://" in str(self.dirpath or ""):
            raise MisconfigurationException(
                f"AdapterCheckpoint: dirpath must be a local folder, where peft can write beside the checkpoint, "
                f"got {self.dirpath!r}"
            )
        self._release()
        first = next(c for c in trainer.callbacks if isinstance(c, AdapterCheckpoint))  # type: ignore[attr-defined]
        if first is self:  # several may save; one looks after the loading
            self._stop_reading = read_adapters(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not peft_models(pl_module):
            raise MisconfigurationException(
                f"AdapterCheckpoint: {type(pl_module).__name__} holds no peft model: "
                "wrap its network with peft.get_peft_model, or use Lightning's ModelCheckpoint"
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def _release(self) -> None:
        if self._stop_reading is not None:
            self._stop_reading()
            self._stop_reading = None

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        def write(checkpoint: dict[str, Any], path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _save_adapters(trainer, checkpoint["state_dict"], path)
            _save_file(checkpoint, path)

        with written_as_adapter(trainer, write):
            super()._save_checkpoint(trainer, filepath)
        if self.save_last == "link" and self.last_model_path not in ("", filepath):
            self._link_checkpoint(trainer, filepath, self.last_model_path)  # before its old target may be removed

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        _remove_folder(adapter_folder(filepath))

    @staticmethod
    @override
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and filepath != linkpath:
            _link(adapter_folder(filepath), adapter_folder(linkpath))
            _link(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()


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
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)


def _save_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Written aside in the same folder and then renamed (Lightning writes to another disk, maybe, and copies)."""
    partial = _aside(path)
    with partial.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _save_adapters(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """peft's own format, in the folder beside a checkpoint that is about to be written."""
    folder, models = adapter_folder(path), peft_models(unwrapped(trainer.lightning_module))
    partial = _aside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    sharded = is_sharded(trainer.strategy.model)
    for name, model in models.items():
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        model.save_pretrained(str(partial if len(models) == 1 else partial / name), state_dict=own if sharded else None)
    if folder.is_symlink():
        folder.unlink()
    elif not path.exists():  # of a run that was killed before it wrote the file
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        partial.rename(folder)
        return
    for file in [each for each in partial.rglob("*") if each.is_file()]:
        target = folder / file.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)  # one by one: the folder of a checkpoint that is overwritten never goes
    shutil.rmtree(partial)


def _link(target: Path, link: Path) -> None:
    """Make or turn a link in one move, so that it always leads somewhere."""
    aside = _aside(link)
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(target, link.parent), target_is_directory=target.is_dir())
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    aside.replace(link)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
