"""What EFMLoRA and FMLoRA share: the perturbation of B alone, its settings and its state."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_flatlora.functional import Estimator, NormScope
from lightning_flatlora.methods.checks import perturbation_problems, rounding_problems
from lightning_flatlora.methods.step_method import StepMethod
from lightning_flatlora.pairs.lora_pair import LoRAPair
from lightning_flatlora.perturbation import Perturbation


@dataclass(eq=False, repr=False, kw_only=True)
class BPerturbationStep(StepMethod):
    """Base of the paper's two methods.

    Attributes:
        beta: weight of the fresh perturbation in the average; 1 if there is none.
    """

    fixed = ("estimator", "norm_scope")

    beta: float = field(default=1.0, init=False)
    estimator: Estimator = "average"
    norm_scope: NormScope = "global"

    @override
    def argument_problems(self) -> list[str]:
        return perturbation_problems(self.beta, self.estimator, self.norm_scope)

    @override
    def reset(self) -> None:
        super().reset()
        self.perturbation = None
        # The state of pairs that are in no optimizer yet, from a checkpoint.
        self.awaited: dict[str, Any] | None = None

    @override
    def follow(self, pairs: list[LoRAPair], module: nn.Module, wrapped: nn.Module) -> None:
        super().follow(pairs, module, wrapped)
        if not pairs:
            self.close()
            self.perturbation = None
        elif self.perturbation is not None:
            self.perturbation.follow(pairs, self._sharding)
        else:
            self.perturbation = Perturbation(pairs, self.estimator, self.norm_scope, self._sharding)
            if self.awaited is not None:
                self.perturbation.load_state_dict(self.awaited, self.awaited["E"], may_be_new=True)
                self.awaited = None

    @override
    def install(self) -> None:
        if self.perturbation is not None and not self.perturbation.is_installed:
            self.warn(*rounding_problems("B", [pair.B for pair in self.pairs]))
            self.perturbation.install()

    @override
    def close(self) -> None:
        super().close()
        if self.perturbation is not None:
            self.perturbation.uninstall()

    @override
    def restore(self, state: dict[str, Any], known: Iterable[str]) -> None:
        saved = state.get("perturbation")
        if saved is None or self.perturbation is None:
            # Its pairs are frozen or not there yet. When they come, the new perturbation starts from this state.
            self.awaited = saved
        else:
            names: Collection[str] = set(known)
            self.perturbation.load_state_dict(saved, names)
