"""What a LoRA pair (A, B) is, and how the pairs of a model are found."""

from lightning_flatlora.pairs.find import find_pairs, nothing_found, search_pairs
from lightning_flatlora.pairs.lora_pair import Finder, LoRAPair, NoPairsError, PairSearch
from lightning_flatlora.pairs.peft_pairs import bare, clean_name, lora_layers, merge_problems

__all__ = [
    "Finder",
    "LoRAPair",
    "NoPairsError",
    "PairSearch",
    "bare",
    "clean_name",
    "find_pairs",
    "lora_layers",
    "merge_problems",
    "nothing_found",
    "search_pairs",
]
