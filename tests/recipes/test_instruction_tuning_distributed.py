"""The recipe on two processes under DDP, FSDP2 and FSDP1, from its YAML, against one process."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from launch import Results, launch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from recipe_runs import run

from recipes.instruction_tuning.module import InstructionTuning
from recipes.language.batches import LengthBatchSampler
from recipes.shared.sharding import BlocksAndFactors, blocks, check_strategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]

METHODS = {"ddp": ("efmlora", "fmlora", "fmlora_manual"), "fsdp2": ("efmlora", "fmlora", "fmlora_manual")}
METHODS["fsdp1"] = METHODS["ddp"][:2]
STRATEGIES = tuple(METHODS)
DDP = [f"ddp:{method}" for method in METHODS["ddp"]]
SHARDED = [f"fsdp2:{method}" for method in METHODS["fsdp2"]] + [f"fsdp1:{method}" for method in METHODS["fsdp1"]]
RUNS = DDP + SHARDED
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CHOICES = ["--data.init_args.dataset=packaged:openbook_qa", "--data.init_args.max_length=64"]
PACKED = ["--data.init_args.packing=true", "--data.init_args.max_length=128", "--data.init_args.batch_size=2"]
PROMPTS = ["Add 1", "Add 2", "Add 3", "Why?", "How many are there?"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def talker(tiny: str, tokenizer: Any, place: Path) -> str:
    """A tiny model that answers each question with other words, of another number."""
    config = transformers.AutoConfig.from_pretrained(tiny, tie_word_embeddings=False, initializer_range=0.3)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 4))
    model.save_pretrained(place / "talker")
    tokenizer.save_pretrained(place / "talker")
    return str(place / "talker")


@pytest.fixture(scope="module")
def common(talker: str, tokenizer: Any, place: Path) -> list[str]:
    """Arguments of all runs: the model, and data of which it knows some answers."""
    module = InstructionTuning(model=talker, lora=LORA, max_new_tokens=6)
    module.configure_model()
    module.eval()
    rows = [{"instruction": f"Add {i}", "input": "one " * (i % 7), "output": f"It is {i}."} for i in range(61)]
    for row in rows[::2]:
        messages = [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["input"])))},
        ]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        row["output"] = module.generate([ids])[0] or "nothing"
    data, prompts = place / "data.jsonl", place / "prompts.txt"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    prompts.write_text("\n".join(PROMPTS))
    return [
        f"--model.init_args.model={talker}",
        "--model.init_args.dtype=float32",
        "--model.init_args.max_new_tokens=6",
        "--trainer.precision=32-true",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        f"--data.init_args.dataset={data}",
        "--data.init_args.batch_size=4",
        f"--data.init_args.prompts={prompts}",
    ]


def training(method: str) -> list[str]:
    clip = "model.init_args" if method == "fmlora_manual" else "trainer"
    return ["--trainer.max_epochs=1", "--model.init_args.lora.lora_dropout=0", f"--{clip}.gradient_clip_val=1e-7"]


EVERY_STEP = [
    "--trainer.callbacks+=lightning_flatlora.AdapterCheckpoint",
    "--trainer.callbacks.init_args.every_n_train_steps=1",
    "--trainer.callbacks.init_args.save_top_k=-1",
    "--trainer.callbacks.init_args.filename={step}",
]


def cases(place: Path, common: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """All runs on two processes, in their order."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}

    def add(name: str, command: str, method: str, strategy: str, options: list[str]) -> None:
        arguments = {"command": command, "method": method, "strategy": strategy, "options": common + options}
        found[name] = ("recipe_runs:run", {"folder": str(place / name), **arguments})

    for name in RUNS:
        strategy, method = name.split(":")
        add(name, "fit", method, strategy, training(method))
    own = [*training("fmlora_manual"), "--model.init_args.sync_ascent=false"]
    add("ddp:own ascent", "fit", "fmlora_manual", "ddp", own)
    for strategy in STRATEGIES[:2]:
        add(f"{strategy}:packed", "fit", "efmlora", strategy, [*training("efmlora"), *PACKED])
    for strategy in ("ddp", "fsdp2"):
        add(f"{strategy}:choices", "test", "lora", strategy, [*CHOICES, "--trainer.limit_test_batches=3"])
    for strategy in STRATEGIES:
        checkpoint = str(saved(place / f"{strategy}:whole", "step=3.ckpt"))
        add(f"{strategy}:whole", "fit", "efmlora", strategy, EVERY_STEP)
        add(f"{strategy}:resumed", "fit", "efmlora", strategy, [f"--ckpt_path={checkpoint}"])
        add(f"{strategy}:test", "test", "lora", strategy, ["--model.init_args.exact_match_examples=7"])
        add(f"{strategy}:predict", "predict", "lora", strategy, ["--data.init_args.batch_size=2"])
    return found


def saved(folder: Path, name: str) -> Path:
    return folder / "runs" / "instruction_tuning" / "efmlora" / "version_0" / "checkpoints" / name


@pytest.fixture(scope="module")
def results(place: Path, common: list[str]) -> Results:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(place / "datasets"))
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it
        return launch(place, cases(place, common))


def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, method: str, options: list[str]) -> Any:
    monkeypatch.setattr("sys.argv", ["test"])  # LightningCLI warns of other arguments beside its own
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(tmp_path)  # and back
    return run(command, str(tmp_path), method, "one", options)


# -- training


def test_two_processes_equal_one_that_accumulates_their_batches(
    results: Results, common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulating = [*training("efmlora"), "--trainer.accumulate_grad_batches=2"]
    expected = alone(monkeypatch, tmp_path, "fit", "efmlora", common + accumulating)
    for rank in results["ddp:efmlora"]:
        assert rank["steps"] == expected["steps"] == 5
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-4, atol=1e-6)
        assert rank["logged"]["val_loss"] == pytest.approx(expected["logged"]["val_loss"], rel=1e-6)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_runs_equal_ddp(name: str, results: Results) -> None:
    whole = results[f"ddp:{name.split(':')[1]}"][0]
    for rank in results[name]:
        assert rank["steps"] == whole["steps"] == 5
        for key, weight in whole["weights"].items():
            torch.testing.assert_close(rank["weights"][key], weight, rtol=1e-5, atol=1e-7)
        for key in ("val_loss", "val_exact_match"):
            assert rank["logged"][key] == pytest.approx(whole["logged"][key], rel=1e-6), key


def test_packed_rows_train_the_same_under_ddp_and_fsdp2(results: Results) -> None:
    one, other = (results[f"{strategy}:packed"][0] for strategy in ("ddp", "fsdp2"))
    assert one["steps"] == other["steps"] > 2
    torch.testing.assert_close(one["weights"], other["weights"], rtol=1e-4, atol=1e-6)


def test_an_ascent_of_each_device_is_an_ascent_of_each_micro_batch(
    results: Results, common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*common, *training("fmlora_manual"), "--model.init_args.accumulate_grad_batches=2"]
    expected = flat(alone(monkeypatch, tmp_path, "fit", "fmlora_manual", options))
    torch.testing.assert_close(flat(results["ddp:own ascent"][0]), expected, rtol=1e-4, atol=1e-6)


def test_methods_differ(results: Results) -> None:
    assert (flat(results["ddp:efmlora"][0]) - flat(results["ddp:fmlora"][0])).abs().max() > 1e-5
    assert (flat(results["ddp:fmlora"][0]) - flat(results["ddp:own ascent"][0])).abs().max() > 1e-5
    torch.testing.assert_close(flat(results["ddp:fmlora"][0]), flat(results["ddp:fmlora_manual"][0]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_gradient_is_clipped(strategy: str, results: Results) -> None:
    clipped, free = (flat(results[f"{strategy}:{name}"][0], "lora_B").abs().max() for name in ("efmlora", "whole"))
    assert 0 < clipped < free / 2  # so little is left that Adam's epsilon counts


def flat(result: dict[str, Any], kind: str = "lora") -> torch.Tensor:
    """A run's weights as one vector."""
    return torch.cat([weight.flatten() for name, weight in result["weights"].items() if kind in name])


def test_fsdp1_units_are_blocks_and_factors(results: Results) -> None:
    assert results["fsdp1:efmlora"][0]["units"] == 1 + 2 + 2 * 2 * 2  # the rest, two blocks, their factors
    assert results["ddp:efmlora"][0]["units"] == 0


@pytest.mark.parametrize("name", RUNS)
def test_peft_loads_the_adapter(name: str, results: Results, place: Path, talker: str) -> None:
    method = name.split(":")[1]
    trained = results[name][0]["weights"]
    (folder,) = (place / name).glob(f"runs/instruction_tuning/{method}/version_0/checkpoints/last")
    model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(talker), str(folder))
    for key, weight in trained.items():
        torch.testing.assert_close(model.state_dict()[key], weight)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_resumed_in_mid_epoch_equals_the_uninterrupted_one(strategy: str, results: Results) -> None:
    whole, resumed = results[f"{strategy}:whole"], results[f"{strategy}:resumed"]
    for one, other in zip(whole, resumed, strict=True):
        assert one["steps"] == other["steps"]
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())
        assert one["logged"]["val_loss"] == other["logged"]["val_loss"]


# -- evaluation and prediction


def test_two_processes_measure_what_one_does(
    results: Results, common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*common, "--model.init_args.exact_match_examples=7"]
    expected = alone(monkeypatch, tmp_path, "test", "lora", options)["logged"]
    assert set(expected) == {"test_loss", "test_perplexity", "test_exact_match"}
    assert 0 < expected["test_exact_match"] < 1
    for strategy in STRATEGIES:
        for rank in results[f"{strategy}:test"]:
            assert rank["logged"] == pytest.approx(expected, rel=1e-5), strategy


def test_choices_are_ranked_as_by_one_process(
    results: Results, common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*common, *CHOICES, "--trainer.limit_test_batches=6"]
    expected = alone(monkeypatch, tmp_path, "test", "lora", options)["logged"]
    assert set(expected) == {"test_loss", "test_perplexity", "test_accuracy"}
    assert 0 < expected["test_accuracy"] < 1
    for strategy in ("ddp", "fsdp2"):
        assert results[f"{strategy}:choices"][1]["logged"] == pytest.approx(expected, rel=1e-5), strategy


def test_answers_are_those_of_one_process_in_the_order_of_the_prompts(
    results: Results, common: list[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch, tmp_path, "predict", "lora", common)
    expected = answers(tmp_path)
    assert [row["prompt"] for row in expected] == PROMPTS
    assert len({row["answer"] for row in expected}) > 2
    for strategy in STRATEGIES:
        assert results[f"{strategy}:predict"]
        assert answers(place / f"{strategy}:predict") == expected, strategy


def answers(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("runs/**/answers*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_evaluation_sees_each_example_once_on_any_number_of_ranks() -> None:
    one = list(chain.from_iterable(LengthBatchSampler(range(1, 42), 4, shuffle=False)))
    for ranks in (2, 3, 7, 16):
        shares = [
            list(LengthBatchSampler(range(1, 42), 4, num_replicas=ranks, rank=rank, shuffle=False))
            for rank in range(ranks)
        ]
        assert len({len(share) for share in shares}) == 1
        batches = chain.from_iterable(zip(*shares, strict=True))
        assert list(chain.from_iterable(batches)) == one


# -- what is refused, and the policy


def test_the_policy_wraps_blocks_and_what_is_trained(tiny: str) -> None:
    module = InstructionTuning(model=tiny, lora=LORA)
    module.configure_model()
    policy = BlocksAndFactors()
    wrapped = {name for name, part in module.named_modules() if policy(part, recurse=False, nonwrapped_numel=0)}
    assert all(policy(part, recurse=True, nonwrapped_numel=0) for part in module.modules())
    assert len(blocks(module)) == 2
    assert {name.split(".")[-1] for name in wrapped} == {"0", "1", "default"}
    factors = [module.get_submodule(name).parameters() for name in wrapped if name.endswith("default")]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert set(chain.from_iterable(factors)) == set(trained)


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
