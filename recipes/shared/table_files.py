"""The files that tables come in: which are read, and which of a folder are not."""

from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
from datasets.data_files import FILES_TO_IGNORE
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from recipes.shared.left_out import few

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
WORDS_STAY: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
"""Options for CSV files by which words such as NA and None stay texts, and only an empty value is missing."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # endings that `datasets` unpacks by itself


def table_ending(name: str) -> str | None:
    """The ending of a table's file, one of :data:`FORMATS`; None where a name is not one of such a file.

    Example:
        >>> table_ending("mine/questions.json"), table_ending("Reviews.CSV.gz"), table_ending("nyu-mll/glue")
        ('.json', '.csv', None)
    """
    endings = [ending.lower() for ending in Path(name).suffixes]
    if endings and endings[-1] in _COMPRESSED:
        endings.pop()
    return endings[-1] if endings and endings[-1] in FORMATS else None


def csv_options(file: Path) -> dict[str, Any]:
    """Return options of ``datasets.load_dataset`` for a CSV file: its separator, and words such as NA as texts.

    Args:
        file: in UTF-8, perhaps compressed. A tab in its first line separates its columns, as in open_clip's tables.
    """
    with fsspec.open(str(file), "rt", compression="infer", encoding="utf-8") as lines:
        separator = "\t" if "\t" in lines.readline() else ","
    return {"sep": separator, **WORDS_STAY}


def warn_of_unread_tables(folder: Path, builder: Any) -> None:
    """Name the tables in a folder that belong to no split, and which `datasets` leaves out without a word.

    Args:
        folder: a data set.
        builder: of `datasets` for its default configuration.
    """
    card = folder / "README.md"
    if card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace"):
        return  # the card decides what is read
    read = {Path(file).resolve() for file in chain.from_iterable((builder.config.data_files or {}).values())}
    unread = []
    for file in sorted(folder.rglob("*.*")):
        name = file.relative_to(folder)
        # Such as .cache and __MACOSX, and dataset_info.json, which `datasets` passes over as well.
        is_hidden = any(part.startswith((".", "__")) for part in name.parts) or file.name in FILES_TO_IGNORE
        if table_ending(file.name) and not is_hidden and file.resolve() not in read:
            unread.append(str(name))
    if unread:
        rank_zero_warn(
            f"dataset={str(folder)!r}: not read are {few(unread)}, which belong to no split. Name all files after "
            "their splits, as train-1.jsonl and train-2.jsonl, or none, and give them one format"
        )
