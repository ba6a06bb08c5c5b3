"""The cost of a step in three programs: the recipe, a plain loop over transformers, and trl's SFTTrainer.

From the root of a clone: ``PYTHONPATH=. python docs/results/trainers.py FOLDER --precision 32-true``. All train LoRA of
rank 8 on every linear layer of the packaged SmolLM2-135M-Instruct, with AdamW, on the same conversations, 8 per step,
each cut at 140 tokens. They run alternately, each in its own process so that peak memory is measured separately. A row
for each run is appended to ``FOLDER/trainers.jsonl``.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

TOKENS = 140
BATCH = 8
STEPS = 12
WARM_UP = 4  # steps that are not measured
RATE = 2e-4
PROGRAMS = ("recipe", "plain loop", "trl")
METHODS = ("LoRA", "EFMLoRA")
QUESTION = "Count from one as far as you can, and say after each number whether it is even or odd."
ANSWER = " ".join(f"{number} is {'odd' if number % 2 else 'even'}." for number in range(1, 100))


def conversations() -> list[dict[str, Any]]:
    """Return conversations that all differ, and that are longer than the part that is used."""
    found = []
    for number in range(BATCH * STEPS):
        prompt = [{"role": "user", "content": f"{number}. {QUESTION}"}]
        found.append({"prompt": prompt, "completion": [{"role": "assistant", "content": ANSWER}]})
    return found


def run_recipe(method: str, precision: str, folder: Path) -> None:
    """Train with the instruction-tuning recipe."""
    from recipes.command_line.cli import RecipeCLI

    data = folder / "conversations.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    RecipeCLI(
        recipe="instruction_tuning",
        args=[
            *("fit", "--model.model=packaged", f"--data.dataset={data}", "--data.validation_share=0"),
            *(f"--data.batch_size={BATCH}", f"--data.max_length={TOKENS}", f"--model.learning_rate={RATE}"),
            *("--model.lora={r: 8, lora_alpha: 16, target_modules: all-linear}", f"--trainer.precision={precision}"),
            *(f"--trainer.max_steps={STEPS}", "--trainer.enable_checkpointing=false"),
            *("--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={folder}"),
            *((f"--method={method.lower()}", "--rho=0.05") if method != "LoRA" else ("--method=lora",)),
        ],
    )


def _adapted() -> tuple[Any, Any]:
    """Return the model with its adapter, weights in float32, and the tokenizer."""
    from peft import LoraConfig, get_peft_model

    from recipes.language.model import PACKAGED, load_base, load_tokenizer

    base: Any = load_base(PACKAGED, "float32", None)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora), load_tokenizer(PACKAGED)


def run_plain_loop(method: str, precision: str, folder: Path) -> None:
    """Train with a loop like that in transformers' documentation."""
    from lightning_flatlora.loops import EFMLoRA

    model, tokenizer = _adapted()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    if method == "EFMLoRA":
        EFMLoRA(model, optimizer, rho=0.05)
    examples = []
    for row in conversations():
        question = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)[:TOKENS]
        labels = [-100] * len(question) + whole[len(question) :]
        examples.append((torch.tensor(whole), torch.tensor(labels)))
    for step in range(STEPS):
        ids, labels = zip(*examples[step * BATCH : (step + 1) * BATCH], strict=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model(input_ids=torch.stack(ids), labels=torch.stack(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run_trl(method: str, precision: str, folder: Path) -> None:
    """Train with trl, whose loss counts only completions."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from lightning_flatlora.loops import EFMLoRA

    model, tokenizer = _adapted()
    args = SFTConfig(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        max_length=TOKENS,
        gradient_checkpointing=False,
        bf16=precision == "bf16-mixed",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    rows = Dataset.from_list(conversations())
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    if method == "EFMLoRA":
        EFMLoRA(trainer.model, trainer.create_optimizer(), rho=0.05)
    trainer.train()


RUNS = {"recipe": run_recipe, "plain loop": run_plain_loop, "trl": run_trl}


def measure(program: str, method: str, precision: str, folder: Path) -> dict[str, Any]:
    """Train in this process; return the median seconds of a step, and the peak memory in GB."""
    ends: list[float] = []
    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    RUNS[program](method, precision, folder)
    seconds = statistics.median(after - before for before, after in list(pairwise(ends))[WARM_UP - 1 :])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in kB
    return {"seconds": seconds, "tokens_per_second": BATCH * TOKENS / seconds, "peak_gb": peak, "steps": len(ends)}


def main() -> None:
    """Measure all programs, round by round, or only one, in the process that a round has started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("PROGRAM", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.one:
        found = measure(*options.one, options.precision, options.folder)
        (options.folder / "one.json").write_text(json.dumps(found))
        return
    runs = list(product(PROGRAMS, METHODS))
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "lightning")}
    for number in range(options.rounds):
        # Back and forth, so that a machine that slows down favours none.
        for program, method in runs if number % 2 == 0 else reversed(runs):
            subprocess.run([sys.executable, *sys.argv, "--one", program, method], check=True)
            found = json.loads((options.folder / "one.json").read_text())
            row = {"program": program, "method": method, "round": number, "precision": options.precision, **found}
            row |= {"threads": torch.get_num_threads(), "processor": platform.machine(), "versions": versions}
            print(row, flush=True)
            with (options.folder / "trainers.jsonl").open("a") as rows:
                rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
