"""transformers' Trainer, with the callbacks of lightning_flatlora.transformers or a loop's line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_no_trace, same, weights
from hf_runs import BETA, RHO, SIZE, Model, Samples, callback_of, trained_by, trainer_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from loop_runs import METHODS, net_of, trained_plainly
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from lightning_flatlora import EFMLoRA as LightningEFMLoRA
from lightning_flatlora import FMLoRA as LightningFMLoRA
from lightning_flatlora import LinearRho, loops
from lightning_flatlora.transformers import EFMLoRA, FMLoRA, TwoPassTrainer

WINDOW, STEPS = 2, 8
RUNS = [("EFMLoRA", 1, None), ("EFMLoRA", WINDOW, None), ("EFMLoRA", 1, 0.05), ("FMLoRA", WINDOW, None)]
SAVES = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize(("name", "window", "clip"), RUNS)
def test_it_gives_the_weights_of_a_plain_loop(tmp_path: Path, name: str, window: int, clip: float | None) -> None:
    """Bit for bit, with a schedule over the run; test_own_loops.py compares such a loop with the callbacks."""
    net = net_of()
    settings = {"gradient_accumulation_steps": window, "max_grad_norm": clip or 0.0}
    _, flat = trained_by(name, tmp_path, rho=LinearRho(RHO, 0.1), net=net, **settings)
    samples = Samples(STEPS * window * SIZE)
    data = list(zip(samples.x.split(SIZE), samples.y.split(SIZE), strict=True))
    rho = LinearRho(RHO, 0.1, total_steps=STEPS)
    assert same(weights(net), weights(trained_plainly(name, data, rho, window=window, clip=clip)))
    assert flat.step == STEPS
    assert_no_trace(net)


def test_a_line_before_training_gives_them_too(tmp_path: Path) -> None:
    by_callback, _ = trained_by("EFMLoRA", tmp_path / "callback")
    trainer = trainer_of(tmp_path / "line")
    flat = loops.EFMLoRA(trainer.model, trainer.create_optimizer(), RHO, beta=BETA)
    trainer.train()
    flat.close()
    assert same(weights(trainer.model), weights(by_callback.model))


# -- checkpoints


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": WINDOW, "max_grad_norm": 0.05}])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    whole, _ = trained_by(name, tmp_path, **SAVES, **settings)
    # And once more, from a checkpoint of a resumed run.
    for step in (3, 6):
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(tmp_path / f"checkpoint-{later}", ignore_errors=True)
        resumed, flat = trained_by(name, tmp_path, resume=True, **SAVES, **settings)
        assert flat.step == STEPS
        assert same(weights(resumed.model), weights(whole.model))


def test_a_checkpoint_in_another_place_is_asked_for_by_name(tmp_path: Path) -> None:
    whole, _ = trained_by("EFMLoRA", tmp_path / "first", **SAVES)
    folder = str(tmp_path / "first" / "checkpoint-3")
    with pytest.raises(MisconfigurationException, match="name its folder in TrainingArguments") as error:
        trained_by("EFMLoRA", tmp_path / "second", resume=folder, **SAVES)
    assert str(tmp_path / "second" / "checkpoint-3" / "EFMLoRA.pt") in str(error.value)
    named, _ = trained_by("EFMLoRA", tmp_path / "second", resume=folder, resume_from_checkpoint=folder, **SAVES)
    assert same(weights(named.model), weights(whole.model))


def test_another_runs_state_is_not_taken(tmp_path: Path) -> None:
    """A run in the same folder, with a checkpoint of the same step, has overwritten the state."""
    for name in ("first", "second"):
        trained_by("EFMLoRA", tmp_path / name, **SAVES)
    state = "checkpoint-3/EFMLoRA.pt"
    shutil.copy(tmp_path / "second" / state, tmp_path / "first" / state)
    with pytest.raises(MisconfigurationException, match=r"EFMLoRA.pt is of this checkpoint"):
        trained_by("EFMLoRA", tmp_path / "first", resume=str(tmp_path / "first" / "checkpoint-3"), **SAVES)


@pytest.mark.parametrize("settings", [{"save_only_model": True}, {}])
def test_a_lost_state_is_an_error(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained_by("EFMLoRA", tmp_path, **SAVES, **settings)
    (tmp_path / "checkpoint-3" / "EFMLoRA.pt").unlink(missing_ok=True)
    with pytest.raises(MisconfigurationException, match=r"EFMLoRA.pt is of this checkpoint"):
        trained_by("EFMLoRA", tmp_path, resume=str(tmp_path / "checkpoint-3"), **SAVES, **settings)


def test_a_run_of_plain_lora_may_go_on_with_the_method(tmp_path: Path) -> None:
    trainer_of(tmp_path, **SAVES).train()
    assert "EFMLoRA" not in json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    with pytest.warns(UserWarning, match="already taken steps without EFMLoRA"):
        _, flat = trained_by("EFMLoRA", tmp_path, resume=str(tmp_path / "checkpoint-3"), **SAVES)
    assert flat.step == STEPS - 3
    # Its own checkpoints have the state.
    _, flat = trained_by("EFMLoRA", tmp_path, resume=str(tmp_path / "checkpoint-6"), **SAVES)
    assert flat.step == STEPS - 3


# -- the log, and what the Trainer may do


class Records(TrainerCallback):  # type: ignore[misc]
    """A tracker."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_rho_and_the_norm_are_logged_with_the_loss(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, logging_strategy="steps", logging_steps=2)
    before, callback, after = Records(), EFMLoRA(LinearRho(RHO, 0.1), log_norm=True), Records()
    for each in (before, callback, after):
        trainer.add_callback(each)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    rhos = [LinearRho(RHO, 0.1, total_steps=STEPS)(step, STEPS, 1.0) for step in (2, 4, 6, 8)]
    assert [log["rho"] for log in logged] == pytest.approx(rhos)
    E = callback.flat.perturbation.state_dict()["E"].values()
    assert logged[-1]["perturbation_norm"] == pytest.approx(float(torch.cat([e.flatten() for e in E]).norm()))
    assert [log["rho"] for log in after.logs if "loss" in log] == pytest.approx(rhos)
    assert not any("rho" in log for log in before.logs)
    # As the docstring says.
    trainer.add_callback(trainer.pop_callback(before))
    trainer.train()
    assert "rho" in before.logs[-2]


def test_with_model_init(tmp_path: Path) -> None:
    """Each training has a new model, which gets a new method."""
    trainer = trainer_of(tmp_path)
    callback = callback_of("EFMLoRA")
    made: list[nn.Module] = []

    def model_init() -> nn.Module:
        made.append(Model(net_of()))
        return made[-1]

    own = Trainer(model_init=model_init, args=trainer.args, callbacks=[callback], train_dataset=trainer.train_dataset)
    own.train()
    own.train()
    assert len(made) >= 2
    assert same(weights(made[-1]), weights(made[-2]))
    assert callback.flat.step == STEPS
    assert callback.flat.perturbation.may_be_nonzero


class RunsOutOfMemory(Model):
    """Its third step in the first size of batches does."""

    steps = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        if self.steps == 3:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(x, labels)


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_with_auto_find_batch_size(tmp_path: Path, rho: float) -> None:
    """After the error the Trainer begins anew, with smaller batches; rho 0 is LoRA bit for bit."""
    nets = []
    for callbacks in ([], [EFMLoRA(rho)]):
        trainer = trainer_of(tmp_path, auto_find_batch_size=True)
        trainer.model = trainer.model_wrapped = RunsOutOfMemory(trainer.model.net)
        for each in callbacks:
            trainer.add_callback(each)
        trainer.train()
        nets.append(trainer.model.net)
    assert same(weights(nets[0]), weights(nets[1])) == (rho == 0)
    assert callbacks[0].flat.step == STEPS


def test_compiled_by_the_trainer(tmp_path: Path) -> None:
    net, compiled = net_of(), net_of()
    trained_by("EFMLoRA", tmp_path, net=net, steps=3)
    trained_by("EFMLoRA", tmp_path, net=compiled, steps=3, torch_compile=True, torch_compile_backend="eager")
    assert same(weights(compiled), weights(net))


# -- refusals


@pytest.mark.parametrize("kind", [EFMLoRA, FMLoRA])
def test_values_out_of_range_are_refused_at_once(kind: type[Any]) -> None:
    with pytest.raises(MisconfigurationException, match="rho must be given"):
        kind()
    with pytest.raises(TypeError, match="every_step"):
        kind(0.1, every_step=2)


def test_restored_callbacks_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, restore_callback_states_from_checkpoint=True)
    with pytest.raises(MisconfigurationException, match="leave restore_callback_states_from_checkpoint out"):
        Trainer(trainer.model, trainer.args, callbacks=[EFMLoRA(RHO)])


def test_fmlora_needs_a_trainer_of_two_passes(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.add_callback(FMLoRA(RHO))
    with pytest.raises(MisconfigurationException, match="derive yours from TwoPassTrainer"):
        trainer.train()


def test_a_trainer_of_two_passes_without_a_callback_is_plain(tmp_path: Path) -> None:
    plain, two_passes = net_of(), net_of()
    trainer_of(tmp_path, net=plain).train()
    trainer_of(tmp_path, net=two_passes, kind=TwoPassTrainer).train()
    assert same(weights(two_passes), weights(plain))


@pytest.mark.parametrize("kind", [LightningEFMLoRA, LightningFMLoRA])
def test_the_callback_of_the_other_trainer_names_this_one(tmp_path: Path, kind: type[Any]) -> None:
    trainer = trainer_of(tmp_path)
    with pytest.raises(MisconfigurationException, match=f"from lightning_flatlora.transformers import {kind.__name__}"):
        Trainer(trainer.model, trainer.args, callbacks=[kind(RHO)])


def test_it_imports_no_lightning() -> None:
    program = "import sys, lightning_flatlora.transformers; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
