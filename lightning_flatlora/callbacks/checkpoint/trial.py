"""Whatever would fail at the first save is tried when the fit begins, and leaves nothing behind."""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from lightning_flatlora.callbacks.checkpoint.export import check_configs, save_adapters
from lightning_flatlora.callbacks.checkpoint.parts import Kind, unwrapped
from lightning_flatlora.callbacks.checkpoint.saving import Selection, check_form
from lightning_flatlora.distributed import is_sharded
from lightning_flatlora.lightning_names import MisconfigurationException, callbacks_of

_MOST_BYTES = 2**27
"""Adapters up to this size are written for the trial; of larger ones the configs are."""


def try_to_save(trainer: Trainer, folder: Path, selection: Selection, linked: bool) -> None:
    """Write the adapters and pickle all states, and throw both away; every rank has to call it.

    Args:
        trainer: in a fit that is about to take its first step.
        folder: the checkpoint callback's.
        selection: what is going to be saved.
        linked: whether a link has to be made too.

    Raises:
        MisconfigurationException: on every rank, whatever one of them couldn't write.
    """
    problem: str | None = None
    cause: Exception | None = None
    try:
        states = _states(trainer)  # ranks may have to speak with each other for these
        if trainer.is_global_zero:
            for name, state in states:
                _try_to_pickle(name, state)
            check_configs(unwrapped(trainer.lightning_module))
            _try_the_disk(trainer, folder, selection, linked)
    except MisconfigurationException as error:
        problem, cause = str(error), error
    except Exception as error:
        problem, cause = f"AdapterCheckpoint: saving into {folder} would fail: {type(error).__name__}: {error}", error
    # A rank that fails alone, as a callback's state may, ends the others too: they would wait for it.
    fails = trainer.strategy.reduce_boolean_decision(problem is not None, all=False)
    of_rank_zero = trainer.strategy.broadcast(problem)
    if fails:
        elsewhere = f"AdapterCheckpoint: saving into {folder} would fail on another rank, which tells why"
        raise MisconfigurationException(problem or of_rank_zero or elsewhere) from cause


def _states(trainer: Trainer) -> list[tuple[str, Any]]:
    """What Lightning puts into a checkpoint beside the weights, by a name for it."""
    found = [(f"the state of {type(each).__name__}", each.state_dict()) for each in callbacks_of(trainer)]
    datamodule = getattr(trainer, "datamodule", None)
    for owner in (trainer.lightning_module, datamodule):
        if owner is not None and owner.hparams:
            found.append((f"a hyper-parameter of {type(owner).__name__}", dict(owner.hparams)))
    if datamodule is not None:
        found.append((f"the state of {type(datamodule).__name__}", datamodule.state_dict()))
    for config in trainer.lr_scheduler_configs:
        found.append((f"the state of {type(config.scheduler).__name__}", config.scheduler.state_dict()))
    for optimizer in trainer.optimizers:
        if is_sharded(trainer.strategy.model):
            check_form(optimizer, optimizer.state_dict())  # to gather it would take long
        else:
            found.append((f"the state of {type(optimizer).__name__}", trainer.strategy.optimizer_state(optimizer)))
    return found


class _Nowhere(io.RawIOBase):
    """Takes everything and keeps nothing."""

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: Any, /) -> int:
        return memoryview(data).nbytes


def _try_to_pickle(name: str, state: Any) -> None:
    try:
        torch.save(state, cast(Any, _Nowhere()))
    except Exception as error:
        part = _first_that_fails(state)
        where = f" ({part!r})" if part else ""
        raise MisconfigurationException(
            f"AdapterCheckpoint: {name}{where} can't be pickled, so no checkpoint could be written: "
            f"{type(error).__name__}: {error}"
        ) from error


def _first_that_fails(state: Any) -> str | None:
    for key, value in state.items() if isinstance(state, dict) else ():
        try:
            torch.save(value, cast(Any, _Nowhere()))
        except Exception:
            return str(key)
    return None


def _try_the_disk(trainer: Trainer, folder: Path, selection: Selection, linked: bool) -> None:
    made = list(_missing_parents(folder))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        trial = Path(tempfile.mkdtemp(prefix=".trial-of-a-checkpoint-", dir=folder))
        try:
            (trial / "file").write_bytes(b"whole")
            (trial / "file").replace(trial / "other")
            if linked:
                os.symlink("other", trial / "link")
            adapters = {name: e.value for name, e in selection.saved.items() if e.kind is Kind.ADAPTER}
            size = sum(value.nbytes for value in adapters.values() if isinstance(value, Tensor))
            if size <= _MOST_BYTES and not is_sharded(trainer.strategy.model):
                module = unwrapped(trainer.lightning_module)
                save_adapters(module, module.state_dict(), trial)
        finally:
            shutil.rmtree(trial)
    finally:
        for each in made:
            if not any(each.iterdir()):
                each.rmdir()


def _missing_parents(folder: Path) -> Iterator[Path]:
    """The folders that making this one will make, the innermost first."""
    while not folder.exists():
        yield folder
        folder = folder.parent
