"""``python -m recipes.report``: see --help."""

import datasets

from recipes.report.run import main
from recipes.shared.mistakes import without_traceback

if __name__ == "__main__":
    datasets.disable_progress_bars()
    with without_traceback():
        main()
