"""What EFMLoRA, FMLoRA and FMLoRAModule share: the settings, the lifetime and the state of the perturbation of B."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_flatlora.callbacks.methods.checks import perturbation_problems, warn_of_rounding
from lightning_flatlora.callbacks.methods.method_callback import MethodCallback
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.lora_pair import Finder
from lightning_flatlora.schedules import RhoSchedule


class BPerturbationCallback(MethodCallback):
    """Base of the callbacks of the paper's method, which perturb B alone.

    Attributes:
        beta: weight of the fresh perturbation in the average; 1 where there is none.
    """

    beta: float = 1.0

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        estimator: Estimator = "average",
        norm_scope: NormScope = "global",
        start_step: int = 0,
        every_n_steps: int = 1,
        adapter_name: str | None = None,
        finder: Finder | None = None,
        sync_ascent: bool = True,
    ) -> None:
        self.estimator: Estimator = estimator
        self.norm_scope: NormScope = norm_scope
        super().__init__(
            rho,
            start_step=start_step,
            every_n_steps=every_n_steps,
            adapter_name=adapter_name,
            finder=finder,
            sync_ascent=sync_ascent,
        )

    @override
    def argument_problems(self) -> list[str]:
        return perturbation_problems(self.beta, self.estimator, self.norm_scope)

    @override
    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give each optimizer's pairs a perturbation, or let their perturbation follow what changed about the pairs."""
        for pair_group in self.pair_groups:
            if pair_group.perturbation is None:
                warn_of_rounding(self, "B", [pair.B for pair in pair_group.pairs])
            pair_group.install(self.estimator, self.norm_scope, trainer.strategy.model)

    @override
    def uninstall(self) -> None:
        """Give the layers their own classes back; the perturbation stays for checkpoints."""
        for pair_group in self.pair_groups:
            pair_group.uninstall()
        super().uninstall()

    @override
    def settings(self) -> dict[str, Any]:
        return {"estimator": self.estimator, "norm_scope": self.norm_scope}
