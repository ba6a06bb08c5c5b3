"""The batches on which flatness is measured, and a module's loss of them."""

import copy
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatlora.callbacks.two_passes import loss_of, random_state
from lightning_flatlora.callbacks.undisturbed import read_without_trace
from lightning_flatlora.flatness import MeanLoss
from lightning_flatlora.lightning_names import MisconfigurationException


class HeldBatches:
    """Batches taken once, before training, and the loss of each that a module's own step computes.

    Args:
        trainer: after its loaders are set up.
        pl_module: the module.
        step: its method that computes the loss of a batch, from :func:`loss_method`.
        data: "train" or "val".
        count: batches of each rank; fewer are held where the loader has fewer, and none where there is no loader.

    Raises:
        MisconfigurationException: a loader that can't be copied, see :func:`first_batches`.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, step: Callable[..., Any], data: str, count: int
    ) -> None:
        self._trainer, self._pl_module, self._step = trainer, pl_module, step
        self._same_draws = random_state(pl_module.device)
        loader = trainer.fit_loop._combined_loader if data == "train" else _validation_loader(trainer)
        training = [*pl_module.modules(), trainer, trainer.datamodule]  # type: ignore[attr-defined]
        self._batches = first_batches(loader, count, pl_module.device, training) if loader is not None else []

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def loss(self) -> MeanLoss:
        """The mean over the batches, as a function of the weights; DDP's wrapper takes no part in it."""
        return MeanLoss([lambda index=index: self._loss(index) for index in range(len(self))])  # type: ignore[misc]

    def _loss(self, index: int) -> Tensor:
        """One batch's loss, with the same random draws at every call."""
        trainer, name = self._trainer, self._step.__name__
        self._same_draws()
        batch = trainer.precision_plugin.convert_input(copy.deepcopy(self._batches[index]))  # a step may change it
        batch = self._pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        takes_index = is_param_in_hook_signature(self._step, "batch_idx", min_args=2)
        with trainer.precision_plugin.train_step_context():
            loss = loss_of(self._step(batch, index) if takes_index else self._step(batch), name)
        if loss is None:
            raise RuntimeError(f"{name} returned None for a held batch, which can't be measured")
        return loss


def loss_method(pl_module: LightningModule) -> tuple[Callable[..., Any], list[str]]:
    """The method that computes the loss of a batch, and why it can't be used."""
    if not pl_module.automatic_optimization:
        found = getattr(pl_module, "compute_loss", None)
        if callable(found):
            return found, []
        return pl_module.training_step, [
            "training_step with manual optimization would step the optimizer: put the loss of a batch into a method "
            "compute_loss(batch, batch_idx), which is measured instead"
        ]
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        return pl_module.training_step, [
            "training_step(dataloader_iter) takes batches itself, so none can be held: "
            "write training_step(batch, batch_idx)"
        ]
    return pl_module.training_step, []


def first_batches(loader: CombinedLoader, count: int, device: torch.device, shared: Sequence[object] = ()) -> list[Any]:
    """The first batches of a loader, as it gives them; the loader and the random generators stay as they are.

    They come from a copy of the loader, its sampler and generator. It shares a map-style dataset and what collates the
    samples, which are put back as they were: their random generators, and what else they count.

    Args:
        loader: of the trainer.
        count: of batches; fewer where the loader has fewer.
        device: whose random generator is put back too.
        shared: what a copy must not copy, though a data set or a sampler may know of it.

    Raises:
        MisconfigurationException: the loader can't be copied, as a generator can't.
    """
    put_back_random_state = random_state(device)
    sources = [source for one in loader.flattened for source in _sources(one)]
    try:
        with read_without_trace(*sources):
            copied = copy.copy(loader)
            copied.flattened = [_copied_loader(one, [*sources, *shared]) for one in loader.flattened]
            try:
                return [batch for batch, *_ in islice(iter(copied), count)]
            finally:
                copied.reset()
    finally:
        put_back_random_state()


def _validation_loader(trainer: Trainer) -> Any:
    """The loader of validation; set up now, as Lightning does at the start where the first epoch validates."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None and trainer.enable_validation:
        trainer.validating = True
        loop.setup_data()
        trainer.training = True
    return loop._combined_loader


def _sources(loader: Any) -> list[Any]:
    """What a loader reads with, and a copy of it shares: a stream keeps its place in itself, so it is not shared."""
    names = ("dataset", "collate_fn", "worker_init_fn")
    found = [getattr(loader, name, None) for name in names]
    return [source for source in found if source is not None and not isinstance(source, IterableDataset)]


def _copied_loader(loader: Any, shared: Sequence[object]) -> Any:
    memo: dict[int, Any] = {id(thing): thing for thing in shared}
    if isinstance(loader, DataLoader):
        memo[id(loader._iterator)] = None  # its workers stay its own
    try:
        return copy.deepcopy(loader, memo)
    except Exception as error:
        raise MisconfigurationException(
            f"batches can't be held of a {type(loader).__name__} that can't be copied ({error}): give a DataLoader, or "
            "choose the other data, 'train' or 'val'"
        ) from error
