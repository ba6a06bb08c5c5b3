"""What the LightningModules of all recipes have in common."""
