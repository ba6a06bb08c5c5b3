"""What the recipes for language models share: chat templates, the model with its adapter, batches and evaluation."""
