"""A data module with parts for training, validation and test, from one table or one for each part."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from recipes.data.parts import Division, indices_in, is_file, refuse_bad_settings, warn_of_training_data
from recipes.data.reading import columns, given_dataset
from recipes.data.resumable import PARTS_OF_STAGE, ResumableData


@dataclass(eq=False)
class PartedData(ResumableData):
    """Rows of tables; validation and test are separate splits, or shares of the training split.

    A hash of each row's key decides which share it is in: this does not depend on the order, the seed or the size of
    the data, and rows of equal keys stay together.

    A subclass defines :meth:`read`, :meth:`keys` and :meth:`encoded`, and :meth:`loader`.

    Args:
        dataset: a Hub name, a local folder of the same layout, a local .json, .jsonl, .parquet or .csv file, or a
            packaged data set. "{split}" is replaced by the split.
        split: training split of a Hub data set.
        validation_split: validation data: another split or a file; None takes ``validation_share``.
        test_split: data for `test`: another split or a file that is not trained on; None takes ``test_share``.
        config_name: configuration of a Hub data set; None if it has only one.
        revision: revision of a Hub data set; "refs/convert/parquet" if the main one is a script.
        validation_share: share of the training split for validation; 0 turns validation off. None takes the split
            "validation" of a folder or a Hub data set, or 0.05 if it has none.
        test_share: share of the training split held out for `test`; give it in training too. 0 holds out nothing. None
            takes the split "test" of a folder or a Hub data set, or holds out nothing if it has none.
        batch_size: examples per batch.
        seed: seed of the order of the batches.
        num_workers: processes that load batches; 0 loads in the training process.

    Attributes:
        own_splits: each part's split or file; None if it takes a share.
        shares: each part's share of the training split.
        parts: the encoded rows of each part that is set up.
        reports: what became of each part's rows, if :meth:`encoded` reports it.

    Raises:
        MisconfigurationException: arguments out of range (here); data that can't be read, or nothing left of it (in
            `setup`, before training).
    """

    dataset: str | None = None
    split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    config_name: str | None = None
    revision: str | None = None
    validation_share: float | None = None
    test_share: float | None = None
    batch_size: int = 16
    seed: int = 0
    num_workers: int = 0

    packaged: ClassVar[str] = ""
    """Names of the packaged data sets, for messages."""
    packaged_splits: ClassVar[Sequence[str]] = ("train",)
    deciding: ClassVar[tuple[str, ...]] = ("shares",)
    kinds: ClassVar[str] = "rows"
    """What the rows are divided by, in the plural, for messages."""
    least: ClassVar[Mapping[str, int]] = {}
    """The smallest values of further settings, which are integers or None."""

    def __post_init__(self) -> None:
        super().__init__()
        shares = {"validation": self.validation_share, "test": self.test_share}
        splits = {"validation": self.validation_split, "test": self.test_split}
        self.division = Division(self.dataset, self.split, splits, shares, packaged=self.packaged)
        self.division.packaged_splits = self.packaged_splits
        self.own_splits, self.shares = self.division.own_splits, self.division.shares
        refuse_bad_settings(self, {"batch_size": 1, "num_workers": 0, **self.least}, self.shares, self.problems())
        self.parts = {}
        self.reports: dict[str, str] = {}
        self._tables: dict[str, Any] = {}

    # -- for subclasses

    def read(self, split: str) -> Any:
        """Return the rows of a split or of a file, as a ``datasets.Dataset``; :meth:`source` says where they are."""
        raise NotImplementedError

    def keys(self, rows: Any) -> list[str]:
        """Return the keys that decide each row's part."""
        raise NotImplementedError

    def encoded(self, part: str, rows: Any) -> Any:
        """Return the rows of a part as batches take them, without those that can't be used."""
        raise NotImplementedError

    def identities(self, rows: Any) -> Sequence[Hashable]:
        """Return what identifies each row, to find rows that are in training and in validation."""
        return self.keys(rows)

    def begin(self) -> None:
        """Prepare the encoding of the rows, in `setup`."""

    def rows_to_predict(self) -> Any:
        """Return the encoded rows of `predict`."""
        raise NotImplementedError

    def problems(self) -> list[str]:
        """Return further problems of the settings."""
        return []

    # -- stages

    @override
    def prepare_data(self) -> None:
        stage = "fit" if self.trainer is None else str(cast("TrainerFn", self.trainer.state.fn).value)
        # A prediction reads only the user's own file.
        if stage == TrainerFn.PREDICTING.value:
            return
        self.division.take_own_splits(self.config_name, self.revision)
        self.division.refuse_wrong_splits("")
        for part in PARTS_OF_STAGE[stage]:
            self.table(self.own_splits.get(part) or self.split)  # on one process, so that the others find it downloaded

    @override
    def setup(self, stage: str) -> None:
        if stage != "predict":
            self.division.take_own_splits(self.config_name, self.revision)
            self.division.refuse_wrong_splits(stage)
        self.begin()
        if stage == "predict":
            self.parts["predict"] = self.rows_to_predict()
            return
        for part in PARTS_OF_STAGE[stage]:
            if part not in self.parts:
                self.parts[part] = self._part(part)
            own = self.own_splits.get(part)
            # An evaluation may run on a machine without the training data, and a Hub's are not fetched for it.
            is_there = stage == "fit" or Path(str(self.dataset)).expanduser().exists()
            if own is not None and is_there:
                trained = self.identities(self.table(self.split))
                warn_of_training_data(part, set(self.identities(self.table(own))), trained, self.kinds)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        rows = self.parts["predict"]
        # Equally many for each rank, which FSDP needs.
        sampler: DistributedSampler[Any] = DistributedSampler(rows, shuffle=False, **self.ranks())
        # Not a LateLoader: a prediction has nothing to resume.
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self.batch_to_predict)

    def batch_to_predict(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return rows of `predict` as a batch."""
        return columns(rows, list(rows[0]))

    @override
    def sizes(self) -> str:
        # A fit does not set up the test, nor read the test's own split.
        return f"{super().sizes()}, test {self.own_splits['test'] or len(self.rows('test'))}"

    # -- which rows

    @override
    def _refuse_trained_rows(self, trained: dict[str, Any] | None) -> None:
        self.division.refuse_trained_rows(self.trainer, trained, self._trained_on())

    def source(self, split: str) -> str:
        """Return the name of the file, folder or data set that a split is read from."""
        return split if is_file(split) else given_dataset(self.dataset, self.packaged).replace("{split}", split)

    def source_of(self, part: str) -> str:
        """Return the name of the file, folder or data set that a part is read from."""
        return self.source(self.division.where(part)[1])

    def table(self, split: str) -> Any:
        """Return what :meth:`read` gives; it is read once."""
        if split not in self._tables:
            self._tables[split] = self.read(split)
        return self._tables[split]

    def rows(self, part: str) -> Any:
        """Return the rows of a part: its own split or file, or its share of the training split."""
        own = self.own_splits.get(part)
        table = self.table(own or self.split)
        if own is not None or not any(self.shares.values()):
            return table if own is not None or part == "train" else table.select([])
        name = f"dataset={self.dataset!r}"
        return table.select(indices_in(part, self.keys(table), self.shares, name, self.kinds))

    def _part(self, part: str) -> Any:
        rows = self.rows(part)
        kept = self.encoded(part, rows) if len(rows) else rows
        report = self.reports.get(part)
        if report:
            rank_zero_info(report)
        if len(kept) or not self.division.is_wanted(part):
            return kept
        raise MisconfigurationException(f"{part}: nothing is left to use. {report}")
