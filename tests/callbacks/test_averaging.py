"""AdapterAveraging: the averages equal hand-computed ones, are saved and validated, and resume bit for bit."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checkpointed_bases import WEIGHTS, assert_resumes, saver, state
from float64_runs import Automatic, Manual, dataset, loss, network, trained
from helpers import ByHand, Classifier, calling, fit, make_loader, make_net, same, trainer_of, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_flatlora import AdapterAveraging, EFMLoRA, FMLoRA, load_adapter_checkpoint

Weights = dict[str, Tensor]


def by_hand(trajectory: list[Weights], decay: float | None) -> Weights:
    """The average of the weights after each step, with each step's coefficient written out."""
    n = len(trajectory)
    shares = [1 / n] * n
    if decay is not None:
        shares = [decay ** (n - 1), *((1 - decay) * decay ** (n - 1 - i) for i in range(1, n))]
    assert abs(sum(shares) - 1) < 1e-12
    return {name: sum(s * each[name] for s, each in zip(shares, trajectory, strict=True)) for name in trajectory[0]}


class Recorded:
    """Copies of the trained weights after each optimizer step, and in each validation."""

    def __init__(self) -> None:
        self.steps: list[Weights] = []
        self.validated: list[Weights] = []

    def copied(self, module: Any) -> Weights:
        return {name: value.clone() for name, value in trained(module.net).items()}

    def module(self, kind: type[Any] = Automatic, **settings: Any) -> Any:
        recorded = self

        class Recording(kind):  # type: ignore[misc]
            def configure_optimizers(self) -> Any:
                [optimizer], schedulers = super().configure_optimizers()
                optimizer.register_step_post_hook(lambda *args: recorded.steps.append(recorded.copied(self)))
                return [optimizer], schedulers

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                recorded.validated.append(recorded.copied(self))
                self.log("val_loss", loss(self.net, batch))

        return Recording(network(), **settings)


def fit64(module: Any, callbacks: list[L.Callback], **settings: Any) -> L.Trainer:
    loader = DataLoader(dataset(), batch_size=4)
    settings = {"max_epochs": 2, "precision": "64-true", "limit_val_batches": 1, "val_check_interval": 13, **settings}
    trainer = trainer_of(None, callbacks, **settings)
    trainer.fit(module, loader, loader)
    return trainer


@pytest.mark.parametrize("method", [None, EFMLoRA, FMLoRA, Manual])
@pytest.mark.parametrize(("decay", "start", "window"), [(0.9, 0, 1), (None, 5, 1), (0.5, 3, 2), (0.0, 0, 1)])
def test_averages_are_those_computed_by_hand(method: Any, decay: float | None, start: int, window: int) -> None:
    """In each validation and after the fit; the trained weights equal those without the callback, bit for bit."""
    plain, averaged = Recorded(), Recorded()
    settings: dict[str, Any] = {"accumulate_grad_batches": window}
    for recorded in (plain, averaged):
        callbacks = [method(0.4)] if method in (EFMLoRA, FMLoRA) else []
        of_trainer = {} if method is Manual else settings
        module = recorded.module(Manual, rho=0.4, **settings) if method is Manual else recorded.module()
        if recorded is averaged:
            callbacks.append(AdapterAveraging(decay, start_step=start))
        fit64(module, callbacks, **of_trainer)
    assert len(averaged.steps) == 52 // window
    assert same(averaged.steps, plain.steps)
    for index, found in enumerate(averaged.validated, start=1):
        steps = 13 * index // window if window == 1 else [6, 13, 19, 26][index - 1]
        torch.testing.assert_close(found, by_hand(plain.steps[start:steps], decay), rtol=0, atol=1e-12)
    assert len(averaged.validated) == 4
    torch.testing.assert_close(trained(module.net), by_hand(plain.steps[start:], decay), rtol=0, atol=1e-12)


def test_before_the_start_step_all_is_as_without_it() -> None:
    plain, averaged = Recorded(), Recorded()
    fit64(plain.module(), [])
    module = averaged.module()
    fit64(module, [AdapterAveraging(0.9, start_step=52)])
    assert same(averaged.validated, plain.validated)
    assert same(trained(module.net), plain.steps[-1])


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    seen: list[Weights] = []

    class Two(ByHand):
        def configure_optimizers(self) -> Any:
            named = [p for p in self.parameters() if p.requires_grad]
            last = torch.optim.SGD(named[3:], lr=0.1)
            last.register_step_post_hook(lambda *args: seen.append(weights(self)))
            return torch.optim.AdamW(named[:3], lr=0.01), last

    module = Two(net=make_net())
    fit(tmp_path, module, [AdapterAveraging(None)], max_epochs=1)
    assert len(seen) == 6
    torch.testing.assert_close(weights(module), by_hand(seen, None))


def test_of_16_bits_the_average_keeps_32(tmp_path: Path) -> None:
    module, seen = Classifier(net=make_net().bfloat16()), []
    averaging = AdapterAveraging(0.99)
    note = calling(on_before_zero_grad=lambda trainer, module, optimizer: seen.append(weights(module)))
    fit(tmp_path, module, [note, averaging], make_loader(dtype=torch.bfloat16), max_epochs=3)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    held = averaging.state_dict()
    last = held["weights"]
    assert sorted(held["averages"]) == sorted(last) == sorted(names)
    steps = [{name: each[name].double() for name in names} for each in [*seen[1:], last]]
    for name, average in held["averages"].items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), by_hand(steps, 0.99)[name], rtol=1e-5, atol=1e-7)
        assert same(weights(module)[name], average.bfloat16())


# -- checkpoints


@pytest.mark.parametrize(("decay", "start"), [(0.9, 0), (None, 4)])
@pytest.mark.parametrize("method", [list, lambda: [EFMLoRA(0.5)]])
def test_runs_resume_bit_for_bit(tmp_path: Path, method: Any, decay: float | None, start: int) -> None:
    def callbacks() -> list[L.Callback]:
        return [*method(), AdapterAveraging(decay, start)]

    whole = assert_resumes(tmp_path, Classifier, callbacks=callbacks)
    ends = [torch.load(tmp_path / run / "step=12.ckpt", weights_only=True) for run in ("1", "2")]
    for part in ("state_dict", "optimizer_states"):
        assert same(ends[0][part], ends[1][part])
    assert same(*(end["callbacks"]["AdapterAveraging"] for end in ends))
    # The file, the folder and the module hold the weights that were validated.
    file = tmp_path / "1" / "step=12.ckpt"
    for name, value in state(file).items():
        assert same(value, whole.state_dict()[name])
    for name, value in load_file(tmp_path / "1" / "step=12" / WEIGHTS).items():
        assert same(value, whole.state_dict()[f"net.{name.removesuffix('weight')}default.weight"])
    assert same(weights(load_adapter_checkpoint(Classifier(), file)), weights(whole))
    held = ends[0]["callbacks"]["AdapterAveraging"]
    assert len(held["averages"]) == len(held["weights"]) == 7  # three pairs and a bias
    assert not same(held["averages"], held["weights"])


def test_lightnings_own_files_resume_too(tmp_path: Path) -> None:
    def run(where: str, **settings: Any) -> Any:
        module = Classifier()
        save = ModelCheckpoint(tmp_path / where, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        fit(tmp_path, module, [AdapterAveraging(0.8), save], **settings)
        return module

    whole, resumed = run("1"), run("2", ckpt_path=tmp_path / "1" / "step=6.ckpt")
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("make", [saver, ModelCheckpoint])
def test_files_with_only_weights_have_the_averages(tmp_path: Path, make: Any) -> None:
    module, plain = Classifier(), Classifier()
    fit(tmp_path, plain, [])
    save = make(tmp_path, save_weights_only=True, save_last=True, every_n_train_steps=12, filename="{step}")
    fit(tmp_path, module, [AdapterAveraging(0.8), save])
    assert not same(weights(module), weights(plain))
    for name in ("step=12.ckpt", "last.ckpt"):
        for key, value in state(tmp_path / name).items():
            assert same(value, module.state_dict()[key])


def test_a_monitored_checkpoint_is_what_was_validated(tmp_path: Path) -> None:
    module = Classifier()
    save = saver(tmp_path, every_n_train_steps=None, monitor="val_loss", filename="{epoch}")
    trainer = fit(tmp_path, module, [AdapterAveraging(0.8), save], val=make_loader(2), max_epochs=3)
    for file in tmp_path.glob("epoch=*.ckpt"):
        (found,) = trainer.validate(module, make_loader(2), ckpt_path=file, verbose=False)
        saved = torch.load(file, weights_only=True)["callbacks"]
        (of_saver,) = [value for key, value in saved.items() if key.startswith("AdapterCheckpoint")]
        assert found["val_loss"] == of_saver["current_score"]


# -- around a fit


def test_a_second_fit_of_a_trainer_continues(tmp_path: Path) -> None:
    whole, twice = Classifier(), Classifier()
    whole.optimizer_class = twice.optimizer_class = torch.optim.SGD  # its fresh state equals the old one
    averaging = [AdapterAveraging(0.8), AdapterAveraging(0.8)]
    fit(tmp_path, whole, [averaging[0]], max_epochs=2)
    trainer = fit(tmp_path, twice, [averaging[1]], max_epochs=1)
    after_one = weights(twice)
    trainer.validate(twice, make_loader(1), verbose=False)
    assert same(weights(twice), after_one)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(twice, make_loader(), make_loader(1))
    assert same(weights(twice), weights(whole))
    assert same(averaging[0].state_dict(), averaging[1].state_dict())


def test_another_run_takes_nothing_from_the_last_or_from_a_file_that_was_evaluated(tmp_path: Path) -> None:
    def averaging() -> list[Any]:
        return [AdapterAveraging(0.8), saver(tmp_path)]

    expected = Classifier()
    fit(tmp_path, expected, averaging(), max_epochs=1)
    used = averaging()[0]
    fit(tmp_path, Classifier(net=make_net(seed=3)), [used], max_epochs=1)
    again = Classifier()
    fit(tmp_path, again, [used], max_epochs=1)
    assert same(weights(again), weights(expected))
    callbacks = averaging()
    trainer_of(tmp_path, callbacks).validate(
        Classifier(net=make_net()), make_loader(1), ckpt_path=tmp_path / "step=6.ckpt", verbose=False
    )
    again = Classifier()
    fit(tmp_path, again, [callbacks[0]], max_epochs=1)
    assert same(weights(again), weights(expected))


def test_a_used_object_takes_nothing_into_a_run_that_had_no_averages(tmp_path: Path) -> None:
    fit(tmp_path, Classifier(), [saver(tmp_path)], max_epochs=2)
    resumed = {}
    for name, averaging in (("new", AdapterAveraging(0.8)), ("used", AdapterAveraging(0.8))):
        if name == "used":
            fit(tmp_path, Classifier(net=make_net(seed=3)), [averaging], max_epochs=1)
        resumed[name] = Classifier()
        trainer = trainer_of(tmp_path, [averaging, saver(tmp_path / name)], max_epochs=3)
        trainer.fit(resumed[name], make_loader(), make_loader(1), ckpt_path=tmp_path / "step=12.ckpt")
    assert same(weights(resumed["used"]), weights(resumed["new"]))


def test_an_epoch_that_is_ended_early_ends_with_the_averages(tmp_path: Path) -> None:
    """Its last batch starts, and returns -1 before it ends: what is saved and left is the average all the same."""
    plain, cut = Classifier(), Classifier()
    for module in (plain, cut):
        module.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 4 else None
    fit(tmp_path, plain, [], max_epochs=2)
    averaging, save = AdapterAveraging(None), saver(tmp_path, every_n_train_steps=None, save_on_train_epoch_end=True)
    fit(tmp_path, cut, [averaging, save], max_epochs=2)
    held = averaging.state_dict()
    assert held["count"] == 8
    assert same(list(held["weights"].values()), [p for p in plain.parameters() if p.requires_grad])
    assert same(list(held["averages"].values()), [p for p in cut.parameters() if p.requires_grad])
    assert not same(weights(cut), weights(plain))
    for key, value in state(tmp_path / "step=8.ckpt").items():
        assert same(value, cut.state_dict()[key])


class Writes(L.Callback):
    """Reset B and restore an earlier state, as ReLoRA and a return to the best weights do, between two batches."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.earlier = {name: value.clone() for name, value in pl_module.state_dict().items()}
        if trainer.current_epoch == 2:
            for name, parameter in pl_module.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.zeros_(parameter)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 3:
            pl_module.load_state_dict(self.earlier)


def test_training_goes_on_from_what_is_written_between_batches(tmp_path: Path) -> None:
    """An average with decay 0 is the last step's weights, so that all must be as without it."""
    plain, averaged, other = Classifier(), Classifier(), Classifier()
    fit(tmp_path, plain, [Writes()], val=make_loader(1), max_epochs=5)
    fit(tmp_path, averaged, [Writes(), AdapterAveraging(0.0)], val=make_loader(1), max_epochs=5)
    fit(tmp_path, other, [AdapterAveraging(0.0)], val=make_loader(1), max_epochs=5)
    assert same(weights(averaged), weights(plain))
    assert not same(weights(averaged), weights(other))


def test_what_is_written_is_the_average_too(tmp_path: Path) -> None:
    """And weights that nobody writes keep their averages and go on as they were."""
    averaging, module, seen = AdapterAveraging(0.9), Classifier(), dict[str, Any]()

    def write(trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            seen["before"] = copy.deepcopy(averaging.state_dict())
            (seen["name"], written), *_ = ((n, p) for n, p in pl_module.named_parameters() if "lora_B" in n)
            torch.nn.init.ones_(written)

    def look(trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.current_epoch == 1 and args[-1] == 0:
            seen["after"] = copy.deepcopy(averaging.state_dict()["averages"])
            seen["weights"] = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}

    callbacks = [averaging, calling(on_train_epoch_start=write, on_train_batch_start=look)]
    fit(tmp_path, module, callbacks, max_epochs=2)
    for name, before in seen["before"]["averages"].items():
        training = seen["before"]["weights"][name]
        assert not same(before, training)
        is_written = name == seen["name"]
        assert same(seen["after"][name], torch.ones_like(before) if is_written else before)
        assert same(seen["weights"][name], torch.ones_like(before) if is_written else training)


def test_a_trainers_second_module_starts_from_its_own_weights(tmp_path: Path) -> None:
    averaging, first, alone, second = AdapterAveraging(None), Classifier(), Classifier(), Classifier()
    trainer = fit(tmp_path, first, [averaging], max_epochs=1)
    for name, parameter in second.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    alone.load_state_dict(second.state_dict())
    fit(tmp_path, alone, [AdapterAveraging(None)], max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(second, make_loader(), make_loader(1))
    assert same(weights(second), weights(alone))


def test_weights_loaded_between_two_fits_are_taken(tmp_path: Path) -> None:
    plain, averaged = Classifier(), Classifier()
    for module, callbacks in ((plain, []), (averaged, [AdapterAveraging(0.0)])):
        start = {name: value.clone() for name, value in module.state_dict().items()}
        trainer = fit(tmp_path, module, callbacks, max_epochs=1)
        module.load_state_dict(start)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, make_loader(), make_loader(1))
    assert same(weights(averaged), weights(plain))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, r"decay must be a number >= 0 and < 1, or None for equal weights, got 1.0"),
        ({"decay": "0.9"}, r"decay must be .*, got '0.9'"),
        ({"decay": None, "start_step": -1}, r"start_step must be an integer >= 0, got -1"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        AdapterAveraging(**settings)


def test_a_module_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    class Frozen(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.base_model.model[0].base_layer.parameters())

    with pytest.raises(MisconfigurationException, match="no parameter that requires a gradient: add an adapter"):
        fit(tmp_path, Frozen(), [AdapterAveraging(0.9)])


def test_the_frozen_base_is_not_copied(tmp_path: Path) -> None:
    class All(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module, averaging = All(), AdapterAveraging(0.9)
    fit(tmp_path, module, [averaging], max_epochs=1)
    sizes = sum(value.numel() for value in averaging.state_dict()["averages"].values())
    assert sizes == sum(p.numel() for p in module.parameters() if p.requires_grad)
