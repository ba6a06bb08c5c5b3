"""Is the perturbation worth it for your own run? One search with EFMLoRA, one without, and an answer.

Give the recipe's name and the options of its `fit`. Both searches have as many trials of learning rate, dropout, rank
and, in classification, the head's rate; one of them may also choose rho. The best third of the trials is repeated with
two more seeds, and the winner of each side with fresh ones, as is LoRA with EFMLoRA's settings if they differ in more
than rho. Each run is its own process; finished runs are kept in an Optuna study: start the command as often as you
like, also on other machines with --storage; after Ctrl-C the same command resumes. It ends with a table, a picture, the
winner's settings, and the answer. Example: python -m recipes.tune classification --budget 20 --data.dataset my.csv
--model.model NAME --trainer.max_epochs 3
"""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from recipes.command_line.arguments import config_digests, names_method, option
from recipes.command_line.configs import listed
from recipes.command_line.mistakes import without_traceback
from recipes.command_line.options import parse_known_options
from recipes.command_line.precision import SETTING, fast_precision
from recipes.data.files import begin_folder, write_whole
from recipes.studies.process import FailedError, StoppedError, module_of
from recipes.studies.queue import Queue, begin_runs, file_storage, open_study
from recipes.studies.statistics import Estimate
from recipes.tune.answer import WITH, Answer, answer, draw
from recipes.tune.search import Options, Run, Search
from recipes.tune.space import RHO, SPACES, Space, parts, seeds_of, size
from recipes.tune.verdict import table_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the missing runs and write the results; return the exit status."""
    # Other options are meant for `fit`, whose own parser checks them.
    options, more = parse_known_options(Options, arguments, "python -m recipes.tune", __doc__)
    search = _search(options, more)
    try:
        search.queue.work(search.open_runs, search.perform, search.announce)
    except (StoppedError, KeyboardInterrupt):
        print(f"\nThis worker stopped. The same command resumes the search in {search.folder}")
        return 130
    except FailedError as failure:
        print("\nThe first run has failed, with the error above: fix its cause, and start again")
        return failure.status
    _write(search)
    return 0


def _write(search: Search) -> None:
    """Write ``results.csv``, ``table.txt``, ``trials.png`` and ``best.yaml``, and print what was found."""
    rows, folder = search.queue.rows, search.folder
    found = answer(rows, search.mode)
    text = found.text(search.metric)
    write_whole(folder / "results.csv", table_of(rows).to_csv(index=False))
    write_whole(folder / "table.txt", text)
    trials = [row for row in rows if row["stage"] == "search"]
    draw(trials, next(iter(search.space)), search.metric, search.mode).savefig(folder / "trials.png", dpi=130)
    printed = _printed_settings(search.options.recipe, search.arguments(found.configs[found.winner], seed=0))
    write_whole(folder / "best.yaml", printed)
    method = "EFMLoRA's" if found.winner == WITH else "LoRA's"
    print(f"\n{text}\n{_one_more_hour(search, found)}")
    print(f"Everything is in {folder}: best.yaml, for fit --config, has {method} settings")


def _one_more_hour(search: Search, found: Answer) -> str:
    """Say what one more hour of a worker would buy, or the hours that one more seed of all winners takes."""
    hours = max(1, math.ceil(search.seconds_of_a_run() * len(found.configs) / 3600))
    runs = hours * 3600 / search.seconds_of_a_run()
    offers = []
    now = found.difference(found.rival)
    if now.interval > 0 and not found.no_answer:
        seeds = now.values + int(runs / len(found.configs))
        then = Estimate(now.mean, now.error * math.sqrt(now.values / seeds), seeds)
        offers.append(
            f"--fresh {seeds}, by which the interval would shrink from ± {now.interval:.3g} to about "
            f"± {then.interval:.3g}"
        )
    # A third of the trials run with two more seeds.
    budget = min(search.options.budget + int(runs * 3 / 5), 2 * size(search.space_of(WITH)))
    if budget > search.options.budget:
        offers.append(f"--budget {budget}")
    time = "One more hour" if hours == 1 else f"{hours} more hours"
    return f"{time} of one worker would buy about {runs:.0f} runs: {', or '.join(offers) or 'all has been tried'}"


def _search(options: Options, more: list[str]) -> Search:
    space = _space(options, more)
    if options.recipe in SPACES and not names_method(options.recipe, more):
        more = ["--method=efmlora", *more]
    metric, mode = str(options.metric), str(options.mode)
    if options.metric is None:
        metric, mode = _monitor(options.recipe, [*more, f"--rho={options.rho[0]}"])
    folder = options.folder or Path("runs/tune") / options.recipe
    # More trials or seeds may be added later; any other change would make the rows incomparable.
    judged = {"metric": metric, "mode": mode, "test": options.test}
    given = {"command": options.recipe, "options": more, **config_digests(more)}
    settings = {**given, **judged, **space}
    begin_folder(folder, "search", ["results.csv", "table.txt", "trials.png", "best.yaml"])
    decided = {"precision": fast_precision(option(more, "--trainer.accelerator") or "auto")}
    storage = options.storage or file_storage(folder)
    study = open_study(storage, options.study or options.recipe, mode, settings, decided)
    begin_runs(folder, {**given, "precision": study.user_attrs["precision"]})
    # For the recipes' own processes, unless the options or a configuration choose one.
    os.environ[SETTING] = study.user_attrs["precision"]
    for name, values in space.items():
        print(f"Searched: {name} of {', '.join(values)}")
    print(f"Precision: {study.user_attrs['precision']}, unless an option sets another", flush=True)
    return Search(options, more, space, Queue(study, lambda key: Run(**key)), folder, metric, mode)


def _monitor(command: str, arguments: Sequence[str]) -> tuple[str, str]:
    """Return the metric and the mode by which a command keeps its best checkpoint."""
    settings: dict[str, Any] = yaml.safe_load(_printed_settings(command, arguments))
    for callback in listed(settings["trainer"]["callbacks"]):
        given = callback.get("init_args", {})
        if given.get("monitor") is not None and "save_last" in given:  # it saves, unlike EarlyStopping
            return given["monitor"], given["mode"]
    raise MisconfigurationException(
        f"{command} keeps no checkpoint by a metric: name one, as in --metric val_loss --mode min"
    )


def _printed_settings(command: str, arguments: Sequence[str]) -> str:
    """Return all settings of a command's ``fit`` as one configuration.

    Raises:
        MisconfigurationException: an argument is wrong.
    """
    line = [sys.executable, "-m", module_of(command), "fit", *arguments, "--print_config"]
    printed = subprocess.run(line, capture_output=True, text=True, check=False)
    if printed.returncode:
        raise MisconfigurationException(f"the options of {command} fit are wrong:\n{printed.stderr.strip()}")
    # After anything that the module may print on import.
    return printed.stdout[max(0, printed.stdout.find("# lightning")) :]


def _space(options: Options, more: Sequence[str]) -> Space:
    """Return the values of each setting, and last those of rho, the first of which is 0: without the perturbation."""
    given = {name: values for name, *values in options.search}
    problems = _mistakes(options)
    is_recipe = options.recipe in SPACES
    space = dict(given or SPACES.get(options.recipe, {}))
    more = [argument.replace(".init_args.", ".") for argument in more]
    if is_recipe and not given and option(more, "--optimizer") is not None:
        problems.append("--optimizer has its own rate: search it by --search optimizer.lr 1e-4 1e-3, say")
    for name in list(space):
        fixed = next(filter(None, (_fixing(more, each) for each in name.split("/"))), None)
        if fixed:
            print(f"--{fixed} is given, so {name} is not searched")
            del space[name]
    for name in ("seed_everything", "trainer.logger", *seeds_of(options.recipe)):
        if option(more, f"--{name}") is not None:
            problems.append(f"--{name} is set by the search: leave it out")
    if options.metric is None and not is_recipe:
        problems.append("say what is judged, as in --metric val_loss --mode min")
    if not space and not is_recipe:
        problems.append(
            f"{options.recipe} is not a recipe: there are {', '.join(SPACES)}. If it is the module of a LightningCLI, "
            "say what is searched, as in --search model.lr 1e-4 1e-3"
        )
    if problems:
        raise MisconfigurationException("; ".join(problems))
    return {**space, RHO: ["0", *(f"{rho:g}" for rho in options.rho)]}


def _fixing(arguments: Sequence[str], name: str) -> str | None:
    """Return the option that sets a setting, or a dict that holds it; None if neither is given.

    Example:
        >>> _fixing(["--model.lora={r: 2}"], "model.lora.r")
        'model.lora'
    """
    while option(arguments, f"--{name}") is None:
        name = name.rpartition(".")[0]
        if "." not in name:  # --model may name a class
            return None
    return name


def _mistakes(options: Options) -> list[str]:
    """Return what is wrong with the search's own options."""
    problems = []
    names: list[str] = []
    for name, *values in options.search:
        names += name.split("/")
        numbers = {len(parts(name, value)) for value in values}
        if len(set(values)) < len(values) or numbers != {name.count("/") + 1}:
            problems.append(
                f"--search {name} must have different values, each with {name.count('/') + 1} parts, got {values}"
            )
    if len(set(names)) < len(names) or RHO in names:
        problems.append("--search names an option once, and never rho, whose values are given by --rho")
    if len(set(options.rho)) < len(options.rho) or not all(0 < rho < math.inf for rho in options.rho):
        problems.append(f"--rho must be different numbers above 0, got {options.rho}")
    if options.budget < 4 or options.fresh < 2:
        problems.append(f"--budget must be at least 4 and --fresh 2, got {options.budget} and {options.fresh}")
    if (options.metric is None) != (options.mode is None):
        problems.append("--metric and --mode go together, as in --metric val_loss --mode min")
    return problems


if __name__ == "__main__":
    with without_traceback():
        sys.exit(main())
