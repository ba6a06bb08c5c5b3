"""Rounding of a base, a merged adapter and its factors, compared with rounding dense models by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from report_models import make_tokenizer, save_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_flatlora import find_pairs
from recipes.report.adapters import Adapted, load_adapter
from recipes.report.data import mean_loss, read_rows
from recipes.report.options import AdapterFolder, Options
from recipes.report.rounding import (
    AGAIN,
    APART,
    FACTORS,
    MERGED,
    NONE,
    RATIO,
    UPDATE,
    WAYS,
    check_roundable,
    measure_rounding,
    rounded,
    steps,
)
from recipes.report.run import main

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
WIDTH = 72  # a group of 64, and one of 8
Load = Callable[..., tuple[Adapted, Options]]


def by_hand(weight: Tensor, bits: int, inputs: int = -1) -> Tensor:
    """Round with NumPy in float64, row by row and group by group."""
    rows = weight.detach().double().movedim(inputs, -1)
    result = np.empty(rows.shape)
    for place in np.ndindex(*rows.shape[:-1]):
        for start in range(0, rows.shape[-1], 64):
            group = rows[place][start : start + 64].numpy()
            step = np.abs(group).max() / (2 ** (bits - 1) - 1)
            result[place][start : start + 64] = np.rint(group / step) * step
    return torch.from_numpy(result).movedim(-1, inputs)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("inputs", [1, 5, 64, 70, 130])
def test_rounding_is_that_by_hand(bits: int, inputs: int) -> None:
    weight = torch.randn(2, 3, inputs, dtype=torch.float64)
    result = rounded(weight, bits)
    torch.testing.assert_close(result, by_hand(weight, bits), rtol=1e-6, atol=0)
    torch.testing.assert_close(rounded(result, bits), result, rtol=1e-6, atol=0)
    step = steps(weight, bits)
    assert len(step) == 6 * math.ceil(inputs / 64)
    assert (result - weight).abs().max() <= step.max() * 0.500001
    assert rounded(weight.float(), bits).dtype == torch.float32


def test_a_group_of_zeros_stays() -> None:
    assert not rounded(torch.zeros(2, 5), bits=4).any()


# -- whole models

TWO_HEADS: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
OF_EXPERTS: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "lora_dropout": 0.0,
}
SIZES: dict[str, Any] = {"hidden_size": WIDTH, "vocab_size": 20, "pad_token_id": 0, "eos_token_id": 1}
EXPERTS = 3
NEEDS_EXPERTS = pytest.mark.skipif(not hasattr(ParamWrapper, "get_delta_factors"), reason="an older peft")


def llama() -> tuple[Any, dict[str, Any], str]:
    return transformers.LlamaConfig(intermediate_size=80, **TWO_HEADS, **SIZES), {"target_modules": ["q_proj"]}, "none"


def gpt2() -> tuple[Any, dict[str, Any], str]:
    """The output layer shares the embedding's parameter, and has no adapter."""
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=WIDTH, n_positions=16, vocab_size=20, eos_token_id=1)
    return config, {"target_modules": ["wte", "c_attn"], "init_lora_weights": False}, "c_attn"


def mixtral() -> tuple[Any, dict[str, Any], str]:
    return (
        transformers.MixtralConfig(intermediate_size=80, num_local_experts=EXPERTS, **TWO_HEADS, **SIZES),
        OF_EXPERTS,
        "none",
    )


def gpt_oss() -> tuple[Any, dict[str, Any], str]:
    """Square experts that are stored transposed."""
    config = transformers.GptOssConfig(
        intermediate_size=WIDTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        head_dim=36,
        layer_types=["full_attention"],
        **TWO_HEADS,
        **SIZES,
    )
    return config, OF_EXPERTS, "experts"


FAMILIES = [llama, gpt2, pytest.param(mixtral, marks=NEEDS_EXPERTS), pytest.param(gpt_oss, marks=NEEDS_EXPERTS)]


@pytest.fixture
def load(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Save a base and an adapter, and load both."""
    # The grouped matrix product of experts doesn't support float64.
    one_by_one = "get_correct_experts_implementation"
    monkeypatch.setattr(transformers.PreTrainedModel, one_by_one, lambda *args: "eager", raising=False)

    def load(family: Any = llama, dtype: Any = "float64", **more: Any) -> tuple[Adapted, Options]:
        config, lora, _ = family()
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        if not base.exists():
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
            make_tokenizer().save_pretrained(base)
            save_adapter(adapter, base, **lora | more)
        options = Options([str(adapter)], texts, dtype=dtype, bits=[4])
        return load_adapter(AdapterFolder("x", adapter), options), options

    return load


def measured(adapted: Adapted, options: Options, *bits: int) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    return measure_rounding(mean_loss(adapted, read_rows(options), options)[0], adapted.pairs, bits)


def loss_of(model: nn.Module, adapted: Adapted, options: Options) -> float:
    loss, _ = mean_loss(replace(adapted, model=model), read_rows(options), options)
    return loss().item()


def round_adapter(folder: Path, bits: int) -> None:
    """Round the factors in an adapter's file by hand."""
    path = folder / "adapter_model.safetensors"
    factors = load_file(path)
    for name, factor in factors.items():
        if "experts" in name and "lora_B" in name:
            of_experts = by_hand(factor.reshape(len(factor), -1, EXPERTS), bits, inputs=1)
            factors[name] = of_experts.reshape(factor.shape).float()
        else:
            # peft keeps an embedding's factors transposed.
            factors[name] = by_hand(factor, bits, inputs=0 if "embedding" in name else -1).float().contiguous()
    save_file(factors, path, {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_dense_models(family: Any, load: Load, tmp_path: Path) -> None:
    bits = 3
    adapted, options = load(family)
    losses, layers = measured(adapted, options, bits)
    merged = load(family)[0].model.merge_and_unload()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    changed = {name: W for name, W in base.named_parameters() if not torch.equal(W, merged.get_parameter(name))}
    assert len(changed) == len(adapted.pairs)
    _, _, transposed = family()
    sizes: dict[str, list[Tensor]] = {way: [] for way in WAYS}
    updates, all_steps = [], []
    for name, W0 in changed.items():
        inputs = -2 if transposed in name else -1
        W = merged.get_parameter(name)
        near, update = by_hand(W0, bits, inputs), (W - W0).detach()
        sizes[MERGED].append(by_hand(W, bits, inputs))
        sizes[AGAIN].append(by_hand(near + update, bits, inputs))
        sizes[APART].append(near + update)
        sizes[NONE].append(near)
        updates.append(update.square().mean().sqrt().item())
        rows = W0.detach().movedim(inputs, -1)
        groups = torch.cat([part.abs().amax(-1).flatten() for part in rows.split(64, -1)])
        all_steps.append((groups / (2 ** (bits - 1) - 1)).square().mean().sqrt().item())
    if family is gpt2:  # its output layer stays
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    for way in (MERGED, AGAIN, APART, NONE):
        for name, weight in zip(changed, sizes[way], strict=True):
            base.get_parameter(name).data = weight
        assert losses.loc["3", way] == pytest.approx(loss_of(base, adapted, options), rel=1e-6), way
    round_adapter(tmp_path / "adapter", bits)
    assert losses.loc["3", FACTORS] == pytest.approx(loss_of(load(family)[0].model, adapted, options), rel=1e-6)
    assert sorted(layers[UPDATE]) == pytest.approx(sorted(updates), rel=1e-6)
    assert sorted(layers["3"]) == pytest.approx(sorted(all_steps), rel=1e-6)
    assert losses.loc["3", RATIO] == pytest.approx(np.median(layers[UPDATE] / layers["3"]))
    assert losses.loc["3"].nunique() == len(WAYS) + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_without_rounding_merged_is_the_adapters_own_loss(family: Any, load: Load) -> None:
    adapted, options = load(family)
    losses, _ = measured(adapted, options, 24)
    own = loss_of(adapted.model, adapted, options)
    for bits, tolerance in (("float", 1e-12), ("24", 1e-6)):
        assert list(losses.loc[bits, [MERGED, AGAIN, APART, FACTORS]]) == pytest.approx([own] * 4, rel=tolerance)
    with adapted.model.disable_adapter():
        assert losses.loc["float", NONE] == pytest.approx(loss_of(adapted.model, adapted, options), rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.* have invalid shape")  # peft's warning about its own bias
def test_a_bias_that_is_trained_with_B_is_kept(load: Load) -> None:
    adapted, options = load(gpt2, lora_bias=True, target_modules=["c_attn"])
    (reader,) = adapted.pairs[0].readers
    nn.init.normal_(reader.bias)  # type: ignore[union-attr, arg-type]
    losses, _ = measured(adapted, options, 24)
    own = loss_of(adapted.model, adapted, options)
    assert losses.loc["float", MERGED] == pytest.approx(own, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fails_at", [None, 0, 1, 9])
def test_all_parameters_are_the_same_tensors_as_before(family: Any, fails_at: int | None, load: Load) -> None:
    adapted, options = load(family, dtype="bfloat16")
    loss, _ = mean_loss(adapted, read_rows(options), options)
    before = {name: (id(W), W.detach().clone()) for name, W in adapted.model.named_parameters(remove_duplicate=False)}
    calls = []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) - 1 == fails_at:
            raise RuntimeError("out of memory")
        return loss()

    if fails_at is None:
        measure_rounding(failing, adapted.pairs, [3])
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            measure_rounding(failing, adapted.pairs, [3])
    after = dict(adapted.model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    for name, (identity, W) in before.items():
        assert id(after[name]) == identity, name
        assert torch.equal(after[name], W), name


def test_16_bits_are_widened_before_they_are_rounded(load: Load) -> None:
    adapted, _ = load(dtype="bfloat16")
    layer: Any = adapted.pairs[0].layers[0]
    W0, update = layer.base_layer.weight, layer.get_delta_weight("default").detach()
    read = []

    def reading() -> Tensor:
        read.append(layer.base_layer.weight)
        return torch.zeros(())

    measure_rounding(reading, adapted.pairs, [8])
    expected = {MERGED: W0.float() + update.float(), APART: W0.float()}
    for way, weight in expected.items():
        found = read[len(WAYS) + WAYS.index(way)]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, rounded(weight, 8).bfloat16())


# -- what is refused


def quantized(model: nn.Module) -> None:
    model.get_submodule("base_model.model.0.base_layer").weight.data = torch.zeros(3, 4, dtype=torch.int8)


@pytest.mark.parametrize(
    ("module", "more", "change", "says"),
    [
        (nn.Linear(4, 3), {}, quantized, "the Linear under .*0.lora_B.* If the base is quantized, give .* --base"),
        (nn.Linear(4, 3), {"use_dora": True}, None, "without DoRA: it can't round the Linear under"),
        (nn.Conv1d(4, 3, 2), {}, None, "it can't round the Conv1d under"),
    ],
)
def test_layers_that_can_not_be_rounded(module: nn.Module, more: dict[str, Any], change: Any, says: str) -> None:
    config = LoraConfig(r=2, target_modules=["0", "1"], **more)
    model = get_peft_model(nn.Sequential(module, nn.Linear(4, 3)), config)
    if change:
        change(model)
    with pytest.raises(ValueError, match=says):
        check_roundable(find_pairs(model).pairs)


@pytest.mark.parametrize("bits", ["1", "25"])
def test_numbers_of_bits_that_make_no_sense(bits: str, adapters: tuple[Path, Path], texts: Path) -> None:
    with pytest.raises(MisconfigurationException, match=rf"--bits must be whole numbers from 2 to 24, got \[4, {bits}"):
        main(["--adapter", str(adapters[0]), "--data", str(texts), "--bits", "4", bits])


# -- in the report


def test_the_report_holds_table_picture_and_layers(adapters: tuple[Path, Path], texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    short = ["--points=3", "--directions=2", "--samples=2", "--curvature=false", "--surface=false"]
    given = ["--adapter", *map(str, adapters), "--data", str(texts), "--output", str(output), *short]
    main([*given, "--bits", "8", "3"])
    assert sorted(path.name for path in output.iterdir()) == ["curves.png", "layers.csv", "report.md", "rounding.png"]
    text = (output / "report.md").read_text()
    table = text.split("## After rounding")[1].split("\n\n")[2].splitlines()
    assert table[0] == f"| adapter | bits | {RATIO} | {' | '.join(WAYS)} |"
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table[2:]]
    assert rows == [[label, bits] for label in ("small", "large") for bits in ("float", "8", "3")]
    assert (output / "rounding.png").read_bytes().startswith(b"\x89PNG")
    layers = pandas.read_csv(output / "layers.csv")
    assert list(layers) == ["adapter", "layer", "update", "8", "3"]
    assert layers["adapter"].value_counts().to_dict() == {"small": 6, "large": 6}
    assert (layers["3"] / layers["8"]).to_numpy() == pytest.approx(127 / 3)

    main(given)
    assert sorted(path.name for path in output.iterdir()) == ["curves.png", "report.md"]
    assert "ounding" not in (output / "report.md").read_text().split("```sh")[0]
