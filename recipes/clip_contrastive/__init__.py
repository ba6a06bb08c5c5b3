"""Contrastive fine-tuning of an open_clip model on images and their captions."""
