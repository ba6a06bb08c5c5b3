"""``python -m lightning_flatlora.report``: see --help."""

import importlib.util
import sys

_NEEDED = ("datasets", "matplotlib", "rich", "scipy", "transformers")

if __name__ == "__main__":
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: the report needs {', '.join(missing)}: pip install 'lightning-flatlora[report]'")
    from lightning_flatlora.report.run import main

    main()
