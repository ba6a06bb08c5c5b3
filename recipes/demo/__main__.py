"""``make demo``: LoRA, EFMLoRA and FMLoRA from one seed on the same batches, then one table and one picture.

Each method runs in a process of its own, so that its peak memory is its own. What is finished is kept: Ctrl-C and start
again goes on from the last checkpoint.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

from recipes.demo.report import plot, write_table
from recipes.demo.run import METHODS, Settings, run, tokenise
from recipes.precision import SETTING, Precision


def main(arguments: list[str] | None = None) -> int:
    """Run what is not there yet, and report; returns the exit status."""
    options = _parser().parse_args(arguments)
    settings = _settings(options)
    if options.only:
        quiet()
        run(options.only, settings, options.folder / options.only)
        return 0
    _drop_other_settings(options.folder, settings)
    print(f"Precision: {settings.precision}; --precision takes another", flush=True)
    if any(not (options.folder / method / "result.json").exists() for method in METHODS):
        tokenise(settings, options.folder)
    results = {}
    for number, method in enumerate(METHODS, 1):
        path = options.folder / method / "result.json"
        if not path.exists():
            print(f"\n[{number}/{len(METHODS)}] {method}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            status = _start(method, settings, options.folder)
            if status:
                print(f"{method} stopped. The same command goes on from its last checkpoint in {path.parent}")
                return status
        results[method] = json.loads(path.read_text())
    write_table(results, options.folder / "table.txt")
    plot(results, options.folder, options.folder / "curves.png")
    print(f"Checkpoints, adapters, table.txt and curves.png are in {options.folder}")
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    """As told; a demo that goes on keeps the precision that it began with, whatever the device does fast by now."""
    given = {field.name: getattr(options, field.name) for field in fields(Settings)}
    if options.precision is not None:
        return Settings(**given)
    del given["precision"]
    settings, before = Settings(**given), _settings_of(options.folder)
    kept = replace(settings, precision=before.get("precision", settings.precision))
    goes_on = asdict(kept) == before and SETTING not in os.environ
    return kept if goes_on else settings


def _settings_of(folder: Path) -> dict[str, Any]:
    """What an earlier demo in this folder has written down; nothing where there was none."""
    path = folder / "settings.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _start(method: str, settings: Settings, folder: Path) -> int:
    """One method in a process of its own, which gets Ctrl-C too."""
    given = [f"--{name}={value}" for name, value in asdict(settings).items() if value is not None]
    command = [sys.executable, "-m", "recipes.demo", "--only", method, "--folder", str(folder), *given]
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 130


def _drop_other_settings(folder: Path, settings: Settings) -> None:
    """Set aside what an earlier demo with other settings left: its results would not be comparable."""
    folder.mkdir(parents=True, exist_ok=True)
    before = _settings_of(folder)
    if before and before != asdict(settings):
        number = next(n for n in range(1, 1000) if not folder.with_name(f"{folder.name}-{n}").exists())
        aside = folder.with_name(f"{folder.name}-{number}")
        shutil.move(folder, aside)
        folder.mkdir()
        print(f"The results of other settings are now in {aside}")
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")


def quiet() -> None:
    """Only what matters here: Lightning's hints on workers and logging intervals do not."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*exists and is not empty.*",
        ".*is_gradient_checkpointing.*",
        ".*set_vital.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where everything lands")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    kinds: dict[str, Any] = {"rho": float, "learning_rate": float, "dataset": str, "model": str}
    for field in fields(Settings):
        if field.name != "precision":
            parser.add_argument(f"--{field.name}", type=kinds.get(field.name, int), default=field.default, help=" ")
    told = "of all computation; left out, what the folder began with, and at first what this device computes fast"
    parser.add_argument("--precision", choices=get_args(Precision), help=told)
    return parser


if __name__ == "__main__":
    sys.exit(main())
