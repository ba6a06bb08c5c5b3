"""LoRA pairs (A, B), and the search for the pairs of a model."""

from lightning_flatlora.pairs.find import find_pairs as find_pairs
