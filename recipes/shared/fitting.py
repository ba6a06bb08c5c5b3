"""What a checkpoint's run and the run that loads it must agree in."""

import reprlib
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def refuse_another(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model or of other classes, before the first weight is loaded.

    Args:
        before: what has to be the same, by the words for it, in the checkpoint's run.
        now: the same of this run.

    Raises:
        MisconfigurationException: the checkpoint's run had something else.
    """
    differences = []
    for name, value in before.items():
        if now.get(name) != value:
            differences.append(f"{name}: {_difference(value, now.get(name))}")
    if differences:
        raise MisconfigurationException(
            f"the checkpoint is of a run on something else ({'; '.join(differences)}): give the model and the data "
            "of that run"
        )


def _difference(before: Any, now: Any) -> str:
    """Return two values in short; of lists what only one of them has, unless they differ in their order.

    Example:
        >>> _difference(["cat", "dog", "fish"], ["cat", "bird", "fish"])
        "['dog'] there, ['bird'] here"
    """
    if isinstance(before, list) and isinstance(now, list) and set(before) != set(now):
        before, now = [one for one in before if one not in now], [one for one in now if one not in before]
    return f"{reprlib.repr(before)} there, {reprlib.repr(now)} here"
