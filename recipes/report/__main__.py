"""``python -m recipes.report``: see --help."""

import datasets
import transformers

from recipes.command_line.mistakes import without_traceback
from recipes.report.run import main

if __name__ == "__main__":
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # missing weights are checked here
    with without_traceback():
        main()
