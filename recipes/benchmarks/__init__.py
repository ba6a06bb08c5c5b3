"""Measurements of cost: ratios in one run, A and B alternating."""
