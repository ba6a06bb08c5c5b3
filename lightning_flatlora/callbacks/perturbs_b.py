"""What EFMLoRA, FMLoRA and FMLoRAModule share: the settings, the life and the state of the perturbation of B."""

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_flatlora.callbacks.base import FlatLoRACallback
from lightning_flatlora.callbacks.checks import perturbation_problems, warn_of_rounding
from lightning_flatlora.distributed import layout_of
from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.perturbation import Perturbation
from lightning_flatlora.schedules import RhoSchedule


class PerturbsB(FlatLoRACallback):
    """Base of the callbacks of the paper's method, which perturb B alone.

    Attributes:
        averages: whether the perturbation lasts from step to step, so that a checkpoint must hold it.
    """

    averages: ClassVar[bool] = False

    def __init__(
        self,
        rho: float | RhoSchedule,
        *,
        estimator: Estimator,
        norm_scope: NormScope,
        beta: float = 1.0,
        more_problems: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        problems = perturbation_problems(beta, estimator, norm_scope)
        super().__init__(rho, more_problems=[*problems, *more_problems], **settings)
        self.beta = beta
        self.estimator: Estimator = estimator
        self.norm_scope: NormScope = norm_scope

    @override
    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give each optimizer's pairs a perturbation, or let the one that they have follow the pairs."""
        for course in self.courses:
            pairs, perturbation = course.pairs, course.perturbation
            if not pairs:
                if perturbation is not None:
                    perturbation.uninstall()
                course.perturbation = None
                continue
            layout = layout_of(trainer.strategy.model, [factor for pair in pairs for factor in (pair.A, pair.B)])
            if perturbation is not None:
                perturbation.follow(pairs, layout)
                continue
            warn_of_rounding(self, "B", [pair.B for pair in pairs])
            course.perturbation = Perturbation(pairs, self.estimator, self.norm_scope, layout)
            course.perturbation.install()
            if course.awaited is not None:
                course.perturbation.load_state_dict(course.awaited, course.awaited["E"], may_be_new=True)
                course.awaited = None

    @override
    def uninstall(self) -> None:
        """Give the layers their own classes back; the perturbation stays for checkpoints."""
        for course in self.courses:
            if course.perturbation is not None:
                course.perturbation.uninstall()
        super().uninstall()

    @override
    def settings(self) -> dict[str, Any]:
        return {"estimator": self.estimator, "norm_scope": self.norm_scope}

    @property
    @override
    def _keeps_perturbation(self) -> bool:
        return self.averages
