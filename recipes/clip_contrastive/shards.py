"""Pictures of webdataset shards."""

import tarfile
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from braceexpand import braceexpand
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from recipes.clip.images import image_endings
from recipes.clip_contrastive.pictures import Picture, lines_of, refuse
from recipes.shared.ranks import rank


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file inside an uncompressed archive; Pillow opens it as it opens a path.

    Attributes:
        archive: where it lies.
        name: inside the archive.
        offset: of its first byte, in bytes.
        size: in bytes.
    """

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read(self) -> bytes:
        """The whole file."""
        with self.archive.open("rb") as archive:
            archive.seek(self.offset)
            return archive.read(self.size)


def pictures_of_shards(pattern: str) -> list[Picture]:
    """Pictures of webdataset shards, found in one pass over the archives' headers."""
    shards: list[Path] = []
    # A backslash stands in paths of Windows, and escapes nothing.
    for one in braceexpand(str(Path(pattern).expanduser()), escape=False):
        shards += map(Path, sorted(glob(one)) or [one])
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise MisconfigurationException(f"dataset={pattern!r}: there is no {', '.join(missing[:5])}")
    pictures, faults = [], []
    for shard in tqdm(shards, "Reading shards", disable=len(shards) < 10 or rank() != 0):
        images, captions, wrong = _members(shard)
        faults += [f"{shard}: {fault}" for fault in wrong]
        faults += [f"{shard}: {key} has no .txt" for key in sorted(images.keys() - captions)]
        faults += [f"{shard}: {key} has a .txt, but no image" for key in sorted(captions.keys() - images)]
        pictures += [Picture(image, captions.get(key, ()), f"{shard.name}/{key}") for key, image in images.items()]
    refuse(pattern, faults)
    return pictures


def _members(shard: Path) -> tuple[dict[str, StoredFile], dict[str, tuple[str, ...]], list[str]]:
    """Images and captions of a shard by key, and what is wrong with its names.

    The key is webdataset's, the name up to the first dot in its last part. Of "1.png", "1.txt" and "1.mask.png" the
    last one is no image of the pair.
    """
    images: dict[str, StoredFile] = {}
    captions: dict[str, tuple[str, ...]] = {}
    faults: list[str] = []
    others: list[tuple[str, str]] = []
    endings = image_endings()
    try:
        # Uncompressed archives alone: images are read from where they lie in the file.
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if name.startswith("."):  # what macOS adds, such as "._1.png"
                    continue
                base, _, suffix = name.partition(".")
                key = f"{folder}/{base}" if folder else base
                if f".{suffix.lower()}" in endings:
                    faults += [f"there is a second image {member.name}"] if key in images else []
                    images[key] = StoredFile(shard, member.name, member.offset_data, member.size)
                elif suffix.lower() == "txt":
                    faults += [f"there is a second text {member.name}"] if key in captions else []
                    file = archive.extractfile(member)
                    if file is not None:  # a folder may have such a name too
                        captions[key] = lines_of(file.read().decode("utf-8-sig"))
                elif Path(name).suffix.lower() in endings:
                    others.append((member.name, key))
            names = archive.getnames()
            if names and not _ends_here(archive, shard):
                faults.append(f"there is no end of an archive after {names[-1]}: it has been cut off")
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise MisconfigurationException(
            f"{shard} can't be read as an uncompressed .tar with texts in UTF-8: {error}"
        ) from error
    faults += [f"the key of {name} ends at the first dot, {key}" for name, key in others if key not in images]
    return images, captions, faults


def _ends_here(archive: tarfile.TarFile, shard: Path) -> bool:
    """Whether the block after the last member is the zeros that end an archive.

    Where it is anything else, the shard was cut off or damaged there, which tarfile takes for the end without a word.
    """
    with shard.open("rb") as file:
        file.seek(archive.offset)
        return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
