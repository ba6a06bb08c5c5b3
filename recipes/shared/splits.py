"""The splits that a data set has of its own, for whoever did not name any."""

from pathlib import Path

import datasets
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from recipes.shared.data import is_file, is_packaged

_NAMES = {"validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}


def own_split(dataset: str, part: str, config_name: str | None = None) -> str | None:
    """The split of a data set that is meant for validation or for testing, by its name; None where it has none.

    Args:
        dataset: a Hub name, a folder, or a file, in whose name "{split}" stands for the split. Packaged data and a
            file without that have no splits.
        part: "validation" or "test".
        config_name: which of a Hub data set's configurations.
    """
    splits = _splits(dataset, config_name)
    for name in _NAMES[part]:
        if name in splits:
            rank_zero_info(f"dataset={dataset!r}: its own split {name!r} is for {part}")
            return name
    return None


def _splits(dataset: str, config_name: str | None) -> list[str]:
    """The names of all splits; none where they can't be told, which the reading of the data then explains."""
    if is_packaged(dataset):
        return []
    if is_file(dataset):
        return [name for names in _NAMES.values() for name in names if _is_there(dataset, name)]
    try:
        return list(datasets.get_dataset_split_names(dataset, config_name))
    except Exception:  # of a dozen types, as in recipes.shared.data.read_table
        return []


def _is_there(dataset: str, split: str) -> bool:
    return "{split}" in dataset and Path(dataset.replace("{split}", split)).expanduser().is_file()
