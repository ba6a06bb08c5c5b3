"""Emoji in five drawing styles: image-text pairs for training, and one separate style for classification.

The images come from npm packages under open licences (see :data:`STYLES`) and are copied, 64 px wide on white, into the
cache, never into the project.

Variants of one emoji in gender, hair, skin tone and direction count as one, and one of them is used. Each emoji is in
one part, the same for all styles: those of the validation and the test part are in no training pair.
"""

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from recipes.clip.images import on_white
from recipes.offline.packaged import cache_dir, npm_folder, write_folder


class Style(NamedTuple):
    """A drawing style; its package is "emoji-" plus its name in :data:`recipes.offline.packaged.NPM`.

    Attributes:
        files: pattern of the images' paths with {} for an emoji's code points.
        licence: licence of the images.
    """

    files: str
    licence: str


STYLES = {
    "google": Style("img/google/64/{}.png", "Noto Emoji, Apache-2.0"),
    "twitter": Style("img/twitter/64/{}.png", "Twemoji, CC BY 4.0"),
    "blob": Style("img/google/64/{}.png", "Noto Emoji of 2017, Apache-2.0"),
    "emojione": Style("img/emojione/64/{}.png", "EmojiOne 2.2.7, CC BY-SA 4.0"),
    "fluent": Style("assets/{}.webp", "Fluent Emoji 3D, MIT"),
}
TARGET = "fluent"  # in no pair: the style to adapt to
CLASSES = {
    "face": (
        "face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical", "face-sleepy",
        "face-unwell", "face-hat", "face-glasses", "face-concerned", "face-negative",
    ),
    "person": (
        "person", "person-gesture", "person-role", "person-activity", "person-sport", "person-fantasy",
        "person-resting",
    ),
    "hand": (
        "hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands", "hand-prop",
    ),
    "mammal": ("animal-mammal",),
    "bird, fish, reptile or insect": (
        "animal-bird", "animal-marine", "animal-reptile", "animal-amphibian", "animal-bug",
    ),
    "plant": ("plant-flower", "plant-other"),
    "fruit or vegetable": ("food-fruit", "food-vegetable"),
    "dish of food": ("food-prepared", "food-asian"),
    "sport or game": ("sport", "game"),
    "clothing": ("clothing",),
    "tool or household item": ("tool", "household"),
    "book or office item": ("office", "writing", "book-paper"),
    "electronic device": ("computer", "phone", "light & video"),
    "music or sound": ("music", "musical-instrument", "sound"),
    "building": ("place-building", "place-religious", "hotel"),
    "road or rail vehicle": ("transport-ground",),
    "sky and weather": ("sky & weather",),
    "clock": ("time",),
    "letters or numbers": ("alphanum", "keycap"),
    "arrow or button": ("arrow", "av-symbol"),
    "geometric shape": ("geometric",),
    "sign or symbol": ("transport-sign", "warning", "zodiac", "religion"),
    "flag": ("country-flag", "flag", "subdivision-flag"),
}  # fmt: skip
_LEAST_TRAIN = 16  # emoji of a class that are kept for training, so that 16 shots can be drawn
_MOST_VALIDATION, _MOST_TEST = 12, 24  # emoji of a class
_WITHOUT = {"200d", "fe0f", "2640", "2642", "27a1", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}  # gender, direction, hair
_PEOPLE = {"1f466", "1f467", "1f468", "1f469", "1f474", "1f475", "1f9d1", "1f9d2", "1f9d3"}  # man, woman, child, ...
_SIZE = 64


@dataclass(frozen=True)
class Emoji:
    """One emoji, in all styles.

    Attributes:
        codes: its code points in hexadecimal, in the spellings of file names.
        names: its names, the standard's first.
        category: its class in :data:`CLASSES`, or the standard's subcategory.
        part: "train", "validation" or "test".
    """

    codes: tuple[str, ...]
    names: tuple[str, ...]
    category: str
    part: str

    def captions(self) -> list[str]:
        """Return captions of its image."""
        return [self.category, *self.names, *(f"{name}, {self.category}" for name in self.names)]


class Folders(NamedTuple):
    """The tables and folders that :func:`prepare` makes.

    Attributes:
        pairs: CSV of images and captions: the training part, in all styles but :data:`TARGET`.
        held_out_pairs: the same for the validation part.
        target: folder with train/CLASS/, validation/CLASS/ and test/CLASS/ in the style :data:`TARGET`.
    """

    pairs: Path
    held_out_pairs: Path
    target: Path


def prepare() -> Folders:
    """Fetch the packages, once, and write images and captions into the cache; takes about half a minute.

    Raises:
        RuntimeError: a package can't be fetched.
    """
    folder = cache_dir() / "emoji"
    if not folder.exists():
        packages = {name: npm_folder(f"emoji-{name}") for name in STYLES}
        all_emoji = emoji(json.loads((packages["google"] / "emoji.json").read_text(encoding="utf-8")))
        write_folder(folder, lambda target: _write(all_emoji, packages, target))
    return Folders(folder / "pairs.csv", folder / "held_out_pairs.csv", folder / TARGET)


def emoji(entries: Iterable[dict[str, Any]]) -> list[Emoji]:
    """Return emoji with their parts, one of each group of variants.

    Args:
        entries: emoji-datasource's emoji.json.
    """
    category_of: dict[str, str] = {}
    for name, groups in CLASSES.items():
        category_of |= dict.fromkeys(groups, name)
    by_category = defaultdict(list)
    seen = set()
    for entry in entries:
        same, group = variants(entry["unified"].lower()), entry["subcategory"]
        # The five modifiers are colours and not pictures of anything.
        if group != "skin-tone" and same not in seen:
            seen.add(same)
            by_category[category_of.get(group, group.replace("-", " "))].append(entry)
    found = []
    for category, members in by_category.items():
        parts = _parts(len(members), category in CLASSES)
        for entry, part in zip(sorted(members, key=_digest), parts, strict=True):
            found.append(Emoji(_spellings(entry), _names(entry), category, part))
    return found


def variants(code: str) -> tuple[str, ...]:
    """Return what an emoji's variants in gender, age, hair, direction and skin tone have in common.

    Example:
        >>> variants("1f469-200d-1f680") == variants("1f9d1-200d-1f680")  # woman astronaut, astronaut
        True
    """
    points = (point for point in code.split("-") if point not in _WITHOUT and not "1f3fb" <= point <= "1f3ff")
    return tuple("person" if point in _PEOPLE else point for point in points)


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(entry["unified"].lower().encode()).hexdigest()


def _parts(number: int, is_class: bool) -> list[str]:
    """Return the parts of one category's emoji, which are sorted by their hashes."""
    free = number - max(_LEAST_TRAIN, number // 2) if is_class else 0
    test, validation = max(min(_MOST_TEST, free * 2 // 3), 0), max(min(_MOST_VALIDATION, free // 3), 0)
    return ["test"] * test + ["validation"] * validation + ["train"] * (number - test - validation)


def _spellings(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return an emoji's code points with and without the variation selector fe0f, since styles differ in that."""
    full, image = entry["unified"].lower(), Path(entry["image"]).stem
    bare = (entry["non_qualified"] or full).lower()
    return tuple(dict.fromkeys((full, image, bare, full.replace("-fe0f", ""), f"{image}-fe0f")))


def _names(entry: dict[str, Any]) -> tuple[str, ...]:
    short = entry["short_names"]
    standard = (entry["name"] or short[0]).lower()
    return tuple(dict.fromkeys([standard, *(name.replace("_", " ").replace("-", " ") for name in short)]))


def _write(all_emoji: Sequence[Emoji], packages: dict[str, Path], folder: Path) -> None:
    """Write all images and the two tables into a folder."""
    rows: dict[str, list[tuple[str, str]]] = {"train": [], "validation": [], "test": []}
    for name, style in STYLES.items():
        for one in tqdm(all_emoji, f"Preparing emoji, {name}", unit="image"):
            paths = (packages[name] / style.files.format(code) for code in one.codes)
            source = next((path for path in paths if path.exists()), None)
            if source is None or (name == TARGET and one.category not in CLASSES):
                continue
            # The target style is read from folders of classes, the others from the tables.
            inside = Path(name, one.part, one.category) if name == TARGET else Path("pairs", name)
            target = folder / inside / f"{one.codes[0]}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            _small(source).save(target)
            if name != TARGET:
                rows[one.part] += [(target.relative_to(folder).as_posix(), caption) for caption in one.captions()]
    for part, table in (("train", "pairs.csv"), ("validation", "held_out_pairs.csv")):
        with (folder / table).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "caption"), *rows[part]])
    lines = [f"{name}: {style.licence}" for name, style in STYLES.items()]
    (folder / "LICENCES.txt").write_text("\n".join([*lines, "names and categories: emoji-datasource, MIT"]) + "\n")


def _small(path: Path) -> Image.Image:
    with Image.open(path) as image:
        # Converted before it is resized: Pillow does not interpolate an image with a palette.
        small = image.convert("RGBA").resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
    return on_white(small)
