"""Which rows of a data set train, validate and test."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from recipes.shared.data import given_dataset, is_packaged, split_names
from recipes.shared.parts import is_file, refuse_split_of_file, source_of

VALIDATION_SHARE = 0.05
"""Of the training split, if nothing else says what validation takes."""
_OWN_SPLITS = {"validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""What data sets call the split for a part."""
_PART_OF_STAGE = {"validate": "validation", "test": "test"}


@dataclass(eq=False)
class Division:
    """The parts for validation and test: data sets or splits of their own, or shares of the training split.

    Args:
        dataset: for training.
        split: of it.
        own_splits: of each part another split of ``dataset`` or a file; None for a share.
        given_shares: of each part the share of the training split; None takes the split that the data set has for the
            part, or else 0.05 for validation and nothing for the test.
        own_datasets: of each part another data set.
        is_drawn: the rows to validate on are drawn from the training split, and not by a share.
        packaged: names of the packaged data sets, for messages.
        packaged_splits: that these have.

    Attributes:
        shares: of each part, as far as it is known; 0 for a part with a split of its own.
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
        defaults = {"validation": VALIDATION_SHARE, "test": 0.0}
        self.shares: dict[str, float] = {}
        for part, share in self.given_shares.items():
            self.shares[part] = defaults[part] if share is None else share
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
        """Return whether a part takes rows of the training split, which do not train."""
        is_drawn = part == "validation" and self.is_drawn and self.own(part) is None
        return is_drawn or self.shares[part] > 0

    def is_wanted(self, part: str) -> bool:
        """Return whether a part must not be empty."""
        return part == "train" or self.own(part) is not None or self.is_divided(part)

    def take_own_splits(self, config_name: str | None, revision: str | None) -> None:
        """Make a data set's own splits the parts for which no split and no share was given.

        Args:
            config_name: of a Hub data set.
            revision: of a Hub data set.
        """
        unset = [part for part, share in self.given_shares.items() if share is None and self.own(part) is None]
        trained_on = re.findall(r"\w+", self.split)  # perhaps one beside "train"
        names = self._split_names(config_name, revision) if unset else []
        for part in unset:
            own = next((split for split in _OWN_SPLITS[part] if split in names and split not in trained_on), None)
            if own is not None:
                rank_zero_info(
                    f"dataset={self.dataset!r}: its split {own!r} is taken; a {part}_share would take its place"
                )
                self.own_splits[part] = own
                self.shares[part] = 0.0

    def _split_names(self, config_name: str | None, revision: str | None) -> list[str]:
        """Return the splits of a data set; of files with "{split}" in their name those that are there."""
        name = given_dataset(self.dataset, self.packaged)
        if is_packaged(name):
            return []
        if is_file(name):
            splits = [*_OWN_SPLITS["validation"], *_OWN_SPLITS["test"]] if "{split}" in name else []
            return [split for split in splits if Path(name.replace("{split}", split)).expanduser().is_file()]
        return split_names(name, self.split, config_name, revision, self.packaged)

    def refuse_wrong_splits(self, stage: str, option: str = "split") -> None:
        """Refuse splits that the data set does not have, or that are trained on, and an evaluation on nothing.

        Args:
            stage: of the Trainer.
            option: what the options for a part's own data are called.

        Raises:
            MisconfigurationException: there is such a split, or nothing to evaluate on.
        """
        name = given_dataset(self.dataset, self.packaged)
        for part in ("train", *self.own_splits):
            dataset, split = self.where(part)
            if is_packaged(dataset) and not is_file(split) and split not in self.packaged_splits:
                raise MisconfigurationException(
                    f"dataset={dataset!r} has no other splits than {', '.join(self.packaged_splits)}, got {split!r}: "
                    "give one of them, a file or a share"
                )
            if part == "train" or self.own(part) is None:
                continue
            refuse_split_of_file(dataset, split)
            # Of slices such as "train[:10%]" only equal ones are found here.
            if stage == "fit" and source_of(dataset, split) == source_of(name, self.split):
                raise MisconfigurationException(
                    f"{self.own(part)!r} is read from where the training data are: give another {part}_{option}, or "
                    "null, which holds out a share"
                )
        evaluated = _PART_OF_STAGE.get(stage)
        if evaluated is not None and not self.is_wanted(evaluated):
            raise MisconfigurationException(
                f"there is nothing to {'test' if evaluated == 'test' else 'validate'} on: no split for it was given or "
                f"found, and no share was held out. Give --data.{evaluated}_{option}, which was not trained on, or "
                f"train with --data.{evaluated}_share 0.1, say"
            )

    def refuse_trained_rows(self, trainer: Any, trained: dict[str, Any] | None, now: dict[str, Any]) -> None:
        """Refuse to judge a checkpoint on what its own run has trained on.

        Args:
            trainer: that judges; None checks nothing.
            trained: ``dataset`` and ``split`` of the checkpoint's run, and what else decides which rows train.
            now: the same of this run.

        Raises:
            MisconfigurationException: the part is read from there, and is not held out as it was.
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
                f"{part}: {read!r} is what the checkpoint's run was trained on, except for the {held_out}: give "
                "these, or another split or file"
            )
