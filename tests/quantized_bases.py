"""A LoRA network whose frozen base is stored in 4 or 8 bits."""

from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

FEATURES, WIDTH, CLASSES = 32, 64, 3


def four_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantizes


def eight_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


BASES = [four_bits, eight_bits]


def network(quantize: Any) -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    net = nn.Sequential(*layers)
    net[0], net[2] = quantize(net[0]), quantize(net[2])
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = quantize is four_bits, quantize is eight_bits  # as transformers does
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], modules_to_save=["4"])
    return get_peft_model(net, config)
