"""What the perturbation changes (``python -m recipes.demo``), and merging (``python -m recipes.demo.merging``)."""
