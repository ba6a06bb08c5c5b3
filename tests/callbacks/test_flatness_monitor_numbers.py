"""FlatnessMonitor logs the instruments' numbers, at the requested steps."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FRONT_ENDS, ByHand, Classifier, build, calling, fit, make_loader, make_net, same, weights
from monitored_runs import ALL_BUT_EMA, KeepsPoints, Recorder, measured
from torch import nn

from lightning_flatlora import CosineRho, EFMLoRA, FlatnessMonitor, Perturbation, find_pairs
from lightning_flatlora.baselines import RandomPerturbation
from lightning_flatlora.flatness import DEFAULT_MEASURES, MEASURES, MeanLoss, Point, ema_sharpness, measure
from lightning_flatlora.full_weight import WeightNoise


def freeze_one_B(trainer: Any, pl_module: Any) -> None:
    find_pairs(pl_module).pairs[0].B.requires_grad_(trainer.current_epoch == 0)


def test_every_measure_goes_on_where_a_pair_rests(tmp_path: Any) -> None:
    monitor = FlatnessMonitor(every_n_epochs=1, batches=2, measures=list(MEASURES), sigma=0.1)
    rows = measured(tmp_path, Classifier(), [EFMLoRA(0.5), monitor, calling(on_train_epoch_start=freeze_one_B)])
    assert [math.isfinite(row["gradient_residual"]) for row in rows] == [True, True]


def measured_by_hand(net: nn.Module, numbers: list[int], measures: list[str]) -> dict[str, float]:
    """The same numbers, computed with the package's functions on some of the loader's batches."""
    net.eval()
    batches = list(make_loader())
    losses = [lambda i=i: nn.functional.cross_entropy(net(batches[i][0]), batches[i][1]) for i in numbers]
    perturbation = Perturbation(find_pairs(net).pairs)
    point = Point(MeanLoss(losses), perturbation, 0.3, noise=WeightNoise(net), sigma=0.1, samples=4)
    return {name: float(value) for name, value in measure(point, measures).items()}


def test_the_numbers_are_those_of_the_instruments(tmp_path: Any) -> None:
    """With constant weights, each measurement equals that of the functions, on the first batches, in eval mode."""
    net = make_net(0.3)
    monitor = FlatnessMonitor(0.3, every_n_steps=3, batches=3, measures=ALL_BUT_EMA, samples=4, sigma=0.1)
    rows = measured(tmp_path, Classifier(net=net, lr=0.0), [monitor])
    expected = measured_by_hand(net, [0, 1, 2], ALL_BUT_EMA)
    assert rows == [expected] * 4
    assert expected["sharpness"] > 0
    assert expected["condition_B"] == math.inf  # B is still 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_for_which_the_step_gives_no_loss_are_left_out(tmp_path: Any) -> None:
    module = Classifier(net=make_net(0.3), lr=0.0)
    module.inside.append(lambda module, batch_idx: "skip" if batch_idx == 1 else None)
    monitor = FlatnessMonitor(0.3, every_n_steps=3, batches=3, measures=["sharpness"])
    with pytest.warns(UserWarning, match="returned None for 1 of 3 probe batches: left out"):
        rows = measured(tmp_path, module, [monitor])
    assert len(rows) > 2
    assert rows == [measured_by_hand(module.net, [0, 2], ["sharpness"])] * len(rows)


def test_the_defaults_are_cheap_and_beside_efmlora_measure_its_average(tmp_path: Any) -> None:
    names = {}
    for front_end in ("plain", "efmlora"):
        module, callbacks, kwargs = build(front_end)
        rows = measured(tmp_path, module, [*callbacks, FlatnessMonitor(0.5)], **kwargs)
        assert len(rows) == 2  # once per epoch
        names[front_end] = set(rows[0])
        assert same(float(module.trainer.callback_metrics["flatness/sharpness"]), rows[-1]["sharpness"])
    assert names["plain"] == {
        *("loss", "sharpness", "lora_sharpness", "balancedness", "condition_A", "condition_B", "radius")
    }
    assert names["efmlora"] - names["plain"] == {"ema_sharpness", "ema_gap", "ema_cosine"}
    assert DEFAULT_MEASURES == ("sharpness", "lora_sharpness", "balancedness", "condition", "radius")


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_without_a_radius_of_its_own_it_takes_the_methods(tmp_path: Any, front_end: str) -> None:
    """The schedule of rho, scope and estimator too: the realized radius shows which were used."""
    rho = CosineRho(0.8, 0.1)
    module, callbacks, kwargs = build(front_end, rho, estimator="projected", norm_scope="layer")
    monitor = KeepsPoints(every_n_steps=3, measures=["radius"])
    rows = measured(tmp_path, module, [monitor, *callbacks], **kwargs)
    points = [point for *_, point in monitor.points]
    assert [point.rho for point in points] == [rho(step, 12) for step in (3, 6, 9, 12)]
    assert {point.perturbation._estimator for point in points} == {"projected"}
    assert all(abs(row["radius"] - math.sqrt(3)) < 0.05 for row in rows[:3])  # three layers, each of radius rho


def test_the_average_is_efmloras_own(tmp_path: Any) -> None:
    """The gap belongs to Ê at the end of the run, whatever the monitor's own radius is."""
    module, callbacks, kwargs = build("efmlora", rho=0.5, lr=0.05)
    (row,) = measured(tmp_path, module, [FlatnessMonitor(0.1, batches=6), *callbacks], max_epochs=1, **kwargs)
    losses = [lambda batch=batch: module.loss(batch, 0) for batch in make_loader()]
    module.eval()
    found = ema_sharpness(MeanLoss(losses), callbacks[0].perturbation, 0.5)
    assert [row[f"ema_{name}"] for name in ("sharpness", "gap", "cosine")] == [found.ema, found.gap, found.cosine]
    assert found.ema > 0


def test_when(tmp_path: Any) -> None:
    """Steps are the optimizer's, epochs are counted from one, and an accumulation window counts once."""
    for settings, accumulate, expected in (
        ({"every_n_steps": 1}, 4, [3, 5, 9, 11]),  # an epoch's last window is shorter
        ({"every_n_steps": 3}, 1, [2, 5, 8, 11]),
        ({"every_n_steps": 3}, 4, [9]),
        ({"every_n_epochs": 2}, 1, [11]),
    ):
        monitor = KeepsPoints(1.0, **settings)
        fit(tmp_path, Classifier(), [monitor], accumulate_grad_batches=accumulate)
        assert [batch for _, batch, _ in monitor.points] == expected, settings


@pytest.mark.parametrize(
    ("settings", "says"), [({"every_n_steps": 16}, "step 0 to 12"), ({"every_n_epochs": 3}, "epoch 0 to 2")]
)
def test_a_run_that_is_too_short_to_be_measured_is_told(tmp_path: Any, settings: dict[str, int], says: str) -> None:
    with pytest.warns(UserWarning, match=f"FlatnessMonitor: nothing was measured: .* training only went from {says}"):
        fit(tmp_path, Classifier(), [FlatnessMonitor(0.5, **settings)])
    fit(tmp_path, Classifier(), [FlatnessMonitor(0.5, **settings)], fast_dev_run=True)


@pytest.mark.parametrize(("sanity", "steps"), [(0, [11, 17, 23]), (1, [5, 11, 17, 23])])
def test_validation_batches_are_those_of_the_first_validation(tmp_path: Any, sanity: int, steps: list[int]) -> None:
    """Those of the sanity check come earlier, and none is kept twice; validation sees the batches unchanged."""
    runs = []
    for monitors in ([], [FlatnessMonitor(0.5, data="val", batches=3)]):
        module, logger = Classifier(), Recorder()
        settings = {"check_val_every_n_epoch": 2, "logger": logger, "log_every_n_steps": 1}
        settings |= {"num_sanity_val_steps": sanity, "max_epochs": 4}
        fit(tmp_path, module, monitors, val=make_loader(2, seed=9), **settings)
        validated = [(step, row["val_loss"]) for step, row in logger.rows if "val_loss" in row]
        runs.append((weights(module), validated))
    assert same(*runs)
    assert len(runs[0][1]) == 2
    assert [step for step, row in logger.rows if "flatness/loss" in row] == steps
    assert math.isclose(logger.measured[-1]["loss"], runs[0][1][-1][1], rel_tol=1e-6)


@pytest.mark.parametrize(("in_epoch", "counts"), [(6, [1, 2, *[3] * 10]), (2, [1, 2, 2, 2])])
def test_a_measurement_takes_the_batches_that_have_passed_by(tmp_path: Any, in_epoch: int, counts: list[int]) -> None:
    net = make_net()
    monitor = FlatnessMonitor(0.3, every_n_steps=1, batches=3, measures=["sharpness"])
    rows = measured(tmp_path, Classifier(net=net, lr=0.0), [monitor], make_loader(in_epoch))
    losses = [nn.functional.cross_entropy(net(inputs), labels).item() for inputs, labels, _ in make_loader(in_epoch)]
    expected = [sum(losses[:count]) / count for count in counts]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-6)


def test_mixed_precision_is_that_of_training(tmp_path: Any) -> None:
    """As in training, the loss is computed under autocast, and the run is not changed."""
    losses, after = {}, []
    for precision, monitors in (("bf16-mixed", True), ("32-true", True), ("bf16-mixed", False)):
        module = Classifier()
        callbacks = [FlatnessMonitor(0.5, every_n_steps=6)] if monitors else []
        for row in measured(tmp_path, module, callbacks, precision=precision, max_epochs=1):
            losses[precision] = row["loss"]
        if precision == "bf16-mixed":
            after.append(weights(module))
    assert same(*after)
    assert losses["bf16-mixed"] != losses["32-true"]
    assert math.isclose(losses["bf16-mixed"], losses["32-true"], rel_tol=0.05)


class MeasuredByHand(ByHand):
    """Optimized by hand, with a loss that can be measured."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, batch_idx)


def test_the_perturbation_of_another_callback_is_not_measured(tmp_path: Any) -> None:
    """In manual optimization it lasts until the end of the batch, and the monitor's hook may run first."""
    rows = []
    for callbacks in ([], [RandomPerturbation(0.5)], [EFMLoRA(0.5)]):
        monitor = FlatnessMonitor(0.3, every_n_steps=1, measures=["sharpness"])
        rows.append(measured(tmp_path, MeasuredByHand(lr=0.0), [monitor, *callbacks]))
    assert len(rows[0]) == 12
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("of_module", [False, True])
def test_what_is_compiled_is_measured_as_it_is_written(tmp_path: Any, of_module: bool) -> None:
    """Compiled code has no second derivative."""
    monitor = FlatnessMonitor(0.5, batches=2, measures=["sharpness", "hessian_trace"])
    (expected,) = measured(tmp_path, Classifier(lr=0.0), [monitor], max_epochs=1)
    module = Classifier(lr=0.0)
    if of_module:
        module = torch.compile(module, backend="aot_eager")
    else:
        module.net = torch.compile(module.net, backend="aot_eager")
    assert measured(tmp_path, module, [monitor], max_epochs=1) == [expected]


def test_a_step_draws_the_same_in_every_pass(tmp_path: Any) -> None:
    """So constant weights give a constant loss, and a tiny radius a tiny sharpness, whatever the step draws."""
    monitor = FlatnessMonitor(1e-6, every_n_steps=1, batches=1, measures=["sharpness"])

    class Draws(Classifier):
        def loss(self, batch: Any, batch_idx: int) -> Any:
            return super().loss(batch, batch_idx) * (1 + torch.rand(()) + random.random() + np.random.rand())

    first, *others = measured(tmp_path, Draws(net=make_net(0.3), lr=0.0), [monitor], max_epochs=1)
    assert others == [first] * 5
    assert 0 <= first["sharpness"] < 1e-4
