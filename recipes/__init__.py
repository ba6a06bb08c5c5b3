"""Recipes: one folder a task, run from a clone."""
