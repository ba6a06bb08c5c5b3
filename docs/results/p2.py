"""P2 of protocol_p1_p2.md: how much general text the adapters of P1 have forgotten.

From the root of a clone: ``python docs/results/p2.py FOLDER_OF_P1 ROWS``. Rows that are there are kept, so the same
command goes on after it was stopped.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from recipes.language.batches import padded, padding_id
from recipes.language.model import PACKAGED, answer_log_likelihood, load_base, load_tokenizer
from recipes.language.texts import parts
from recipes.shared.ledger import Ledger, Row, commit, entries
from recipes.studies.process import written
from recipes.studies.results import Results
from recipes.tune.search import KEY, SEARCH_SEEDS, Run

KINDS = ("privacy", "sentiment")
TEXTS = 400  # of each kind
BATCH = 16
MOST_TOKENS = 512


class Forgetting:
    """The base model, the texts, and what the base model's loss on them is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        """The row of a run of P1."""
        # The folder of the adapter is named like the checkpoint beside it.
        checkpoint = Path(written(self.folder / run.name / "fit.json")["best"])
        adapter = self.folder / run.name / "fit" / "checkpoints" / checkpoint.stem
        net = PeftModel.from_pretrained(self.base, str(adapter))
        found = self.losses(net)
        self.base = net.unload()
        rise = sum(found[kind] - self.untuned[kind] for kind in KINDS) / len(KINDS)
        return {**run.key(), "trial": run.trial, "losses": found, "untuned": self.untuned, "rise": rise}

    @torch.no_grad()
    def losses(self, net: nn.Module) -> dict[str, float]:
        """Nats per token of each kind, without a text's first token, in the precision of P1's evaluations."""
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
    """Measure the trials with the first seed and the final runs."""
    forgetting = Forgetting(folder)
    print("The untuned model:", forgetting.untuned)
    runs = []
    for row in Results(folder, KEY).rows:
        if row["seed"] == SEARCH_SEEDS[0] or row["stage"] == "final":
            runs.append(Run(**{name: row[name] for name in Run._fields}))
    rows = Ledger(path, entries(*KEY))
    for row in rows.complete(runs, lambda run: {**forgetting.measure(run), "commit": commit()}):
        print(f"{row['rise']:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
