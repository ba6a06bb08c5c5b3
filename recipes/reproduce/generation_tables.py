"""The tables of the paper on GPT-2 and E2E: the texts that it writes, and what a step of training costs."""

from collections.abc import Sequence

from recipes.reproduce.table import USUAL_GRIDS, Metric, Published, Table, Task

_E2E_METRICS = (
    Metric("bleu", "BLEU", 1),
    Metric("nist", "NIST", 1, 2),
    Metric("meteor", "METEOR", 1),
    Metric("rouge_l", "ROUGE-L", 1),
    Metric("cider", "CIDEr", 1, 2),
)
_COSTS = (
    Metric("seconds_per_step", "ms", 1000),
    Metric("seconds_per_step", "x LoRA", 1, 2, is_relative=True),
    Metric("peak_mib", "GiB", 1 / 1024, 2),
)
_E2E = "tuetschek/e2e_nlg, refs/convert/parquet"
_GPT2 = {"medium": "openai-community/gpt2-medium", "large": "openai-community/gpt2-large"}
_SHORT = ("--trainer.max_steps=100", "--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false")


def _gpt2(size: str, steps: int, metrics: Sequence[Metric], options: Sequence[str] = ()) -> Task:
    configs = ("e2e.yaml",) if size == "medium" else ("e2e.yaml", f"e2e_{size}.yaml")
    return Task(f"GPT-2 {size}", configs, steps, (_GPT2[size], _E2E), 2e-4, options=options, metrics=metrics)


def _scores(size: str, figures: str) -> dict[str, str]:
    names = [metric.key(size) for metric in _E2E_METRICS]
    return dict(zip(names, figures.split("/"), strict=True))


TABLE3 = Table(
    name="table3",
    title="Table 3: E2E NLG, GPT-2 medium and large",
    recipe="nlg",
    tasks={size: _gpt2(size, 26_290, _E2E_METRICS) for size in _GPT2},
    learning_rates=(1e-4, 2e-4, 4e-4),
    grids={"lora_dropout": (0.1, 0.0, 0.05, 0.2), **USUAL_GRIDS},
    seeds=(0, 1, 2),
    seed_options=("seed_everything", "data.seed"),
    unit="BLEU, METEOR and ROUGE-L in %, NIST and CIDEr as they are",
    choice="loss",
    keeps="last",
    trial_steps=3000,
    published=(
        Published("full fine-tuning", "arXiv 2106.09685", _scores("medium", "68.2/8.62/46.2/71.0/2.47")),
        Published(
            "LoRA",
            "arXiv 2106.09685",
            _scores("medium", "70.4/8.85/46.8/71.8/2.53") | _scores("large", "70.4/8.89/46.8/72.0/2.47"),
        ),
    ),
    notes=(
        "The loss per token on E2E's development set chooses; the last weights are tested, as in LoRA's repository.",
    ),
)
TABLE6 = Table(
    name="table6",
    title="Table 6: what a step of training GPT-2 on E2E costs",
    recipe="nlg",
    tasks={size: _gpt2(size, 100, _COSTS, _SHORT) for size in _GPT2},
    learning_rates=(2e-4,),
    # A step costs as much at every size that is not 0.
    grids={"lora_dropout": (0.1,), "rho": (0.05,), "lora_rho": (0.05,), "sigma": (0.05,), "alpha": (0.5,)},
    seeds=(0, 1, 2),
    seed_options=("seed_everything", "data.seed"),
    unit="cost: the median step's time, and the largest memory of tensors on the GPU in training",
    keeps="nothing",
    published=(
        Published("FMLoRA, the paper's", "arXiv 2508.00522", {f"{size} x LoRA": "2.1" for size in _GPT2}),
        Published("EFMLoRA, the paper's", "arXiv 2508.00522", {f"{size} x LoRA": "1.1 to 1.2" for size in _GPT2}),
    ),
    notes=("The paper states less than 0.4 GB of additional memory.",),
)
