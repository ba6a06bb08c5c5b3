"""The demo: a packaged language model fine-tuned with LoRA, EFMLoRA and FMLoRA, side by side."""
