"""Front ends and baselines that take two passes a step, with modules that have methods of a test's own."""

from typing import Any

from helpers import FRONT_ENDS, Classifier, TwoPassClassifier, build

from lightning_flatlora.baselines import SAM, LoRASAM

TWO_PASSES = ("fmlora", "module", "lora_sam", "sam")


def two_passes(kind: str, own: type[Any], rho: float = 0.5, **kwargs: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    """A front end with two passes, whose module has the methods of a class of the test's own."""
    bases = () if own is object else (own,)
    classes = type("Own", (*bases, Classifier), {}), type("Own", (*bases, TwoPassClassifier), {})
    front_end = kind if kind in FRONT_ENDS else "plain"
    module, callbacks, more = build(front_end, rho, classes=classes, **kwargs)
    if kind in ("lora_sam", "sam"):
        callbacks.append(LoRASAM(rho) if kind == "lora_sam" else SAM(rho))
    return module, callbacks, more
