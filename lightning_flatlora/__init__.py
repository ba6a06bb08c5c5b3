"""Flat minima for LoRA fine-tuning in PyTorch Lightning: FMLoRA and EFMLoRA (arXiv 2508.00522)."""

from lightning_flatlora.callbacks import AdapterCheckpoint, EFMLoRA, FMLoRA
from lightning_flatlora.module import FMLoRAModule
from lightning_flatlora.pairs import LoRAPair, find_pairs
from lightning_flatlora.perturbation import Perturbation
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
    "InverseSqrtRho",
    "LearningRateRho",
    "LinearRho",
    "LoRAPair",
    "Perturbation",
    "RhoSchedule",
    "find_pairs",
]
