"""Recipes: one folder a task, run from a clone."""

import sys

if "bitsandbytes" not in sys.modules:
    # peft imports it with itself, needed or not, which takes more than a second. Python takes None among its modules as
    # one that can't be imported; a model in 4 or 8 bits imports it later.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    import peft  # noqa: F401

    del sys.modules["bitsandbytes"]
