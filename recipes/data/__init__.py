"""Data sets of the recipes: reading, dividing into parts, and resuming within an epoch."""
