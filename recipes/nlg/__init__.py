"""Texts for meanings, such as GPT-2 on E2E, with LoRA, EFMLoRA and FMLoRA."""
