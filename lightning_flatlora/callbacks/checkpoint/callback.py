"""AdapterCheckpoint: Lightning's ModelCheckpoint decides when to save, and the files have the adapter's size."""

import os
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatlora.callbacks.checkpoint import folder as folders
from lightning_flatlora.callbacks.checkpoint.changes import listed, record_of
from lightning_flatlora.callbacks.checkpoint.export import save_adapters
from lightning_flatlora.callbacks.checkpoint.initialization import rewritten_base, warn_of_rewritten_base
from lightning_flatlora.callbacks.checkpoint.loading import compare_base, read_adapters
from lightning_flatlora.callbacks.checkpoint.parts import Entry, Kind, found_hosts, hosts, state_entries, twin_of
from lightning_flatlora.callbacks.checkpoint.saving import Selection, select, written_as_adapter
from lightning_flatlora.callbacks.checkpoint.sparse import bytes_of, size_text
from lightning_flatlora.callbacks.checkpoint.trial import try_to_save
from lightning_flatlora.callbacks.patches import without_logging
from lightning_flatlora.callbacks.strategies import checkpoint_problems
from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.lightning_names import MisconfigurationException, callback_of
from lightning_flatlora.lora_pair import Finder
from lightning_flatlora.methods.checks import refuse

if TYPE_CHECKING:
    _Base = ModelCheckpoint
else:
    # The ModelCheckpoint may be of either of Lightning's names.
    _Base = object


class SavesAdapters(_Base):
    """What AdapterCheckpoint adds to ModelCheckpoint, which must come after it among the base classes."""

    _has_reported_other_folder = False

    def __init__(self, *args: Any, finder: Finder | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finder = finder
        self._reading = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a fit: a copy or pickle that is made in the middle of one has no part in it."""
        return without_logging(self) | {"_reading": ExitStack()}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not any(callback is self for callback in trainer.checkpoint_callbacks):
            raise MisconfigurationException(
                "AdapterCheckpoint: this Trainer is of pytorch_lightning, which takes it for no checkpoint callback: "
                "import AdapterCheckpoint from lightning_flatlora.pytorch_lightning"
            )
        super().setup(trainer, pl_module, stage)
        # peft writes with plain file operations, which know no remote file systems.
        if "://" in str(self.dirpath or ""):
            raise MisconfigurationException(
                f"AdapterCheckpoint: dirpath must be a local folder, where peft can write beside the checkpoint, "
                f"got {self.dirpath!r}"
            )
        self._reading.close()
        # Several callbacks may save, but one handles the loading.
        if callback_of(trainer, SavesAdapters) is self:
            record_of(pl_module).finder = self.finder
            self._reading = read_adapters(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not (hosts(pl_module) or found_hosts(pl_module, self.finder)):
            raise MisconfigurationException(
                f"AdapterCheckpoint: {type(pl_module).__name__} holds no peft model: wrap its network with "
                "peft.get_peft_model or give it an adapter with add_adapter, or give a finder for other layers, or use "
                "Lightning's ModelCheckpoint"
            )
        refuse(self, checkpoint_problems(trainer.strategy))
        # Before any step, so that the sums are of the base as its loader gave it.
        if callback_of(trainer, SavesAdapters) is self:
            record = record_of(pl_module)
            twin = twin_of(pl_module)
            entries = state_entries(twin, record.finder)
            record.start(entries, whole=not is_sharded(trainer.strategy.model))
            rewritten = record.add(rewritten_base(twin, entries), entries)
            if rewritten:
                warn_of_rewritten_base(rewritten)
            compare_base(record, record.fingerprints, refuse=pl_module.strict_loading)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # In these cases nothing will be saved.
        if getattr(trainer, "fast_dev_run", False) or (self.save_top_k == 0 and not self.save_last):
            return
        selection = select(trainer)
        try_to_save(trainer, Path(str(self.dirpath)), selection, linked=self.save_last == "link")
        if callback_of(trainer, SavesAdapters) is self:
            _announce(selection)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        # In manual optimization ModelCheckpoint never saves by time, and says that it would rather save the weights
        # from before the step. A checkpoint at a batch's end is what is wanted in both kinds of optimization.
        seen: Any = pl_module if pl_module.automatic_optimization else SimpleNamespace(automatic_optimization=True)
        super().on_train_batch_end(trainer, seen, *args, **kwargs)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._reading.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._reading.close()

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        def write(checkpoint: dict[str, Any], path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = self._save_folder(trainer, checkpoint["state_dict"], path)
            _save_file(checkpoint, path)
            folders.note_checkpoint(folder, is_there=True)

        _warn_of_merged(trainer.lightning_module)
        with written_as_adapter(trainer, write) as selection:
            super()._save_checkpoint(trainer, filepath)
        if selection.new:
            rank_zero_info(
                f"AdapterCheckpoint: {listed(selection.new)} of the base changed in the training or is trained, and is "
                "in the .ckpt files from now on. The folders beside them hold the adapter alone: where this matters, "
                "load the .ckpt files, by load_adapter_checkpoint for example"
            )
        if self.save_last == "link" and self.last_model_path not in ("", filepath):
            # Now, because ModelCheckpoint may remove the link's old target before it turns the link itself.
            self._link_checkpoint(trainer, filepath, self.last_model_path)

    def _save_folder(self, trainer: Trainer, state: dict[str, Any], path: Path) -> Path:
        """peft's own format, in the folder beside a checkpoint that is about to be written."""
        module = twin_of(trainer.lightning_module)
        # peft may need more of the base, such as a resized embedding.
        if not is_sharded(trainer.strategy.model):
            # By PyTorch's method, since a module's own may leave entries out or name them otherwise.
            state = {**nn.Module.state_dict(module), **state}
        folders.leave_to_user(path, self.FILE_EXTENSION)
        folder = self._folder(path)
        partial = folders.begin_folder(folder)
        save_adapters(module, state, partial, self.finder)
        folders.put_in_place(partial, folder, path)
        return folder

    def _folder(self, path: Path) -> Path:
        folder = folders.adapter_folder(path, self.FILE_EXTENSION)
        wanted = folders.wanted_folder(path, self.FILE_EXTENSION)
        if folder != wanted and not self._has_reported_other_folder:
            self._has_reported_other_folder = True
            rank_zero_info(
                f"AdapterCheckpoint: {wanted} stays as it is, since it is somebody else's or its checkpoint was "
                f"deleted. The adapter beside {path.name} is in {folder.name}"
            )
        return folder

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        folder = None
        # On rank zero alone: for a slower rank the folder would vanish while it looks. And before the file is removed,
        # since the file may be what shows that the folder is ours.
        if trainer.is_global_zero:
            folder = folders.leave_to_user(Path(filepath), self.FILE_EXTENSION)
        if folder is not None:
            folders.note_checkpoint(folder, is_there=False)
        super()._remove_checkpoint(trainer, filepath)
        if folder is not None:
            folders.remove_folder(folder)

    @override
    def _link_checkpoint(self, trainer: Trainer, filepath: str, linkpath: str) -> None:  # type: ignore[override]
        if trainer.is_global_zero and filepath != linkpath:
            folders.leave_to_user(Path(linkpath), self.FILE_EXTENSION)
            target, place = folders.adapter_folder(filepath, self.FILE_EXTENSION), self._folder(Path(linkpath))
            # An existing link is turned in one move.
            if not place.is_symlink():
                folders.remove_folder(place)
            # Asked again, because a user's file may remain in the place; the link then gets another name.
            folders.link(target, self._folder(Path(linkpath)))
            folders.link(Path(filepath), Path(linkpath))
        trainer.strategy.barrier()


class AdapterCheckpoint(SavesAdapters, ModelCheckpoint):
    """Lightning's ModelCheckpoint without the frozen base: adapters, trained weights, optimizer, schedulers, callbacks.

    Its files are the same under every strategy: one ``NAME.ckpt``, whole values on the CPU, written by rank zero. So a
    run may be resumed on another number of processes, or under another strategy, as long as its Trainer has an
    AdapterCheckpoint too. Beside each file lies a folder ``NAME`` that ``PeftModel.from_pretrained(base, folder)``
    loads (with one subfolder for each adapter that is not called "default", as peft writes them).

    It works with any LightningModule that holds a peft model, or a model with an adapter by ``add_adapter``. The file
    holds everything except the tensors of the base that equal what the base's own loader gives, whatever
    ``requires_grad`` says at the moment: a head that was trained and then frozen, buffers that count or average, and
    all that is outside of the base. The file describes what it leaves out, so that another base is noticed on loading.
    A checkpoint that lacks an adapter's weight, or has one that the module doesn't know, is refused (unless the
    module's ``strict_loading`` is off).

    Files appear whole or not at all, the folder before the file, and a file is removed only after the next one exists.
    So a process that is killed at any moment leaves a checkpoint to resume from. No file is deleted that this callback
    has not written, and what would fail at the first save fails when the fit starts. Rank zero writes directly, not
    through a CheckpointIO plugin. Other checkpoint callbacks beside it write what they always do. docs/checkpoints.md
    has more.

    Args:
        args: as for ModelCheckpoint.
        finder: of layers that are not peft's, see :mod:`lightning_flatlora.finders`. The base is then the child modules
            that hold them, and the folder has the factors by name: in ``lit_model.pth.lora``, which litgpt's scripts
            read, or in ``factors.safetensors``.
        kwargs: as for ModelCheckpoint.

    Raises:
        MisconfigurationException: at the start of a fit: the module holds no adapter, ``dirpath`` is not a local
            folder, or the strategy can't save like this; on resuming, the base is another one than the checkpoint's.

    Example:
        >>> import lightning as L
        >>> saver = AdapterCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
        >>> trainer = L.Trainer(callbacks=[saver], accelerator="cpu", logger=False)
    """


def _save_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a hidden file in the same folder and rename it (Lightning may write to another disk, and copies)."""
    partial = folders.aside(path)
    with partial.open("wb") as file:
        torch.save(checkpoint, file)
        # On the disk before the rename, so that a crash leaves the old file or the whole new one.
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _warn_of_merged(module: nn.Module) -> None:
    """Warn of a save while an adapter is merged: the file holds the sum as the base, and the adapter beside it."""
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            rank_zero_warn(
                f"AdapterCheckpoint: the adapter is merged into its base while a checkpoint is saved, as in {name}, so "
                "whoever loads the file has it in the weights twice: call unmerge_adapter() before the save, as in "
                "on_validation_epoch_end"
            )
            return


def _announce(selection: Selection) -> None:
    """Report once what the files hold beside the adapters, and what they leave out."""
    left_out = {name: selection.entries[name] for name in selection.left_out}
    adapters = {name: entry for name, entry in selection.saved.items() if entry.kind is Kind.ADAPTER}
    more = {name: entry for name, entry in selection.saved.items() if name not in adapters}
    beside = f", and beside them {_size(more)}: {listed(more)}" if more else ""
    rank_zero_info(
        f"AdapterCheckpoint: the files hold the adapters ({_size(adapters)}){beside}. {_size(left_out)} of the base "
        "are left out as long as nothing changes them"
    )


def _size(entries: dict[str, Entry]) -> str:
    tensors = {id(entry.value): entry.value for entry in entries.values() if isinstance(entry.value, Tensor)}
    number = "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"
    return f"{number}, {size_text(map(bytes_of, tensors.values()))}"
