"""The arms next to P1 in protocol_p1_p2.md: other changes to LoRA, searched as P1's sides were.

From the root of a clone: ``PYTHONPATH=.:docs/results python docs/results/arms.py ARM FOLDER``, where ARM is one of
``ARMS``. Its rows are ``FOLDER/ARM/results.jsonl`` when all runs are done; ``rho`` in them is the arm's strength, and
``times`` a factor on it, beyond the grid. P1's rows without a perturbation are put there first, so the search is P1's
with another method in place of EFMLoRA; so are the arm's own published rows, if there are any. The same command resumes
after a stop. The search goes trial by trial, as P1's did, so let two processes do two arms.

The rows of all arms, without P1's and each with its arm's name, are ``arms.jsonl``.
"""

import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import TPESampler
from optuna.study import create_study
from optuna.trial import create_trial
from p2 import PLAIN, RECIPE  # in this folder
from shared_runs import add_finished, queue_of, work
from torch import Tensor, nn

from lightning_flatlora.callbacks.base import MethodCallback
from lightning_flatlora.methods.b_perturbation import EFMLoRAStep
from recipes.studies.process import written
from recipes.studies.queue import Queue
from recipes.studies.rows import Row, read
from recipes.tune.answer import chosen
from recipes.tune.search import SEARCH_SEEDS, SIDES, WITH, WITHOUT, Options, Run, Search, judged
from recipes.tune.space import RHO, Config, Space, arguments

SPACE = {
    "model.learning_rate": ["1e-4", "3e-4", "1e-3", "3e-3"],
    "model.lora.lora_dropout": ["0", "0.1", "0.5", "0.9"],
    "model.lora.r/model.lora.lora_alpha": ["2/4", "8/16", "32/64"],
}
"""As in P1's command."""
TRIALS = 24  # of both sides; the half without a perturbation is P1's
FRESH = 10  # final seeds, of P1's 20
TIMES = "times"
FURTHER, EXTENSIONS = 4, 3  # the factor by which a grid is extended, and how often at most


class RandomScaling(L.Callback):
    """Multiply the adapter's scaling by 1 + spread * u in each step, with u uniform in [-1, 1].

    Args:
        spread: at least 0.
        seed: of the random numbers u.
    """

    def __init__(self, spread: float, seed: int = 0) -> None:
        self.spread = spread
        self.seed = seed
        self.stored: list[tuple[dict[str, float], dict[str, float]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Scale, and remember the former scaling."""
        # Seeded by the step only, so that a resumed run has the same factors.
        number = random.Random(f"{self.seed}, {trainer.global_step}").uniform(-1, 1)
        factor = 1 + self.spread * number
        for layer in pl_module.modules():
            scaling = getattr(layer, "scaling", None)
            if isinstance(scaling, dict) and hasattr(layer, "lora_B"):
                self.stored.append((scaling, dict(scaling)))
                for name in scaling:
                    scaling[name] *= factor
        if not self.stored:
            raise ValueError("no layer has a LoRA adapter")

    def on_train_batch_end(self, *args: Any) -> None:
        """Restore the scaling."""
        for scaling, stored in self.stored:
            scaling.update(stored)
        self.stored.clear()


class VariationalLoss(L.Callback):
    """Add MonteCLoRA's variational loss to the task's: the mean over peft's samplers, as in peft's trainer."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add its gradient, since the gradient of the sum of both losses is the sum of their gradients."""
        terms: list[Tensor] = []
        for layer in pl_module.modules():
            if hasattr(layer, "get_variational_loss"):
                divergence, entropy = layer.get_variational_loss()
                terms.append(divergence + entropy)
        if not terms:
            raise ValueError("no layer has a sampler of MonteCLoRA")
        torch.stack(terms).mean().backward(retain_graph=True)


class TurnedStep(EFMLoRAStep):
    """The step of :class:`Turned`."""

    def use_gradients(self, also_finite: Iterable[nn.Parameter]) -> None:
        """Move the average by the perturbation that lowers the loss."""
        if self.perturbation.has_gradient and self.refreshes:
            fresh = self.perturbation.ascend(self.current_rho, at_perturbed=True, also_finite=also_finite)
            turned = fresh._replace(stacks=[-stack for stack in fresh.stacks])
            self.perturbation.average(turned, self.beta)


class Turned(MethodCallback[TurnedStep]):
    """EFMLoRA with the sign turned, as in MSAM: an average of gradients points up where the coming one points down.

    Args:
        rho: radius, as EFMLoRA's.
    """

    def __init__(self, rho: float) -> None:
        super().__init__(TurnedStep(rho=rho))


class Arm(NamedTuple):
    """A change to LoRA.

    Attributes:
        options: options of `fit` for a strength and a seed.
        strengths: the strengths to try.
        least: a strength that is LoRA, below which there is none.
    """

    options: Callable[[str, int], list[str]]
    strengths: Sequence[str]
    least: float = 0.0


def _of_callback(path: str, strength: str, *, seeded: bool = False) -> Callable[[str, int], list[str]]:
    """Return the options that add a callback to the Trainer."""

    def options(value: str, seed: int) -> list[str]:
        given = [f"--trainer.callbacks+={path}", f"--trainer.callbacks.{strength}={value}"]
        return [*given, f"--trainer.callbacks.seed={seed}"] if seeded else given

    return options


def _of_fmlora(*others: str) -> Callable[[str, int], list[str]]:
    return lambda rho, seed: ["--method=fmlora", f"--rho={rho}", *others]


def _of_monteclora(scaler: str, seed: int) -> list[str]:
    # With its default size, the draws that peft holds for each layer would take 5 GiB at rank 32.
    fields = json.dumps({"sample_scaler": float(scaler), "buffer_size": 4})
    return [f"--model.lora.monteclora_config={fields}", "--trainer.callbacks+=arms.VariationalLoss"]


def _of_averaging(steps: str, seed: int) -> list[str]:
    decay = 1 - 1 / float(steps)
    return ["--trainer.callbacks+=lightning_flatlora.AdapterAveraging", f"--trainer.callbacks.decay={decay:g}"]


RADII = ["0.05", "0.2", "0.8", "3.2"]
ARMS = {
    "lora_sam": Arm(_of_callback("lightning_flatlora.baselines.LoRASAM", "rho"), ["0.0125", "0.05", "0.2", "0.8"]),
    "bi_lora": Arm(
        _of_callback("lightning_flatlora.baselines.BiLoRA", "rho", seeded=True), ["0.005", "0.02", "0.08", "0.32"]
    ),
    "scaling": Arm(_of_callback("arms.RandomScaling", "spread", seeded=True), ["0.1", "0.2", "0.5", "1"]),
    "monteclora": Arm(_of_monteclora, ["1e-4", "3e-4", "1e-3", "3e-3"]),
    "fmlora": Arm(_of_fmlora(), RADII),
    "late_fmlora": Arm(_of_fmlora("--trainer.callbacks.start_step=68"), RADII),  # the last tenth of 75 steps
    # LoRA's compute: half of its batch of 16 twice. Validation has as many examples as P1's.
    "half_fmlora": Arm(_of_fmlora("--data.batch_size=8", "--trainer.limit_val_batches=12"), RADII),
    "turned": Arm(_of_callback("arms.Turned", "rho"), RADII),
    "averaging": Arm(_of_averaging, ["2", "5", "10", "20"], least=1.0),  # steps
}


class ArmSearch(Search):
    """P1's search with an arm in place of EFMLoRA, whose grid is extended until the best strength lies within."""

    arm: Arm

    def _open_trials(self, side: str) -> list[Run]:
        """Return the side's next trial, which all before it decide, as in P1."""
        tried = self.tried(side)
        if len(tried) >= self.trials_of(side):  # more if the grid was extended
            return []
        judgements = [(row["config"], judged(row)) for row in tried.values()]
        config = suggestion(self.space_of(side), judgements)
        return [Run(side, config, SEARCH_SEEDS[0], "search", len(tried))]

    def arguments(self, config: Config, seed: int) -> list[str]:
        """Return the arguments of the recipe's ``fit``."""
        settings = {name: value for name, value in config.items() if name != TIMES}
        given = [*self.more, *arguments(settings), f"--seed_everything={seed}", f"--data.seed={seed}"]
        strength = config[RHO] if TIMES not in config else f"{strength_of(config):g}"
        return [*given, *self.arm.options(strength, seed)]

    def perform(self, run: Run, trial: Trial) -> Row:
        """Do a run; its row also names the checkpoint that counts, and so its step."""
        row = super().perform(run, trial)
        file = self.folder / run.name / "fit.json"  # missing if the run failed
        return {**row, "checkpoint": Path(written(file)["best"]).stem if file.exists() else None}

    def _repeats(self) -> list[Run]:
        """Return P1's repeats and, when these are done, the runs beyond the grid."""
        runs = super()._repeats()
        while all(self.queue.find(run) is not None for run in runs):
            more = self._beyond(runs)
            if not more:
                break
            runs += more
        return runs

    def _beyond(self, runs: Sequence[Run]) -> list[Run]:
        """Return the best settings with a strength beyond the grid, if theirs is at its end.

        Args:
            runs: the runs of the search on all but the first seed, and those beyond the grid so far.
        """
        extensions = [run.config for run in runs if TIMES in run.config and run.seed == SEARCH_SEEDS[0]]
        # Later extensions may be done too; each follows from what was there before it.
        rows = [row for row in self.queue.rows if TIMES not in row["config"] or row["config"] in extensions]
        best = chosen(rows, self.mode)[WITH]
        strength = strength_of(best)
        tried = [*map(float, self.arm.strengths), *map(strength_of, extensions)]
        if min(tried) < strength < max(tried) or len(extensions) == EXTENSIONS:
            return []
        factor = FURTHER if strength == max(tried) else 1 / FURTHER
        if factor * strength <= self.arm.least:
            return []
        config = {**best, TIMES: f"{factor * strength / float(best[RHO]):g}"}
        number = TRIALS + len(extensions)
        return [Run(WITH, config, seed, "search", number) for seed in SEARCH_SEEDS]

    def _finals(self) -> list[Run]:
        """Return the final runs without a control, which is `docs/results/p1_control.py`."""
        return [run for run in super()._finals() if run.side in SIDES]


def suggestion(space: Space, tried: Sequence[tuple[Config, float]]) -> Config:
    """Return a configuration that has not been tried, as `recipes.tune` did at P1's commit, 4947a85.

    Args:
        space: the values of each setting.
        tried: the configurations before it, in the order of their trials, and their results; less is better.
    """
    distributions: dict[str, BaseDistribution] = {name: CategoricalDistribution(space[name]) for name in space}
    known = [config for config, _ in tried]
    seed = 100 * len(tried)
    while True:
        study = create_study(sampler=TPESampler(seed=seed, n_startup_trials=4, multivariate=True))
        for config, value in tried:
            study.add_trial(create_trial(params=config, distributions=distributions, value=value))
        found: Config = study.ask(distributions).params
        if found not in known:
            return found
        seed += 1


def strength_of(config: Config) -> float:
    """Return an arm's strength."""
    return float(config[RHO]) * float(config.get(TIMES, 1))


def published(name: str) -> list[Row]:
    """Return the published rows that an arm's search has: P1's without a perturbation, and its own."""
    folder = Path(__file__).parent
    rows = [row for row in read(folder / "p1.jsonl") if row["side"] == WITHOUT]
    return rows + [row for row in read(folder / "arms.jsonl") if row["arm"] == name]


def main(name: str, folder: Path) -> None:
    """Search, then train and test the winner."""
    own = folder / name  # the arms' runs have equal names
    own.mkdir(parents=True, exist_ok=True)
    queue = queue_of(own, name, Run, {"options": PLAIN})
    add_finished(queue, published(name), Run)
    search = search_of(name, queue, own)
    work(queue, search.open_runs, search.perform, own)


def search_of(name: str, queue: Queue[Run], folder: Path) -> ArmSearch:
    """Return the search of an arm."""
    options = Options(RECIPE, TRIALS, fresh=FRESH, test=True)
    space = {**SPACE, RHO: ["0", *ARMS[name].strengths]}
    search = ArmSearch(options, PLAIN, space, queue, folder, "val_loss", "min")
    search.arm = ARMS[name]
    return search


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
