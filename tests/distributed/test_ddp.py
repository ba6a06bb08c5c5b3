"""Two gloo processes under DDP equal one process on the joint batch, and hold the same perturbation."""

from functools import partial
from typing import Any

import lightning as L
import pytest
import pytorch_lightning
import torch
from fits import (
    assert_equal_to_one_process,
    difference,
    in_float64,
    joint_batches,
    own_share,
    train,
    train_alone,
    turns,
)
from float64_runs import RHO, Automatic, Manual, fit_in_float64, loss, network, trained
from launch import Results, Runs, launch
from torch import Tensor, nn

import lightning_flatlora.pytorch_lightning
from lightning_flatlora import EFMLoRA, FMLoRA

FRONT_ENDS = ["EFMLoRA", "FMLoRA", "FMLoRAModule", "EFMLoRA+FMLoRAModule"]
STEPS: list[dict[str, Any]] = [
    {"accumulate": 1},
    {"accumulate": 2, "clip": [0.05, "norm"]},
    {"accumulate": 2, "clip": [0.01, "value"]},
]
BATCHES = 9  # odd: the last window of two is shorter
DDP_SETTINGS: list[tuple[list[str], int]] = [  # and the batches per step: static_graph doesn't support accumulation
    (["gradient_as_bucket_view", "find_unused_parameters"], 2),
    (["static_graph"], 1),
]
TWO_PASSES = ["FMLoRA", "FMLoRAModule"]


def name_of(*parts: object) -> str:
    return "-".join(map(str, parts)).replace("/", "")


# -- the runs


class Routed(nn.Module):
    """The second layer sees only some samples, and the third is left out in every third batch.

    So a layer is unused sometimes on one rank and sometimes on all, as with experts.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.batch_idx = 0

    def forward(self, x: Tensor) -> Tensor:
        first, _, second, _, third, _, last = self.net.base_model.model
        hidden = torch.tanh(first(x))
        chosen = x[:, 0] > 0.3
        if chosen.any():
            hidden = hidden.index_put((chosen,), torch.tanh(second(hidden[chosen])))
        if self.batch_idx % 3 != 1:
            hidden = torch.tanh(third(hidden))
        return last(hidden)  # type: ignore[no-any-return]


class RoutedAutomatic(Automatic):
    """Automatic optimization."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.net.batch_idx = batch_idx
        return super().training_step(batch, batch_idx)


class RoutedManual(Manual):
    """FMLoRAModule."""

    def compute_loss(self, batch: Any, batch_idx: int) -> Any:
        self.net.batch_idx = batch_idx
        return super().compute_loss(batch, batch_idx)


def train_routed(front_end: str, alone: bool = False) -> dict[str, Any]:
    """Train layers that some batches leave out, with find_unused_parameters."""
    net = Routed(network())
    step = {"accumulate_grad_batches": 2}
    short = {"limit_train_batches": 12}
    loader, trainer = (joint_batches(), {}) if alone else (own_share(), in_float64("ddp", find_unused_parameters=True))
    if front_end == "FMLoRAModule":
        fit_in_float64(RoutedManual(net, rho=RHO, **step), 1, [], loader, **short, **trainer)
    else:
        callback = {"EFMLoRA": EFMLoRA, "FMLoRA": FMLoRA}[front_end](RHO)
        fit_in_float64(RoutedAutomatic(net), 1, [callback], loader, **step, **short, **trainer)
    return {"weights": trained(net.net)}


class CalledOff(Automatic):
    """Ends its first epoch early, at a batch."""

    def __init__(self, net: nn.Module, at: int) -> None:
        super().__init__(net)
        self.at = at

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == self.at else None


class Synchronizes(L.Callback):
    """Notes at the end of each epoch whether DDP would average the gradients of a backward pass."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.answers.append(getattr(trainer.strategy.model, "require_backward_grad_sync", True))


def train_called_off(alone: bool = False) -> dict[str, Any]:
    """Train FMLoRA with a separate ascent on each rank, which DDP must not synchronize, and call off one batch."""
    net, answers = network(), Synchronizes()
    loader, trainer = (turns(), {"accumulate_grad_batches": 2}) if alone else (own_share(), in_float64("ddp"))
    callbacks = [FMLoRA(RHO, sync_ascent=alone), answers]
    trainer["limit_train_batches"] = 12 if alone else 6
    fit_in_float64(CalledOff(net, at=6 if alone else 3), 2, callbacks, loader, **trainer)
    return {"weights": trained(net), "synchronizes": answers.answers}


class UnderTheOtherName(pytorch_lightning.LightningModule):
    """Automatic optimization, with pytorch_lightning's Trainer."""

    configure_optimizers = Automatic.configure_optimizers

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return loss(self.net, batch)


def train_under_the_other_name(front_end: str) -> dict[str, Any]:
    """As fits.train on two ranks, with a strategy, a Trainer and a callback of pytorch_lightning."""
    net, callback = network(), getattr(lightning_flatlora.pytorch_lightning, front_end)(RHO)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    strategy = pytorch_lightning.strategies.DDPStrategy(process_group_backend="gloo")
    trainer = pytorch_lightning.Trainer(
        max_epochs=2,
        callbacks=[callback],
        precision="64-true",
        accelerator="cpu",
        strategy=strategy,
        devices=2,
        use_distributed_sampler=False,
        enable_model_summary=False,
        limit_train_batches=BATCHES,
        **quiet,
    )
    trainer.fit(UnderTheOtherName(net), own_share())
    return {"weights": trained(net), "E": callback.perturbation.state_dict()["E"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {}
    for front_end in FRONT_ENDS:
        ddp = partial(train, "ddp", front_end, batches=BATCHES)
        for step in STEPS:
            runs[name_of(front_end, step)] = partial(ddp, **step)
        for settings, accumulate in DDP_SETTINGS:
            used = dict.fromkeys(settings, True)
            runs[name_of(front_end, settings)] = partial(ddp, accumulate, epochs=1, strategy_settings=used)
    for front_end in TWO_PASSES:
        runs[name_of(front_end, "own")] = partial(train, "ddp", front_end, 2, sync_ascent=False, batches=BATCHES)
    for front_end in FRONT_ENDS[:3]:
        runs[name_of(front_end, "routed")] = partial(train_routed, front_end)
    for front_end in FRONT_ENDS[:2]:
        runs[name_of(front_end, "other name")] = partial(train_under_the_other_name, front_end)
    runs["called off"] = partial(train_called_off)
    return launch(tmp_path_factory.mktemp("ddp"), runs)


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_two_ranks_equal_one_process_on_the_joint_batch(results: Results, front_end: str, step: dict[str, Any]) -> None:
    assert_equal_to_one_process(results[name_of(front_end, step)], train_alone(front_end, batches=BATCHES, **step))


@pytest.mark.parametrize(("settings", "accumulate"), DDP_SETTINGS, ids=str)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_settings_of_ddp_change_nothing(results: Results, front_end: str, settings: list[str], accumulate: int) -> None:
    alone = train_alone(front_end, accumulate, epochs=1, batches=BATCHES)
    assert_equal_to_one_process(results[name_of(front_end, settings)], alone)


@pytest.mark.parametrize("front_end", FRONT_ENDS[:3])
def test_layers_that_are_unused_on_one_rank_or_on_all(results: Results, front_end: str) -> None:
    """If a layer is used early in an accumulation window, but not in its last batch, its gradient reaches all ranks."""
    assert_equal_to_one_process(results[name_of(front_end, "routed")], train_routed(front_end, alone=True))


@pytest.mark.parametrize("front_end", TWO_PASSES)
def test_an_ascent_of_each_rank_equals_one_of_each_micro_batch(results: Results, front_end: str) -> None:
    """sync_ascent=False: E differs between ranks, as if one process took their halves in turn; weights are equal."""
    first, second = results[name_of(front_end, "own")]
    alone = train_alone(front_end, accumulate=4, loader=turns(), batches=2 * BATCHES)
    assert difference(first["weights"], second["weights"]) == 0
    assert difference(first["weights"], alone["weights"]) < 1e-10
    assert difference(second["E"], alone["E"]) < 1e-10  # the second rank's half comes last
    assert difference(first["E"], second["E"]) > 1e-3


def test_a_batch_called_off_leaves_ddp_synchronizing(results: Results) -> None:
    """FMLoRA with a separate ascent on each rank: DDP was told not to synchronize, and then no backward pass came."""
    first, second = results["called off"]
    assert first["synchronizes"] == second["synchronizes"] == [True, True]
    assert difference(first["weights"], second["weights"]) == 0
    assert difference(first["weights"], train_called_off(alone=True)["weights"]) < 1e-10


@pytest.mark.parametrize("front_end", FRONT_ENDS[:2])
def test_pytorch_lightning_trains_the_same(results: Results, front_end: str) -> None:
    there, here = results[name_of(front_end, "other name")], results[name_of(front_end, STEPS[0])]
    for one, other in zip(there, here, strict=True):
        assert difference(one["weights"], other["weights"]) == 0
        assert difference(one["E"], other["E"]) == 0
