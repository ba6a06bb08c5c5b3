"""The methods: what each adds to plain LoRA, and the settings that it has where nobody chooses others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L

from lightning_flatlora import CosineRho, EFMLoRA, FMLoRA
from lightning_flatlora.baselines import SAM, BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        title: what the demos and the benchmarks call it.
        build: makes the callbacks from all settings, some of which may belong to other methods.
        defaults: the settings that ``build`` needs.
        full: all weights are trained, and no adapter.
    """

    title: str
    build: Callable[[Settings], list[L.Callback]] = lambda settings: []
    defaults: Settings = field(default_factory=dict)
    full: bool = False

    def callbacks(self, **settings: Any) -> list[L.Callback]:
        """New callbacks for a Trainer, with these settings in place of the defaults."""
        return self.build({**self.defaults, **settings})


def _random_perturbation(settings: Settings) -> list[L.Callback]:
    # Flat-LoRA's noise grows from nothing over the run.
    return [RandomPerturbation(CosineRho(0.0, settings["sigma"]), seed=int(settings["seed"]))]


def _bi_lora(settings: Settings) -> list[L.Callback]:
    return [BiLoRA(settings["rho"], seed=int(settings["seed"]))]


def _balancedness(settings: Settings, kind: Any) -> list[L.Callback]:
    # The regularization fades out over the run.
    return [BalancednessRegularization(CosineRho(settings["alpha"], 0.0), kind)]


METHODS: dict[str, Method] = {
    "lora": Method("LoRA"),
    "efmlora": Method("EFMLoRA", lambda settings: [EFMLoRA(settings["rho"])], {"rho": 0.5}),
    "fmlora": Method("FMLoRA", lambda settings: [FMLoRA(settings["rho"])], {"rho": 0.5}),
    # FMLoRA as a LightningModule in manual optimization: each recipe has one, whose name ends in FM.
    "fmlora_manual": Method("FMLoRAModule"),
    "lora_sam": Method("LoRA-SAM", lambda settings: [LoRASAM(settings["rho"])], {"rho": 0.5}),
    "flat_lora": Method("Flat-LoRA", _random_perturbation, {"sigma": 0.05, "seed": 0}),
    "bi_lora": Method("Bi-LoRA", _bi_lora, {"rho": 0.5, "seed": 0}),
    "nbar": Method("nBAR", lambda settings: _balancedness(settings, "nBAR"), {"alpha": 1.0}),
    "obar": Method("oBAR", lambda settings: _balancedness(settings, "oBAR"), {"alpha": 1.0}),
    "full": Method("full", full=True),
    "full_sam": Method("SAM, full", lambda settings: [SAM(settings["rho"])], {"rho": 0.5}, full=True),
}
BY_TITLE = {method.title: method for method in METHODS.values()}

OURS = ("LoRA", "EFMLoRA", "FMLoRA")
"""Titles of what the demos compare."""

COLOURS = {"untuned": "#888888", "LoRA": "#4477aa", "EFMLoRA": "#ee7733", "FMLoRA": "#228833"}
"""Of their pictures, by title."""
