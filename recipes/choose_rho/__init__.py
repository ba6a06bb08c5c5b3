"""The radius of a recipe's run, chosen on validation data: ``python -m recipes.choose_rho``."""
