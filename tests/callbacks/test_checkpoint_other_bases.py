"""A base that is not the one that was saved is noticed, by shapes and a sample of values."""

from pathlib import Path

import pytest
import torch
from checkpointed_bases import module_of, network, saver, state, validate
from helpers import FEATURES, Classifier, fit, same, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_flatlora import load_adapter_checkpoint
from lightning_flatlora.callbacks.adapter_checkpoint.contents import differing, identities_of

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def test_another_base_is_noticed(tmp_path: Path, trained_base: Path) -> None:
    """A head that the loader draws anew: no resumed run, and an evaluation with a warning."""
    said, file = r"1 tensors of the base.*base_model.model.head.weight", trained_base / "step=6.ckpt"
    with pytest.raises(MisconfigurationException, match=f"{said}.*strict"):
        fit(tmp_path, module_of(head_seed=2), [saver(tmp_path)], ckpt_path=file)
    with pytest.warns(UserWarning, match=said):
        validate(trained_base, module_of(head_seed=2))
    lenient = module_of(head_seed=2)
    lenient.strict_loading = False
    with pytest.warns(UserWarning, match=said):
        fit(tmp_path, lenient, [saver(tmp_path)], ckpt_path=file)


def test_a_base_that_differs_between_the_samples_is_taken_for_the_same(tmp_path: Path, trained_base: Path) -> None:
    """As the page on checkpoints says: a few values of each weight are compared."""
    other = module_of()
    other.net.base_model.model.head.weight.data[0, 1] += 1
    fit(tmp_path, other, [saver(tmp_path)], ckpt_path=trained_base / "step=6.ckpt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_of_another_precision_is_the_same_base(trained_base: Path, dtype: torch.dtype) -> None:
    """pytest turns warnings into errors."""
    validate(trained_base, module_of().to(dtype), dtype=dtype)


class BuiltLater(Classifier):
    """Makes its net in Lightning's hook for that, and the wrong one before it."""

    def configure_model(self) -> None:
        if not hasattr(self.net, "peft_config"):
            self.net = network()


def test_a_module_that_is_built_in_configure_model_is_built_before_it_is_loaded(tmp_path: Path) -> None:
    """As Lightning's load_from_checkpoint does it."""
    trained = BuiltLater(net=nn.Identity())
    fit(tmp_path, trained, [saver(tmp_path)], max_epochs=1)
    again = BuiltLater(net=nn.Identity())
    load_adapter_checkpoint(again, tmp_path / "step=6.ckpt")
    assert same(weights(again), weights(trained))


def test_another_base_of_half_precision_is_not_taken_for_rounding() -> None:
    """A chat model's weights are within the rounding of bfloat16 of those that it was trained from."""
    weight = 1 + torch.rand(40)
    half, chat = identities_of({"w": weight.bfloat16()}), identities_of({"w": (weight * 1.004).bfloat16()})
    assert differing(half, chat) == ["w"]
    assert differing(half, identities_of({"w": weight})) == []


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"w": torch.ones(4, 4)}, []),
        ({"w": torch.ones(4, 4).T}, []),
        ({"w": torch.ones(2, 8)}, ["w"]),
        ({"w": torch.ones(5, 4).index_fill(0, torch.tensor(4), 2.0)}, ["w"]),
        ({"w": torch.ones(4, 4), "more": torch.ones(1)}, ["more"]),
        ({}, ["w"]),
        ({"w": torch.ones(4, 4, device="meta")}, []),
        ({"w": torch.ones(8, 1, dtype=torch.uint8)}, []),
    ],
)
def test_shapes_and_samples_are_compared_if_both_can_be_read(other: dict[str, Tensor], expected: list[str]) -> None:
    """Packed weights of 4 or 8 bits can't, since they depend on the way in which they are packed."""
    assert differing(identities_of({"w": torch.ones(4, 4)}), identities_of(other)) == expected
    assert differing(identities_of(other), identities_of({"w": torch.ones(4, 4)})) == expected
    assert differing(identities_of({"w": torch.ones(4)}, sharded=True), identities_of({"w": torch.zeros(2)})) == []


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"lora_A": torch.ones(2)}, tmp_path / "adapter.bin")
    with pytest.raises(MisconfigurationException, match=r"adapter.bin has no state_dict: give a .ckpt of"):
        load_adapter_checkpoint(nn.Linear(2, 1), tmp_path / "adapter.bin")


def initialized(init: str, seed: int) -> Classifier:
    """A module on the same base, whose weights PiSSA has rewritten; its quick form draws random numbers."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 3))
    torch.manual_seed(seed)
    return Classifier(net=get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)))


def test_a_base_that_was_rewritten_at_random_is_in_the_file(tmp_path: Path) -> None:
    weight = "net.base_model.model.0.base_layer.weight"
    whole, other = (initialized("pissa_niter_1", seed) for seed in (1, 2))
    assert not same(other.state_dict()[weight], whole.state_dict()[weight])
    with pytest.warns(UserWarning, match="AdapterCheckpoint: peft rewrote the base of net, as init_lora_weights says"):
        fit(tmp_path, whole, [saver(tmp_path / "1")])
    with pytest.warns(UserWarning, match="AdapterCheckpoint: peft rewrote"):
        fit(tmp_path, other, [saver(tmp_path / "2")], ckpt_path=tmp_path / "1" / "step=6.ckpt")
    assert same(whole.state_dict(), other.state_dict())
    assert same(state(tmp_path / "2" / "step=12.ckpt")[weight], whole.state_dict()[weight])


def test_a_base_that_comes_out_the_same_is_left_out(tmp_path: Path) -> None:
    fit(tmp_path, initialized("pissa", 1), [saver(tmp_path)])
    assert "net.base_model.model.0.base_layer.weight" not in state(tmp_path / "step=6.ckpt")


def test_another_scaling_of_the_adapter_is_told_of(tmp_path: Path, trained_base: Path) -> None:
    """The same weights with another lora_alpha or use_rslora are another model, and have the same names and shapes."""
    file = trained_base / "step=6.ckpt"
    for load in (
        lambda module: load_adapter_checkpoint(module, file),
        lambda module: validate(trained_base, module),
        lambda module: fit(tmp_path, module, [saver(tmp_path)], ckpt_path=file),
    ):
        module = module_of()
        module.net.base_model.model.first.scaling["default"] = 16.0
        with pytest.warns(UserWarning, match=r"another lora_alpha, r or use_rslora in 1 layers, .*first.lora_B"):
            load(module)
