"""The flatness of finished adapters, as Markdown and pictures: ``python -m recipes.report --help``."""
