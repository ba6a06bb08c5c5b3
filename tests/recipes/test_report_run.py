"""The command from start to end: the files it writes, the numbers in them, and what it leaves unchanged."""

import hashlib
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from report_models import save_adapter, save_base

from lightning_flatlora import Perturbation, find_pairs
from lightning_flatlora.flatness import (
    expected_sharpness,
    hessian_trace,
    lora_sharpness,
    sam_sharpness,
    top_eigenvalue,
    trained_factors,
)
from lightning_flatlora.full_weight import WeightNoise
from recipes.report import numbers
from recipes.report.adapters import load_adapter
from recipes.report.data import mean_loss, read_rows
from recipes.report.numbers import LOSS, NORM, RADIUS, Measured, sam_name
from recipes.report.options import Options, parse
from recipes.report.run import main, measure

PNG = b"\x89PNG\r\n"
SMALL = ["--points", "5", "--directions", "2", "--samples", "2", "--rho", "0.2", "0.5", "--batch_size", "4"]


def arguments(adapters: tuple[Path, ...], texts: Path, *more: str) -> list[str]:
    return ["--adapter", *map(str, adapters), "--data", str(texts), *SMALL, *more]


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def options(adapters: tuple[Path, Path], texts: Path) -> Options:
    return parse(arguments(adapters, texts, "--dtype", "float64"))


@pytest.fixture(scope="module")
def results(options: Options) -> list[Measured]:
    return measure(options)


def test_the_command_writes_the_report_and_nothing_else(
    adapters: tuple[Path, Path], base: Path, texts: Path, tmp_path: Path
) -> None:
    before = contents(base.parent)
    output = tmp_path / "report"
    main(arguments(adapters, texts, "--output", str(output)))
    assert contents(base.parent) == before
    assert sorted(path.name for path in output.iterdir()) == ["curves.png", "report.md", "surface.png"]
    assert all((output / name).read_bytes().startswith(PNG) for name in ("curves.png", "surface.png"))
    text = (output / "report.md").read_text()
    for said in ("# Flatness of small, large", "(curves.png)", "(surface.png)", "Hessian trace", "Compare with care"):
        assert said in text
    assert f"python -m recipes.report --adapter {adapters[0]}" in text

    main(arguments(adapters[:1], texts, "--output", str(output), "--surface=false", "--curvature=false"))
    assert sorted(path.name for path in output.iterdir()) == ["curves.png", "report.md"]
    text = (output / "report.md").read_text()
    assert "Hessian trace" not in text
    assert "surface" not in text.split("```sh")[0]
    assert "large" not in text.split("## How")[0]


def test_the_table_holds_what_the_instruments_say(options: Options, results: list[Measured]) -> None:
    adapted = load_adapter(options.adapters[1], options)
    loss, terms = mean_loss(adapted, read_rows(options), options)
    pairs = find_pairs(adapted.model).pairs
    perturbation, noise = Perturbation(pairs), WeightNoise(adapted.model)
    expected = expected_sharpness(loss, noise, options.sigma, samples=2, seed=0)
    trace = hessian_trace(loss, trained_factors(pairs), samples=2, seed=0)
    wanted = {
        "loss": loss(),
        **{sam_name(rho): sam_sharpness(loss, perturbation, rho).sharpness for rho in (0.2, 0.5)},
        **{f"LoRA-space sharpness, rho {rho}": lora_sharpness(loss, pairs, rho).sharpness for rho in (0.2, 0.5)},
        "expected sharpness, sigma 0.05": expected.sharpness,
        "largest Hessian eigenvalue": top_eigenvalue(loss, trained_factors(pairs), seed=0),
        "Hessian trace": trace.mean,
    }
    result = results[1]
    for name, value in wanted.items():
        assert result.value(name) == pytest.approx(value.item(), rel=1e-10), name
    errors = {quantity.name: quantity.error for quantity in result.quantities}
    assert errors["Hessian trace"] == pytest.approx(trace.standard_error.item(), rel=1e-10)
    assert errors["expected sharpness, sigma 0.05"] == pytest.approx(expected.standard_error.item(), rel=1e-10)
    about = {"adapter": "large", "rank": "4", "pairs": str(len(pairs)), "loss over": f"{terms} tokens"}
    assert result.about == result.about | about


def test_factors_numbers_are_those_of_the_layers(options: Options, results: list[Measured]) -> None:
    pairs = find_pairs(load_adapter(options.adapters[0], options).model).pairs
    by_hand = torch.stack([(pair.B.square().sum() - pair.A.square().sum()) / 2 for pair in pairs]).detach()
    found = {quantity.name: quantity for quantity in results[0].quantities}
    assert found["balancedness"].value == pytest.approx(by_hand.median().item())
    assert found["balancedness"].span == pytest.approx((by_hand.min().item(), by_hand.max().item()))
    conditions = torch.stack([torch.linalg.cond(pair.B.detach()) for pair in pairs])
    assert found["condition number of B"].span == pytest.approx((conditions.min().item(), conditions.max().item()))
    assert 0.5 < found[RADIUS].value <= 1
    model = load_adapter(options.adapters[0], options).model
    bases = [parameter for name, parameter in model.named_parameters() if "base_layer.weight" in name]
    assert len(bases) == len(pairs)
    norm = torch.cat([weight.flatten() for weight in bases]).norm().item()
    assert found[NORM].value == pytest.approx(norm)


def test_every_curve_and_the_surface_go_through_the_adapter(results: list[Measured]) -> None:
    for result in results:
        around, loss = result.landscape, pytest.approx(result.value(LOSS), rel=1e-10)
        assert around.steps.tolist() == [-1, -0.5, 0, 0.5, 1]
        assert around.adversarial[2].item() == loss
        assert around.random[:, 2].tolist() == [loss, loss]
        assert around.shares.tolist() == pytest.approx([-0.05, -0.025, 0, 0.025, 0.05])
        assert around.sigmas.tolist() == pytest.approx([0, 0.05, 0.1])
        assert around.noise[:, 0].tolist() == [loss, loss]
        assert around.surface is not None
        assert around.surface.shape == (5, 5)
        torch.testing.assert_close(around.surface[2], around.adversarial)
        assert around.adversarial[3] > around.adversarial[2] > around.adversarial[1]
        assert around.noise.std() > 0
        assert around.random[:, 0].std() > 0


def test_the_adversarial_curve_meets_the_sharpness(options: Options, results: list[Measured]) -> None:
    """At the radius of E, the loss on the curve has risen by the sharpness in the table."""
    # The points are half of the largest rho apart.
    largest = 2 * 0.2 * results[0].value(RADIUS)
    given = arguments((options.adapters[0].path,), options.data, "--dtype", "float64", "--curvature=false")
    (result,) = measure(parse([*given, "--surface=false", "--points", "9", "--rho", "0.2", repr(largest)]))
    rise = result.landscape.adversarial[5].item() - result.value(LOSS)
    assert rise == pytest.approx(result.value(sam_name(0.2)), rel=1e-10)


def test_an_adapter_without_a_layer_that_can_have_noise_is_refused(
    base: Path, root: Path, texts: Path, tmp_path: Path
) -> None:
    dora = save_adapter(root / "dora", base, use_dora=True)
    with pytest.raises(MisconfigurationException, match=r"dora on --base .* can't be measured: NoPairsError"):
        main(arguments((dora,), texts, "--output", str(tmp_path)))


def test_columns_are_checked_before_a_model_is_loaded(adapters: tuple[Path, Path], texts: Path, tmp_path: Path) -> None:
    data = tmp_path / "other.jsonl"
    data.write_text('{"question": "a"}\n')
    with pytest.raises(
        MisconfigurationException, match="--data has the columns question; a CAUSAL_LM adapter needs messages"
    ):
        main(arguments(adapters, data, "--base", str(tmp_path / "nowhere")))


def test_all_adapters_are_checked_before_the_first_is_measured(
    classifiers: tuple[Path, Path], base: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = save_adapter(tmp_path / "second", save_base(tmp_path / "base"), task="SEQ_CLS", classes=2)
    monkeypatch.setattr(numbers, "measure_numbers", lambda *args: pytest.fail("the first was measured"))
    with pytest.raises(MisconfigurationException, match="label must be a number from 0 to 1"):
        main(arguments((classifiers[0], second), texts, "--base", str(base), "--output", str(tmp_path / "report")))
