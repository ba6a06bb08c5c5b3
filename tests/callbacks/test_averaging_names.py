"""AdapterAveraging knows weights by name, and averages each step before another callback saves."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checkpointed_bases import saver
from helpers import (
    Classifier,
    ResumableLoader,
    calling,
    fit,
    make_loader,
    needs_weight_averaging,
    same,
    weights,
)
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_flatlora import AdapterAveraging


class Ordered(Classifier):
    """Lists its parameters in one of two orders, as groups that are made from a set do, and stands still."""

    is_reversed = False

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters[::-1] if self.is_reversed else parameters, lr=0.0)


def test_a_resumed_run_may_list_its_parameters_in_another_order(tmp_path: Path) -> None:
    first, resumed = Ordered(), Ordered()
    for parameter in first.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    fit(tmp_path, first, [AdapterAveraging(0.9), saver(tmp_path)], max_epochs=1)
    resumed.is_reversed = True
    callbacks = [AdapterAveraging(0.9), saver(tmp_path / "resumed")]
    fit(tmp_path, resumed, callbacks, max_epochs=2, ckpt_path=tmp_path / "step=6.ckpt")
    torch.testing.assert_close(weights(resumed), weights(first), rtol=1e-6, atol=1e-7)


def test_the_order_may_change_within_a_fit(tmp_path: Path) -> None:
    """Parameters are known by name, so that groups that are put before others change nothing."""

    def exchange(trainer: L.Trainer, pl_module: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        groups[0]["params"].reverse()

    plain, changed = Classifier(), Classifier()
    fit(tmp_path, plain, [AdapterAveraging(0.9)], max_epochs=2)
    fit(tmp_path, changed, [AdapterAveraging(0.9), calling(on_train_epoch_start=exchange)], max_epochs=2)
    torch.testing.assert_close(weights(changed), weights(plain), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["name", "shape"])
def test_a_checkpoint_with_averages_of_other_weights_is_refused(tmp_path: Path, kind: str) -> None:
    fit(tmp_path, Classifier(), [AdapterAveraging(0.9), saver(tmp_path)], max_epochs=1)
    file = tmp_path / "step=6.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    averages = checkpoint["callbacks"]["AdapterAveraging"]["averages"]
    name = next(iter(averages))
    average = averages.pop(name)
    averages |= {"another": average} if kind == "name" else {name: average[1:]}
    torch.save(checkpoint, file)
    module = Classifier()
    expected = "another is absent here, but .* in the checkpoint" if kind == "name" else r"net.* is \(.*\) here, but"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(tmp_path, module, [AdapterAveraging(0.9), saver(tmp_path)], max_epochs=2, ckpt_path=file)


def test_a_parameter_that_is_replaced_starts_its_average_again(tmp_path: Path) -> None:
    """As ReLoRA's new adapters do; the others keep theirs."""
    module, averaging, seen = Classifier(), AdapterAveraging(0.9), dict[str, Any]()

    def replace(trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch != 1:
            return
        layer = pl_module.net.base_model.model[0].lora_A["default"]
        new = torch.nn.Parameter(torch.ones_like(layer.weight))
        group = trainer.optimizers[0].param_groups[0]
        group["params"] = [new if each is layer.weight else each for each in group["params"]]
        layer.weight = new
        seen["name"] = "net.base_model.model.0.lora_A.default.weight"

    def look(trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 7:
            seen["state"] = copy.deepcopy(averaging.state_dict())

    callbacks = [averaging, calling(on_train_epoch_start=replace, on_train_batch_end=look)]
    fit(tmp_path, module, callbacks, max_epochs=2)
    for name, average in seen["state"]["averages"].items():
        assert same(average, seen["state"]["weights"][name]) == (name == seen["name"])


def test_a_parameter_that_is_not_the_modules_is_refused(tmp_path: Path) -> None:
    """No checkpoint holds it, so that a resumed run would average another one."""
    outside = [torch.nn.Parameter(torch.zeros(2))]

    class Outside(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*(p for p in self.parameters() if p.requires_grad), *outside], lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"trains a parameter of shape \(2,\) that is not the module's"):
        fit(tmp_path, Outside(), [AdapterAveraging(0.9)])


def test_a_callback_that_saves_before_it_in_a_batch_has_the_batchs_average(tmp_path: Path) -> None:
    """AdapterAveraging is called first, wherever it is listed."""

    def save(trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    whole, resumed = Classifier(), Classifier()
    callbacks = [calling(on_train_batch_end=save), AdapterAveraging(0.8)]
    fit(tmp_path, whole, callbacks, ResumableLoader(list(make_loader())))
    loader = ResumableLoader(list(make_loader()))
    fit(tmp_path, resumed, [AdapterAveraging(0.8)], loader, ckpt_path=tmp_path / "early.ckpt")
    assert same(weights(resumed), weights(whole))


OTHERS = [
    ("StochasticWeightAveraging", {"swa_lrs": 0.1, "swa_epoch_start": 0.5}),
    pytest.param("EMAWeightAveraging", {}, marks=needs_weight_averaging),
]


@pytest.mark.parametrize(("name", "settings"), OTHERS)
def test_another_average_of_the_weights_is_refused(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    other = getattr(lightnings, name)(**settings)
    with pytest.raises(MisconfigurationException, match=f"{name} averages the same weights: keep one"):
        fit(tmp_path, Classifier(), [AdapterAveraging(0.9), other])
