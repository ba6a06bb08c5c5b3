"""Which parts of a module hold adapters, whatever its attributes are, and whatever names its parts have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed_bases import assert_resumes, saver, state
from helpers import CLASSES, FEATURES, WIDTH, Classifier, fit, needs_weight_averaging, same, weights
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from lightning_flatlora import EFMLoRA, load_adapter_checkpoint
from lightning_flatlora.callbacks.adapter_checkpoint.contents import hosts

ARGUMENTS = {"r": 2, "target_modules": ["0", "2"]}


def config(**kwargs: Any) -> LoraConfig:
    return LoraConfig(**{**ARGUMENTS, "init_lora_weights": False, **kwargs})


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))


class Projects(Classifier):
    """Has a frozen random layer before the network, which no loader can restore."""

    def __init__(self, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        torch.manual_seed(seed)
        self.projection = nn.Linear(FEATURES, FEATURES).requires_grad_(False)

    def loss(self, batch: Any, batch_idx: int) -> Tensor | None:
        inputs, labels, factor = batch
        return super().loss((self.projection(inputs), labels, factor), batch_idx)


def assert_peft_loads(folder: Path, module: Any) -> None:
    loaded = PeftModel.from_pretrained(base(), str(folder))
    inputs = torch.randn(5, FEATURES)
    assert torch.equal(loaded(inputs), module.net(inputs))


def in_a_peft_model() -> nn.Module:
    return get_peft_model(base(), config())


def injected() -> nn.Module:
    return inject_adapter_in_model(config(), base())


def test_a_modules_own_attribute_called_peft_config_changes_nothing(tmp_path: Path) -> None:
    seeds = iter((1, 2))

    def module() -> Projects:
        made = Projects(next(seeds), net=injected())
        made.peft_config = made.net.peft_config
        return made

    whole = assert_resumes(tmp_path, module)
    assert list(hosts(whole)) == ["net"]
    saved = state(tmp_path / "1" / "step=6.ckpt")
    assert {"projection.weight", "projection.bias"} <= set(saved)
    assert not [name for name in saved if "base_layer" in name]
    assert_peft_loads(tmp_path / "1" / "step=12", whole)


def test_two_peft_models_are_two_hosts_and_a_module_without_adapters_is_none() -> None:
    module = nn.ModuleDict({"one": in_a_peft_model(), "plain": base(), "other": in_a_peft_model()})
    for part in (module, module["plain"]):
        part.peft_config = {"default": config()}
    assert list(hosts(module)) == ["one", "other"]


HOSTS = {
    "a peft model": (in_a_peft_model, "net"),
    "a mixed model": (lambda: PeftMixedModel(base(), config()), "net.base_model.model"),
    "a tuner": (lambda: LoraModel(base(), config(), "default"), "net.model"),
    "a model into which an adapter was injected": (injected, "net"),
    "a model into which an adapter and a head were injected": (
        lambda: inject_adapter_in_model(config(target_modules=["0"], modules_to_save=["2"]), base()),
        "net",
    ),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_an_adapter_is_found_however_it_came_into_the_model(tmp_path: Path, kind: str) -> None:
    make, expected = HOSTS[kind]
    module = assert_resumes(tmp_path, lambda: Classifier(net=make()), callbacks=lambda: [EFMLoRA(0.1)])
    assert list(hosts(module)) == [expected]
    assert len(state(tmp_path / "1" / "step=12.ckpt")) == 4
    assert_peft_loads(tmp_path / "1" / "step=12", module)


def test_an_adapter_that_was_injected_into_the_module_itself_is_found(tmp_path: Path) -> None:
    """Next to another network, which had an adapter before and keeps its own folder."""
    module = Classifier(net=base().requires_grad_(False))
    module.teacher = in_a_peft_model()
    inject_adapter_in_model(config(target_modules=["net.0", "net.2"]), module)
    assert list(hosts(module)) == ["teacher", ""]
    fit(tmp_path, module, [saver(tmp_path)])
    assert "net.0.lora_A.default.weight" in state(tmp_path / "step=12.ckpt")
    assert "net.0.base_layer.weight" not in state(tmp_path / "step=12.ckpt")


class Keeps(Classifier):
    """Its base, or one of the base's layers, is also an attribute, which is assigned before or after the peft model."""

    def __init__(self, order: tuple[str, ...], network: nn.Module) -> None:
        super().__init__(net=nn.Identity())
        del self.net
        parts = {"net": network, "base": network.get_base_model(), "layer": network.get_base_model()[0]}
        for name in order:
            setattr(self, name, parts[name])


ORDERS = [("net", "base"), ("net", "layer"), ("layer", "base", "net")]


@pytest.mark.parametrize("order", ORDERS)
def test_a_base_that_the_module_keeps_beside_the_peft_model_is_no_second_host(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    whole = assert_resumes(tmp_path, lambda: Keeps(order, in_a_peft_model()))
    assert hosts(whole) == {"net": whole.net}
    assert_peft_loads(tmp_path / "1" / "step=12", whole)
    assert not [name for name in state(tmp_path / "1" / "step=12.ckpt") if "base_layer" in name]


# -- modules with their own state_dict


class OfTheNetwork(Classifier):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.net.state_dict(*args, **{**kwargs, "prefix": ""})


def of_alpaca() -> Any:
    """With the state_dict that training scripts copied from alpaca-lora; it returns the adapter under other names."""
    net = in_a_peft_model()
    whole = net.state_dict
    net.state_dict = (lambda self, *_, **__: get_peft_model_state_dict(self, whole())).__get__(net, type(net))
    return net


class LeavesOut(nn.Module):
    """Holds a peft model, but leaves all of it out of its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = in_a_peft_model()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {}


OWN_STATES: dict[str, Any] = {
    "the module gives the network's": lambda: OfTheNetwork(net=in_a_peft_model()),
    "the network gives other names": lambda: Classifier(net=of_alpaca()),
    "the network leaves the adapter out": lambda: Classifier(net=LeavesOut()),
}


@pytest.mark.parametrize("kind", OWN_STATES)
def test_a_state_dict_of_its_own_changes_nothing(tmp_path: Path, kind: str) -> None:
    """The file, the folder, the loaded weights and the result of the module's own state_dict stay as they are."""
    trained = assert_resumes(tmp_path, OWN_STATES[kind], callbacks=lambda: [EFMLoRA(0.5)])
    plain = Classifier(net=in_a_peft_model())
    fit(tmp_path, plain, [EFMLoRA(0.5), saver(tmp_path / "3")])
    file = tmp_path / "1" / "step=12.ckpt"
    saved = {name.replace(".inner.", "."): value for name, value in state(file).items()}
    assert same(saved, state(tmp_path / "3" / "step=12.ckpt"))
    assert_peft_loads(file.with_suffix(""), trained)
    loaded = load_adapter_checkpoint(OWN_STATES[kind](), file)
    assert same(list(weights(loaded).values()), list(weights(plain).values()))
    assert set(trained.state_dict()) == set(OWN_STATES[kind]().state_dict())


@needs_weight_averaging
@pytest.mark.parametrize("make", [lambda: OfTheNetwork(net=in_a_peft_model()), lambda: Classifier(net=of_alpaca())])
def test_averages_under_other_names_are_refused(tmp_path: Path, make: Any) -> None:
    """They would put the base into the file, and could not be resumed."""
    with pytest.raises(MisconfigurationException, match="WeightAveraging gives averages under other names"):
        fit(tmp_path, make(), [lightnings.EMAWeightAveraging(), saver(tmp_path)])
    assert not list(tmp_path.iterdir())
