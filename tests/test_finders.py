"""Finders: other projects' layers, imitated in their structure, are read through like peft's; and what is refused."""

import pickle
import sys
from typing import Any

import pytest
import torch
from imitated_layers import BY_NAME, Bare, OfNeMo, OfTorchtune, model_of
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from lightning_flatlora import EFMLoRA, LoRAPair, NoPairsError, ParameterRef, Perturbation, find_pairs
from lightning_flatlora.pairs.finders import litgpt_pairs, nemo_pairs, torchtune_pairs

RHO = 0.2


def loss_of(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    return model(x).square().mean()


@pytest.mark.parametrize("finder", [litgpt_pairs, torchtune_pairs, nemo_pairs, BY_NAME])
def test_callbacks_with_a_finder_can_be_pickled(finder: Any) -> None:
    callback = pickle.loads(pickle.dumps(EFMLoRA(RHO, finder=finder)))
    assert callback.method.finder == finder


@pytest.mark.filterwarnings("ignore")  # LightningCLI's warnings about its parser
@pytest.mark.parametrize(
    ("written", "finder"),
    [
        ("lightning_flatlora.pairs.finders.litgpt_pairs", litgpt_pairs),
        ("lightning_flatlora.pairs.finders.torchtune_pairs", torchtune_pairs),
        ("lightning_flatlora.pairs.finders.nemo_pairs", nemo_pairs),
        ({"class_path": "lightning_flatlora.pairs.finders.PairsByName", "init_args": vars(BY_NAME)}, BY_NAME),
    ],
)
def test_a_config_may_name_a_finder(monkeypatch: pytest.MonkeyPatch, written: Any, finder: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["fit"])
    callback = {"class_path": "lightning_flatlora.EFMLoRA", "init_args": {"rho": 0.1, "finder": written}}
    settings = {"trainer.logger": False, "trainer.accelerator": "cpu", "trainer.callbacks": [callback]}
    cli = LightningCLI(BoringModel, run=False, args=settings, save_config_callback=None, seed_everything_default=False)
    assert [each.method.finder for each in cli.trainer.callbacks if isinstance(each, EFMLoRA)] == [finder]


@pytest.mark.parametrize("finder", [litgpt_pairs, torchtune_pairs, nemo_pairs])
def test_compiled_layers_read_it(finder: Any) -> None:
    kind = {litgpt_pairs: Bare, torchtune_pairs: OfTorchtune, nemo_pairs: OfNeMo}[finder]
    model = model_of(kind)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    pairs = find_pairs(compiled, finder=finder).pairs
    assert not [pair.name for pair in pairs if "_orig_mod" in pair.name]
    perturbation = Perturbation(pairs)
    perturbation.install()
    loss_of(compiled).backward()
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    for _ in range(2):
        with perturbation.applied():
            assert torch.allclose(loss_of(compiled), loss_of(model))
            perturbed = loss_of(compiled)
        assert loss_of(compiled) < perturbed
    perturbation.uninstall()


# -- what is refused


def pair_of(layer: Any, **changes: Any) -> LoRAPair:
    settings: dict[str, Any] = {
        "name": "pair",
        "A": layer.lora_A,
        "B": layer.lora_B,
        "scaling": 1.5,
        "readers": [ParameterRef(layer, "lora_B")],
        "A_readers": [ParameterRef(layer, "lora_A")],
    }
    return LoRAPair(**(settings | changes))


def test_a_finder_that_finds_nothing() -> None:
    with pytest.raises(NoPairsError, match=r"litgpt_pairs found none .*The model holds Linear, Sequential: does the"):
        find_pairs(nn.Sequential(nn.Linear(4, 4)), finder=litgpt_pairs)


def test_pairs_that_are_not_trained_are_known_and_named() -> None:
    model = model_of(Bare)
    model[0].lora_B.requires_grad_(False)
    search = find_pairs(model, finder=litgpt_pairs)
    assert [pair.name for pair in search.pairs] == ["2.lora_B"]
    assert [pair.name for pair in search.resting] == ["0.lora_B"]
    with pytest.raises(NoPairsError, match=r"2 are not trained, such as 0\.lora_B: unfreeze their B"):
        find_pairs(model.requires_grad_(False), finder=litgpt_pairs)


def of_shapes(A: tuple[int, int], B: tuple[int, int]) -> Bare:
    layer = Bare()
    layer.lora_A, layer.lora_B = nn.Parameter(torch.zeros(A)), nn.Parameter(torch.zeros(B))
    return layer


def read_by(*names: str) -> Any:
    return lambda layer: {"readers": [ParameterRef(layer, name) for name in names]}


def rows(which: range) -> Any:
    return lambda layer: {"B_rows": which, "readers": [ParameterRef(layer, "lora_B", which)]}


BARE: tuple[Any, Any] = (2, 6), (6, 2)
NOT_A_RANGE = "rows must be a range of consecutive rows"
REFUSED: list[tuple[tuple[Any, Any], Any, str]] = [
    (((2, 6), (6, 3)), {}, r"perturbed: A must be \(r, m\) and B \(n, r\), got \(2, 6\) and \(6, 3\)"),
    (((6, 2), (2, 6)), {}, "which look transposed"),
    (BARE, {"readers": []}, "no reader is given"),
    (BARE, {"scaling": float("nan")}, "scaling must be a finite number, got nan"),
    (BARE, read_by("lora_A"), "lora_A of the reader Bare is another parameter"),
    (BARE, read_by("typo"), "typo of the reader Bare is another parameter"),
    (BARE, {"A_readers": []}, "A is trained and no reader of it is given"),
    (
        BARE,
        {"B_rows": range(3)},
        r"lora_B .* is read in the rows None, but the pair's are range\(0, 3\)",
    ),
    (BARE, rows(range(4, 9)), "some of the rows .* don't exist: the parameter has 6"),
    (BARE, rows(range(0, 6, 2)), NOT_A_RANGE),
    (BARE, rows(range(-1, 3)), NOT_A_RANGE),
    (BARE, rows(range(3, 3)), NOT_A_RANGE),
]
for bad in (0, 2.0, True, 3):
    REFUSED.append((BARE, {"experts": bad}, f"experts must be an integer >= 1 that divides the 2 rows of A, got {bad}"))


@pytest.mark.parametrize(("shapes", "changes", "said"), REFUSED)
def test_pairs_that_can_not_be_perturbed(shapes: tuple[Any, Any], changes: Any, said: str) -> None:
    layer = of_shapes(*shapes)
    settings = changes(layer) if callable(changes) else changes
    with pytest.raises(ValueError, match=said):
        find_pairs(layer, finder=lambda model: [pair_of(layer, **settings)])


def test_what_a_finder_gives_is_checked() -> None:
    layer, other = Bare(), Bare()
    with pytest.raises(ValueError, match="gives 2 pairs the name 'pair'"):
        find_pairs(layer, finder=lambda model: [pair_of(layer), pair_of(other)])
    with pytest.raises(ValueError, match="adapter_name applies to peft layers, finder to all others"):
        find_pairs(layer, "default", finder=lambda model: [pair_of(layer)])


def test_layers_with_the_names_of_lora_and_no_scaling_are_none() -> None:
    block = nn.Module()
    block.linear_in, block.linear_out = nn.Linear(4, 8), nn.Linear(8, 4)
    for finder in (nemo_pairs, torchtune_pairs, litgpt_pairs):
        with pytest.raises(NoPairsError):
            find_pairs(block, finder=finder)
    block.alpha, block.dim, block.activation = 16, 8, nn.SiLU()
    with pytest.raises(NoPairsError):  # this adapter's update is not a product of two factors
        find_pairs(block, finder=nemo_pairs)


def test_a_parameter_that_two_pairs_share_is_left_out_with_both() -> None:
    one, two, alone = Bare(), Bare(), Bare()
    two.lora_A = one.lora_A
    layers = {"one": one, "two": two, "alone": alone}
    search = find_pairs(one, finder=lambda model: [pair_of(each, name=name) for name, each in layers.items()])
    assert [pair.name for pair in search.pairs] == ["alone"]
    assert search.left_out == [
        "a factor is shared with another pair or scaling, so its gradient belongs to several products "
        "(2 in all, first one)"
    ]
    assert search.resting == []


@pytest.mark.parametrize(("second", "is_found"), [(range(3, 6), True), (range(2, 6), False)])
def test_rows_that_overlap_are_shared_and_others_are_not(second: range, is_found: bool) -> None:
    layer = Bare()
    layer.lora_B = nn.Parameter(torch.zeros(6, 1))
    found = []
    for index, rows in enumerate((range(3), second)):
        reader = ParameterRef(layer, "lora_B", rows)
        of_A = range(index, index + 1)
        changes = {"readers": [reader], "A_readers": [ParameterRef(layer, "lora_A", of_A)]}
        found.append(pair_of(layer, name=str(rows), A_rows=of_A, B_rows=rows, **changes))
    if is_found:
        assert len(find_pairs(layer, finder=lambda model: found).pairs) == 2
    else:
        with pytest.raises(NoPairsError, match="shared with another pair"):
            find_pairs(layer, finder=lambda model: found)


def test_a_tied_pair_has_two_readers() -> None:
    one, two = Bare(), Bare()
    two.lora_A, two.lora_B = one.lora_A, one.lora_B
    readers = [ParameterRef(one, "lora_B"), ParameterRef(two, "lora_B")]
    pairs = find_pairs(one, finder=lambda model: [pair_of(one, readers=readers)]).pairs
    assert pairs[0].readers == readers
    (found,) = find_pairs(nn.Sequential(one, two), finder=litgpt_pairs).pairs
    assert found.readers == readers
    two.scaling = 2 * one.scaling
    with pytest.raises(NoPairsError, match="shared with another pair"):
        find_pairs(nn.Sequential(one, two), finder=litgpt_pairs)
