"""P2 of protocol_p1_p2.md: how much the adapters of P1 have forgotten about general texts.

From the root of a clone: ``PYTHONPATH=. python docs/results/p2.py FOLDER_OF_P1 ROWS``. Existing rows are kept, so the
same command resumes after a stop. The runs are those of ``p1.jsonl`` and ``p1_control.jsonl``; an adapter that is not
in P1's folder is trained again, as in P1.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from recipes.language.batches import padded, padding_id
from recipes.language.model import PACKAGED, answer_log_likelihood, load_base, load_tokenizer
from recipes.offline.texts import parts
from recipes.studies.process import commit, fit
from recipes.studies.rows import Row, append, read
from recipes.tune.search import SEARCH_SEEDS, Run
from recipes.tune.space import RHO, arguments

RECIPE = "instruction_tuning"
OPTIONS = [
    *("--config", "recipes/instruction_tuning/configs/packaged.yaml", "--method", "efmlora"),
    *("--trainer.max_steps", "75", "--trainer.val_check_interval", "25", "--trainer.check_val_every_n_epoch", "null"),
    *("--model.exact_match_examples", "0", "--model.attn_implementation", "eager", "--trainer.limit_val_batches", "6"),
]
"""What every run of P1 had, beside what its row says."""
PLAIN = [option for option in OPTIONS if option not in ("--method", "efmlora")]
"""The same without a method."""
KINDS = ("privacy", "sentiment")
TEXTS = 400  # of each kind
BATCH = 16
MOST_TOKENS = 512


def run_of(row: Row) -> Run:
    """Return the run of a row."""
    return Run(**{name: row[name] for name in Run._fields})


def runs_of_p1() -> list[Run]:
    """Return the published runs of P1 and of its control."""
    published = Path(__file__).parent
    rows = read(published / "p1.jsonl") + read(published / "p1_control.jsonl")
    return [run_of(row) for row in rows]


def measure_all(runs: Sequence[Run], measure: Callable[[Run], Row], path: Path) -> None:
    """Append a row with the measurement of each run that has none yet."""
    done = [run_of(row) for row in read(path)]
    for run in runs:
        if run not in done:
            print(run, flush=True)
            row = {**run.key(), **measure(run), "commit": commit()}
            append(path, row)
            print(row, flush=True)


class Forgetting:
    """The base model, the texts, and the base model's loss on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = load_tokenizer(PACKAGED)
        self.padding = padding_id(tokenizer)
        self.texts = {}
        for kind in KINDS:
            encoded = [tokenizer(example.text)["input_ids"][:MOST_TOKENS] for example in parts(kind)["test"][:TEXTS]]
            # Similar lengths in a batch need little padding.
            self.texts[kind] = sorted(encoded, key=len)
        self.base: Any = load_base(PACKAGED, "float32", None, {"attn_implementation": "eager"})
        self.untuned = self.losses(self.base)

    def measure(self, run: Run) -> Row:
        """Return how much a run of P1 has forgotten; ``val_loss`` is that of the measured adapter."""
        folder = self.folder / run.name
        given = [*OPTIONS, *arguments(run.config), f"--rho={run.config[RHO]}"]
        fitted = fit(RECIPE, folder, [*given, f"--seed_everything={run.seed}", f"--data.seed={run.seed}"])
        # The adapter's folder has the name of the checkpoint next to it.
        adapter = folder / "fit" / "checkpoints" / Path(fitted["best"]).stem
        net = PeftModel.from_pretrained(self.base, str(adapter))
        found = self.losses(net)
        self.base = net.unload()
        rise = sum(found[kind] - self.untuned[kind] for kind in KINDS) / len(KINDS)
        val_loss = min(validation["val_loss"] for validation in fitted["validations"])
        return {"val_loss": val_loss, "losses": found, "untuned": self.untuned, "rise": rise}

    @torch.no_grad()
    def losses(self, net: nn.Module) -> dict[str, float]:
        """Return nats per token for each kind, without a text's first token, under autocast to bfloat16."""
        net.eval()
        found = {}
        for kind, encoded in self.texts.items():
            total, count = 0.0, 0
            for start in range(0, len(encoded), BATCH):
                inputs: dict[str, Tensor] = padded(encoded[start : start + BATCH], self.padding)
                labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
                with torch.autocast("cpu", torch.bfloat16):
                    log_likelihoods, tokens = answer_log_likelihood(net, inputs, labels)
                total -= float(log_likelihoods.sum())
                count += int(tokens.sum())
            found[kind] = total / count
        return found


def main(folder: Path, path: Path) -> None:
    """Measure the final runs and the trials with the first seed."""
    forgetting = Forgetting(folder)
    print("The untuned model:", forgetting.untuned)
    runs = [run for run in runs_of_p1() if run.stage == "final" or run.seed == SEARCH_SEEDS[0]]
    runs.sort(key=lambda run: run.trial)  # final runs have trial -1
    measure_all(runs, forgetting.measure, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
