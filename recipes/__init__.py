"""Recipes: one folder per task, run from a clone."""

import sys

if "bitsandbytes" not in sys.modules:
    # peft imports it, needed or not, which takes more than a second. Python treats a module that is None as one that
    # can't be imported; a model in 4 or 8 bits imports it later.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    import peft  # noqa: F401

    del sys.modules["bitsandbytes"]
