"""What the callbacks put on a module for a moment is taken away again, and what was there comes back."""

from typing import Any

import torch
from helpers import Classifier, TwoPassClassifier, fit

from lightning_flatlora.callbacks.patches import put_on_instance


def test_put_on_instance_restores_what_was_there() -> None:
    module = Classifier()
    put_back = put_on_instance(module, "log", lambda: "put")
    assert module.log() == "put"  # type: ignore[call-arg, func-returns-value]
    put_back()
    assert "log" not in module.__dict__
    module.log = repr  # type: ignore[method-assign, assignment]
    put_back = put_on_instance(module, "log", lambda: "put")
    put_back()
    put_back()
    assert module.log is repr
    below, above = put_on_instance(module, "log", str), put_on_instance(module, "log", int)
    below()  # patches may end in any order
    assert module.log is int
    above()
    assert module.log is repr
    put_back = put_on_instance(module, "log", str)
    module.log = int  # type: ignore[method-assign, assignment]
    put_back()
    assert module.log is int  # what somebody else has put on top stays
    assert not [name for name in module.__dict__ if "replaced" in name]


def test_an_instances_own_configure_optimizers_is_kept(tmp_path: Any) -> None:
    """As LightningCLI sets one for an optimizer in YAML."""
    module = TwoPassClassifier(0.5)
    own = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)  # noqa: E731
    module.configure_optimizers = own  # type: ignore[method-assign]
    trainer = fit(tmp_path, module, [], max_epochs=1)
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert module.configure_optimizers is own
