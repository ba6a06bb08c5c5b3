"""Is the perturbation worth it for your own run? One search with it and one without: ``python -m recipes.tune``."""
