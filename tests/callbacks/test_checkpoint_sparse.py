"""Sparse buffers, such as a graph's adjacency: in the files where they belong there, and compared as all others are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed_bases import saver, state
from helpers import CLASSES, FEATURES, Classifier, fit, make_loader, same, trainer_of, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_flatlora.callbacks.checkpoint.changes import differing, fingerprints_of, sums_of
from lightning_flatlora.callbacks.checkpoint.sparse import bytes_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state"),
]
Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Layout] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda tensor: tensor.to_sparse_bsr((2, 2)),
    "bsc": lambda tensor: tensor.to_sparse_bsc((2, 2)),
}
INSIDE = "net.base_model.model.adjacency"


def graph(layout: str, weight: float = 0.5) -> Tensor:
    edges = torch.eye(4)
    edges[1, 2] = weight
    return LAYOUTS[layout](edges)


class OnAGraph(nn.Module):
    """Counts its steps in the weights of the edges, if asked."""

    def __init__(self, layout: str, weight: float, counts: bool) -> None:
        super().__init__()
        self.layer, self.counts = nn.Linear(FEATURES, CLASSES), counts
        self.register_buffer("adjacency", graph(layout, weight))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.counts:
            self.adjacency.values().add_(1)
        return self.layer(self.adjacency.to_dense() @ x)


def module(layout: str, weight: float = 0.5, counts: bool = False) -> Classifier:
    torch.manual_seed(0)
    net = get_peft_model(OnAGraph(layout, weight, counts), LoraConfig(r=2, target_modules=["layer"]))
    made = Classifier(net=net)
    made.register_buffer("outside", graph(layout))
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_buffer_is_in_the_file_unless_the_base_has_it_already(tmp_path: Path, layout: str) -> None:
    whole = module(layout)
    fit(tmp_path, whole, [saver(tmp_path / "1")])
    saved = state(tmp_path / "1" / "step=6.ckpt")
    assert INSIDE not in saved
    assert saved["outside"].layout is whole.outside.layout
    assert same(saved["outside"].to_dense(), whole.outside.to_dense())
    resumed = module(layout)
    resumed.outside.values().zero_()
    fit(tmp_path, resumed, [saver(tmp_path / "2")], ckpt_path=tmp_path / "1" / "step=6.ckpt")
    assert same(weights(resumed), weights(whole))
    assert same(resumed.outside.to_dense(), whole.outside.to_dense())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_buffer_of_the_base_that_changes_is_saved(tmp_path: Path, layout: str) -> None:
    whole, resumed = module(layout, counts=True), module(layout, counts=True)
    fit(tmp_path, whole, [saver(tmp_path / "1")])
    assert state(tmp_path / "1" / "step=6.ckpt")[INSIDE].to_dense()[0, 0] == 7
    fit(tmp_path, resumed, [saver(tmp_path / "2")], ckpt_path=tmp_path / "1" / "step=6.ckpt")
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_base_on_another_graph_is_noticed(tmp_path: Path, layout: str) -> None:
    fit(tmp_path, module(layout), [saver(tmp_path / "1")])
    file = tmp_path / "1" / "step=6.ckpt"
    with pytest.raises(MisconfigurationException, match=r"1 tensors of the base.*base_model.model.adjacency"):
        fit(tmp_path, module(layout, weight=0.7), [saver(tmp_path / "2")], ckpt_path=file)
    loads = trainer_of(tmp_path, [saver(tmp_path / "2")])
    with pytest.warns(UserWarning, match=r"1 tensors of the base.*base_model.model.adjacency"):
        loads.validate(module(layout, weight=0.7), make_loader(1), ckpt_path=file, verbose=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sum_of_a_sparse_tensor_tells_of_its_values_and_of_their_places(layout: str) -> None:
    edges = torch.zeros(4, 4)
    edges[0, 1] = 1
    tensors = {
        "it": LAYOUTS[layout](edges),
        "again": LAYOUTS[layout](edges.clone()),
        "another value": LAYOUTS[layout](2 * edges),
        "another row": LAYOUTS[layout](edges.roll(2, 0)),
        "another column": LAYOUTS[layout](edges.roll(2, 1)),
        "turned": LAYOUTS[layout](edges.T.contiguous().roll(2, 0)),
    }
    sums = sums_of(tensors)
    assert None not in sums.values()
    assert sums.pop("again") == sums["it"]
    assert len(set(sums.values())) == len(sums)


def test_the_order_in_which_a_sparse_tensor_keeps_its_elements_does_not_matter() -> None:
    places, values = torch.tensor([[0, 1], [1, 0]]), torch.tensor([1.0, 2.0])
    one = torch.sparse_coo_tensor(places, values, (2, 2), check_invariants=True)
    other = torch.sparse_coo_tensor(places.flip(1), values.flip(0), (2, 2), check_invariants=True)
    assert fingerprints_of({"w": one}) == fingerprints_of({"w": other})
    assert differing(fingerprints_of({"w": one}), fingerprints_of({"w": 2 * one})) == (["w"], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_size_of_a_sparse_tensor_is_that_of_what_it_stores(layout: str, dtype: torch.dtype) -> None:
    edges = torch.zeros(2000, 2000, dtype=dtype)
    edges[::100, 7] = 1
    assert 20 * dtype.itemsize <= bytes_of(LAYOUTS[layout](edges)) < 2**15
    assert bytes_of(edges) == 2000 * 2000 * dtype.itemsize


def test_the_user_is_told_the_size_of_what_is_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made: Any = module("csr")
    made.register_buffer("wide", torch.eye(4000).to_sparse_csr())
    with caplog.at_level("INFO"):
        fit(tmp_path, made, [saver(tmp_path)], max_epochs=1)
    (message,) = [record.message for record in caplog.records if "the files hold the adapters" in record.message]
    assert "beside them 2 tensors, 80.1 kB" in message
