"""EFMLoRA under transformers' Trainer: the Lightning callback's weights, clean between steps, resumed, refused."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from float64_runs import BETA, Automatic, fit_in_float64, network, optimizer_of
from helpers import assert_no_trace, is_perturbed, same, weights
from hf_runs import RHO, SIZE, Samples, trainer_of
from lightning.pytorch.demos.boring_classes import BoringModel
from loop_runs import net_of
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from lightning_flatlora import EFMLoRA as LightningEFMLoRA
from lightning_flatlora import FMLoRA as LightningFMLoRA
from lightning_flatlora import LinearRho, loops
from lightning_flatlora.lightning_names import MisconfigurationException
from lightning_flatlora.transformers_trainer import EFMLoRA

WINDOW, STEPS = 2, 8


class Unscheduled(Automatic):
    def configure_optimizers(self) -> Any:
        return optimizer_of(self.net)


class Seeds(L.Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            torch.manual_seed(batch_idx // trainer.accumulate_grad_batches)


def by_lightning(callback: Any, window: int = 1, clip: float | None = None, dropout: float = 0.0) -> nn.Module:
    net = net_of(dropout=dropout)
    data = Samples(STEPS * window * SIZE)
    batches = list(zip(data.x.split(SIZE), data.y.split(SIZE), strict=True))
    settings = {"accumulate_grad_batches": window, "gradient_clip_val": clip}
    fit_in_float64(Unscheduled(net), 1, [Seeds(), callback], DataLoader(batches, batch_size=None), **settings)
    return net


@pytest.mark.parametrize("window", [1, WINDOW])
def test_weights_equal_the_lightning_callbacks_bit_for_bit(tmp_path: Path, window: int) -> None:
    """With dropout and a schedule over the run."""
    rho, net = LinearRho(RHO, 0.1), net_of(dropout=0.2)
    callback = EFMLoRA(rho, beta=BETA)
    trainer_of(tmp_path, [callback], net, gradient_accumulation_steps=window).train()
    theirs = LightningEFMLoRA(rho, beta=BETA)
    expected = by_lightning(theirs, window, dropout=0.2)
    assert same(weights(net), weights(expected))
    assert callback.loop is not None
    assert callback.loop.step == STEPS
    ours = callback.loop.perturbation.state_dict()["E"]
    assert same(list(ours.values()), list(theirs.perturbation.state_dict()["E"].values()))
    assert_no_trace(net)


def test_clipping_by_norm_changes_no_more_than_rounding(tmp_path: Path) -> None:
    """transformers has no hook before it clips."""
    net = network()
    trainer_of(tmp_path, [EFMLoRA(RHO, beta=BETA)], net, max_grad_norm=0.05).train()
    expected = weights(by_lightning(LightningEFMLoRA(RHO, beta=BETA), clip=0.05))
    assert not same(expected, weights(by_lightning(LightningEFMLoRA(RHO, beta=BETA))))
    for name, value in weights(net).items():
        assert float((value - expected[name]).abs().max()) < 1e-10, name


def test_rho_zero_is_their_own_run_bit_for_bit_and_more_is_not(tmp_path: Path) -> None:
    finals = []
    for callbacks in ([], [EFMLoRA(0.0)], [EFMLoRA(RHO)]):
        net = net_of(dropout=0.2)
        trainer_of(tmp_path, callbacks, net).train()
        finals.append(weights(net))
    assert same(finals[0], finals[1])
    assert not same(finals[0], finals[2])


class Looks(TrainerCallback):  # type: ignore[misc]
    """Whether layers read B + E, in the hooks between steps and in evaluation."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def look(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(is_perturbed(model))

    on_step_end = on_save = on_evaluate = on_prediction_step = on_optimizer_step = look


def test_everything_between_the_steps_sees_clean_weights(tmp_path: Path) -> None:
    looks, inside = Looks(), []

    class Watched(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            inside.append(is_perturbed(model))
            return super().compute_loss(model, *args, **kwargs)

    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(
        tmp_path, [EFMLoRA(RHO), looks], kind=Watched, steps=4, data={"eval_dataset": Samples(4)}, **settings
    )
    trainer.train()
    assert len(looks.seen) >= 12
    assert not any(looks.seen)
    assert inside.count(True) == 3
    assert_no_trace(trainer.model)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "whole", [EFMLoRA(RHO, beta=BETA)], **saves)
    whole.train()
    second = trainer_of(tmp_path / "whole", [EFMLoRA(RHO, beta=BETA)], **saves)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same(weights(second.model), weights(whole.model))

    # elsewhere: transformers does not say where the checkpoint lies
    third = trainer_of(tmp_path / "third", [EFMLoRA(RHO)], **saves)
    with pytest.raises(MisconfigurationException, match=r"checkpoint-3/flatlora\.pt does not exist: give"):
        third.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    folder = tmp_path / "whole" / "checkpoint-3"
    fourth = trainer_of(tmp_path / "third", [EFMLoRA(RHO, beta=BETA, resume_from=folder)], **saves)
    fourth.train(resume_from_checkpoint=str(folder))
    assert same(weights(fourth.model), weights(whole.model))
    other = trainer_of(tmp_path / "whole", [EFMLoRA(RHO, beta=BETA, estimator="projected")], **saves)
    with pytest.raises(MisconfigurationException, match="estimator must be 'average' as in the checkpoint"):
        other.train(resume_from_checkpoint=str(folder))
    assert_no_trace(other.model)
    # as scripts keep it: True, or the checkpoint of an earlier start
    for value in (True, str(folder), str(tmp_path / "whole" / "checkpoint-6")):
        fifth = trainer_of(tmp_path / "whole", [EFMLoRA(RHO, beta=BETA)], resume_from_checkpoint=value, **saves)
        fifth.train(resume_from_checkpoint=str(folder))
        assert same(weights(fifth.model), weights(whole.model))
    shutil.copy(tmp_path / "whole" / "checkpoint-6" / "flatlora.pt", folder)
    with pytest.raises(MisconfigurationException, match="is not of the checkpoint that is resumed"):
        fourth.train(resume_from_checkpoint=str(folder))
    assert_no_trace(fourth.model)


@pytest.mark.parametrize("hook", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_checkpoint_that_a_signal_asks_for_is_resumed(tmp_path: Path, hook: str) -> None:
    """transformers saves it from a callback of its own, and calls no on_save."""
    whole, folder = trainer_of(tmp_path / "whole", [EFMLoRA(RHO, beta=BETA)]), tmp_path / "stopped"
    whole.train()
    trainer = trainer_of(folder, [EFMLoRA(RHO, beta=BETA)], enable_jit_checkpoint=True)
    jit = next(each for each in trainer.callback_handler.callbacks if isinstance(each, JITCheckpointCallback))
    own = getattr(jit, hook)

    def asked(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        jit.jit_manager.is_checkpoint_requested = state.global_step == 3
        own(args, state, control, **kwargs)

    setattr(jit, hook, asked)
    trainer.train()
    assert [path.name for path in folder.glob("*/flatlora.pt")] == ["flatlora.pt"]
    second = trainer_of(folder, [EFMLoRA(RHO, beta=BETA)])
    second.train(resume_from_checkpoint=True)
    assert same(weights(second.model), weights(whole.model))


def test_compiled_by_the_trainer(tmp_path: Path) -> None:
    net, compiled = network(), network()
    trainer_of(tmp_path, [EFMLoRA(RHO)], net, steps=3).train()
    settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer_of(tmp_path, [EFMLoRA(RHO)], compiled, steps=3, **settings).train()
    assert same(weights(compiled), weights(net))


def test_two_passes_by_their_own_training_step(tmp_path: Path) -> None:
    """FMLoRA needs no callback: training_step is theirs to override, and is called once for each pass."""

    class TwoPasses(Trainer):  # type: ignore[misc]
        flat: loops.FMLoRA | None = None

        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            if self.flat is None:
                self.flat = loops.FMLoRA(model, self.optimizer, RHO)
            for each_pass in self.flat.training_passes():
                with each_pass:
                    loss = super().training_step(model, dict(inputs), *args)
            if self.accelerator.sync_gradients:
                self.flat.before_step()
            return loss

    net = net_of(dropout=0.2)
    trainer_of(tmp_path, [], net, kind=TwoPasses, gradient_accumulation_steps=WINDOW).train()
    assert same(weights(net), weights(by_lightning(LightningFMLoRA(RHO), WINDOW, dropout=0.2)))


def test_a_model_of_transformers_and_peft_saves_its_adapter(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), LoraConfig(r=2))
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(12)]
    trainer = trainer_of(tmp_path, [], save_strategy="steps", save_steps=2)
    callback = EFMLoRA(0.05)
    trainer = Trainer(model, trainer.args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert callback.loop is not None
    assert callback.loop.step == 8
    saved = sorted(path.name for path in (tmp_path / "checkpoint-8").iterdir())
    assert {"adapter_model.safetensors", "flatlora.pt"} <= set(saved)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# -- what is refused


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("DEEPSPEED", "where no callback sees the gradients"),
        ("FSDP", "only been tested"),
        ("MEGATRON_LM", "Megatron splits"),
    ],
)
def test_other_kinds_of_training_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    trainer = trainer_of(tmp_path, [EFMLoRA(RHO)])
    callback = next(each for each in trainer.callback_handler.callbacks if isinstance(each, EFMLoRA))
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType(kind))
    of_trainer = {"model": trainer.model, "optimizer": trainer.optimizer}
    with pytest.raises(MisconfigurationException, match=said):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, **of_trainer)


@pytest.mark.parametrize(("devices", "said"), [(2, "DataParallel copies the layers"), (1, "FSDP has only been tested")])
def test_several_devices_in_one_process_and_sharded_models_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int, said: str
) -> None:
    trainer = trainer_of(tmp_path, [])
    trainer.args._n_gpu = devices
    monkeypatch.setattr("lightning_flatlora.transformers_trainer.is_sharded", lambda model: devices == 1)
    of_trainer = {"model": trainer.model, "optimizer": trainer.optimizer}
    with pytest.raises(MisconfigurationException, match=said):
        EFMLoRA(RHO).on_train_begin(trainer.args, trainer.state, trainer.control, **of_trainer)


@pytest.mark.parametrize(
    ("sees_steps", "error", "said"),
    [
        (True, RuntimeError, r"about to step without EFMLoRA's before_step: use a trainer with transformers' own"),
        # An optimizer whose wrapper hides its steps.
        (False, MisconfigurationException, r"at step 1 of this trainer, .* came for 0 steps"),
    ],
)
def test_a_trainer_with_a_loop_of_its_own_that_lacks_the_hooks_is_refused(
    tmp_path: Path, sees_steps: bool, error: type[Exception], said: str
) -> None:
    """Its run would be plain LoRA."""

    class OwnLoop(Trainer):  # type: ignore[misc]
        def train(self) -> None:
            handler, state = self.callback_handler, self.state
            handler.model, handler.optimizer = self.model, self.optimizer
            handler.on_train_begin(self.args, state, self.control)
            for batch in self.get_train_dataloader():
                self.model(**batch)["loss"].backward()
                if sees_steps:
                    self.optimizer.step()
                state.global_step += 1
                handler.on_step_end(self.args, state, self.control)

    callback = EFMLoRA(RHO)
    trainer = trainer_of(tmp_path, [callback], kind=OwnLoop)
    with pytest.raises(error, match=said):
        trainer.train()
    if sees_steps:  # no hook of transformers comes after an exception
        callback.close()
    assert_no_trace(trainer.model)


def test_each_trainer_names_the_callback_of_the_other(tmp_path: Path) -> None:
    # The oldest releases of Lightning refuse such a callback themselves.
    with pytest.raises((AttributeError, ValueError), match=r"Lightning's takes lightning_flatlora\.EFMLoRA|a parent"):
        L.Trainer(callbacks=[EFMLoRA(RHO)], accelerator="cpu", logger=False, max_epochs=1).fit(BoringModel())
    with pytest.raises(AttributeError, match=r"Lightning's takes lightning_flatlora\.EFMLoRA"):
        EFMLoRA(RHO).on_exception()
    for callback in (LightningEFMLoRA(RHO), LightningFMLoRA(RHO)):
        with pytest.raises(MisconfigurationException, match=r"transformers takes lightning_flatlora.transformers_tr"):
            trainer_of(tmp_path, [callback])


def test_wrong_values_are_refused_where_they_are_written() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"(?s)3 problems.*rho must be.*every_n_steps must.*beta must be"
    ):
        EFMLoRA(-1.0, beta=2.0, every_n_steps=0)
    with pytest.raises(TypeError, match=r"EFMLoRA: .*unexpected keyword argument 'betta'"):
        EFMLoRA(RHO, betta=0.5)


def test_a_damaged_state_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(tmp_path, [EFMLoRA(RHO)], **saves).train()
    folder = tmp_path / "checkpoint-3"
    assert not list(folder.glob("*.part"))
    file = folder / "flatlora.pt"
    file.write_bytes(file.read_bytes()[:500])
    resumed = trainer_of(tmp_path, [EFMLoRA(RHO)], **saves)
    with pytest.raises(MisconfigurationException, match=r"flatlora\.pt can't be read .* delete its checkpoint"):
        resumed.train(resume_from_checkpoint=str(folder))
    assert_no_trace(resumed.model)


def test_two_callbacks_for_the_same_weights_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [EFMLoRA(0.1), EFMLoRA(0.3)], net_of())
    with pytest.raises(MisconfigurationException, match="two EFMLoRA callbacks for the same weights: keep one"):
        trainer.train()


def test_a_second_run_with_the_same_optimizer_takes_another_callback(tmp_path: Path) -> None:
    """After a whole run, and after one that an exception has ended."""
    net = net_of()
    optimizer = optimizer_of(net)

    class Fails(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("ends here")

    for callbacks in ([EFMLoRA(0.1)], [EFMLoRA(0.2), Fails()], [EFMLoRA(0.3)]):
        trainer = trainer_of(tmp_path, callbacks, net)
        trainer.optimizer = optimizer
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        if len(callbacks) == 1:
            trainer.train()
            continue
        with pytest.raises(RuntimeError, match="ends here"):
            trainer.train()
