"""Checkpoints next to other callbacks, optimizers and ways to hold an adapter, and without a Trainer."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import pytest
import torch
from checkpointed_bases import WEIGHTS, assert_resumes, saver, state
from helpers import Classifier, fit, make_net, needs_weight_averaging, same, trainer_of, weights
from hostile_modules import of_hydra, two_linear, under_peft
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from pytorch_optimizer import Lookahead
from quantized_bases import BASES
from quantized_bases import network as quantized_network
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_flatlora import EFMLoRA, load_adapter_checkpoint


@needs_weight_averaging
# At 0.999, rounding changes the averages of frozen weights.
@pytest.mark.parametrize(("decay", "first"), [(None, "averaging"), (0.5, "saver"), (0.999, "averaging")])
def test_averaged_weights_are_saved_beside_the_current_ones(tmp_path: Path, decay: float | None, first: str) -> None:
    def callbacks(where: str) -> list[L.Callback]:
        averaging = lightnings.EMAWeightAveraging(decay=decay) if decay else lightnings.WeightAveraging()
        both: list[L.Callback] = [averaging, saver(tmp_path / where)]
        return [EFMLoRA(0.1), *(both if first == "averaging" else both[::-1])]

    whole = Classifier()
    fit(tmp_path, whole, callbacks("1"))
    file = torch.load(tmp_path / "1" / "step=6.ckpt", weights_only=True)
    averages, current = state(tmp_path / "1" / "step=6.ckpt"), file["current_model_state"]
    assert averages.keys() == current.keys()
    assert not any("base_layer.weight" in name for name in averages)
    assert not same(averages, current)
    found = load_file(tmp_path / "1" / "step=6" / WEIGHTS)
    assert len(found) == 6
    for name, value in found.items():
        assert same(value, averages[f"net.{name.removesuffix('weight')}default.weight"])
    resumed = Classifier()
    fit(tmp_path, resumed, callbacks("2"), ckpt_path=tmp_path / "1" / "step=6.ckpt")
    for name, weight in weights(whole).items():
        rounding = 1e-6 if decay == 0.999 and "lora" not in name else 0.0  # rounding of an average of the base
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=rounding, atol=0)
    ends = [torch.load(tmp_path / run / "step=12.ckpt") for run in ("1", "2")]
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert same(ends[0][part], ends[1][part])


def test_stochastic_weight_averaging_is_refused(tmp_path: Path) -> None:
    """Its state is a copy of the whole model."""
    callbacks = [saver(tmp_path), StochasticWeightAveraging(swa_lrs=0.01)]
    with pytest.raises(MisconfigurationException, match="save the frozen base too: use AdapterAveraging"):
        fit(tmp_path, Classifier(), callbacks)
    assert not list(tmp_path.rglob("*.ckpt"))


class WithLoraFA(Classifier):
    def configure_optimizers(self) -> Any:
        return create_lorafa_optimizer(self.net, r=2, lora_alpha=4, lr=0.01)


class WithLookahead(Classifier):
    def configure_optimizers(self) -> Any:
        return Lookahead(torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01), k=2)


@pytest.mark.parametrize("kind", [WithLoraFA, WithLookahead])
def test_optimizers_that_key_their_state_in_another_way(tmp_path: Path, kind: Any) -> None:
    assert_resumes(tmp_path, kind, callbacks=lambda: [EFMLoRA(0.5)])


def never(*args: Any) -> Any:
    raise AssertionError("the first step was taken")


class Unpicklable(L.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"fine": 1, "stream": (number for number in ())}


def test_what_would_fail_at_the_first_save_fails_at_the_start(tmp_path: Path) -> None:
    module = Classifier()
    module.inside.append(never)
    with pytest.raises(MisconfigurationException, match=r"would fail: TypeError: cannot pickle 'generator' object"):
        fit(tmp_path, module, [Unpicklable(), saver(tmp_path / "new" / "folder")])
    assert not list(tmp_path.iterdir())
    odd = under_peft(two_linear, "0")
    odd.peft_config["default"].revision = object()
    with pytest.raises(MisconfigurationException, match=r"would fail: TypeError: .*object is not JSON serializable"):
        fit(tmp_path, Classifier(net=odd), [saver(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(MisconfigurationException, match=r"saving into .*/file/folder would fail: NotADirectoryError"):
        fit(tmp_path, module, [saver(tmp_path / "file" / "folder")])


class Names(Sequence[str]):
    """A list type from another library."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __getitem__(self, index: Any) -> Any:
        return self.names[index]

    def __len__(self) -> int:
        return len(self.names)


def of_another_library() -> nn.Module:
    config = LoraConfig(r=2, target_modules=Names(["0", "2"]), rank_pattern=MappingProxyType({"0": 3}))  # type: ignore[arg-type]
    return get_peft_model(two_linear(), config)


@pytest.mark.parametrize("make", [of_hydra, of_another_library])
def test_other_lists_and_dicts_are_written_as_plain_ones(tmp_path: Path, make: Any) -> None:
    fit(tmp_path, Classifier(net=make()), [saver(tmp_path)])
    config = LoraConfig.from_pretrained(str(tmp_path / "step=12"))
    assert (config.target_modules, config.rank_pattern, config.r) == ({"0", "2"}, {"0": 3}, 2)


class Remembers(Classifier):
    """Keeps a count in its extra state, and a metric whose state is saved in the checkpoint; neither is a buffer."""

    def __init__(self) -> None:
        super().__init__(net=make_net())
        self.seen = 0
        self.average = MeanMetric()
        self.average.persistent(True)

    def on_train_batch_start(self, *args: Any) -> None:  # since files are written before the batch-end hook
        self.seen += 1
        self.average.update(float(self.seen))

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def test_what_a_module_keeps_outside_of_its_tensors_is_resumed(tmp_path: Path) -> None:
    whole = assert_resumes(tmp_path, Remembers)
    for file in (tmp_path / "1" / "step=12.ckpt", tmp_path / "2" / "step=12.ckpt"):
        loaded = load_adapter_checkpoint(Remembers(), file)
        assert loaded.seen == whole.seen == 12
        assert same(loaded.average.metric_state, whole.average.metric_state)


@pytest.mark.parametrize("quantize", BASES)
def test_a_quantized_base_is_not_saved_and_may_be_exchanged(tmp_path: Path, quantize: Any) -> None:
    """Trained on packed weights, resumed and tested on these, and tested on float32 weights, all without a warning."""

    def module(packed: bool = True) -> Classifier:
        net = quantized_network(quantize if packed else lambda layer: layer)
        torch.seed()
        for name, p in net.named_parameters():
            if "lora" in name:
                nn.init.normal_(p)
        return Classifier(net=net)

    generator = torch.Generator().manual_seed(2)
    data = torch.randn(24, 32, generator=generator), torch.randint(3, (24,), generator=generator), torch.ones(24)
    batches = DataLoader(TensorDataset(*data), batch_size=4)
    assert_resumes(tmp_path, module, batches)
    file = tmp_path / "1" / "step=6.ckpt"
    assert not [name for name in state(file) if "base_layer" in name]
    loads = trainer_of(tmp_path, [saver(tmp_path / "2")])
    loads.validate(module(packed=False), batches, ckpt_path=file, verbose=False)


def test_without_a_trainer(trained: tuple[Any, Path]) -> None:
    module, file = trained[0], trained[1] / "step=12.ckpt"
    other = Classifier(net=make_net())
    assert load_adapter_checkpoint(other, file) is other
    assert same(weights(other), weights(module))
    # Lightning's own method is not strict.
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*call load_adapter_checkpoint"):
        Classifier.load_from_checkpoint(file)
    with (
        pytest.warns(UserWarning, match="Found keys that are in the model"),
        pytest.warns(UserWarning, match="call load_adapter_checkpoint"),
    ):
        assert same(weights(Classifier.load_from_checkpoint(file, strict=False)), weights(module))
    with pytest.warns(UserWarning, match=r"tensors of the base.*are not those"):
        load_adapter_checkpoint(Classifier(net=make_net(seed=1)), file)
    with pytest.raises(
        MisconfigurationException,
        match=r"(?s)step=12.ckpt can.t .*size mismatch .*lora_A.*\[2, 6\].*\[3, 6\]",
    ):
        load_adapter_checkpoint(Classifier(net=make_net(rank=3)), file)


class KeepsLoraAlone(Classifier):
    """Makes its files small by its own means."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if "lora_" in name}


def test_a_module_that_takes_weights_out_of_its_checkpoints_resumes(tmp_path: Path) -> None:
    assert_resumes(tmp_path, KeepsLoraAlone, callbacks=lambda: [EFMLoRA(0.1)])
    assert load_file(tmp_path / "1" / "step=6" / WEIGHTS)
