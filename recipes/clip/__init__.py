"""Shared by the recipes for open_clip models: the model with its adapter, image reading, the emoji, and the export."""
