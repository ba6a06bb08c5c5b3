"""A fit whose pairs never have a gradient perturbs nothing, and says so."""

import warnings
from typing import Any

import pytest
import torch
from helpers import CLASSES, FRONT_ENDS, Classifier, TwoPassClassifier, build, fit, make_net
from torch import Tensor, nn

from lightning_flatlora.baselines import BalancednessRegularization, BiLoRA, LoRASAM, RandomPerturbation

MISSING = "no B of a pair has had a gradient in any step so far"


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


@pytest.mark.parametrize("case", ["detached", "steps in backward", "late"])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_fit_without_gradients_says_it_once(tmp_path: Any, front_end: str, case: str) -> None:
    """Gradients that come later are no reason."""
    bases = (StepsInBackward,) if case == "steps in backward" else ()
    classes = type("Automatic", (*bases, Classifier), {}), type("Manual", (*bases, TwoPassClassifier), {})
    net = {"detached": Detached, "steps in backward": make_net, "late": Late}[case]()
    module, callbacks, kwargs = build(front_end, net=net, classes=classes)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(tmp_path, module, callbacks, **kwargs)
    assert len([each for each in warned if MISSING in str(each.message)]) == (case != "late")


@pytest.mark.parametrize("baseline", [LoRASAM, BalancednessRegularization, RandomPerturbation, BiLoRA])
def test_a_baseline_without_gradients_says_it_once(tmp_path: Any, baseline: Any) -> None:
    with pytest.warns(UserWarning, match=MISSING) as warned:
        fit(tmp_path, Classifier(net=Detached()), [baseline(0.5)])
    assert len([each for each in warned if MISSING in str(each.message)]) == 1
