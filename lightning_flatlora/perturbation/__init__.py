"""The perturbation E of every pair of a model: stacked, taken from gradients, averaged, and read by the layers."""

from lightning_flatlora.perturbation.ascent import FreshPerturbation
from lightning_flatlora.perturbation.perturbation import Perturbation

__all__ = ["FreshPerturbation", "Perturbation"]
