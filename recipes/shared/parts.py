"""Which part of the data a row belongs to, what a split is read from, and what is refused as a part."""

import hashlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from recipes.shared.table_files import table_ending


def refuse_split_of_file(name: str, split: str) -> None:
    """Refuse a split of a data set that is a file: it has none, and would be read as a whole.

    A model would be tested on what it was trained on.

    Args:
        name: of the data set; "{split}" in it stands for the split.
        split: the name of a split, or a file.

    Raises:
        MisconfigurationException: the data set is a file without "{split}" in its name.
    """
    if not is_file(name) or "{split}" in name or split == "train" or is_file(split):
        return
    raise MisconfigurationException(
        f"dataset={name!r} is a file, and has no split {split!r}: give another file as test_split or validation_split, "
        "or null"
    )


def source_of(name: str, split: str) -> Path | tuple[str, str]:
    """Return where a split of a data set is read from: equal for what is the same, however it is written."""
    if is_file(split):
        return Path(split).expanduser().resolve()
    if is_file(name):
        return Path(name.replace("{split}", split)).expanduser().resolve()
    folder = Path(name).expanduser()
    return (str(folder.resolve()) if folder.is_dir() else name), split


def is_file(name: str) -> bool:
    """Return whether a name is that of a table's file, of a text file or of shards; it need not be there."""
    return table_ending(name) is not None or Path(name).suffix.lower() in (".txt", ".tar")


def part_of(key: str, shares: dict[str, float]) -> str:
    """The part that a key falls into: the same on every machine, whatever else is in the data.

    Example:
        >>> part_of("what is a cat", {"validation": 0.15, "test": 0.25})
        'train'
    """
    fraction = _fraction(key)
    for part, share in shares.items():
        if fraction < share:
            return part
        fraction -= share
    return "train"


def _fraction(key: str) -> float:
    """Return a number in [0, 1) that only the text decides, unlike Python's own hash, in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def indices_in(part: str, keys: Sequence[str], shares: dict[str, float], source: str, kinds: str) -> list[int]:
    """Return the indices of the rows of a part. A part that none of few keys falls into takes the one that is nearest.

    Args:
        part: "train", or one of the others.
        keys: of all rows.
        shares: of the parts that are not trained on.
        source: where the rows are from, for messages.
        kinds: what the keys stand for, in the plural.

    Raises:
        MisconfigurationException: there are fewer different keys than parts.

    Example:
        >>> indices_in("validation", ["a", "b", "b", "a"], {"validation": 0.25, "test": 0.0}, "mine.csv", "texts")
        [1, 2]
    """
    parts = {key: part_of(key, shares) for key in keys}
    for other, share in shares.items():
        trained = sorted((key for key in parts if parts[key] == "train"), key=_fraction)
        if share and other not in parts.values() and len(trained) > 1:
            parts[trained[0]] = other
            rank_zero_warn(f"none of {len(keys)} rows falls into {other}'s share of {share:g}: it takes the nearest")
    indices = [index for index, key in enumerate(keys) if parts[key] == part]
    if not indices and (part == "train" or shares[part]):
        raise MisconfigurationException(
            f"{source}: nothing is left for {part}. Its {len(keys)} rows are divided by their {kinds} ({len(parts)} "
            "different ones), and equal ones stay together: give more rows, a validation_split or a test_split, or "
            "validation_share=0, which keeps the last checkpoint and no best one"
        )
    return indices


def warn_of_training_data(part: str, keys: Collection[Hashable], trained: Collection[Hashable], what: str) -> None:
    """Warn where a part repeats what is trained on, as a copied file and an overlapping slice do.

    A warning and not an error, since many public data sets repeat a few of their texts.

    Args:
        part: its name, or what it is read from.
        keys: of its rows: equal keys are the same to a model.
        trained: the keys of the training data.
        what: the keys stand for, in the plural.

    Example:
        >>> warn_of_training_data("validation", ["a"], ["b"], "texts")
    """
    known = set(trained)
    repeated = sum(key in known for key in keys)
    if repeated:
        rank_zero_warn(
            f"{part}: {repeated} of {len(keys)} {what} are in the training split too, so that this part measures "
            "partly what was learnt by heart"
        )


def refuse_bad_settings(
    data: object, least: Mapping[str, int], shares: Mapping[str, float] | None = None, more: Sequence[str] = ()
) -> None:
    """Check a data module's settings.

    Args:
        data: holds them.
        least: the smallest values of integers, by name; None passes.
        shares: of validation and test, which have to leave something to train on.
        more: problems that have been found elsewhere.

    Raises:
        MisconfigurationException: with all problems.
    """
    problems = []
    for name, smallest in least.items():
        value = getattr(data, name)
        if value is not None and value < smallest:
            problems.append(f"{name} must be an integer >= {smallest}, got {value!r}")
    if shares and (min(shares.values()) < 0 or sum(shares.values()) >= 1):
        problems.append(
            "validation_share and test_share must be >= 0 and leave something to train on, "
            f"got {shares['validation']!r} and {shares['test']!r}"
        )
    problems += more
    if problems:
        raise MisconfigurationException(f"{type(data).__name__}: " + "; ".join(problems))
