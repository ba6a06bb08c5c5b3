"""FlatnessMonitor: a run with it is the run without it, bit for bit, and it logs what the instruments say."""

import copy
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    FEATURES,
    FRONT_ENDS,
    Classifier,
    TwoPassClassifier,
    assert_no_trace,
    build,
    fit,
    is_perturbed,
    make_loader,
    make_net,
    same,
    weights,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_flatlora import CosineRho, EFMLoRA, FlatnessMonitor, FMLoRA, Perturbation, find_pairs
from lightning_flatlora.baselines import RandomPerturbation
from lightning_flatlora.flatness import DEFAULT_MEASURES, MEASURES, MeanLoss, Point, ema_sharpness, measure
from lightning_flatlora.weight_noise import WeightNoise

ALL_BUT_EMA = [name for name in MEASURES if name != "ema"]


class Rich:
    """All that a measurement could disturb: BatchNorm, dropout, a metric, noise of every generator, lists, logging."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.mean = MeanMetric()
        self.losses: list[Tensor] = []
        self.calls = 0

    def loss(self, batch: Any, batch_idx: int) -> Any:
        inputs, *rest = batch
        inputs.mul_(1.5)  # a step may change its batch
        inputs = self.norm(inputs + 0.1 * torch.randn_like(inputs) + 0.1 * random.random() + 0.1 * np.random.rand())
        loss = super().loss((inputs, *rest), batch_idx)  # type: ignore[misc]
        if self.trainer.validating:  # type: ignore[attr-defined]
            return loss
        self.mean.update(loss.detach())
        self.losses.append(loss.detach())
        self.calls += 1
        self.log("loss", loss.detach(), on_step=True, on_epoch=True)  # type: ignore[attr-defined]
        self.log("mean", self.mean, on_step=False, on_epoch=True)  # type: ignore[attr-defined]
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("sum", torch.stack(self.losses).sum())  # type: ignore[attr-defined]
        self.losses.clear()


class RichClassifier(Rich, Classifier):
    pass


class RichTwoPassClassifier(Rich, TwoPassClassifier):
    pass


RICH = (RichClassifier, RichTwoPassClassifier)


class Course(Callback):
    """Everything that training has after each batch and epoch."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        streams = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        gradients = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        kept = pl_module.calls, list(pl_module.losses), pl_module.mean.mean_value.clone(), pl_module.mean._update_count
        buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        modes = [module.training for module in pl_module.modules()]
        self.states.append([weights(pl_module), gradients, streams, kept, buffers, optimizer, modes, outputs])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(own_metrics(trainer))


def own_metrics(trainer: Any) -> dict[str, Tensor]:
    """What the module has logged."""
    metrics = {**trainer.callback_metrics, **trainer.logged_metrics}
    return {name: torch.as_tensor(value).clone() for name, value in metrics.items() if "flatness" not in name}


class Recorder(Logger):
    """A logger that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    @property
    def measured(self) -> list[dict[str, float]]:
        """The rows of the monitor, without the common prefix."""
        rows = [row for _, row in self.rows if any(name.startswith("flatness/") for name in row)]
        return [{name.removeprefix("flatness/"): value for name, value in row.items()} for row in rows]


def run(
    tmp_path: Any, front_end: str, monitors: list[FlatnessMonitor], first: bool = True, **settings: Any
) -> tuple[Course, Any, Recorder]:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    module, callbacks, kwargs = build(front_end, net=make_net(0.3), classes=RICH, **settings)
    course, logger = Course(), Recorder()
    callbacks = [*monitors, *callbacks, course] if first else [*callbacks, *monitors, course]
    loader = torch.utils.data.DataLoader(make_loader(5).dataset, batch_size=4, shuffle=True)
    fit(tmp_path, module, callbacks, loader, val=make_loader(2), logger=logger, log_every_n_steps=1, **kwargs)
    assert_no_trace(module)
    return course, module, logger


@pytest.mark.filterwarnings("ignore:.* counts each batch twice")
@pytest.mark.parametrize(("accumulate", "first"), [(1, True), (2, False)], ids=["before others", "after, accumulating"])
@pytest.mark.parametrize("front_end", ["plain", *FRONT_ENDS])
def test_a_run_with_it_is_the_run_without_it(tmp_path: Any, front_end: str, accumulate: int, first: bool) -> None:
    measures = [*ALL_BUT_EMA, "ema"] if "efmlora" in front_end else ALL_BUT_EMA
    monitors = [
        FlatnessMonitor(0.3, every_n_steps=1, batches=2, measures=measures, samples=2, per_layer=True),
        FlatnessMonitor(0.7, every_n_epochs=1, batches=1, data="val"),
    ]
    without, _, quiet = run(tmp_path, front_end, [], accumulate=accumulate)
    with_it, _, logger = run(tmp_path, front_end, monitors, first, accumulate=accumulate)
    assert len(without.states) == len(with_it.states) > 5
    for left, right in zip(without.states, with_it.states, strict=True):
        assert same(left, right)
    assert len(logger.measured) == 2 * (5 if accumulate == 1 else 3) + 2
    others = [row for row in logger.rows if "flatness/loss" not in row[1]]
    assert str(others) == str(quiet.rows)


class Gradients(Callback):
    """That a measurement leaves the very tensors in .grad, untouched; it stands on both sides of the monitor."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert not is_perturbed(pl_module)
        grads = [p.grad for p in pl_module.parameters()]
        where = [(id(p), p.data_ptr(), p._version) for p in pl_module.parameters()]
        marks = [None if g is None else (id(g), g.data_ptr(), g._version) for g in grads]
        self.seen.append((where, marks, [None if g is None else g.clone() for g in grads], grads))


@pytest.mark.parametrize("front_end", ["plain", *FRONT_ENDS])
def test_gradients_and_weights_are_the_same_tensors(tmp_path: Any, front_end: str) -> None:
    module, callbacks, kwargs = build(front_end, accumulate=2)
    before, after = Gradients(), Gradients()
    monitor = FlatnessMonitor(0.3, every_n_steps=1, measures=ALL_BUT_EMA, samples=2)
    fit(tmp_path, module, [*callbacks, before, monitor, after], max_epochs=1, **kwargs)
    assert len(before.seen) == 6
    for left, right in zip(before.seen, after.seen, strict=True):
        assert left[:2] == right[:2]
        assert same(left[2], right[2])
    assert any(grad is not None for grad in before.seen[0][3])


@pytest.mark.parametrize("measures", [None, ALL_BUT_EMA], ids=["default", "all"])
def test_a_run_whose_loss_turns_nan_ends_as_it_does_without_it(tmp_path: Any, measures: list[str] | None) -> None:
    class Diverges(Classifier):
        def loss(self, batch: Any, batch_idx: int) -> Any:
            return super().loss(batch, batch_idx) * (1.0 if self.global_step < 3 else math.nan)

    ends, logger = [], Recorder()
    for monitors in ([], [FlatnessMonitor(rho=0.1, every_n_steps=1, measures=measures, samples=2)]):
        module = Diverges()
        trainer = fit(tmp_path, module, monitors, max_epochs=1, logger=logger, log_every_n_steps=1)
        ends.append((trainer.global_step, weights(module), torch.get_rng_state()))
    assert same(*ends)
    assert len(logger.measured) == 6
    assert all(math.isnan(value) for value in logger.measured[-1].values())


# -- what it logs


def test_the_numbers_are_those_of_the_instruments(tmp_path: Any) -> None:
    """Weights that don't move: every measurement is that of the functions, on the first batches, in eval mode."""
    net = make_net(0.3)
    logger = Recorder()
    monitor = FlatnessMonitor(0.3, every_n_steps=2, batches=3, measures=ALL_BUT_EMA, samples=4, sigma=0.1)
    fit(tmp_path, Classifier(net=net, lr=0.0), [monitor], max_epochs=2, logger=logger, log_every_n_steps=1)
    net.eval()
    held = [batch for _, batch in zip(range(3), make_loader(), strict=False)]
    losses = [lambda batch=batch: nn.functional.cross_entropy(net(batch[0]), batch[1]) for batch in held]
    perturbation = Perturbation(find_pairs(net).pairs)
    point = Point(MeanLoss(losses), perturbation, 0.3, noise=WeightNoise(net), sigma=0.1, samples=4)
    expected = {name: float(value) for name, value in measure(point, ALL_BUT_EMA).items()}
    assert len(logger.measured) == 6
    for measured in logger.measured:
        assert measured == expected
    assert expected["sharpness"] > 0
    assert expected["condition_B"] == math.inf  # B = 0 still


def test_the_defaults_are_cheap_and_beside_efmlora_measure_its_average(tmp_path: Any) -> None:
    names = {}
    for front_end in ("plain", "efmlora"):
        module, callbacks, kwargs = build(front_end)
        logger = Recorder()
        trainer = fit(
            tmp_path,
            module,
            [*callbacks, FlatnessMonitor(0.5)],
            max_epochs=3,
            logger=logger,
            log_every_n_steps=1,
            **kwargs,
        )
        assert len(logger.measured) == 3  # once an epoch
        names[front_end] = set(logger.measured[0])
        assert same(float(trainer.callback_metrics["flatness/sharpness"]), logger.measured[-1]["sharpness"])
    assert names["plain"] == {
        *("loss", "sharpness", "lora_sharpness", "balancedness", "condition_A", "condition_B", "radius")
    }
    assert names["efmlora"] - names["plain"] == {"ema_sharpness", "ema_gap", "ema_cosine"}
    assert DEFAULT_MEASURES == ("sharpness", "lora_sharpness", "balancedness", "condition", "radius")


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_without_a_radius_of_its_own_it_takes_the_methods(tmp_path: Any, front_end: str) -> None:
    """rho over time, scope and estimator too: the realised radius tells which were taken."""
    rho = CosineRho(0.8, 0.1)
    module, callbacks, kwargs = build(front_end, rho, estimator="projected", norm_scope="layer")
    seen: list[float] = []
    points: list[Point] = []

    class Watched(FlatnessMonitor):
        def _point(self, trainer: Any, *args: Any) -> Point:
            point = super()._point(trainer, *args)
            points.append(point)
            seen.append(float(trainer.callback_metrics.get("flatness/radius", math.nan)))
            return point

    fit(tmp_path, module, [Watched(every_n_steps=3, measures=["radius"]), *callbacks], **kwargs)
    assert [point.rho for point in points] == [rho(step, 12) for step in (3, 6, 9, 12)]
    assert {(point.perturbation.norm_scope, point.perturbation._groups[0].projected) for point in points} == {
        ("layer", True)
    }
    assert all(abs(radius - math.sqrt(3)) < 0.05 for radius in seen[1:])  # three layers, each of radius rho


def test_the_average_is_efmloras_own(tmp_path: Any) -> None:
    """The gap is that of Ê as it is at the end, whatever the monitor's own radius."""
    module, callbacks, kwargs = build("efmlora", rho=0.5, lr=0.05)
    logger = Recorder()
    fit(
        tmp_path,
        module,
        [FlatnessMonitor(0.1, batches=6), *callbacks],
        max_epochs=1,
        logger=logger,
        log_every_n_steps=1,
        **kwargs,
    )
    losses = [lambda batch=batch: module.loss(batch, 0) for batch in make_loader()]
    module.eval()
    found = ema_sharpness(MeanLoss(losses), callbacks[0].perturbation, 0.5)
    (row,) = logger.measured
    assert (row["ema_sharpness"], row["ema_gap"], row["ema_cosine"]) == tuple(
        map(float, (found.ema, found.gap, found.cosine))
    )
    assert found.ema > 0


def test_when(tmp_path: Any) -> None:
    """Steps are the optimizer's, epochs are counted from one, and a window that accumulates counts once."""
    for settings, accumulate, expected in (
        ({"every_n_steps": 1}, 4, [3, 5, 9, 11]),  # the last window of an epoch is shorter
        ({"every_n_steps": 3}, 1, [2, 5, 8, 11]),
        ({"every_n_steps": 3}, 4, [9]),
        ({"every_n_epochs": 2}, 1, [11]),
    ):
        batches: list[int] = []

        class Watched(FlatnessMonitor):
            def _point(self, trainer: Any, *args: Any, batches: list[int] = batches) -> Point:
                batches.append(trainer.current_epoch * 6 + trainer.fit_loop.epoch_loop.batch_idx)
                return super()._point(trainer, *args)

        fit(tmp_path, Classifier(), [Watched(1.0, **settings)], accumulate_grad_batches=accumulate)
        assert batches == expected, settings


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    ("settings", "beside"), [({}, {"train_loss_epoch", "val_loss"}), ({"every_n_steps": 2}, {"train_loss_step"})]
)
def test_it_logs_at_the_steps_of_what_the_module_logs(
    tmp_path: Any, settings: dict[str, int], beside: set[str], accumulate: int
) -> None:
    class Logs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch, batch_idx)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

    logger = Recorder()
    trained = {"logger": logger, "log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    fit(tmp_path, Logs(), [FlatnessMonitor(0.5, **settings)], val=make_loader(2), **trained)
    steps = {
        name: [step for step, row in logger.rows if name in row] for name in ("flatness/sharpness", *sorted(beside))
    }
    assert len(steps["flatness/sharpness"]) >= 2
    assert all(at == steps["flatness/sharpness"] for at in steps.values()), steps


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"every_n_steps": 20}, "every_n_steps is 20, and training went from step 0 to 12"),
        ({"every_n_epochs": 3}, "every_n_epochs is 3, and training went from epoch 0 to 2"),
    ],
)
def test_a_run_that_is_too_short_to_be_measured_is_told(tmp_path: Any, settings: dict[str, int], says: str) -> None:
    with pytest.warns(UserWarning, match=f"FlatnessMonitor: nothing was measured: {says}"):
        fit(tmp_path, Classifier(), [FlatnessMonitor(0.5, **settings)])
    fit(tmp_path, Classifier(), [FlatnessMonitor(0.5, **settings)], fast_dev_run=True)
    fit(tmp_path, Classifier(), [FlatnessMonitor(0.5, **settings)], max_epochs=4)


def test_a_resumed_run_that_is_too_short_is_told_from_where_it_went_on(tmp_path: Any) -> None:
    checkpoint = tmp_path / "two.ckpt"
    fit(tmp_path, Classifier(), []).save_checkpoint(checkpoint)
    for settings, says in (
        ({"every_n_steps": 10}, "every_n_steps is 10, and training went from step 12 to 18"),
        ({"every_n_epochs": 2}, "every_n_epochs is 2, and training went from epoch 2 to 3"),
    ):
        with pytest.warns(UserWarning, match=says):
            fit(tmp_path, Classifier(), [FlatnessMonitor(0.5, **settings)], max_epochs=3, ckpt_path=checkpoint)


def test_validation_batches_are_held_before_the_first_validation(tmp_path: Any) -> None:
    """And without a change of when validation runs, or of what it sees."""
    runs = []
    for monitors in ([], [FlatnessMonitor(0.5, data="val", batches=3)]):
        module, logger = Classifier(), Recorder()
        settings = {"check_val_every_n_epoch": 2, "logger": logger, "log_every_n_steps": 1}
        fit(tmp_path, module, monitors, val=make_loader(2, seed=9), max_epochs=4, **settings)
        validated = [(step, row["val_loss"]) for step, row in logger.rows if "val_loss" in row]
        runs.append((weights(module), validated))
    assert same(*runs)
    assert len(runs[0][1]) == 2
    assert len(logger.measured) == 4
    assert math.isclose(logger.measured[-1]["loss"], runs[0][1][-1][1], rel_tol=1e-6)


def test_mixed_precision_is_that_of_training(tmp_path: Any) -> None:
    """As in training the loss is computed under autocast, and the run is left alone."""
    losses, after = {}, []
    for precision, monitors in (("bf16-mixed", True), ("32-true", True), ("bf16-mixed", False)):
        module, logger = Classifier(), Recorder()
        callbacks = [FlatnessMonitor(0.5, every_n_steps=6)] if monitors else []
        settings = {"precision": precision, "logger": logger, "log_every_n_steps": 1, "max_epochs": 1}
        fit(tmp_path, module, callbacks, **settings)
        if monitors:
            losses[precision] = logger.measured[0]["loss"]
        if precision == "bf16-mixed":
            after.append(weights(module))
    assert same(*after)
    assert losses["bf16-mixed"] != losses["32-true"]
    assert math.isclose(losses["bf16-mixed"], losses["32-true"], rel_tol=0.05)


def test_checkpoints_can_follow_a_measure(tmp_path: Any) -> None:
    best = ModelCheckpoint(tmp_path, monitor="flatness/sharpness", save_on_train_epoch_end=True)
    logger = Recorder()
    settings = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 3}
    fit(tmp_path, Classifier(), [FlatnessMonitor(0.5), best], **settings)
    assert math.isclose(float(best.best_model_score), min(row["sharpness"] for row in logger.measured), rel_tol=1e-6)


class ByHand(Classifier):
    """A user's own manual optimization."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__(lr=lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch, batch_idx))
        optimizer.step()


class MeasuredByHand(ByHand):
    """The same, with a loss that can be measured."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch, batch_idx)


def test_manual_optimization_is_measured_by_compute_loss(tmp_path: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"put the loss of a batch into a method compute_loss"):
        fit(tmp_path, ByHand(), [FlatnessMonitor(0.3)])
    logger = Recorder()
    monitor = FlatnessMonitor(every_n_steps=4)
    fit(tmp_path, MeasuredByHand(), [EFMLoRA(0.5), monitor], logger=logger, log_every_n_steps=1)
    assert len(logger.measured) == 3


def test_the_noise_of_another_callback_is_not_measured(tmp_path: Any) -> None:
    """In manual optimization it lasts to the end of the batch, where the monitor may come first."""
    rows = []
    for callbacks in ([], [RandomPerturbation(0.5)]):
        logger = Recorder()
        monitor = FlatnessMonitor(0.3, every_n_steps=1, measures=["sharpness"])
        fit(tmp_path, MeasuredByHand(lr=0.0), [monitor, *callbacks], logger=logger, log_every_n_steps=1)
        rows.append(logger.measured)
    assert rows[0] == rows[1]


def test_a_step_draws_the_same_in_every_pass(tmp_path: Any) -> None:
    """So that weights which don't move have one loss, and a tiny radius a tiny sharpness, whatever the step draws."""
    logger = Recorder()
    monitor = FlatnessMonitor(1e-6, every_n_steps=1, measures=["sharpness"])

    class Draws(Classifier):
        def loss(self, batch: Any, batch_idx: int) -> Any:
            return super().loss(batch, batch_idx) * (1 + torch.rand(()) + random.random() + np.random.rand())

    fit(tmp_path, Draws(net=make_net(0.3), lr=0.0), [monitor], logger=logger, log_every_n_steps=1, max_epochs=1)
    assert len(logger.measured) == 6
    assert all(row == logger.measured[0] for row in logger.measured)
    assert 0 <= logger.measured[0]["sharpness"] < 1e-4


def test_a_loss_that_fails_leaves_training_as_it_was(tmp_path: Any) -> None:
    module, callbacks, kwargs = build("efmlora")
    states: list[Any] = []

    def fail(module: Any, batch_idx: int) -> None:
        if not module.training:
            raise ZeroDivisionError

    class Before(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            states.append((weights(pl_module), [m.training for m in pl_module.modules()], torch.get_rng_state()))

    module.inside.append(fail)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, [*callbacks, Before(), FlatnessMonitor(every_n_steps=3)], **kwargs)
    assert len(states) == 3
    assert same(states[-1], (weights(module), [m.training for m in module.modules()], torch.get_rng_state()))
    assert_no_trace(module)


def test_a_batch_without_a_loss_is_an_error(tmp_path: Any) -> None:
    module = Classifier()
    module.inside.append(lambda module, batch_idx: None if module.training else "skip")
    with pytest.raises(RuntimeError, match="training_step returned None for a held batch"):
        fit(tmp_path, module, [FlatnessMonitor(0.3)])


# -- what is refused


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(MisconfigurationException) as error:
        FlatnessMonitor(
            -1, every_n_steps=0, every_n_epochs=True, batches=1.5, data="test", measures=["flat"], sigma=0, samples=1
        )
    lines = str(error.value).splitlines()
    assert lines[0] == "FlatnessMonitor: 9 problems"
    for line in (
        "rho must be a finite number > 0, or None to take that of the method beside it, got -1",
        "every_n_steps and every_n_epochs can't both be given: leave one out",
        "every_n_steps must be an integer >= 1, got 0",
        "every_n_epochs must be an integer >= 1, got True",
        "batches must be an integer >= 1, got 1.5",
        "samples must be an integer >= 2, got 1",
        "data must be 'train' or 'val', got 'test'",
        "sigma must be a finite number > 0, got 0",
    ):
        assert f"  - {line}" in lines
    assert lines[-1].startswith("  - measures holds 'flat', which is none of sharpness, lora_sharpness, ema")


@pytest.mark.parametrize("measures", ["sharpness", [], 3])
def test_measures_are_a_list_of_names(measures: Any) -> None:
    with pytest.raises(MisconfigurationException, match="measures must be None or a list of names among sharpness"):
        FlatnessMonitor(1.0, measures=measures)


def test_scipy_is_asked_for_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_flatlora.callbacks.flatness_monitor.find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match=r"needs scipy: pip install 'lightning-flatlora\[flatness\]'"):
        FlatnessMonitor(1.0, measures=["top_eigenvalue"])


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy, XLAStrategy])
def test_sharded_models_are_refused_at_the_start(strategy: Any) -> None:
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=[])
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__} is not supported.*use one device or"):
        FlatnessMonitor(1.0).on_fit_start(trainer, Classifier())


def test_a_start_that_lacks_everything_says_so_at_once(tmp_path: Any) -> None:
    module = Classifier(net=nn.Linear(FEATURES, 3))
    with pytest.raises(MisconfigurationException) as error:
        fit(tmp_path, module, [FlatnessMonitor(measures=["ema", "expected_sharpness"])])
    lines = str(error.value).splitlines()
    assert lines[0] == "FlatnessMonitor: 3 problems"
    assert "rho must be given where no EFMLoRA, FMLoRA or FMLoRAModule has one" in lines[1]
    assert "the measure 'ema' needs an EFMLoRA callback" in lines[2]
    assert "no LoRA pair to perturb" in lines[3]


def test_loaders_that_give_nothing_to_hold_are_refused(tmp_path: Any) -> None:
    with pytest.raises(MisconfigurationException, match="data='val' gives no batch to hold"):
        fit(tmp_path, Classifier(), [FlatnessMonitor(1.0, data="val")])
    with pytest.raises(MisconfigurationException, match="can't be copied"):
        fit(tmp_path, Classifier(), [FlatnessMonitor(1.0)], (batch for batch in make_loader()), max_epochs=1)


def test_it_can_be_used_for_another_run(tmp_path: Any) -> None:
    monitor, logger = FlatnessMonitor(every_n_steps=3), Recorder()
    for callback in (EFMLoRA(0.5), FMLoRA(0.3)):
        fit(tmp_path, Classifier(), [callback, monitor], max_epochs=1, logger=logger, log_every_n_steps=1)
    assert ["ema_gap" in row for row in logger.measured] == [True, True, False, False]
