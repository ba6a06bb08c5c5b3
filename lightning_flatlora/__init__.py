"""Flat minima for LoRA fine-tuning in PyTorch Lightning: FMLoRA and EFMLoRA (arXiv 2508.00522)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_flatlora.pairs import find_pairs as find_pairs
from lightning_flatlora.pairs.lora_pair import Finder as Finder
from lightning_flatlora.pairs.lora_pair import LoRAPair as LoRAPair
from lightning_flatlora.pairs.lora_pair import NoPairsError as NoPairsError
from lightning_flatlora.pairs.lora_pair import PairSearch as PairSearch
from lightning_flatlora.perturbation import FreshPerturbation as FreshPerturbation
from lightning_flatlora.perturbation import Perturbation as Perturbation
from lightning_flatlora.perturbed_read import ParameterRef as ParameterRef
from lightning_flatlora.schedules import ConstantRho as ConstantRho
from lightning_flatlora.schedules import CosineRho as CosineRho
from lightning_flatlora.schedules import InverseSqrtRho as InverseSqrtRho
from lightning_flatlora.schedules import LearningRateRho as LearningRateRho
from lightning_flatlora.schedules import LinearRho as LinearRho
from lightning_flatlora.schedules import RhoSchedule as RhoSchedule

if TYPE_CHECKING:
    from lightning_flatlora.callbacks import AdapterAveraging as AdapterAveraging
    from lightning_flatlora.callbacks import AdapterCheckpoint as AdapterCheckpoint
    from lightning_flatlora.callbacks import EFMLoRA as EFMLoRA
    from lightning_flatlora.callbacks import FlatnessMonitor as FlatnessMonitor
    from lightning_flatlora.callbacks import FMLoRA as FMLoRA
    from lightning_flatlora.callbacks import Requeue as Requeue
    from lightning_flatlora.callbacks import load_adapter_checkpoint as load_adapter_checkpoint
    from lightning_flatlora.module import FMLoRAModule as FMLoRAModule

__version__ = "0.1.0"

_WITH_LIGHTNING = {
    "AdapterAveraging": "callbacks",
    "AdapterCheckpoint": "callbacks",
    "EFMLoRA": "callbacks",
    "FlatnessMonitor": "callbacks",
    "FMLoRA": "callbacks",
    "FMLoRAModule": "module",
    "Requeue": "callbacks",
    "load_adapter_checkpoint": "callbacks",
}


def __getattr__(name: str) -> Any:
    """Import what needs Lightning when it is first used, since other loops and trainers need not wait for it."""
    if name not in _WITH_LIGHTNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_WITH_LIGHTNING[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_WITH_LIGHTNING})
