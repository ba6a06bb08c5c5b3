"""The methods that EFMLoRA and FMLoRA are compared with, as callbacks behind the same engine and YAML switch."""

from lightning_flatlora.baselines.bi_lora import BiLoRA as BiLoRA
from lightning_flatlora.baselines.one_pass import BalancednessRegularization as BalancednessRegularization
from lightning_flatlora.baselines.one_pass import RandomPerturbation as RandomPerturbation
from lightning_flatlora.baselines.sam import SAM as SAM
from lightning_flatlora.baselines.sam import LoRASAM as LoRASAM
