"""Perturbations of a layer's full weight W0 + s B A, as terms that are added to its output."""

from lightning_flatlora.full_weight.weight_noise import WeightNoise as WeightNoise
