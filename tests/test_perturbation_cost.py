"""What the perturbation costs: bounded memory, stacks of bounded size, and kernels that hardly grow with the pairs."""

import weakref
from typing import Any

import pytest
import torch
from loop_runs import run, squares
from peft import LoraConfig, get_peft_model
from perturbation_models import RHO, backward, fresh, model_and_pairs, slices
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_flatlora import Perturbation, loops
from lightning_flatlora.pairs.lora_pair import LoRAPair


def test_large_models_are_computed_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = model_and_pairs()
    backward(model)
    whole = fresh(pairs)
    monkeypatch.setattr("lightning_flatlora.perturbation.pair_stack.LARGEST_STACK", 1)
    parts = Perturbation(pairs).ascend(RHO, at_perturbed=False).stacks
    assert [len(stack) for stack in parts] == [1, 1, 1]
    assert all(torch.allclose(E, whole[p.name]) for p, E in zip(pairs, slices(parts), strict=True))


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes held at once by tensors that were created inside."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: list[weakref.ref[Tensor]] = []
        self._given: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        tensors = [reference() for reference in self._made]
        alive = [tensor for tensor in tensors if tensor is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        made_here = {pointer: size for pointer, size in storages.items() if pointer not in self._given}
        self.peak = max(self.peak, sum(made_here.values()))
        return out

    def given(self, *tensors: Tensor) -> None:
        """Tensors that existed before: views of them don't count as new memory."""
        self._given |= {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_extra_memory_is_two_copies_of_B_and_one_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The average is one float32 copy of all B, a refresh makes another, and temporaries are as large as one stack."""
    n, m, r, layers = 64, 48, 4, 40
    pairs = [
        LoRAPair(str(i), nn.Parameter(torch.randn(r, m)), nn.Parameter(torch.randn(n, r)), 2.0) for i in range(layers)
    ]
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.randn(r, m), torch.randn(n, r)
    monkeypatch.setattr("lightning_flatlora.perturbation.pair_stack.LARGEST_STACK", 2 * n * r)  # two layers per stack
    all_B = sum(pair.B.numel() * 4 for pair in pairs)
    perturbation = Perturbation(pairs)
    kept = sum(stack.E.numel() * stack.E.element_size() for stack in perturbation._stacks)
    assert kept == all_B
    watch = PeakMemory()
    for pair in pairs:
        watch.given(pair.A, pair.B, pair.A.grad, pair.B.grad)
    watch.given(*(stack.E for stack in perturbation._stacks))
    with watch:
        perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.9)
    one_stack = all_B * 2 // layers
    assert all_B < watch.peak < all_B + 12 * one_stack


class Block(nn.Module):
    """The seven projections of a Llama block, whose LoRA factors have four shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, n) for n in (8, 4, 4, 8))
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) * torch.cat([self.k(x), self.v(x)], dim=-1))
        return x + self.down(self.gate(x) * self.up(x))


class Kernels(TorchDispatchMode):
    """The number of tensor operations inside, except for views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not (func.is_view or func is torch.ops.aten._unsafe_view.default)
        return func(*args, **(kwargs or {}))


def kernels_of_a_step(blocks: int, method: Any) -> int:
    """Count those of a later step of a loop; the method ``None`` means plain LoRA."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(*(Block() for _ in range(blocks))), LoraConfig(target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    flat = None if method is None else method(model, optimizer, RHO)
    for _ in range(3):
        kernels = Kernels()
        with kernels:
            run(flat, model, optimizer, [torch.ones(2, 8)], loss=squares)
    return kernels.count


def test_a_step_of_efmlora_adds_one_kernel_for_each_pair() -> None:
    """It computes B + E. The algebra of E takes a fixed number of calls per shape, whatever the number of pairs."""
    extra = [kernels_of_a_step(blocks, loops.EFMLoRA) - kernels_of_a_step(blocks, None) for blocks in (2, 32)]
    assert extra[1] - extra[0] <= 30 * 7
    assert extra[0] - 2 * 7 <= 400  # 351 with PyTorch 2.13


def test_a_step_of_fmlora_takes_fewer_kernels_than_two_steps() -> None:
    assert kernels_of_a_step(32, loops.FMLoRA) < 2 * kernels_of_a_step(32, None)
