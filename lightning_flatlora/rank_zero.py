"""Messages of the first rank without importing Lightning, which takes seconds that other loops need not wait.

The functions are Lightning's own, from the library under it.
"""

import logging
import os

from lightning_utilities.core import rank_zero
from lightning_utilities.core.rank_zero import WarningCache as WarningCache
from lightning_utilities.core.rank_zero import rank_zero_info as rank_zero_info
from lightning_utilities.core.rank_zero import rank_zero_warn as rank_zero_warn

# Lightning gives them the same when it is imported, and its strategies set the rank once they know better.
if not hasattr(rank_zero.rank_zero_only, "rank"):
    given = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    rank_zero.rank_zero_only.rank = int(next(filter(None, given), 0))  # type: ignore[attr-defined]
    rank_zero.log = logging.getLogger("lightning_flatlora")
    rank_zero.log.setLevel(logging.INFO)
    rank_zero.log.addHandler(logging.StreamHandler())
