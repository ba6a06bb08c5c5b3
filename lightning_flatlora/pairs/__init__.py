"""What a LoRA pair (A, B) is, and how the pairs of a model are found."""

from lightning_flatlora.pairs.find import find_pairs as find_pairs
from lightning_flatlora.pairs.find import nothing_found as nothing_found
from lightning_flatlora.pairs.find import search_pairs as search_pairs
from lightning_flatlora.pairs.lora_pair import LoRAPair as LoRAPair
from lightning_flatlora.pairs.lora_pair import NoPairsError as NoPairsError
from lightning_flatlora.pairs.peft_pairs import lora_layers as lora_layers
from lightning_flatlora.pairs.peft_pairs import merge_problems as merge_problems
