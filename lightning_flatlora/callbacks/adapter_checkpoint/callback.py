"""AdapterCheckpoint: Lightning's ModelCheckpoint decides when to save; the files are as small as the adapter."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.serialization import get_unsafe_globals_in_checkpoint
from typing_extensions import override

from lightning_flatlora.callbacks.adapter_checkpoint import contents, export
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import adapters_only, read_adapters
from lightning_flatlora.callbacks.both_lightnings import callbacks_of, is_lightning
from lightning_flatlora.callbacks.logging import without_logging
from lightning_flatlora.callbacks.strategies import checkpoint_problems
from lightning_flatlora.methods.checks import refuse
from lightning_flatlora.methods.optimizers import parameters_of
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
            # A link saves copying a large file. These files are small, and a link would at times point nowhere.
            self.save_last = True
        # The identities of the parameters that the optimizers of this fit have trained so far.
        self._seen: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the state of a fit, which a copy or pickle made during it must not carry along."""
        return without_logging(self)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a remote dirpath when a run begins, and let the strategy load checkpoints of adapters."""
        if self not in trainer.checkpoint_callbacks:
            refuse(self, ["under pytorch_lightning import AdapterCheckpoint from lightning_flatlora.pytorch_lightning"])
        super().setup(trainer, pl_module, stage)
        # peft writes with plain file operations, which know no remote file systems.
        if "://" in str(self.dirpath or ""):
            refuse(self, [f"dirpath must be a local folder, got {self.dirpath!r}"])
        # Several callbacks may save, but one handles the loading, in all of the strategy's fits and tests.
        if "load_model_state_dict" not in vars(trainer.strategy):
            read_adapters(trainer, self.finder)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, when a fit starts, a module without an adapter, and whatever can't save it alone."""
        super().on_fit_start(trainer, pl_module)
        problems = checkpoint_problems(trainer.strategy)
        if not contents.hosts(pl_module, self.finder):
            problems.append(
                f"{type(pl_module).__name__} holds no peft model: wrap its network with peft.get_peft_model, give a "
                "finder for other layers, or use Lightning's ModelCheckpoint"
            )
        if any(is_lightning(each, StochasticWeightAveraging) for each in callbacks_of(trainer)):
            problems.append("StochasticWeightAveraging would save the frozen base too: use AdapterAveraging")
        refuse(self, problems)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try a complete save when training starts, so that errors appear now and not hours later."""
        super().on_train_start(trainer, pl_module)
        self._seen.clear()
        saves = self.save_top_k != 0 or self.save_last
        if saves and not getattr(trainer, "fast_dev_run", False):
            self._dry_run(trainer)

    def _dry_run(self, trainer: Trainer) -> None:
        """Write a complete checkpoint to a temporary place and remove it; if one rank fails, all raise an error."""
        error: Exception | None = None
        try:
            with adapters_only(trainer, self.finder):
                # On every rank, since the weights are gathered and a state_dict() may communicate.
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
                if trainer.is_global_zero:
                    self._save_and_remove(trainer, checkpoint)
        except Exception as any_error:
            error = any_error
        # A single rank may fail, for example on a callback's state. All must then stop, or the others would wait.
        if trainer.strategy.reduce_boolean_decision(error is not None, all=False):
            reason = f": {type(error).__name__}: {error}" if error else " on another rank, whose error says why"
            problem = f"AdapterCheckpoint: saving into {self.dirpath} would fail{reason}"
            raise MisconfigurationException(problem) from error

    def _save_and_remove(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        # The folders that are missing are made at the first save.
        dirpath = Path(str(self.dirpath))
        folder = next(each for each in (dirpath, *dirpath.parents) if each.exists())
        with export.partial_place(folder) as place:
            file = place / "dry_run.ckpt"
            trainer.strategy.save_checkpoint(checkpoint, file)
            unsafe = get_unsafe_globals_in_checkpoint(file)
        if unsafe:
            rank_zero_warn(
                f"AdapterCheckpoint: PyTorch loads {', '.join(sorted(unsafe)[:3])} only from a file that you trust, "
                "and a model among the hyper-parameters brings its frozen base into every file. Leave them out by "
                "self.save_hyperparameters(ignore=[...]), or give weights_only=False with ckpt_path"
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note, before an optimizer steps, which parameters it trains."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        # A parameter that this step trains may be frozen again before the next save.
        trained = {id(parameter) for parameter in parameters_of(optimizer) if parameter.requires_grad}
        if not trained <= self._seen:
            contents.note_trained(pl_module)
            self._seen |= trained

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Save when a batch ends, if a step or an interval is due, as in automatic optimization."""
        # In manual optimization ModelCheckpoint never saves by time, and says that it would rather save the weights
        # from before the step. Both kinds of optimization need the checkpoint at the batch's end.
        seen: Any = pl_module if pl_module.automatic_optimization else SimpleNamespace(automatic_optimization=True)
        super().on_train_batch_end(trainer, seen, *args, **kwargs)

    @override
    def file_exists(self, filepath: str | Path, trainer: Trainer) -> bool:
        """Report whether a name is taken, by a file or by a folder in the place of the checkpoint's own."""
        return super().file_exists(filepath, trainer) or super().file_exists(export.folder_of(Path(filepath)), trainer)

    @override
    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        # Since 2.6 Lightning writes last.ckpt only if it has saved another file here, such as one of the best. A run
        # that is resumed would repeat all epochs since then.
        if self.save_last:
            self._last_global_step_saved = trainer.global_step

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with adapters_only(trainer, self.finder):
            super()._save_checkpoint(trainer, filepath)

    @override
    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        # A resumed checkpoint names the ones before it, and Lightning would delete folders as well as files.
        is_within = Path(str(self.dirpath)).resolve() in Path(previous).resolve().parents
        return is_within and super()._should_remove_checkpoint(trainer, previous, current)

    @override
    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        path, folder = Path(filepath), export.folder_of(Path(filepath))
        # On rank zero only: a slower rank would find the folder gone. A folder whose file somebody has
        # deleted was kept on purpose.
        if trainer.is_global_zero and path.exists() and export.is_ours(folder, path):
            export.remove_folder(folder)
        with suppress(FileNotFoundError):  # another job that shares the folder may delete it, too
            super()._remove_checkpoint(trainer, filepath)


class AdapterCheckpoint(SavesAdapters, ModelCheckpoint):
    """Save as Lightning's ModelCheckpoint does, including optimizers and callbacks, but without the frozen base.

    Its files are the same under every strategy: one ``NAME.ckpt``, whole values on the CPU, written by rank zero. So a
    run may be resumed on another number of processes, or under another strategy, as long as its Trainer has an
    AdapterCheckpoint too. Next to each file is a folder ``NAME`` that ``PeftModel.from_pretrained(base, folder)``
    loads (with one subfolder for each adapter that is not called "default", as peft writes them).

    It works with any LightningModule that holds a peft model, or a model with an adapter from ``add_adapter``. The file
    holds the adapters, everything outside of the base, all buffers, and every parameter of the base that has ever
    required a gradient, such as a head that was trained and then frozen. The rest of the base is recognized on loading.

    With ``save_last=True`` every save writes ``last.ckpt``, even if the monitored value is not among the best.
    A process that is killed at any moment leaves a checkpoint to resume from. The callback deletes only files that
    it has written, and a save that would fail raises its error when the fit starts. Rank zero writes directly, not
    through a CheckpointIO plugin. docs/checkpoints.md has more.

    Args:
        args: as for ModelCheckpoint; ``save_last="link"`` writes a file, as ``save_last=True`` does.
        finder: of layers that are not peft's, see :mod:`lightning_flatlora.pairs.finders`. The base is then the child
            modules that hold them, and the folder has the factors by name: in ``lit_model.pth.lora``, which litgpt's
            scripts read, or in ``factors.safetensors``.
        kwargs: as for ModelCheckpoint.

    Raises:
        MisconfigurationException: at the start of a fit, if the module holds no adapter, ``dirpath`` is not a local
            folder, or the strategy can't save like this; on resuming, if the base is not the checkpoint's.

    Example:
        >>> import lightning as L
        >>> saver = AdapterCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
        >>> trainer = L.Trainer(callbacks=[saver], accelerator="cpu", logger=False)
    """
