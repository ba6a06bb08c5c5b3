"""The callback: Lightning's ModelCheckpoint, which decides when, with files of the size of the adapter."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_flatlora.callbacks.base import without_logging
from lightning_flatlora.callbacks.checkpoint.changes import listed, record_of
from lightning_flatlora.callbacks.checkpoint.export import save_adapters
from lightning_flatlora.callbacks.checkpoint.folder import (
    adapter_folder,
    aside,
    begin_folder,
    existing_folder,
    link,
    put_in_place,
    remove_folder,
    wanted_folder,
)
from lightning_flatlora.callbacks.checkpoint.loading import compare_base, read_adapters
from lightning_flatlora.callbacks.checkpoint.parts import Entry, Kind, entries_of, hosts, unwrapped
from lightning_flatlora.callbacks.checkpoint.saving import Selection, select, written_as_adapter
from lightning_flatlora.callbacks.checkpoint.trial import try_to_save
from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.lightning_names import MisconfigurationException, callbacks_of, is_lightning

if TYPE_CHECKING:
    _Base = ModelCheckpoint
else:
    _Base = object  # the ModelCheckpoint may be of either of Lightning's names


class SavesAdapters(_Base):
    """What AdapterCheckpoint adds to, or changes in, ModelCheckpoint, which comes after it among the base classes."""

    _stop_reading: Callable[[], None] | None = None
    _has_told_of_other_folder = False

    def __getstate__(self) -> dict[str, Any]:
        """What Lightning's own has: a copy or pickle that is made in the middle of a fit has no part in that fit."""
        return without_logging(self) | {"_stop_reading": None}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not any(callback is self for callback in trainer.checkpoint_callbacks):
            raise MisconfigurationException(
                "AdapterCheckpoint: this Trainer is of pytorch_lightning, which takes it for no checkpoint callback: "
                "import AdapterCheckpoint from lightning_flatlora.pytorch_lightning"
            )
        super().setup(trainer, pl_module, stage)
        if "://" in str(self.dirpath or ""):
            raise MisconfigurationException(
                f"AdapterCheckpoint: dirpath must be a local folder, where peft can write beside the checkpoint, "
                f"got {self.dirpath!r}"
            )
        self._release()
        if self._is_first(trainer):  # several may save; one looks after the loading
            self._stop_reading = read_adapters(trainer)

    def _is_first(self, trainer: Trainer) -> bool:
        ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, SavesAdapters)]
        return bool(ours and ours[0] is self)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not hosts(pl_module):
            raise MisconfigurationException(
                f"AdapterCheckpoint: {type(pl_module).__name__} holds no peft model: wrap its network with "
                "peft.get_peft_model or give it an adapter with add_adapter, or use Lightning's ModelCheckpoint"
            )
        if is_lightning(trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                "AdapterCheckpoint: DeepSpeed keeps weights and optimizer in a form of its own: use Lightning's "
                "ModelCheckpoint, or train under DDP or FSDP"
            )
        if self._is_first(trainer):
            record = record_of(pl_module)
            record.start(entries_of(unwrapped(pl_module)), whole=not is_sharded(trainer.strategy.model))
            compare_base(record, record.prints, refuse=pl_module.strict_loading)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if getattr(trainer, "fast_dev_run", False) or (self.save_top_k == 0 and not self.save_last):
            return
        selection = select(trainer)
        try_to_save(trainer, Path(str(self.dirpath)), selection, linked=self.save_last == "link")
        if self._is_first(trainer):
            _announce(selection)

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
            self._save_folder(trainer, checkpoint["state_dict"], path)
            _save_file(checkpoint, path)

        with written_as_adapter(trainer, write) as selection:
            super()._save_checkpoint(trainer, filepath)
        if selection.new:
            rank_zero_info(
                f"AdapterCheckpoint: {listed(selection.new)} of the base changed in the training or is trained, and is "
                "in the checkpoints from now on"
            )
        if self.save_last == "link" and self.last_model_path not in ("", filepath):
            self._link_checkpoint(trainer, filepath, self.last_model_path)  # before its old target may be removed

    def _save_folder(self, trainer: Trainer, state: dict[str, Any], path: Path) -> None:
        """peft's own format, in the folder beside a checkpoint that is about to be written."""
        module = unwrapped(trainer.lightning_module)
        if not is_sharded(trainer.strategy.model):  # peft may want more of the base, as a resized embedding
            state = {**module.state_dict(), **state}
        folder = self._folder(path)
        partial = begin_folder(folder)
        save_adapters(module, state, partial)
        put_in_place(partial, folder, path)

    def _folder(self, path: Path) -> Path:
        folder = adapter_folder(path, self.FILE_EXTENSION)
        wanted = wanted_folder(path, self.FILE_EXTENSION)
        if folder != wanted and not self._has_told_of_other_folder:
            self._has_told_of_other_folder = True
            rank_zero_info(
                f"AdapterCheckpoint: {wanted} is not of AdapterCheckpoint and stays as it is; the adapter beside "
                f"{path.name} is in {folder.name}"
            )
        return folder

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        folder = None
        if trainer.is_global_zero:  # alone: for a slower rank the folder would vanish while it looks
            folder = existing_folder(Path(filepath), self.FILE_EXTENSION)  # as long as the file tells that it is ours
        super()._remove_checkpoint(trainer, filepath)
        if folder is not None:
            remove_folder(folder)

    @override
    def _link_checkpoint(self, trainer: Trainer, filepath: str, linkpath: str) -> None:  # type: ignore[override]
        if trainer.is_global_zero and filepath != linkpath:
            target, place = adapter_folder(filepath, self.FILE_EXTENSION), self._folder(Path(linkpath))
            if not place.is_symlink():  # a link is turned in one move
                remove_folder(place)
            link(target, self._folder(Path(linkpath)))  # elsewhere, if a user's file is left in the place
            link(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()


class AdapterCheckpoint(SavesAdapters, ModelCheckpoint):
    """Lightning's ModelCheckpoint without the frozen base: adapters, trained weights, optimizer, schedulers, callbacks.

    Its files are the same under every strategy: one ``NAME.ckpt``, whole values on the CPU, written by rank zero. So a
    run may be resumed on another number of processes, or under another strategy, as long as its Trainer has an
    AdapterCheckpoint too. Beside each file lies a folder ``NAME`` that ``PeftModel.from_pretrained(base, folder)``
    loads (with one subfolder for each adapter that is not called "default", as peft writes them).

    It works with any LightningModule that holds a peft model, or a model with an adapter by ``add_adapter``. In the
    file is everything but the tensors of the base that are as its own loader gives them, whatever ``requires_grad``
    says at the moment: a head that was trained and then frozen, buffers that count or average, and all that is outside
    of the base. What is left out is described, and another base is noticed on loading. A checkpoint that lacks an
    adapter's weight, or has one that the module doesn't know, is refused (unless the module's ``strict_loading`` is
    off).

    Files appear whole or not at all, the folder before the file, and a file is removed only after the next one is
    there; so a process killed at any moment leaves a checkpoint to resume from. No file is deleted that it has not
    written, and what would fail at the first save fails when the fit starts. Rank zero writes directly, not through a
    CheckpointIO plugin. Other checkpoint callbacks beside it write what they always do. More is in docs/checkpoints.md.

    Args:
        args: as for ModelCheckpoint.
        kwargs: as for ModelCheckpoint.

    Example:
        >>> AdapterCheckpoint(every_n_train_steps=100, save_top_k=-1).best_model_path
        ''
    """


def _save_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Written aside in the same folder and then renamed (Lightning writes to another disk, maybe, and copies)."""
    partial = aside(path)
    with partial.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _announce(selection: Selection) -> None:
    """Say once what is in the files beside the adapters, and what is not."""
    adapters: dict[str, Entry] = {}
    more: dict[str, Entry] = {}
    left_out: dict[str, Entry] = {}
    for name, entry in selection.entries.items():
        if name in selection.left_out:
            left_out[name] = entry
        elif name in selection.saved:
            (adapters if entry.kind is Kind.ADAPTER else more)[name] = entry
    beside = f", and beside them {_size(more)}, as {listed(more)}" if more else ""
    rank_zero_info(
        f"AdapterCheckpoint: the files hold the adapters ({_size(adapters)}){beside}. {_size(left_out)} of the base "
        "are left out as long as nothing changes them"
    )


def _size(entries: dict[str, Entry]) -> str:
    tensors = {id(entry.value): entry.value for entry in entries.values() if isinstance(entry.value, Tensor)}
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    return f"{len(tensors)} tensors, {megabytes:.1f} MB"
