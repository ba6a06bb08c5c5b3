"""The methods that EFMLoRA and FMLoRA are compared with, as callbacks behind the same engine and YAML switch."""

from lightning_flatlora.baselines.balancedness import BalancednessRegularization
from lightning_flatlora.baselines.bi_lora import BiLoRA
from lightning_flatlora.baselines.lora_sam import LoRASAM
from lightning_flatlora.baselines.random_perturbation import RandomPerturbation
from lightning_flatlora.baselines.sam import SAM

__all__ = ["SAM", "BalancednessRegularization", "BiLoRA", "LoRASAM", "RandomPerturbation"]
