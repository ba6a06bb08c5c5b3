"""The flatness of finished adapters, as Markdown and pictures: ``python -m lightning_flatlora.report --help``."""
