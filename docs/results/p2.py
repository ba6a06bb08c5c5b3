"""P2 of protocol_p1_p2.md: how much general text the adapters of P1 have forgotten.

From the root of a clone: ``PYTHONPATH=. python docs/results/p2.py FOLDER_OF_P1 ROWS``. Rows that are there are kept, so
the same command goes on after it was stopped, and several processes may share the runs. An adapter that is not in P1's
folder is trained again, as P1 trained it.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from recipes.language.batches import padded, padding_id
from recipes.language.model import PACKAGED, answer_log_likelihood, load_base, load_tokenizer
from recipes.offline.texts import parts
from recipes.studies.ledger import Ledger, Row, commit
from recipes.studies.process import fit
from recipes.tune.search import KEY, SEARCH_SEEDS, Run, Search

RECIPE = "instruction_tuning"
OPTIONS = [
    *("--config", "recipes/instruction_tuning/configs/packaged.yaml", "--method", "efmlora"),
    *("--trainer.max_steps", "75", "--trainer.val_check_interval", "25", "--trainer.check_val_every_n_epoch", "null"),
    *("--model.exact_match_examples", "0", "--model.attn_implementation", "eager", "--trainer.limit_val_batches", "6"),
]
"""What every run of P1 had, beside what its row says."""
KINDS = ("privacy", "sentiment")
TEXTS = 400  # of each kind
BATCH = 16
MOST_TOKENS = 512


class Forgetting:
    """The base model, the texts, and what the base model's loss on them is."""

    def __init__(self, search: Search) -> None:
        self.search = search
        tokenizer = load_tokenizer(PACKAGED)
        self.padding = padding_id(tokenizer)
        self.texts = {}
        for kind in KINDS:
            encoded = [tokenizer(example.text)["input_ids"][:MOST_TOKENS] for example in parts(kind)["test"][:TEXTS]]
            # Similar lengths in a batch leave little padding.
            self.texts[kind] = sorted(encoded, key=len)
        self.base: Any = load_base(PACKAGED, "float32", None, {"attn_implementation": "eager"})
        self.untuned = self.losses(self.base)

    def measure(self, run: Run) -> Row:
        """Return the row of a run of P1; ``val_loss`` is that of the adapter which is measured."""
        folder = self.search.results.folder / run.name
        fitted = fit(RECIPE, folder, self.search.arguments(run.config, run.seed))
        # The folder of the adapter is named like the checkpoint beside it.
        adapter = folder / "fit" / "checkpoints" / Path(fitted["best"]).stem
        net = PeftModel.from_pretrained(self.base, str(adapter))
        found = self.losses(net)
        self.base = net.unload()
        rise = sum(found[kind] - self.untuned[kind] for kind in KINDS) / len(KINDS)
        val_loss = min(validation["val_loss"] for validation in fitted["validations"])
        losses = {"val_loss": val_loss, "losses": found, "untuned": self.untuned, "rise": rise}
        return {**run.key(), "trial": run.trial, **losses, "commit": commit()}

    @torch.no_grad()
    def losses(self, net: nn.Module) -> dict[str, float]:
        """Nats per token of each kind, without a text's first token, under autocast to bfloat16."""
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
    results = Ledger(folder / "results.jsonl", KEY)
    forgetting = Forgetting(Search(RECIPE, OPTIONS, space={}, radii=[], results=results))
    print("The untuned model:", forgetting.untuned)
    final, trials = [], []
    for row in results.rows:
        run = Run(**{name: row[name] for name in Run._fields})
        if row["stage"] == "final":
            final.append(run)
        elif row["seed"] == SEARCH_SEEDS[0]:
            trials.append(run)
    rows = Ledger(path, KEY)
    runs = [*final, *sorted(trials, key=lambda run: run.trial)]
    # Several processes may share them: each takes the first run that no other one does.
    while rows.perform_first([run for run in runs if rows.find(run) is None], forgetting.measure, print):
        print(f"{rows.rows[-1]['rise']:.4f}", flush=True)
        rows.reload()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
