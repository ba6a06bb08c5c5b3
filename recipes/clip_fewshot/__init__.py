"""Few-shot image classification with CLIP, by the protocol of CLIP-LoRA."""
