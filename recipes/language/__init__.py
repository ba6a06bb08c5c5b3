"""Shared by the recipes for language models: chat templates, the model with its adapter, batches and evaluation."""
