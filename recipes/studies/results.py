"""What is done of a study whose runs several processes or machines share."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from recipes.shared.ledger import Ledger, Row, Run, entries

_RESULTS = "results"


@dataclass(frozen=True)
class Shard:
    """One share of the runs.

    Attributes:
        number: of the share, from 1 on.
        count: of the shares.
    """

    number: int = 1
    count: int = 1

    def has(self, place: int) -> bool:
        """Whether the run at a place of the plan is this share's."""
        return place % self.count == self.number - 1


def shard(text: str) -> Shard:
    """The share that a text such as "2/8" names.

    Raises:
        argparse.ArgumentTypeError: it names none.

    Example:
        >>> shard("2/8")
        Shard(number=2, count=8)
    """
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a share such as 2/8, from 1/8 to 8/8")
    return Shard(int(number), int(count))


class Results:
    """The rows of all shares: each writes into a file of its own, since not every file system appends safely.

    Args:
        folder: of the study.
        key: the entries of a row that make up its run's key.
        shard: whose rows are appended.
    """

    def __init__(self, folder: Path, key: Sequence[str], shard: Shard = Shard()) -> None:
        self.folder = folder
        self.shard = shard
        self._key = entries(*key)
        suffix = "" if shard.count == 1 else f"-{shard.number}-of-{shard.count}"
        self.own = Ledger(folder / f"{_RESULTS}{suffix}.jsonl", self._key)
        self._others: list[Ledger] = []
        self.reload()

    def reload(self) -> None:
        """Read all files again."""
        self.own.reload()
        paths = [self.folder / f"{_RESULTS}.jsonl", *sorted(self.folder.glob(f"{_RESULTS}-*-of-*.jsonl"))]
        self._others = [Ledger(path, self._key) for path in paths if path != self.own.path]

    @property
    def rows(self) -> list[Row]:
        """The rows of all files."""
        return list(chain.from_iterable(ledger.rows for ledger in (self.own, *self._others)))

    def find(self, run: Run) -> Row | None:
        """The row of a run, or None while the run is not done."""
        for ledger in (self.own, *self._others):
            row = ledger.find(run)
            if row is not None:
                return row
        return None
