"""All recipes from their YAML on two processes under DDP, FSDP2 and FSDP1, against one process."""

import json
from collections.abc import Callable
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Results, Runs, launch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import run
from recipe_sets import MODES, NAMES, PROMPTS, Recipe, prepared
from vqa_models import COLOURS

from recipes.language.batches import LengthBatchSampler
from recipes.training.sharding import BlocksAndFactors, check_strategy

pytestmark = [
    pytest.mark.timeout(1200)  # the first test waits for all runs
]

NO_DROPOUT = "--model.init_args.lora.lora_dropout=0"  # each rank draws its own dropout

# -- the runs

SHARDED = [
    *(("classification", "fsdp1"), ("classification by prompts", "fsdp2")),
    *(("clip_contrastive", "fsdp2"), ("siglip", "fsdp1"), ("all weights", "fsdp2"), ("clip_fewshot", "fsdp2")),
    *(("instruction_tuning", "fsdp2"), ("instruction_tuning", "fsdp1"), ("vqa", "fsdp2")),
]
"""What is trained by EFMLoRA, or by itself, in shards; instruction tuning stands for nlg, whose module is alike."""
OF_FMLORA = (("ddp", "fmlora"), ("fsdp1", "fmlora"), ("fsdp2", "fmlora"))
"""Of contrastive training: its loss is over the batches of all ranks."""
RESUMED = {"clip_contrastive": "ddp", "clip_fewshot": "fsdp1", "instruction_tuning": "fsdp2"}
"""One recipe for each way in which batches are drawn; the last one in packed rows."""
MEASURED = {
    "instruction_tuning": ("fsdp1", {"test_loss", "test_perplexity", "test_exact_match"}),
    "choices": ("ddp", {"test_loss", "test_perplexity", "test_accuracy"}),
    "nlg": ("ddp", {"test_loss", "test_bleu", "test_nist"}),
    "vqa": ("fsdp2", {"test_loss", "test_exact_match", "test_exact_match_colour", "test_exact_match_yes_no"}),
}
PREDICTED = {"clip_fewshot": "ddp", "instruction_tuning": "fsdp2", "vqa": "fsdp1"}
EVERY_STEP = [
    "--trainer.callbacks+=lightning_flatlora.AdapterCheckpoint",
    "--trainer.callbacks.init_args.every_n_train_steps=1",
    "--trainer.callbacks.init_args.save_top_k=-1",
    "--trainer.callbacks.init_args.filename={step}",
    "--model.init_args.lora.lora_dropout=0.2",
]


def training(name: str, method: str) -> list[str]:
    """Arguments of short runs without dropout; instruction tuning is clipped so strongly that Adam's epsilon counts."""
    options = [NO_DROPOUT] if method != "full" else []
    if name == "instruction_tuning":
        options += ["--trainer.max_epochs=1", "--trainer.gradient_clip_val=1e-7"]
    elif name in ("clip_contrastive", *MODES):  # so that the gradient's size matters
        options += ["--trainer.gradient_clip_val=null"]
    return options


CHOICES = ["--data.init_args.dataset=packaged:openbook_qa", "--data.init_args.max_length=64"]
PACKED = ["--data.init_args.packing=true", "--data.init_args.max_length=128", "--data.init_args.batch_size=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def recipes(place: Path, tiny: str, tokenizer: Any) -> dict[str, Recipe]:
    return {name: prepared(name, place / name, tiny, tokenizer) for name in (*NAMES, *MODES)}


@pytest.fixture(scope="module")
def results(place: Path, recipes: dict[str, Recipe]) -> Results:
    """All runs on two processes, by recipe, strategy, and method or other subject."""
    cases: Runs = {}

    def add(
        name: str, strategy: str, method: str, about: str = "", command: str = "fit", options: list[str] | None = None
    ) -> None:
        recipe = recipes[name]
        options = training(name, method) if options is None else options
        options = [*EVERY_RUN, *recipe.options, *recipe.ranks, *options]
        case = f"{name}:{strategy}:{about or method}"
        cases[case] = partial(run, command, str(place / case), recipe.folder, method, strategy, options)

    for name, strategy in [*product((*NAMES, *MODES), ("ddp",)), *SHARDED]:
        add(name, strategy, MODES.get(name, "efmlora"))
    for strategy, method in OF_FMLORA:
        add("clip_contrastive", strategy, method)
    for name, strategy in RESUMED.items():
        whole = f"{name}:{strategy}:whole"
        version = place / whole / "runs" / name / "efmlora" / "version_0"
        steps = [*EVERY_STEP, *(PACKED if name == "instruction_tuning" else [])]
        add(name, strategy, "efmlora", "whole", options=steps)
        resumed = [*steps, f"--ckpt_path={version / 'checkpoints' / 'step=2.ckpt'}"]
        add(name, strategy, "efmlora", "resumed", options=resumed)
    for name, (strategy, _) in MEASURED.items():
        recipe = "instruction_tuning" if name == "choices" else name
        add(recipe, strategy, "lora", name, "test", measuring(name, 3))
    for name, strategy in PREDICTED.items():
        add(name, strategy, "lora", "predict", "predict", [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(place / "datasets"))
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # caused by Lightning
        return launch(place, cases, timeout=1000)


EVERY_RUN = ["--trainer.precision=32-true", "--trainer.log_every_n_steps=1", "--trainer.enable_model_summary=false"]


def measuring(name: str, batches: int) -> list[str]:
    """Arguments of an evaluation; for choices, with this number of batches per process."""
    if name == "choices":
        return [*CHOICES, f"--trainer.limit_test_batches={batches}"]
    return ["--model.init_args.exact_match_examples=7"] if name == "instruction_tuning" else []


Alone = Callable[..., dict[str, Any]]


@pytest.fixture
def alone(recipes: dict[str, Recipe], tmp_path: Path, command_line: None, own_datasets: None) -> Alone:
    """Run the same command in this process only."""

    def command(name: str, method: str, *options: str, what: str = "fit") -> dict[str, Any]:
        recipe = recipes[name]
        given = [*EVERY_RUN, *recipe.options, *options]
        return run(what, str(tmp_path), recipe.folder, method, "one", given)

    return command


def assert_same_weights(one: dict[str, Any], other: dict[str, Any], rtol: float) -> None:
    assert one["steps"] == other["steps"] > 2
    assert one["weights"].keys() == other["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, other["weights"][name], rtol=rtol, atol=rtol / 100)


def evaluated(result: dict[str, Any]) -> dict[str, float]:
    """The metrics over all data, rather than those of a rank's last batch."""
    return {name: value for name, value in result["logged"].items() if name.startswith(("val_", "test_"))}


def assert_same_protocol(folder: Path, other: Path) -> None:
    """Two few-shot runs have measured the same before, during and after training."""
    one, two = (json.loads(next(place.glob("runs/**/result.json")).read_text()) for place in (folder, other))
    for part in ("zero_shot", "validation", "test"):
        assert one[part] == pytest.approx(two[part], rel=1e-4), part


# -- training


@pytest.mark.parametrize("name", [*NAMES, *MODES])
def test_two_processes_equal_one_with_the_batches_of_both(
    name: str, results: Results, recipes: dict[str, Recipe], alone: Alone, place: Path, tmp_path: Path
) -> None:
    method, recipe = MODES.get(name, "efmlora"), recipes[name]
    expected = alone(name, method, *training(name, method), *recipe.alone)
    case = f"{name}:ddp:{method}"
    for rank in results[case]:
        assert_same_weights(rank, expected, recipe.rtol)
        assert evaluated(rank) == pytest.approx(evaluated(expected), rel=1e-5)
    assert evaluated(expected)
    if name == "clip_fewshot":
        assert_same_protocol(place / case, tmp_path)


@pytest.mark.parametrize(("name", "strategy"), SHARDED)
def test_sharded_models_train_as_whole_ones(
    name: str, strategy: str, results: Results, recipes: dict[str, Recipe], place: Path
) -> None:
    method = MODES.get(name, "efmlora")
    case, whole = f"{name}:{strategy}:{method}", f"{name}:ddp:{method}"
    for rank in results[case]:
        assert_same_weights(rank, results[whole][0], 1e-5)
        assert evaluated(rank) == pytest.approx(evaluated(results[whole][0]), rel=1e-6)
    if name == "clip_fewshot":
        assert_same_protocol(place / case, place / whole)


@pytest.mark.parametrize(("strategy", "method"), OF_FMLORA[1:])
def test_both_passes_of_fmlora_are_the_same_on_sharded_models(strategy: str, method: str, results: Results) -> None:
    expected = results["clip_contrastive:ddp:fmlora"][0]
    one_pass = results["clip_contrastive:ddp:efmlora"][0]["weights"]
    assert any((weight - one_pass[name]).abs().max() > 1e-5 for name, weight in expected["weights"].items())
    for rank in results[f"clip_contrastive:{strategy}:{method}"]:
        assert_same_weights(rank, expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("siglip", 1 + 1 + 4 + 4 * 3 * 2),  # the rest, the loss, the blocks, and the factors of q, k and v in each
        ("instruction_tuning", 1 + 2 + 2 * 2 * 2),
    ],
)
def test_fsdp1_units_are_blocks_and_factors(name: str, units: int, results: Results) -> None:
    assert results[f"{name}:fsdp1:efmlora"][0]["units"] == units
    assert results[f"{name}:ddp:efmlora"][0]["units"] == 0


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_mid_epoch_equals_the_uninterrupted_one(name: str, results: Results) -> None:
    whole, resumed = (results[f"{name}:{RESUMED[name]}:{about}"] for about in ("whole", "resumed"))
    for one, other in zip(whole, resumed, strict=True):
        assert one["steps"] == other["steps"] > 2
        assert one["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(weight, other["weights"][key]) for key, weight in one["weights"].items())
        assert evaluated(one) == evaluated(other)


# -- evaluation and prediction


@pytest.mark.parametrize("name", MEASURED)
def test_two_processes_measure_what_one_does(
    name: str, results: Results, alone: Alone, place: Path, tmp_path: Path
) -> None:
    recipe = "instruction_tuning" if name == "choices" else name
    strategy, metrics = MEASURED[name]
    expected = alone(recipe, "lora", *measuring(name, 6), what="test")["logged"]
    assert metrics <= set(expected)
    for metric in {"test_exact_match", "test_accuracy"} & set(expected):
        assert 0 < expected[metric] < 1
    case = f"{recipe}:{strategy}:{name}"
    for rank in results[case]:
        assert rank["logged"] == pytest.approx(expected, rel=1e-5)
    for path in tmp_path.glob("runs/**/test_*.tsv"):  # texts and references
        (together,) = (place / case).glob(f"runs/**/{path.name}")
        assert together.read_text() == path.read_text()
        assert len(together.read_text().splitlines()) > 7


@pytest.mark.parametrize("name", PREDICTED)
def test_predictions_are_those_of_one_process_in_the_order_of_the_inputs(
    name: str, results: Results, alone: Alone, place: Path, tmp_path: Path
) -> None:
    alone(name, "lora", what="predict")
    case = f"{name}:{PREDICTED[name]}:predict"
    assert results[case]
    expected, found = predictions(tmp_path), predictions(place / case)
    inputs = [row.get("image", row.get("prompt")) for row in expected]
    assert inputs == (PROMPTS if name == "instruction_tuning" else sorted(inputs))
    assert len(inputs) == (39 if name == "clip_fewshot" else 5)
    assert len({row.get("answer", row.get("probability")) for row in expected}) > 1
    if name == "vqa":
        assert [row["prompt"] for row in expected] == [f"is it {COLOURS[i % 3]}?" for i in range(5)]
    for row, wanted in zip(found, expected, strict=True):
        near = {key: pytest.approx(value, rel=1e-4) for key, value in wanted.items() if key == "probability"}
        assert row == wanted | near


def predictions(folder: Path) -> list[dict[str, Any]]:
    (path,) = chain(folder.glob("runs/**/predictions.jsonl"), folder.glob("runs/**/answers*.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_evaluation_sees_each_example_once_on_any_number_of_ranks() -> None:
    one = list(chain.from_iterable(LengthBatchSampler(range(1, 42), 4, shuffle=False)))
    for ranks in (2, 3, 7, 16):
        samplers = [LengthBatchSampler(range(1, 42), 4, 0, ranks, rank, shuffle=False) for rank in range(ranks)]
        shares = [list(sampler) for sampler in samplers]
        assert len({len(share) for share in shares}) == 1
        batches = chain.from_iterable(zip(*shares, strict=True))
        assert list(chain.from_iterable(batches)) == one


# -- what is refused, and the policy


@pytest.mark.parametrize(
    ("settings", "quantization", "lora", "message"),
    [
        ({}, None, {}, r"auto_wrap_policy.*strategies/fsdp1.yaml"),
        ({"auto_wrap_policy": BlocksAndFactors()}, "4bit", {}, "quantization='4bit'.*use ddp"),
        ({"auto_wrap_policy": BlocksAndFactors()}, None, {"use_dora": True}, "DoRA.*FSDP2 or ddp"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings: Any, quantization: Any, lora: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        check_strategy(FSDPStrategy(**settings), quantization, lora)
