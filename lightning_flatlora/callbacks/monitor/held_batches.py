"""The batches on which flatness is measured, and their loss."""

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch._dynamo import OptimizedModule
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatlora.callbacks.monitor.snapshots import read_without_trace
from lightning_flatlora.callbacks.random_state import random_state
from lightning_flatlora.callbacks.training_step import loss_of
from lightning_flatlora.flatness import MeanLoss
from lightning_flatlora.flatness.measures import CURVATURES
from lightning_flatlora.lightning_names import MisconfigurationException


class HeldBatches:
    """Batches that are taken once, before training, and the loss that a module's own step computes of each.

    Args:
        trainer: after its loaders are set up.
        pl_module: the module, before other callbacks replace its methods for a step.
        data: "train" or "val".
        count: batches of each rank. Fewer are held where the loader has fewer, and none where there is no loader.

    Raises:
        MisconfigurationException: a loader that can't be copied, see :func:`first_batches`.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, data: str, count: int) -> None:
        self._trainer, self._pl_module, self._step = trainer, pl_module, _loss_method(pl_module)
        self._same_draws = random_state(pl_module.device)
        # Private, since trainer.train_dataloader is only what lies inside of the CombinedLoader.
        loader = trainer.fit_loop._combined_loader if data == "train" else _validation_loader(trainer)
        training = [*pl_module.modules(), trainer, trainer.datamodule]  # type: ignore[attr-defined]
        self._batches = first_batches(loader, count, pl_module.device, training) if loader is not None else []
        self._usable = list(range(len(self)))

    def __len__(self) -> int:
        return len(self._batches)

    def try_out(self) -> str | None:
        """Leave out the batches without a loss, and say why nothing can be measured, if so: the module is in eval mode.

        Detection models give their losses in training mode alone, and an RNN of cuDNN no gradient in eval mode.
        """
        try:
            self._leave_out_batches_without_loss()
            loss = self._loss(self._usable[0])
            if loss is not None and loss.requires_grad:
                trained = [parameter for parameter in self._pl_module.parameters() if parameter.requires_grad]
                torch.autograd.grad(loss, trained, allow_unused=True)
        except Exception as error:
            return f"{self._step.__name__} fails in eval mode, in which it measures: {type(error).__name__}: {error}"
        return None

    def _leave_out_batches_without_loss(self) -> None:
        """Keep the batches for which the module's step gives a loss; all of them where it gives none for any."""
        with torch.no_grad():
            usable = [index for index in self._usable if self._loss(index) is not None]
        without = len(self._usable) - len(usable)
        if without and usable:
            rank_zero_warn(
                f"FlatnessMonitor: {self._step.__name__} returned None for {without} of {len(self)} held batches, "
                "which are left out"
            )
            self._usable = usable

    @property
    def loss(self) -> MeanLoss:
        """The mean over the batches, as a function of the weights; it does not go through DDP's wrapper."""
        return MeanLoss([partial(self._loss_or_nan, index) for index in self._usable])

    def _loss_or_nan(self, index: int) -> Tensor:
        """One batch's loss; where there is none, no number, which depends on what is trained as a loss does."""
        loss = self._loss(index)
        if loss is not None:
            return loss
        rank_zero_warn(
            f"FlatnessMonitor: {self._step.__name__} returned None for a held batch, so NaN is logged for what was "
            "measured on it"
        )
        trained = [parameter for parameter in self._pl_module.parameters() if parameter.requires_grad]
        # Squared, so that the curvature is no number either.
        return torch.stack([parameter.square().sum() for parameter in trained]).sum() * torch.nan

    def _loss(self, index: int) -> Tensor | None:
        """One batch's loss, with the same random draws at every call; None where the module's step gives none."""
        trainer, name = self._trainer, self._step.__name__
        # So that the losses at two weights differ by the weights alone, if a step draws at random.
        self._same_draws()
        own_batch = copy.deepcopy(self._batches[index])  # a step may change its batch
        # These are the three steps of Lightning's own loop from a loader's batch to that of training_step.
        batch = trainer.precision_plugin.convert_input(own_batch)
        batch = self._pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        takes_index = is_param_in_hook_signature(self._step, "batch_idx", min_args=2)
        with trainer.precision_plugin.train_step_context():
            return loss_of(self._step(batch, index) if takes_index else self._step(batch), name)


def _loss_method(pl_module: LightningModule) -> Callable[..., Any]:
    """The method that computes the loss of a batch."""
    compute_loss = getattr(pl_module, "compute_loss", None)
    if not pl_module.automatic_optimization and callable(compute_loss):
        return cast(Callable[..., Any], compute_loss)
    return pl_module.training_step


def loss_problems(pl_module: LightningModule) -> list[str]:
    """Why the method that computes the loss of a batch can't be used."""
    if not pl_module.automatic_optimization:
        if callable(getattr(pl_module, "compute_loss", None)):
            return []
        return [
            "training_step with manual optimization would step the optimizer: put the loss of a batch into a method "
            "compute_loss(batch, batch_idx), which is measured instead"
        ]
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        return [
            "training_step(dataloader_iter) takes batches itself, so none can be held: "
            "write training_step(batch, batch_idx)"
        ]
    return []


def curvature_problems(pl_module: LightningModule, measures: Collection[str]) -> list[str]:
    """Why the measures that take second derivatives can't be used: torch.compile gives none."""
    chosen = [name for name in CURVATURES if name in measures]
    if not chosen:
        return []
    is_compiled = getattr(pl_module, "_compiler_ctx", None) is not None  # where Lightning was given a compiled module
    for module in pl_module.modules():
        is_compiled |= isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
    if not is_compiled:
        return []
    return [
        f"the measures {', '.join(chosen)} need second derivatives, which torch.compile does not give: leave them out, "
        "or measure without torch.compile"
    ]


def first_batches(loader: CombinedLoader, count: int, device: torch.device, shared: Sequence[object] = ()) -> list[Any]:
    """The first batches of a loader, as it gives them; the loader and the random generators stay as they are.

    They come from a copy of the loader, its sampler and its generator. The copy shares a map-style data set and what
    collates the samples. These are restored: their random generators, and whatever they count.

    Args:
        loader: of the trainer.
        count: of batches; fewer where the loader has fewer.
        device: whose random generator is put back too.
        shared: what must not be copied, although a data set or a sampler may hold it.

    Raises:
        MisconfigurationException: the loader can't be copied, such as a generator.
    """
    sources = []
    for one in loader.flattened:
        sources += _sources(one)
    with ExitStack() as stack:
        stack.callback(random_state(device))
        stack.enter_context(read_without_trace(*sources))
        copied = copy.copy(loader)
        copied.flattened = [_copied_loader(one, [*sources, *shared]) for one in loader.flattened]
        # Ends the workers of the copy.
        stack.callback(copied.reset)
        return [batch for batch, *_ in islice(iter(copied), count)]


def _validation_loader(trainer: Trainer) -> Any:
    """The validation loader. It is set up now, as Lightning does at the start where the first epoch validates."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None and trainer.enable_validation:
        # The state in which Lightning itself sets up this loader.
        trainer.validating = True
        loop.setup_data()
        trainer.training = True
    return loop._combined_loader


def _sources(loader: Any) -> list[Any]:
    """What a loader reads with and its copy shares. A stream, which stores its own position, is not shared."""
    sources = []
    for name in ("dataset", "collate_fn", "worker_init_fn"):
        source = getattr(loader, name, None)
        if source is not None and not isinstance(source, IterableDataset):
            sources.append(source)
    return sources


def _copied_loader(loader: Any, shared: Sequence[object]) -> Any:
    memo: dict[int, Any] = {id(thing): thing for thing in shared}
    if isinstance(loader, DataLoader):
        # The copy starts workers of its own.
        memo[id(loader._iterator)] = None
    try:
        return copy.deepcopy(loader, memo)
    except Exception as error:
        raise MisconfigurationException(
            f"FlatnessMonitor: batches can't be held of a {type(loader).__name__} that can't be copied ({error}): give "
            "a DataLoader whose data set holds nothing that is open, such as a generator or a file, or choose the "
            "other data, 'train' or 'val'"
        ) from error
