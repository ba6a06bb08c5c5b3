"""The methods that the benchmarks compare: ours, the baselines, and one of another package."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_flatlora import CosineRho, EFMLoRA, FMLoRA
from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation
from recipes.benchmarks.workloads import Learner
from recipes.training.module import BARE

OURS = ("LoRA", "EFMLoRA", "FMLoRA")
"""The methods that are compared unless others are named."""

RHO = 0.5  # does not change the cost of a step


class PeerSAM(Learner):
    """Trains with pytorch_optimizer's SAM around AdamW, in manual optimization: two passes per step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = super(PeerSAM, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        # The first pass; the optimizer's step runs only the second.
        loss = closure()
        optimizer.step(closure)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        from pytorch_optimizer import SAM

        return cast("torch.optim.Optimizer", SAM(self.trained(), torch.optim.AdamW, rho=RHO, lr=1e-4))


@dataclass(frozen=True)
class Method:
    """How training steps are taken.

    Attributes:
        callbacks: makes new callbacks for each Trainer.
        learner: class of the module.
        full: train all weights, without an adapter.
    """

    callbacks: Callable[[], list[L.Callback]] = list
    learner: type[Learner] = Learner
    full: bool = False


METHODS = {
    "LoRA": Method(),
    "EFMLoRA": Method(lambda: [EFMLoRA(RHO)]),
    "FMLoRA": Method(lambda: [FMLoRA(RHO)]),
    "LoRA-SAM": Method(lambda: [LoRASAM(RHO)]),
    # Flat-LoRA's noise grows from nothing over the run, and the regularization of nBAR and oBAR fades out.
    "Flat-LoRA": Method(lambda: [RandomPerturbation(CosineRho(0.0, 0.05), seed=0)]),
    "Bi-LoRA": Method(lambda: [BiLoRA(RHO, seed=0)]),
    "nBAR": Method(lambda: [BalancednessRegularization(CosineRho(1.0, 0.0), "nBAR")]),
    "oBAR": Method(lambda: [BalancednessRegularization(CosineRho(1.0, 0.0), "oBAR")]),
    "full": Method(full=True),
    "SAM, full": Method(lambda: [SAM(RHO)], full=True),
    "SAM of pytorch_optimizer": Method(learner=PeerSAM),
}
"""By title: the package's methods, the baselines and the peer."""


def train(
    method: Method, network: nn.Module, causal: bool, batches: Sequence[Any], *watch: L.Callback, **settings: Any
) -> None:
    """Train one step on each batch, without anything costly outside the steps.

    Args:
        method: how steps are taken.
        network: network to train.
        causal: whether it is a causal language model.
        batches: one per step.
        watch: callbacks that measure.
        settings: further arguments of the Trainer.
    """
    trainer = L.Trainer(
        max_epochs=1,  # not max_steps, which does not count the steps of a peer's own optimizer
        devices=1,
        callbacks=[*watch, *method.callbacks()],
        enable_progress_bar=False,
        **settings,
        **BARE,
    )
    trainer.fit(method.learner(network, causal), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
