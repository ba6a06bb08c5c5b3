"""The CLIP demo: a small open_clip model trained here on emoji, then adapted to a drawing style it has never seen."""
