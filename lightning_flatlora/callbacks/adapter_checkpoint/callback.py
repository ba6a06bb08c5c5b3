"""AdapterCheckpoint: Lightning's ModelCheckpoint decides when to save, and the files have the adapter's size."""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from lightning_flatlora.callbacks.adapter_checkpoint import export
from lightning_flatlora.callbacks.adapter_checkpoint.contents import hosts, note_trained
from lightning_flatlora.callbacks.adapter_checkpoint.loading import read_adapters
from lightning_flatlora.callbacks.adapter_checkpoint.saving import adapters_only, dry_run
from lightning_flatlora.callbacks.patches import without_logging
from lightning_flatlora.callbacks.strategies import checkpoint_problems
from lightning_flatlora.methods.checks import refuse
from lightning_flatlora.methods.gradients import parameters_of
from lightning_flatlora.pairs.lora_pair import Finder

if TYPE_CHECKING:
    _Base = ModelCheckpoint
else:
    # The ModelCheckpoint may be of either of Lightning's names.
    _Base = object


class SavesAdapters(_Base):
    """Add what AdapterCheckpoint does to ModelCheckpoint, which must come after it among the base classes."""

    def __init__(self, *args: Any, finder: Finder | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finder = finder
        if self.save_last == "link":
            # A link spares a copy of a large file. Here it would only bring moments in which it leads nowhere.
            self.save_last = True
        # The identities of the parameters that the optimizers of this fit have trained so far.
        self._seen: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a fit: a copy or pickle that is made in the middle of one has no part in it."""
        return without_logging(self)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not any(callback is self for callback in trainer.checkpoint_callbacks):
            problem = (
                "this Trainer is of pytorch_lightning, which does not recognise it as a checkpoint callback: import "
                "AdapterCheckpoint from lightning_flatlora.pytorch_lightning"
            )
            refuse(self, [problem])
        super().setup(trainer, pl_module, stage)
        # peft writes with plain file operations, which know no remote file systems.
        if "://" in str(self.dirpath or ""):
            refuse(self, [f"dirpath must be a local folder, got {self.dirpath!r}"])
        # Several callbacks may save, but one handles the loading, in all of the strategy's fits and tests.
        if "load_model_state_dict" not in vars(trainer.strategy):
            read_adapters(trainer, self.finder)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        problems = checkpoint_problems(trainer.strategy)
        if not hosts(pl_module, self.finder):
            problems.append(
                f"{type(pl_module).__name__} holds no peft model: wrap its network with peft.get_peft_model, give a "
                "finder for other layers, or use Lightning's ModelCheckpoint"
            )
        refuse(self, problems)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._seen.clear()
        saves = self.save_top_k != 0 or self.save_last
        if saves and not getattr(trainer, "fast_dev_run", False):
            with adapters_only(trainer, self.finder):
                dry_run(trainer, Path(str(self.dirpath)), self.save_weights_only)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        # What a step trains may be frozen again before the next save.
        trained = {id(parameter) for parameter in parameters_of(optimizer) if parameter.requires_grad}
        if not trained <= self._seen:
            note_trained(pl_module)
            self._seen |= trained

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        # In manual optimization ModelCheckpoint never saves by time, and says that it would rather save the weights
        # from before the step. A checkpoint at a batch's end is what is wanted in both kinds of optimization.
        seen: Any = pl_module if pl_module.automatic_optimization else SimpleNamespace(automatic_optimization=True)
        super().on_train_batch_end(trainer, seen, *args, **kwargs)

    @override
    def file_exists(self, filepath: str | Path, trainer: Trainer) -> bool:
        """Report whether a name is taken, by a file or by a folder that stands where the checkpoint's own would be."""
        folder = export.folder_of(Path(filepath))
        return super().file_exists(filepath, trainer) or super().file_exists(folder, trainer)

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with adapters_only(trainer, self.finder):
            super()._save_checkpoint(trainer, filepath)

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        path, folder = Path(filepath), export.folder_of(Path(filepath))
        # On rank zero only: for a slower rank the folder would vanish while it looks. A folder whose file somebody has
        # deleted was kept on purpose.
        goes = trainer.is_global_zero and path.exists() and export.is_ours(folder, path)
        super()._remove_checkpoint(trainer, filepath)
        if goes:
            export.remove_folder(folder)


class AdapterCheckpoint(SavesAdapters, ModelCheckpoint):
    """Save as Lightning's ModelCheckpoint does, without the frozen base: what learns, optimizer, schedulers, callbacks.

    Its files are the same under every strategy: one ``NAME.ckpt``, whole values on the CPU, written by rank zero. So a
    run may be resumed on another number of processes, or under another strategy, as long as its Trainer has an
    AdapterCheckpoint too. Beside each file lies a folder ``NAME`` that ``PeftModel.from_pretrained(base, folder)``
    loads (with one subfolder for each adapter that is not called "default", as peft writes them).

    It works with any LightningModule that holds a peft model, or a model with an adapter by ``add_adapter``. The file
    holds the adapters, everything outside of the base, all buffers, and every parameter of the base that has ever
    required a gradient, such as a head that was trained and then frozen. The rest of the base is recognized on loading.

    Files appear whole or not at all, and are removed only after the next ones exist. So a process that is killed at any
    moment leaves a checkpoint to resume from. No file is deleted that this callback has not written, and what would
    fail at the first save fails when the fit starts. Rank zero writes directly, not through a CheckpointIO plugin.
    Other checkpoint callbacks in the Trainer write what they always do. docs/checkpoints.md has more.

    Args:
        args: as for ModelCheckpoint; ``save_last="link"`` writes a file, as ``save_last=True`` does.
        finder: of layers that are not peft's, see :mod:`lightning_flatlora.pairs.finders`. The base is then the child
            modules that hold them, and the folder has the factors by name: in ``lit_model.pth.lora``, which litgpt's
            scripts read, or in ``factors.safetensors``.
        kwargs: as for ModelCheckpoint.

    Raises:
        MisconfigurationException: at the start of a fit: the module holds no adapter, ``dirpath`` is not a local
            folder, or the strategy can't save like this; on resuming, the base is another one than the checkpoint's.

    Example:
        >>> import lightning as L
        >>> saver = AdapterCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
        >>> trainer = L.Trainer(callbacks=[saver], accelerator="cpu", logger=False)
    """
