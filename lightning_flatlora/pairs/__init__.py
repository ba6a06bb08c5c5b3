"""What a LoRA pair (A, B) is, and how the pairs of a model are found."""

from lightning_flatlora.pairs.find import find_pairs as find_pairs
