"""Front ends and baselines that take two passes a step, with modules that have methods of a test's own."""

from typing import Any

import torch
from helpers import FRONT_ENDS, Classifier, TwoPassClassifier, build, fit

from lightning_flatlora.baselines import SAM, LoRASAM

TWO_PASSES = ("fmlora", "module", "lora_sam", "sam")


def two_passes(kind: str, own: type[Any], rho: float = 0.5, **kwargs: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    """A front end with two passes, whose module has the methods of a class of the test's own."""
    classes = type("Own", (own, Classifier), {}), type("Own", (own, TwoPassClassifier), {})
    front_end = kind if kind in FRONT_ENDS else "plain"
    module, callbacks, more = build(front_end, rho, classes=classes, **kwargs)
    if kind in ("lora_sam", "sam"):
        callbacks.append(LoRASAM(rho) if kind == "lora_sam" else SAM(rho))
    return module, callbacks, more


def beside_a_plain_run(tmp_path: Any, kind: str, own: type[Any]) -> tuple[Any, Any]:
    """The modules of a plain run and of one with two passes, over six steps at rate 0, where the clean passes agree."""
    modules = []
    for each in ("plain", kind):
        module, callbacks, more = two_passes(each, own, lr=0.0)
        module.optimizer_class = torch.optim.SGD
        fit(tmp_path, module, callbacks, max_epochs=1, **more)
        modules.append(module)
    return modules[0], modules[1]
