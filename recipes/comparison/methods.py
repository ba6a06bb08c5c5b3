"""The methods: what each adds to plain LoRA, and the hyper-parameter that is chosen for it on the validation part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import lightning as L

from lightning_flatlora import CosineRho, EFMLoRA, FMLoRA
from lightning_flatlora.baselines import SAM, BalancednessRegularization, LoRASAM, RandomPerturbation
from recipes.comparison.task import Config, Grids


def _nothing(config: Config) -> list[L.Callback]:
    return []


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        parameter: its own hyper-parameter, the one that is chosen.
        grid: the values to choose from: a name in the task's grids, or the configurations themselves.
        callbacks: for the Trainer, of a configuration with the run's "seed".
        start: the method whose learning rate it takes; None for those that have their learning rate chosen.
        full: all weights are trained, and no adapter.
    """

    parameter: str
    grid: str | tuple[Config, ...]
    callbacks: Callable[[Config], list[L.Callback]] = _nothing
    start: str | None = "lora"
    full: bool = False

    def configurations(self, grids: Grids, learning_rate: float | None) -> list[Config]:
        """What is tried for it.

        Args:
            grids: of the task.
            learning_rate: that of the method it starts from; None for those without one.
        """
        own = self.grid if not isinstance(self.grid, str) else [{self.parameter: value} for value in grids[self.grid]]
        return [{**({} if learning_rate is None else {"learning_rate": learning_rate}), **config} for config in own]


def _balancedness(config: Config, kind: Literal["nBAR", "oBAR"]) -> L.Callback:
    return BalancednessRegularization(CosineRho(config["alpha"], 0.0), kind)


def _noise(config: Config) -> list[L.Callback]:
    return [RandomPerturbation(CosineRho(0.0, config["sigma"]), seed=int(config["seed"]))]


_REGULARISED = tuple({"weight_decay": decay, "dropout": dropout} for decay in (0.1, 1.0) for dropout in (0.1, 0.3))
METHODS: dict[str, Method] = {
    "lora": Method("learning_rate", "learning_rate", start=None),
    "lora_regularised": Method("weight_decay", _REGULARISED),
    "efmlora": Method("rho", "rho", lambda config: [EFMLoRA(config["rho"])]),
    "fmlora": Method("rho", "rho", lambda config: [FMLoRA(config["rho"])]),
    "lora_sam": Method("rho", "lora_rho", lambda config: [LoRASAM(config["rho"])]),
    "flat_lora": Method("sigma", "sigma", _noise),
    "nbar": Method("alpha", "alpha", lambda config: [_balancedness(config, "nBAR")]),
    "obar": Method("alpha", "alpha", lambda config: [_balancedness(config, "oBAR")]),
    "full": Method("learning_rate", "full_learning_rate", start=None, full=True),
    "full_sam": Method("rho", "sam_rho", lambda config: [SAM(config["rho"])], start="full", full=True),
}
VARIANTS: dict[str, Method] = {
    "efmlora_projected": Method("rho", "rho", lambda config: [EFMLoRA(config["rho"], estimator="projected")]),
    "fmlora_projected": Method("rho", "rho", lambda config: [FMLoRA(config["rho"], estimator="projected")]),
    "efmlora_layer": Method("rho", "layer_rho", lambda config: [EFMLoRA(config["rho"], norm_scope="layer")]),
    "efmlora_beta01": Method("rho", "rho", lambda config: [EFMLoRA(config["rho"], beta=0.1)]),
    "efmlora_every5": Method("rho", "rho", lambda config: [EFMLoRA(config["rho"], every_n_steps=5)]),
    "fmlora_every5": Method("rho", "rho", lambda config: [FMLoRA(config["rho"], every_n_steps=5)]),
}
"""Beyond the paper; run only when they are named."""


ALL = METHODS | VARIANTS
