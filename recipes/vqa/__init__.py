"""Visual question answering: a generative vision-language model with LoRA, EFMLoRA and FMLoRA."""
