"""Instruction tuning of a causal language model with LoRA, EFMLoRA and FMLoRA."""
