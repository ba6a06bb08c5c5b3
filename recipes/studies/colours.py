"""The colour of each method in the project's pictures."""

COLOURS = {"LoRA": "tab:blue", "EFMLoRA": "tab:orange", "FMLoRA": "tab:red", "LoRA, dropout 0.9": "tab:purple"}
"""By title. The first two are Matplotlib's first, as in the pages' programs."""
