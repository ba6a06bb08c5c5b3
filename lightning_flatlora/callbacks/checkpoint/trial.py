"""Tries, when the fit begins, whatever would fail at the first save, and leaves nothing behind."""

import inspect
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_flatlora.callbacks.checkpoint.changes import record_of
from lightning_flatlora.callbacks.checkpoint.export import check_configs, save_adapters
from lightning_flatlora.callbacks.checkpoint.optimizer_states import check_form
from lightning_flatlora.callbacks.checkpoint.parts import Kind, twin_of
from lightning_flatlora.callbacks.checkpoint.saving import Selection
from lightning_flatlora.callbacks.checkpoint.sparse import bytes_of, size_text
from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.lightning_names import MisconfigurationException, callbacks_of

_MOST_BYTES = 2**27
"""Adapters up to this size are written for the trial; of larger ones only the configs are checked."""


def try_to_save(trainer: Trainer, folder: Path, selection: Selection, linked: bool) -> None:
    """Write the adapters and pickle all states, and discard both; every rank must call this.

    Args:
        trainer: in a fit that is about to take its first step.
        folder: the checkpoint callback's.
        selection: what is going to be saved.
        linked: whether a link will be made, too.

    Raises:
        MisconfigurationException: on every rank, where one of them could not write.
    """
    problem: str | None = None
    cause: Exception | None = None
    try:
        # On every rank, since a state_dict() may communicate.
        states = _states(trainer)
        if trainer.is_global_zero:
            for name, state in states:
                _try_to_pickle(name, state)
            for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
                _warn_of_hyperparameters(owner)
            check_configs(twin_of(trainer.lightning_module))
            _try_the_disk(trainer, folder, selection, linked)
    except MisconfigurationException as error:
        problem, cause = str(error), error
    except Exception as error:
        problem, cause = f"AdapterCheckpoint: saving into {folder} would fail: {type(error).__name__}: {error}", error
    # One rank may fail alone, for example by a callback's state. It ends the others, too, which would wait for it.
    fails = trainer.strategy.reduce_boolean_decision(problem is not None, all=False)
    of_rank_zero = trainer.strategy.broadcast(problem)
    if fails:
        elsewhere = f"AdapterCheckpoint: saving into {folder} would fail on another rank, whose error says why"
        raise MisconfigurationException(problem or of_rank_zero or elsewhere) from cause


def _states(trainer: Trainer) -> list[tuple[str, Any]]:
    """What Lightning puts into a checkpoint beside the weights, each with a name for messages."""
    states: list[tuple[str, Any]] = []
    for callback in callbacks_of(trainer):
        states.append((f"the state of {type(callback).__name__}", callback.state_dict()))
    datamodule = getattr(trainer, "datamodule", None)
    for owner in (trainer.lightning_module, datamodule):
        if owner is not None and owner.hparams:
            states.append((f"a hyper-parameter of {type(owner).__name__}", dict(owner.hparams)))
    if datamodule is not None:
        states.append((f"the state of {type(datamodule).__name__}", datamodule.state_dict()))
    for config in trainer.lr_scheduler_configs:
        states.append((f"the state of {type(config.scheduler).__name__}", config.scheduler.state_dict()))
    for optimizer in trainer.optimizers:
        if is_sharded(trainer.strategy.model):
            # The values are not gathered, which would take long.
            check_form(optimizer, optimizer.state_dict())
        else:
            states.append((f"the state of {type(optimizer).__name__}", trainer.strategy.optimizer_state(optimizer)))
    return states


def _save_nowhere(value: Any) -> None:
    with open(os.devnull, "wb") as nowhere:
        torch.save(value, nowhere)


def _try_to_pickle(name: str, state: Any) -> None:
    try:
        _save_nowhere(state)
    except Exception as error:
        part = _first_that_fails(state)
        where = f" ({part!r})" if part else ""
        raise MisconfigurationException(
            f"AdapterCheckpoint: {name}{where} can't be pickled, so no checkpoint could be written: "
            f"{type(error).__name__}: {error}"
        ) from error


def _warn_of_hyperparameters(owner: Any) -> None:
    """Name hyper-parameters that would make every file large, or that PyTorch would refuse to load."""
    if owner is None:
        return
    hparams = dict(owner.hparams)
    modules = {name: value for name, value in hparams.items() if isinstance(value, nn.Module)}
    if modules:
        sizes: list[int] = []
        for module in modules.values():
            sizes += map(bytes_of, module.parameters())
        rank_zero_warn(
            f"AdapterCheckpoint: the hyper-parameters of {type(owner).__name__} hold modules of {size_text(sizes)}, "
            "which go into every file whole, and the files then load with weights_only=False alone: use "
            f"self.save_hyperparameters(ignore={list(modules)})"
        )
        return
    refused = [name for name, value in hparams.items() if not _loads(value)]
    # Lightning saves a configuration of OmegaConf as the object that it is.
    if not refused and type(owner.hparams).__module__.startswith("omegaconf") and not _loads(owner.hparams):
        refused = list(hparams)
    # Earlier releases of Lightning load whatever is in a file.
    if refused and "weights_only" in inspect.signature(Trainer.fit).parameters:
        rank_zero_warn(
            f"AdapterCheckpoint: the hyper-parameters {refused} of {type(owner).__name__} hold objects that PyTorch "
            "loads only from a file that you trust. Give weights_only=False along with ckpt_path, or leave them out: "
            f"self.save_hyperparameters(ignore={refused})"
        )


def _loads(value: Any) -> bool:
    """Whether PyTorch loads a value from a file that need not be trusted."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except Exception:  # whatever PyTorch says of it, a user's run goes on without this check
        return False
    return True


def _first_that_fails(state: Any) -> str | None:
    if not isinstance(state, dict):
        return None
    for key, value in state.items():
        try:
            _save_nowhere(value)
        except Exception:
            return str(key)
    return None


def _try_the_disk(trainer: Trainer, folder: Path, selection: Selection, linked: bool) -> None:
    made = list(_missing_parents(folder))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".trial-of-a-checkpoint-", dir=folder) as name:
            trial = Path(name)
            (trial / "file").write_bytes(b"whole")
            # Some file systems can't rename over another file, or make links.
            (trial / "file").replace(trial / "other")
            if linked:
                os.symlink("other", trial / "link")
            adapters = [entry.value for entry in selection.saved.values() if entry.kind is Kind.ADAPTER]
            size = sum(bytes_of(value) for value in adapters if isinstance(value, Tensor))
            if size <= _MOST_BYTES and not is_sharded(trainer.strategy.model):
                module = twin_of(trainer.lightning_module)
                finder = record_of(trainer.lightning_module).finder
                # In a folder of their own, since an adapter's subfolder has the adapter's name, whatever that is.
                save_adapters(module, nn.Module.state_dict(module), trial / "adapters", finder)
    finally:
        for each in made:
            # Another process may have written into the folder in the meantime.
            if not any(each.iterdir()):
                each.rmdir()


def _missing_parents(folder: Path) -> Iterator[Path]:
    """The folders that must be created for this one, the innermost first."""
    while not folder.exists():
        yield folder
        folder = folder.parent
