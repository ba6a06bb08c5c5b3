"""The disturbances of column A in protocol_matrix.md, and the losses of a finished adapter under them.

The adapter is not changed: a copy of the encoder's layer computes with the disturbed base and factors, merged.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_flatlora.full_weight.weight_noise import derived_seed
from recipes.demo.data import Batch, evaluation_batches
from recipes.demo.encoder import CutEncoder, pooled
from recipes.offline.texts import Example
from recipes.report.rounding import rounded

DRAWS = 8
CLEAN = "clean"
TEMPERATURES = torch.cat([torch.ones(1), torch.logspace(-0.5, 1, 31)])
"""By which logits are divided; the first one leaves them."""
BASE_NOISE, B_NOISE = "base, noise 1", "B, noise 3"
PRIMARY = (BASE_NOISE, B_NOISE)


class Layer(NamedTuple):
    """One adapted linear layer.

    Attributes:
        W: the base weight, (n, m).
        A: (r, m).
        B: (n, r).
        scaling: the update's factor s.
    """

    W: Tensor
    A: Tensor
    B: Tensor
    scaling: float

    def merged(self) -> Tensor:
        """Return W + s B A."""
        return self.W + self.scaling * self.B @ self.A


Change = Callable[[str, Layer], Layer]
"""Gives a disturbed layer for a name and a layer."""


def noisy(weight: Tensor, size: float, draw: int, name: str) -> Tensor:
    """Add Gaussian noise whose Frobenius norm is ``size`` times the weight's.

    Args:
        weight: shape (n, m).
        size: relative, without a unit.
        draw: determines the noise's direction, together with the name.
        name: the weight's name.
    """
    direction = _direction(tuple(weight.shape), draw, name).to(weight.dtype)
    return weight + size * torch.linalg.vector_norm(weight) * direction


@lru_cache(maxsize=256)  # the final seeds have draws of their own, and come one after another
def _direction(shape: tuple[int, ...], draw: int, name: str) -> Tensor:
    """Draw a matrix of norm 1, which is the same for all arms and seeds."""
    generator = torch.Generator().manual_seed(derived_seed(draw, zlib.crc32(name.encode())))
    normal = torch.randn(shape, generator=generator)
    return normal / torch.linalg.vector_norm(normal)


def _noise_on_base(size: float, draw: int, name: str, layer: Layer) -> Layer:
    return layer._replace(W=noisy(layer.W, size, draw, f"{name}, base"))


def _noise_on_B(size: float, draw: int, name: str, layer: Layer) -> Layer:
    return layer._replace(B=noisy(layer.B, size, draw, f"{name}, B"))


def _rounded_base(bits: int, name: str, layer: Layer) -> Layer:
    return layer._replace(W=rounded(layer.W, bits))


def _rounded_factors(bits: int, name: str, layer: Layer) -> Layer:
    return layer._replace(A=rounded(layer.A, bits), B=rounded(layer.B, bits))


def noise_on_base(size: float, draws: Iterable[int]) -> list[Change]:
    """Return draws of noise on each base weight."""
    return [partial(_noise_on_base, size, draw) for draw in draws]


def noise_on_B(size: float, draws: Iterable[int]) -> list[Change]:
    """Return draws of noise on each B."""
    return [partial(_noise_on_B, size, draw) for draw in draws]


def disturbances(set_of_draws: int = 0) -> dict[str, list[Change]]:
    """Return the draws of each disturbance, over which the mean is taken; the first one is none.

    Args:
        set_of_draws: sets with different numbers have no draw in common.
    """
    draws = range(set_of_draws * DRAWS, (set_of_draws + 1) * DRAWS)
    found: dict[str, list[Change]] = {CLEAN: [lambda name, layer: layer]}
    for size in (0.3, 1.0):
        found[f"base, noise {size:g}"] = noise_on_base(size, draws)
    for bits in (4, 3, 2):
        found[f"base, {bits} bits"] = [partial(_rounded_base, bits)]
    for size in (1.0, 3.0):
        found[f"B, noise {size:g}"] = noise_on_B(size, draws)
    for bits in (4, 3, 2):
        found[f"A and B, {bits} bits"] = [partial(_rounded_factors, bits)]
    return found


DISTURBANCES = tuple(disturbances())
"""Their names."""


def layers_of(net: nn.Module, bases: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Return an encoder's adapted layers.

    Args:
        net: a model with peft's LoRA layers.
        bases: the undisturbed base of each, since an arm may train on another base.
    """
    found = {}
    for path, module in net.named_modules():
        if hasattr(module, "lora_B"):
            name = path.removeprefix("base_model.model.")
            A, B = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
            found[name] = Layer(bases[name], A, B, module.scaling["default"])
    if found.keys() != bases.keys():
        raise ValueError(f"the adapter must be on {sorted(bases)}, and is on {sorted(found)}")
    return found


def linear_weights(net: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all Linear layers by name."""
    return {name: module.weight.detach() for name, module in net.named_modules() if isinstance(module, nn.Linear)}


class Evaluation:
    """The mean loss and the accuracy on some texts.

    Args:
        encoder: has the undisturbed base.
        examples: the texts.
    """

    def __init__(self, encoder: CutEncoder, examples: Sequence[Example]) -> None:
        self.batches = evaluation_batches(examples, encoder.states)
        self.copy = encoder.upper().eval().requires_grad_(False)
        self.bases = {name: weight.clone() for name, weight in linear_weights(self.copy).items()}

    @torch.no_grad()
    def measure(
        self, net: nn.Module, head: nn.Module, names: Iterable[str], set_of_draws: int = 0
    ) -> dict[str, dict[str, float]]:
        """Return a classifier's results under each disturbance.

        These are ``loss`` in nats, ``calibrated``, the loss at the temperature that is best for it, and ``accuracy``. A
        loss that is not finite counts like a random guess.

        Args:
            net: the adapted encoder, which is not changed.
            head: computes the logits of the classes.
            names: of :data:`DISTURBANCES`.
            set_of_draws: as in :func:`disturbances`.
        """
        layers, changes = layers_of(net, self.bases), disturbances(set_of_draws)
        found = {}
        for name in names:
            drawn = [self._once(layers, head, change) for change in changes[name]]
            losses = torch.stack([each for each, _ in drawn]).mean(0)
            accuracy = sum(each for _, each in drawn) / len(drawn)
            found[name] = {"loss": float(losses[0]), "calibrated": float(losses.min()), "accuracy": accuracy}
        return found

    def _once(self, layers: Mapping[str, Layer], head: nn.Module, change: Change) -> tuple[Tensor, float]:
        """Return the loss at each of :data:`TEMPERATURES`, and the accuracy."""
        for name, layer in layers.items():
            self.copy.get_submodule(name).weight.copy_(change(name, layer).merged())
        logits = torch.cat([self._logits(batch, head) for batch in self.batches])
        labels = torch.cat([batch["labels"] for batch in self.batches])
        losses = [nn.functional.cross_entropy(logits / temperature, labels) for temperature in TEMPERATURES]
        guessed = math.log(logits.shape[1])
        accuracy = float((logits.argmax(1) == labels).float().mean())
        return torch.stack(losses).nan_to_num(guessed, guessed, guessed), accuracy

    def _logits(self, batch: Batch, head: nn.Module) -> Tensor:
        hidden = self.copy(batch["hidden"], batch["owners"])
        logits: Tensor = head(pooled(hidden, batch["owners"], len(batch["labels"])))
        return logits
