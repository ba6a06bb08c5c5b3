"""The common parts of all recipes' LightningModules."""
