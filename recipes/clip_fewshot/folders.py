"""Images in folders: one folder per class, or folders train, validation and test that hold these."""

from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.clip.images import PART_OF_FOLDER, image_files, is_hidden

Example = tuple[Path, int]
Parts = dict[str, list[Example]]
PARTS = ("train", "validation", "test")


def read(folder: Path) -> tuple[list[str], Parts]:
    """Return the classes, and (path, label) by part; all images as the part "train" if there are no parts.

    Args:
        folder: has one folder per class, or folders train (or training), test (or testing) and optionally
            validation (or valid, val or dev) that hold these, in lower or upper case. Without test, validation is used
            for testing.

    Raises:
        MisconfigurationException: a part is missing, or there are other folders next to the parts.
    """
    inside = _folders_in(folder)
    parts = {PART_OF_FOLDER.get(path.name.lower(), path.name): path for path in inside}
    if not parts.keys() & set(PARTS):
        parts = {"train": folder}
    else:
        if "test" not in parts and "validation" in parts:  # as ImageNet comes
            parts["test"] = parts.pop("validation")
        if len(parts) < len(inside) or not {"train", "test"} <= parts.keys() <= set(PARTS):
            raise MisconfigurationException(
                f"{folder} has the folders {', '.join(path.name for path in inside)}: it needs train, test and "
                "optionally validation, or only one folder per class. A class whose folder has the name of a part must "
                "be renamed; class_names can give it its name back"
            )
    names = set()
    for path in parts.values():
        names |= {inner.name for inner in _folders_in(path)}
    classes = sorted(names)
    examples: Parts = {}
    for part, path in parts.items():
        examples[part] = []
        for label, name in enumerate(classes):
            examples[part] += [(image, label) for image in image_files(path / name)]
    return classes, examples


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
