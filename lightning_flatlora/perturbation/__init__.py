"""The perturbation E of every pair of a model: stacked, computed from gradients, averaged, and read by the layers."""

from lightning_flatlora.perturbation.pair_stack import FreshPerturbation as FreshPerturbation
from lightning_flatlora.perturbation.perturbation import Perturbation as Perturbation
