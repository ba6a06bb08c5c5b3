"""A fit whose pairs never have a gradient perturbs nothing, and says so."""

import warnings
from itertools import product
from typing import Any

import pytest
import torch
from helpers import CLASSES, FRONT_ENDS, build, fit, make_net
from torch import Tensor, nn


class Detached(nn.Module):
    """A trained head on the features of adapted layers, which a mistake has put under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.head = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.net(x)
        return self.head(features)


class StepsInBackward:
    """Each parameter has an optimizer that steps as soon as its gradient is there, as in PyTorch's tutorial."""

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]

        def step(parameter: Tensor) -> None:
            torch.optim.SGD([parameter], lr=0.01).step()
            parameter.grad = None

        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(step)
        return torch.optim.SGD(trained, lr=0.0)


class Late(Detached):
    """The adapters join after some steps, as the layers of a staged fine-tuning do."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= 3:
            return super().forward(x)
        return self.head(self.net(x))


CASES = [
    *product([*FRONT_ENDS, "LoRASAM", "nBAR", "RandomPerturbation", "BiLoRA"], [Detached]),
    *product(["efmlora", "module"], [StepsInBackward, Late]),
]


@pytest.mark.parametrize(("front_end", "case"), CASES)
def test_a_fit_without_gradients_says_it_once(tmp_path: Any, front_end: str, case: Any) -> None:
    """Gradients that come later are no reason."""
    own, net = (case, make_net()) if case is StepsInBackward else (object, case())
    module, callbacks, kwargs = build(front_end, net=net, own=own)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(tmp_path, module, callbacks, **kwargs)
    said = [each for each in warned if "no B of a pair has had a gradient in any step so far" in str(each.message)]
    assert len(said) == (case is not Late)
