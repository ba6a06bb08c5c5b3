"""Show what the perturbation changes (``python -m recipes.demo``)."""
