"""What the recipes for open_clip models share: the model with its adapter, image reading, the emoji, and the export."""
