"""The merging demo: adapters of four tasks, trained by LoRA and by EFMLoRA, and merged into one."""
