"""Flat minima for LoRA fine-tuning in PyTorch Lightning: FMLoRA and EFMLoRA (arXiv 2508.00522)."""

from lightning_flatlora.callbacks import AdapterCheckpoint, EFMLoRA, FlatnessMonitor, FMLoRA, load_adapter_checkpoint
from lightning_flatlora.module import FMLoRAModule
from lightning_flatlora.pairs import find_pairs
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair, NoPairsError, PairSearch
from lightning_flatlora.perturbation import FreshPerturbation, Perturbation
from lightning_flatlora.perturbed_read import ParameterRef
from lightning_flatlora.schedules import (
    ConstantRho,
    CosineRho,
    InverseSqrtRho,
    LearningRateRho,
    LinearRho,
    RhoSchedule,
)

__version__ = "0.1.0"

__all__ = [
    "AdapterCheckpoint",
    "ConstantRho",
    "CosineRho",
    "EFMLoRA",
    "FMLoRA",
    "FMLoRAModule",
    "Finder",
    "FlatnessMonitor",
    "FreshPerturbation",
    "InverseSqrtRho",
    "LearningRateRho",
    "LinearRho",
    "LoRAPair",
    "NoPairsError",
    "PairSearch",
    "ParameterRef",
    "Perturbation",
    "RhoSchedule",
    "find_pairs",
    "load_adapter_checkpoint",
]
