"""Images in folders: one folder for each class, alone or in folders train, validation and test."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from recipes.clip.images import image_files, is_hidden
from recipes.shared.left_out import few

Example = tuple[Path, int]
Parts = dict[str, list[Example]]
Found = tuple[Sequence[str], Parts]
PARTS = ("train", "validation", "test")
_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def read(dataset: str) -> Found:
    """Classes, and (path, label) by part; all images as the part "train" where there are no parts.

    Args:
        dataset: a folder with one folder for each class, or with folders train (or training), test (or testing) and
            perhaps validation (or valid, val or dev) that hold these, in small letters or capitals. Without test,
            validation is it.

    Raises:
        MisconfigurationException: a part is missing, a class has no images, or parts differ in their classes.
    """
    folder = Path(dataset).expanduser()
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    by_name = {path.name.lower(): path for path in inside}
    parts = {}
    for part, names in _FOLDERS.items():
        # In the order of the names: where there are several, the first is taken.
        found = [by_name[name] for name in names if name in by_name]
        if found:
            parts[part] = found[0]
    if "train" in parts and "test" not in parts and "validation" in parts:  # as ImageNet comes
        parts["test"] = parts.pop("validation")
        rank_zero_info(f"{dataset} has no test part: {parts['test'].name} is it, and train gives validation's images")
    missing = [part for part in ("train", "test") if part not in parts]
    if len(missing) == 2:
        classes = class_folders(folder)
        return classes, {"train": images_of(folder, classes)}
    if missing:
        raise MisconfigurationException(
            f"dataset={dataset!r} has no folder {missing[0]!r}: give it both train and test, or neither and one folder "
            "for each class, which are then divided by split_seed. A class whose folder has the name of a part needs "
            "another name, which class_names can turn back"
        )
    left_out = [path.name for path in inside if path not in parts.values() and not is_hidden(path.name)]
    if left_out:
        rank_zero_warn(f"dataset={dataset!r}: the folders {', '.join(left_out)} are no part and are left out")
    classes = class_folders(parts["train"])
    for path in parts.values():
        check_same(path, classes, class_folders(path))
    return classes, {part: images_of(path, classes) for part, path in parts.items()}


def class_folders(folder: Path) -> list[str]:
    """The names of a folder's folders, in order.

    Raises:
        MisconfigurationException: there is none.
    """
    if not folder.is_dir():
        raise MisconfigurationException(f"there is no folder {folder}")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    if not classes:
        raise MisconfigurationException(f"{folder} holds no folder: it needs one for each class, with its images")
    return classes


def images_of(folder: Path, classes: Sequence[str]) -> list[Example]:
    """(path, label) of all images of the classes' folders.

    Raises:
        MisconfigurationException: a class has none.
    """
    examples: list[Example] = []
    nested: list[str] = []
    for label, name in enumerate(classes):
        paths = image_files(folder / name)
        if not paths:
            raise MisconfigurationException(
                f"class {name!r} is empty: {folder / name} holds no file with an image's ending, such as .jpg or .png"
            )
        examples += [(path, label) for path in paths]
        inside = {path.relative_to(folder / name).parts[0] for path in paths}
        if len(inside) > 1 and not inside & {path.name for path in paths}:  # none is the class's own
            nested.append(f"{name} ({few(sorted(inside))})")
    if nested:
        found = few(nested, "; ")
        rank_zero_warn(f"{folder}: folders within one class: {found}. If these are the classes, move them up")
    return examples


def check_same(folder: Path, expected: Sequence[str], actual: Sequence[str]) -> None:
    """Refuse a part with other classes than train.

    Raises:
        MisconfigurationException: it has.
    """
    missing, unknown = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if missing or unknown:
        raise MisconfigurationException(
            f"the classes of {folder} are not those of train: missing {missing or 'none'}, unknown {unknown or 'none'}"
        )
