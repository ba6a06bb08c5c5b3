"""What the benchmarks compare: our methods, the baselines, and peers of other packages."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatlora import CosineRho
from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation
from recipes.benchmarks.workloads import Learner
from recipes.shared.methods import OURS, callbacks_of

RHO = 0.5  # a step costs the same whatever it is


class Peer(Learner):
    """Takes its steps with an optimizer of pytorch_optimizer that wraps AdamW, in manual optimization."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = super(Peer, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        # The first pass: these optimizers' step takes the second one alone.
        loss = closure()
        self.take_step(optimizer, closure)
        return loss

    def take_step(self, optimizer: Any, closure: Callable[[], Tensor]) -> None:
        """The step, from the gradient that is there."""
        optimizer.step(closure)


class PeerSAM(Peer):
    """pytorch_optimizer's SAM: two passes."""

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        from pytorch_optimizer import SAM

        return cast("torch.optim.Optimizer", SAM(self.trained(), torch.optim.AdamW, rho=RHO, lr=1e-4))


class PeerLookSAM(Peer):
    """pytorch_optimizer's LookSAM: two passes in every tenth step.

    Its own ``step(closure)`` takes the second pass in each step, also where it makes no use of it; here it is left out.
    """

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        from pytorch_optimizer import LookSAM

        return cast("torch.optim.Optimizer", LookSAM(self.trained(), torch.optim.AdamW, rho=RHO, k=10, lr=1e-4))

    @override
    def take_step(self, optimizer: Any, closure: Callable[[], Tensor]) -> None:
        if optimizer.get_step() % optimizer.k == 0:
            optimizer.step(closure)
        else:
            optimizer.second_step()


@dataclass(frozen=True)
class Method:
    """How a step is taken.

    Attributes:
        callbacks: new ones for each Trainer.
        learner: the module.
        full: all weights are trained, without an adapter.
    """

    callbacks: Callable[[], list[L.Callback]] = list
    learner: type[Learner] = Learner
    full: bool = False


METHODS = {
    **{title: Method(partial(callbacks_of, title, RHO)) for title in OURS},
    "LoRA-SAM": Method(lambda: [LoRASAM(RHO)]),
    # Flat-LoRA's noise grows from nothing over the run, and the regularization of nBAR and oBAR fades out.
    "Flat-LoRA": Method(lambda: [RandomPerturbation(CosineRho(0.0, 0.05), seed=0)]),
    "Bi-LoRA": Method(lambda: [BiLoRA(RHO, seed=0)]),
    "nBAR": Method(lambda: [BalancednessRegularization(CosineRho(1.0, 0.0), "nBAR")]),
    "oBAR": Method(lambda: [BalancednessRegularization(CosineRho(1.0, 0.0), "oBAR")]),
    "full": Method(full=True),
    "SAM, full": Method(lambda: [SAM(RHO)], full=True),
    "SAM of pytorch_optimizer": Method(learner=PeerSAM),
    "LookSAM of pytorch_optimizer": Method(learner=PeerLookSAM),
}
"""By title: the package's methods, the baselines and the peers."""
