"""Which rows of a data set train, validate and test: separate splits, or shares by a hash."""

import hashlib
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from recipes.data.reading import given_dataset, is_packaged, split_names, table_ending

_SHARES = {"validation": 0.05, "test": 0.0}
"""Shares of the training split, if nothing else decides what a part takes."""
_OWN_SPLITS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Names that data sets have for a part's split."""
_PART_OF_STAGE = {"validate": "validation", "test": "test"}


def source_of(name: str, split: str) -> Path | tuple[str, str]:
    """Return where a split of a data set is read from: equal for the same data, however the name is written."""
    if is_file(split):
        return Path(split).expanduser().resolve()
    if is_file(name):
        return Path(name.replace("{split}", split)).expanduser().resolve()
    folder = Path(name).expanduser()
    return (str(folder.resolve()) if folder.is_dir() else name), split


def is_file(name: str) -> bool:
    """Return whether a name is that of a table's file, a text file or shards; the file need not exist."""
    return table_ending(name) is not None or Path(name).suffix.lower() in (".txt", ".tar")


def part_of(key: str, shares: dict[str, float]) -> str:
    """Return the part of a key: the same on every machine, whatever else is in the data.

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
    """Return a number in [0, 1) that only the text decides, in every process, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def indices_in(part: str, keys: Sequence[str], shares: dict[str, float], source: str, kinds: str) -> list[int]:
    """Return the indices of a part's rows. If few keys leave a part empty, it takes the nearest key.

    Args:
        part: "train", or one of the others.
        keys: keys of all rows.
        shares: shares of the parts that are not trained on.
        source: source of the rows, for messages.
        kinds: what the keys are, in the plural.

    Raises:
        MisconfigurationException: there are fewer distinct keys than parts.

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
            "validation_share=0, which keeps only the last checkpoint, not the best one"
        )
    return indices


def warn_of_training_data(part: str, keys: Collection[Hashable], trained: Collection[Hashable], what: str) -> None:
    """Warn if a part repeats training data, as a copied file or an overlapping slice does.

    A warning, not an error, since many public data sets repeat a few of their texts.

    Args:
        part: name of the part, or of its source.
        keys: keys of its rows; rows with equal keys are the same to a model.
        trained: keys of the training data.
        what: what the keys are, in the plural.

    Example:
        >>> warn_of_training_data("validation", ["a"], ["b"], "texts")
    """
    known = set(trained)
    repeated = sum(key in known for key in keys)
    if repeated:
        rank_zero_warn(
            f"{part}: {repeated} of {len(keys)} {what} are in the training split too, so this part "
            "partly measures memorization"
        )


def refuse_bad_settings(
    data: object, least: Mapping[str, int], shares: Mapping[str, float] | None = None, more: Sequence[str] = ()
) -> None:
    """Check a data module's settings.

    Args:
        data: the data module.
        least: smallest values of integers, by name; None is allowed too.
        shares: shares of validation and test, which must leave something to train on.
        more: problems found elsewhere.

    Raises:
        MisconfigurationException: lists all problems.
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


@dataclass(eq=False)
class Division:
    """The parts for validation and test: separate data sets or splits, or shares of the training split.

    Args:
        dataset: training data.
        split: training split.
        own_splits: each part's own split of ``dataset``, or file; None for a share.
        given_shares: each part's share of the training split; None takes the data set's own split for the part, or else
            0.05 for validation and nothing for the test.
        own_datasets: each part's own data set.
        is_drawn: the rows to validate on are drawn from the training split, not taken by a share.
        packaged: names of the packaged data sets, for messages.
        packaged_splits: splits of the packaged data sets.

    Attributes:
        shares: each part's share, as far as it is known; 0 for a part with its own split.
    """

    dataset: str | None
    split: str
    own_splits: dict[str, str | None]
    given_shares: Mapping[str, float | None]
    own_datasets: Mapping[str, str | None] = field(default_factory=dict)
    is_drawn: bool = False
    packaged: str = ""
    packaged_splits: Sequence[str] = ("train",)

    def __post_init__(self) -> None:
        self.shares: dict[str, float] = {}
        for part, share in self.given_shares.items():
            self.shares[part] = _SHARES[part] if share is None else share
            if self.own(part) is not None:
                self.shares[part] = 0.0  # the whole training split trains, except for the other part's share

    def own(self, part: str) -> str | None:
        """Return a part's own data set, split or file; None if it takes a share."""
        return self.own_datasets.get(part) or self.own_splits.get(part)

    def where(self, part: str) -> tuple[str, str]:
        """Return the data set and the split that a part is read from."""
        other = self.own_datasets.get(part)
        if other is not None:
            return other, "train"
        return str(self.dataset), self.own_splits.get(part) or self.split

    def is_divided(self, part: str) -> bool:
        """Return whether a part takes rows of the training split, which then do not train."""
        is_drawn = part == "validation" and self.is_drawn and self.own(part) is None
        return is_drawn or self.shares[part] > 0

    def is_wanted(self, part: str) -> bool:
        """Return whether a part must not be empty."""
        return part == "train" or self.own(part) is not None or self.is_divided(part)

    def take_own_splits(self, config_name: str | None, revision: str | None) -> None:
        """Use a data set's own splits for the parts for which no split and no share was given.

        Args:
            config_name: configuration of a Hub data set.
            revision: revision of a Hub data set.
        """
        unset = [part for part, share in self.given_shares.items() if share is None and self.own(part) is None]
        trained_on = re.findall(r"\w+", self.split)  # there may be others besides "train"
        name = given_dataset(self.dataset, self.packaged)
        has_splits = unset and not is_packaged(name) and not is_file(name)
        names = split_names(name, self.split, config_name, revision, self.packaged) if has_splits else []
        for part in unset:
            own = next((split for split in _OWN_SPLITS[part] if split in names and split not in trained_on), None)
            if own is not None:
                rank_zero_info(
                    f"dataset={self.dataset!r}: its split {own!r} is used; set {part}_share to take a share instead"
                )
                self.own_splits[part] = own
                self.shares[part] = 0.0

    def refuse_wrong_splits(self, stage: str, option: str = "split") -> None:
        """Refuse splits that don't exist or are trained on, and an evaluation without data.

        Args:
            stage: stage of the Trainer.
            option: suffix of the options for a part's own data.

        Raises:
            MisconfigurationException: there is such a split, or there is nothing to evaluate on.
        """
        name = given_dataset(self.dataset, self.packaged)
        for part in ("train", *self.own_splits):
            dataset, split = self.where(part)
            known = self.packaged_splits if is_packaged(dataset) else ["train"]
            is_known = is_packaged(dataset) or (is_file(dataset) and "{split}" not in dataset)
            if is_known and not is_file(split) and split not in known:
                raise MisconfigurationException(
                    f"dataset={dataset!r} has no split {split!r}: give another one, a file, a share or null"
                )
            if part == "train" or self.own(part) is None:
                continue
            # Among slices such as "train[:10%]", only equal ones are found here.
            if stage == "fit" and source_of(dataset, split) == source_of(name, self.split):
                raise MisconfigurationException(
                    f"{self.own(part)!r} is where the training data come from: give another {part}_{option}, or "
                    "null, which holds out a share"
                )
        evaluated = _PART_OF_STAGE.get(stage)
        if evaluated is not None and not self.is_wanted(evaluated):
            raise MisconfigurationException(
                f"there is nothing to {'test' if evaluated == 'test' else 'validate'} on: no split for it was given or "
                f"found, and no share was held out. Give --data.{evaluated}_{option}, which was not trained on, or "
                f"train with, say, --data.{evaluated}_share 0.1"
            )

    def refuse_trained_rows(self, trainer: Any, trained: dict[str, Any] | None, now: dict[str, Any]) -> None:
        """Refuse to evaluate a checkpoint on data that its own run has trained on.

        Args:
            trainer: the Trainer that evaluates; None checks nothing.
            trained: ``dataset`` and ``split`` of the checkpoint's run, and all else that decides which rows train.
            now: the same of this run.

        Raises:
            MisconfigurationException: the part comes from there, but is not held out as it was.
        """
        if trainer is None or trained is None or trainer.state.fn not in _PART_OF_STAGE:
            return
        part = _PART_OF_STAGE[trainer.state.fn]
        dataset, split = self.where(part)
        deciding = {name: value for name, value in trained.items() if name not in ("dataset", "split")}
        is_held_out = self.is_divided(part) and all(now[name] == value for name, value in deciding.items())
        if source_of(dataset, split) == source_of(trained["dataset"], trained["split"]) and not is_held_out:
            read = split if dataset == self.dataset else dataset
            held_out = ", ".join(f"{name} {value!r}" for name, value in deciding.items())
            raise MisconfigurationException(
                f"{part}: the checkpoint's run was trained on {read!r}, except for the {held_out}: give "
                "these, or another split or file"
            )
