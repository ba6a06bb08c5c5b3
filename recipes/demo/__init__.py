"""What the perturbation changes (``python -m recipes.demo``)."""
