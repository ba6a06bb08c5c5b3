"""``python -m recipes.clip_fewshot sweep``: methods x shots x seeds, one table.

Each run is a process of its own. What is finished is kept, and a run that was stopped goes on from its last checkpoint:
start the same command again. Options that are not listed here go to every run, as to `fit`, for example
``--data.init_args.dataset=eurosat --data.init_args.root=data --model.init_args.pretrained=openai``.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

CONFIGS = Path(__file__).parent / "configs"
METHODS = ("lora", "efmlora", "fmlora", "fmlora_manual")
NAMES = {"lora": "LoRA", "efmlora": "EFMLoRA", "fmlora": "FMLoRA", "fmlora_manual": "FMLoRAModule"}
Result = dict[str, Any]


class Run(NamedTuple):
    """One training of the sweep.

    Attributes:
        method: a configuration.
        rho: radius of the perturbation; None is the configuration's, or none with LoRA.
        shots: images of each class.
        seed: of everything.
    """

    method: str
    rho: float | None
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """What the table calls the method."""
        return NAMES[self.method] + ("" if self.rho is None else f", rho {self.rho:g}")

    def folder(self, sweep: Path) -> Path:
        """Where it leaves its files."""
        rho = "" if self.rho is None else f"-rho-{self.rho:g}"
        return sweep / f"{self.method}{rho}-{self.shots}-shot" / f"seed-{self.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not there yet, and write ``results.jsonl`` and ``table.md``; returns the exit status."""
    options, more = _parser().parse_known_args(arguments)
    given = [f"--config={Path(path).resolve()}" for path in options.config] + more
    _keep_settings(options.folder, given)
    runs = [
        Run(method, rho, shots, seed)  # methods side by side, as the machine's load may change
        for shots, seed, method in product(options.shots, options.seeds, options.methods)
        for rho in ([None] if method == "lora" else options.rho or [None])
    ]
    for number, run in enumerate(runs, 1):
        if (run.folder(options.folder) / "result.json").exists():
            continue
        print(f"\n[{number}/{len(runs)}] {run.name}, {_counted(run.shots)}, seed {run.seed}", flush=True)
        status = _start(command(run, options.folder, given))
        if status:
            print(f"This run stopped. The same command goes on with it, in {run.folder(options.folder)}")
            return status
        _report(runs, options.folder, options.part)
    print(_report(runs, options.folder, options.part))
    print(f"Runs, results.jsonl and table.md are in {options.folder}")
    return 0


def command(run: Run, folder: Path, given: Sequence[str]) -> list[str]:
    """What starts a run, or goes on with it.

    Args:
        run: of the sweep.
        folder: of the sweep.
        given: more options of `fit`.
    """
    own = run.folder(folder)
    last = own / "checkpoints" / "last.ckpt"
    logger = "--trainer.logger"
    return [
        *(sys.executable, "-m", "recipes.clip_fewshot", "fit", f"--config={configuration(run, folder)}"),
        *given,
        f"--seed_everything={run.seed}",
        f"--data.init_args.shots={run.shots}",
        f"--data.init_args.seed={run.seed}",
        f"{logger}=lightning.pytorch.loggers.CSVLogger",
        f"{logger}.init_args.save_dir={own.parent.parent}",
        f"{logger}.init_args.name={own.parent.name}",
        f"{logger}.init_args.version={own.name}",
        *([f"--ckpt_path={last}"] if last.exists() else []),
    ]


def configuration(run: Run, folder: Path) -> Path:
    """The method's configuration, or a copy of it with the run's rho."""
    path = CONFIGS / f"{run.method}.yaml"
    if run.rho is None:
        return path
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    for part in [settings["model"], *settings["trainer"]["callbacks"]]:
        if "rho" in part.get("init_args", {}):
            part["init_args"]["rho"] = run.rho
    copy = run.folder(folder) / "method.yaml"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return copy


def results(runs: Sequence[Run], folder: Path) -> Iterator[Result]:
    """What the finished runs among these have written, with method and recipe."""
    for run in runs:
        path = run.folder(folder) / "result.json"
        if path.exists():
            own = {"recipe": "clip_fewshot", "method": run.method, "name": run.name, "rho": run.rho}
            yield {**own, **json.loads(path.read_text())}


def table(found: Sequence[Result], part: str = "test") -> str:
    """Markdown: a row for each method, accuracy in % over seeds for each number of shots, and relative step time.

    Args:
        found: the runs' results.
        part: whose accuracy: "test", or "validation" to choose by.

    Example:
        >>> cost = {"seconds_per_step": 0.5, "zero_shot": {"accuracy": 0.25}}
        >>> runs = [{"name": "LoRA", "shots": 1, "test": {"accuracy": a}, **cost} for a in (0.5, 0.6)]
        >>> print(table(runs))
        | method | 1 shot | step time |
        |---|---|---|
        | zero-shot | 25.0 | |
        | LoRA | 55.0 ± 5.0 (2) | 1.00 |
        <BLANKLINE>
        Accuracy in % on the test part, mean ± standard error (seeds); step time relative to LoRA's.
    """
    shots = sorted({row["shots"] for row in found})
    base = _seconds([row for row in found if row["name"] == "LoRA"])
    lines = [["method", *map(_counted, shots), "step time"]]
    if part == "test":
        zero_shot = f"{100 * statistics.mean(row['zero_shot']['accuracy'] for row in found):.1f}"
        lines.append(["zero-shot", *[zero_shot] * len(shots), ""])
    for name in dict.fromkeys(row["name"] for row in found):
        own = [row for row in found if row["name"] == name]
        cells = [_mean([100 * row[part]["accuracy"] for row in own if row["shots"] == number]) for number in shots]
        seconds = _seconds(own)
        lines.append([name, *cells, f"{seconds / base:.2f}" if seconds and base else "-"])
    shown = ["|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines]
    shown.insert(1, "|" + "---|" * len(lines[0]))
    note = f"Accuracy in % on the {part} part, mean ± standard error (seeds); step time relative to LoRA's."
    return "\n".join([*shown, "", note])


def _counted(shots: int) -> str:
    return f"{shots} shot{'s' * (shots > 1)}"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f} (1)"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {error:.1f} ({len(values)})"


def _seconds(found: Sequence[Result]) -> float | None:
    own = [row["seconds_per_step"] for row in found if row["seconds_per_step"]]
    return statistics.median(own) if own else None


def _report(runs: Sequence[Run], folder: Path, part: str) -> str:
    """Write results.jsonl and table.md anew from the finished runs; the table."""
    found = list(results(runs, folder))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
    (folder / "results.jsonl").write_text("".join(lines), encoding="utf-8")
    shown = table(found, part)
    (folder / "table.md").write_text(shown + "\n", encoding="utf-8")
    return shown


def _start(arguments: Sequence[str]) -> int:
    """A process of its own, which gets Ctrl-C too."""
    try:
        return subprocess.run(arguments, check=False).returncode
    except KeyboardInterrupt:
        return 130


def _keep_settings(folder: Path, given: Sequence[str]) -> None:
    """Refuse to mix runs of other options into a folder: their results would not be comparable."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "options.json"
    if path.exists() and json.loads(path.read_text()) != list(given):
        raise MisconfigurationException(
            f"--folder={folder} holds runs with the options {json.loads(path.read_text())}, and now they are "
            f"{list(given)}: name another folder"
        )
    path.write_text(json.dumps(list(given)) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.clip_fewshot sweep",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["lora", "efmlora", "fmlora"], help="to compare"
    )
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 4, 16], help="images of each class")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of shots, adapter and batches")
    parser.add_argument("--rho", nargs="+", type=float, help="radii to compare; by default that of each configuration")
    parser.add_argument(
        "--part", choices=["test", "validation"], default="test", help="in the table; validation is what to choose by"
    )
    parser.add_argument("--config", nargs="+", default=[], help="YAML files on top of each method's, as of a strategy")
    parser.add_argument("--folder", type=Path, default=Path("runs/clip_fewshot/sweep"), help="where everything lands")
    return parser
