"""The seven properties of the method (docs/method.md) on real peft layers, and what Perturbation itself promises."""

import copy
import dataclasses
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_flatlora import Perturbation, find_pairs, read_through
from lightning_flatlora.flatness.sharpness import clean
from lightning_flatlora.pairs import LoRAPair

RHO = 0.3


class Net(nn.Module):
    """A convolution and two Linear layers of one shape, so that there are two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(torch.tanh(self.conv(x)).mean((2, 3)))))


def model_and_pairs(dtype: torch.dtype = torch.float64, dropout: float = 0.0, **config: object):  # type: ignore[no-untyped-def]
    settings = {"r": 3, "lora_alpha": 4, "target_modules": ["conv", "one", "two"], "lora_dropout": dropout, **config}
    model = get_peft_model(Net(), LoraConfig(**settings)).to(dtype)  # type: ignore[arg-type]
    pairs = find_pairs(model).pairs
    with torch.no_grad():
        for pair in pairs:
            pair.B.normal_(std=0.3)
    return model, pairs


def backward(model: nn.Module, scale: float = 1.0, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 6, (16,), generator=generator)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    (loss * scale).backward()
    return loss.detach()


def fresh(pairs: list[LoRAPair], at_perturbed: bool = False, **settings: object) -> dict[str, Tensor]:
    perturbation = Perturbation(pairs, **settings)  # type: ignore[arg-type]
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=at_perturbed))
    return perturbation.state_dict()["E"]


def full(pair: LoRAPair, E: Tensor) -> Tensor:
    """s E A, the perturbation in full weight space, (n, m)."""
    return pair.scaling * E @ pair.A.detach().flatten(1)


settings = pytest.mark.parametrize("estimator", ["average", "projected"])
scopes = pytest.mark.parametrize("norm_scope", ["global", "layer"])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_dora", [False, True])
def test_1_both_gradients_agree(dropout: float, use_dora: bool) -> None:
    """B^T G_B = G_A A^T, for every LoRA layer, dropout included."""
    model, pairs = model_and_pairs(dropout=dropout, use_dora=use_dora)
    backward(model)
    for pair in pairs:
        B, A, grad_B, grad_A = (t.flatten(1) for t in (pair.B.data, pair.A.data, pair.B.grad, pair.A.grad))
        assert torch.allclose(B.T @ grad_B, grad_A @ A.T, atol=1e-13)
        assert (grad_B != 0).any()


@settings
@scopes
def test_2_the_loss_may_be_scaled(estimator: str, norm_scope: str) -> None:
    """By a power of two bit for bit, in float32 as well: fp16's loss scale leaves E as it is."""
    model, pairs = model_and_pairs(torch.float32)
    backward(model)
    one = fresh(pairs, estimator=estimator, norm_scope=norm_scope)
    backward(model, scale=2.0**14)
    other = fresh(pairs, estimator=estimator, norm_scope=norm_scope)
    assert all(torch.equal(one[name], other[name]) for name in one)
    backward(model, scale=3.7)
    third = fresh(pairs, estimator=estimator, norm_scope=norm_scope)
    assert all(torch.allclose(one[name], third[name], rtol=1e-4, atol=1e-6) for name in one)


@settings
@scopes
def test_3_the_full_space_perturbation_does_not_depend_on_the_factors(estimator: str, norm_scope: str) -> None:
    """(B M, M^-1 A) for M = c orthogonal, exactly; for a general M up to the damping."""
    model, pairs = model_and_pairs()
    backward(model)
    before = {p.name: full(p, E) for p, E in zip(pairs, fresh(pairs, estimator=estimator).values(), strict=True)}
    for M, tolerance in ((2.5 * torch.linalg.qr(torch.randn(3, 3).double())[0], 1e-10), (torch.randn(3, 3), 1e-2)):
        other = copy.deepcopy(model)
        moved = find_pairs(other).pairs
        with torch.no_grad():
            for pair in moved:
                pair.B.copy_((pair.B.flatten(1) @ M.double()).view_as(pair.B))
                pair.A.copy_((torch.linalg.inv(M.double()) @ pair.A.flatten(1)).view_as(pair.A))
        backward(other)
        for pair, E in zip(moved, fresh(moved, estimator=estimator).values(), strict=True):
            error = (full(pair, E) - before[pair.name]).norm() / before[pair.name].norm()
            assert error < tolerance


@settings
@scopes
def test_4_it_is_an_ascent_direction(estimator: str, norm_scope: str) -> None:
    """<G_B, E> >= 0 for each pair, and the loss at B + E is larger."""
    model, pairs = model_and_pairs()
    clean = backward(model)
    perturbation = Perturbation(pairs, estimator=estimator, norm_scope=norm_scope)  # type: ignore[arg-type]
    perturbation.install()
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    E = perturbation.state_dict()["E"]
    assert all((pair.B.grad.flatten(1) * E[pair.name]).sum() > 0 for pair in pairs)
    with perturbation.applied():
        assert backward(model) > clean
    assert backward(model) == clean


@settings
@scopes
@pytest.mark.parametrize("at_start", [True, False])
def test_5_the_realised_radius_is_at_most_rho(estimator: str, norm_scope: str, at_start: bool) -> None:
    model, pairs = model_and_pairs()
    if at_start:
        for pair in pairs:
            pair.B.data.zero_()
    backward(model)
    E = fresh(pairs, estimator=estimator, norm_scope=norm_scope)
    norms = torch.stack([full(pair, E[pair.name]).norm() for pair in pairs])
    radii = norms if norm_scope == "layer" else norms.norm()[None]
    assert (radii <= RHO * (1 + 1e-9)).all()
    if estimator == "projected" or at_start:
        assert (radii > RHO * (1 - 1e-3)).all()
    else:
        assert (radii > RHO * 0.5).all()


def test_6_rho_zero_is_nothing_and_rho_is_something() -> None:
    model, pairs = model_and_pairs()
    backward(model)
    perturbation = Perturbation(pairs)
    nothing = perturbation.ascend(0.0, at_perturbed=False)
    assert nothing.is_zero
    assert all((stack == 0).all() for stack in nothing.stacks)
    something = perturbation.ascend(RHO, at_perturbed=False)
    assert not something.is_zero
    assert all((stack != 0).any() for stack in something.stacks)


def test_7_beta_one_keeps_the_last_and_the_first_is_taken_whole() -> None:
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs)
    backward(model, seed=1)
    first = perturbation.ascend(RHO, at_perturbed=False)
    perturbation.average(first, beta=0.25)
    kept = perturbation.state_dict()["E"]
    assert all(torch.equal(kept[p.name], E) for p, E in zip(pairs, _flat(first.stacks), strict=True))
    backward(model, seed=2)
    second = perturbation.ascend(RHO, at_perturbed=False)
    perturbation.average(second, beta=0.25)
    kept = perturbation.state_dict()["E"]
    for pair, old, new in zip(pairs, _flat(first.stacks), _flat(second.stacks), strict=True):
        assert torch.allclose(kept[pair.name], 0.75 * old + 0.25 * new, rtol=1e-12)
    perturbation.average(first, beta=1.0)
    kept = perturbation.state_dict()["E"]
    assert all(torch.equal(kept[p.name], E) for p, E in zip(pairs, _flat(first.stacks), strict=True))


def _flat(stacks: list[Tensor]) -> list[Tensor]:
    """Slices of the stacks in the order of the pairs: the convolution's group comes first, as in the model."""
    return [E for stack in stacks for E in stack]


def test_gradients_taken_at_the_perturbed_point_use_that_point() -> None:
    """EFMLoRA's E at B + Ê equals FMLoRA's E of a model whose B was really moved there."""
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs)
    perturbation.install()
    backward(model, seed=1)
    perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.5)
    moved_model = copy.deepcopy(model)
    moved = find_pairs(moved_model).pairs
    E = perturbation.state_dict()["E"]
    with torch.no_grad():
        for pair in moved:
            pair.B.add_(E[pair.name].view_as(pair.B))
    with perturbation.applied():
        backward(model, seed=2)
    backward(moved_model, seed=2)
    assert all(torch.allclose(p.B.grad, q.B.grad, rtol=1e-12) for p, q in zip(pairs, moved, strict=True))
    at_perturbed = _flat(perturbation.ascend(RHO, at_perturbed=True).stacks)
    expected = _flat(Perturbation(moved).ascend(RHO, at_perturbed=False).stacks)
    assert all(torch.allclose(e, f, rtol=1e-10) for e, f in zip(at_perturbed, expected, strict=True))


@pytest.mark.parametrize("which", ["A", "B"])
@settings
def test_a_gradient_that_is_not_finite_changes_nothing(which: str, estimator: str) -> None:
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs, estimator=estimator)  # type: ignore[arg-type]
    backward(model)
    perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.5)
    before = perturbation.state_dict()["E"]
    getattr(pairs[1], which).grad[0, 0] = float("nan")
    bad = perturbation.ascend(RHO, at_perturbed=True)
    assert not bad.finite
    assert all((stack == 0).all() for stack in bad.stacks)
    perturbation.average(bad, beta=0.5)
    after = perturbation.state_dict()["E"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_first_gradient_that_is_not_finite_leaves_the_next_one_to_be_the_first() -> None:
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs)
    backward(model, scale=float("inf"))
    perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.25)
    backward(model)
    good = perturbation.ascend(RHO, at_perturbed=True)
    perturbation.average(good, beta=0.25)
    kept = perturbation.state_dict()["E"]
    assert all(torch.equal(kept[p.name], E) for p, E in zip(pairs, _flat(good.stacks), strict=True))


@scopes
def test_missing_gradients_count_as_zero(norm_scope: str) -> None:
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs, norm_scope=norm_scope)  # type: ignore[arg-type]
    model.zero_grad()
    assert all((stack == 0).all() for stack in perturbation.ascend(RHO, at_perturbed=False).stacks)
    backward(model)
    pairs[0].A.grad = pairs[0].B.grad = None
    stacks = perturbation.ascend(RHO, at_perturbed=False).stacks
    assert (stacks[0] == 0).all()
    assert (stacks[1] != 0).any()


def test_a_frozen_A_takes_the_estimate_from_B_alone() -> None:
    model, pairs = model_and_pairs()
    for pair in pairs:
        pair.A.requires_grad_(False)
    backward(model)
    ours = fresh(pairs, estimator="average")
    expected = fresh(pairs, estimator="projected")
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_the_state_goes_round_and_refuses_other_pairs() -> None:
    model, pairs = model_and_pairs(torch.float32)
    backward(model)
    perturbation = Perturbation(pairs)
    perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.5)
    state = perturbation.state_dict()
    other = Perturbation(pairs)
    other.load_state_dict(state)
    assert other.started
    assert all(torch.equal(other.state_dict()["E"][name], E) for name, E in state["E"].items())
    with pytest.raises(ValueError, match=r"conv\.lora_B\.default\.weight is in the checkpoint but not in the model"):
        Perturbation(pairs[1:]).load_state_dict(state)
    wrong = copy.deepcopy(state)
    wrong["E"][pairs[0].name] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="has shape"):
        Perturbation(pairs).load_state_dict(wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_computed_in_float32(dtype: torch.dtype) -> None:
    model, pairs = model_and_pairs(torch.float32)
    backward(model)
    exact = fresh(pairs)
    low = copy.deepcopy(model).to(dtype)
    low_pairs = find_pairs(low).pairs
    for pair, source in zip(low_pairs, pairs, strict=True):
        pair.A.grad, pair.B.grad = source.A.grad.to(dtype), source.B.grad.to(dtype)
    ours = fresh(low_pairs)
    for name, E in ours.items():
        assert E.dtype == torch.float32
        assert (E - exact[name]).norm() / exact[name].norm() < (2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_large_models_are_computed_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = model_and_pairs()
    backward(model)
    whole = fresh(pairs)
    monkeypatch.setattr("lightning_flatlora.perturbation._LARGEST_STACK", 1)
    parts = Perturbation(pairs).ascend(RHO, at_perturbed=False).stacks
    assert [len(stack) for stack in parts] == [1, 1, 1]
    assert all(torch.allclose(E, whole[p.name]) for p, E in zip(pairs, _flat(parts), strict=True))


@pytest.mark.parametrize(
    "kind", ["Linear", "DoRA", "Conv2d", "Conv1d", "DoRAConv", "MultiheadAttention", "GPT2", "rslora"]
)
def test_reading_b_plus_e_equals_moving_b(kind: str) -> None:
    """Loss and gradients equal those of a copy whose B was really moved; switched off, the clean ones."""
    model, run, tolerance = _layer(kind)
    perturbation = Perturbation(find_pairs(model).pairs)
    generator = torch.Generator().manual_seed(0)
    for _, E in (entry for group in perturbation._groups for entry in group):
        E.copy_(torch.randn(E.shape, generator=generator, dtype=E.dtype) * 0.1)
    moved = copy.deepcopy(model)
    E = perturbation.state_dict()["E"]
    with torch.no_grad():
        for pair in find_pairs(moved).pairs:
            pair.B.add_(E[pair.name].view_as(pair.B))
    keys, clean = list(model.state_dict()), run(model).detach()
    perturbation.install()
    assert torch.allclose(run(model).detach(), clean, atol=tolerance)
    with perturbation.applied():
        perturbed = run(model)
        perturbed.backward()
        assert list(model.state_dict()) == keys
    expected = run(moved)
    expected.backward()
    assert torch.allclose(perturbed, expected, atol=tolerance)
    assert abs(float(perturbed.detach() - clean)) > 1e-4
    for pair, other in zip(find_pairs(model).pairs, find_pairs(moved).pairs, strict=True):
        assert torch.allclose(pair.B.grad, other.B.grad, atol=tolerance)
        assert torch.allclose(pair.A.grad, other.A.grad, atol=tolerance)
    perturbation.uninstall()
    assert not read_through.is_installed(model)
    assert torch.allclose(run(model).detach(), clean, atol=tolerance)


def _layer(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], float]:
    """A peft model of one kind of layer with random B, what to run, and the tolerance (0: bit for bit)."""
    config = {"r": 3, "lora_alpha": 4, "target_modules": ["0"], "use_dora": kind.startswith("DoRA")}
    tolerance = 0.0
    base: nn.Module
    if kind in ("Linear", "DoRA", "rslora"):
        base, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
        config["use_rslora"] = kind == "rslora"
    elif kind in ("Conv2d", "DoRAConv"):
        base, x = nn.Sequential(nn.Conv2d(2, 6, 3)), torch.randn(4, 2, 5, 5)
    elif kind == "Conv1d":
        base, x = nn.Sequential(nn.Conv1d(2, 6, 3)), torch.randn(4, 2, 8)
    elif kind == "GPT2":
        from transformers.pytorch_utils import Conv1D

        base, x = nn.Sequential(Conv1D(5, 6)), torch.randn(4, 6)
        config["fan_in_fan_out"] = True
    else:
        base, x = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)), torch.randn(3, 4, 8)
        tolerance = 1e-5  # peft merges and unmerges the base weight in each forward pass
    model = get_peft_model(base, LoraConfig(**config))  # type: ignore[arg-type]
    with torch.no_grad():
        for pair in find_pairs(model).pairs:
            pair.B.normal_(std=0.3)

    def run(net: nn.Module) -> Tensor:
        if kind == "MultiheadAttention":
            return net.base_model.model[0](x, x, x, need_weights=False)[0].square().mean()  # type: ignore[index, operator]
        return net(x).square().mean()

    return model, run, tolerance


def test_two_perturbations_of_one_model_do_not_disturb_each_other() -> None:
    """A measurement inside a training step may have its own; afterwards the first is read again."""
    model, pairs = model_and_pairs()
    backward(model)
    first, second = Perturbation(pairs), Perturbation(pairs, norm_scope="layer")
    first.install()
    first.assign(first.ascend(RHO, at_perturbed=False))
    with first.applied():
        perturbed = backward(model)
        second.install()
        second.assign(second.ascend(2 * RHO, at_perturbed=False))
        with second.applied():
            assert backward(model) != perturbed
        assert backward(model) == perturbed
    second.uninstall()
    with first.applied():
        assert backward(model) == perturbed
    first.uninstall()
    assert not read_through.is_installed(model)


def test_after_anothers_turn_the_own_average_is_read_again() -> None:
    """The one switch must not be trusted where somebody else has given the readers another perturbation."""
    model, pairs = model_and_pairs()
    clean_loss = backward(model)
    first, second = Perturbation(pairs), Perturbation(pairs)
    first.install()
    second.install()
    first.assign(first.ascend(RHO, at_perturbed=False))
    second.assign(second.ascend(2 * RHO, at_perturbed=False))
    first.on()
    perturbed = backward(model)
    assert perturbed != clean_loss
    second.on()
    assert backward(model) not in (perturbed, clean_loss)
    first.on()
    assert backward(model) == perturbed
    with pytest.raises(ZeroDivisionError), clean(pairs), second.applied():
        raise ZeroDivisionError
    assert backward(model) == perturbed
    first.off()
    assert backward(model) == clean_loss
    first.uninstall()
    second.uninstall()
    assert not read_through.is_installed(model)


def test_on_and_off_are_one_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are called several times in every step, so they must not walk over all layers."""
    model, pairs = model_and_pairs()
    perturbation = Perturbation(pairs)
    perturbation.install()
    clean_loss = backward(model)
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    perturbation.on()
    given: list[nn.Module] = []
    monkeypatch.setattr(read_through, "perturb", lambda module, *rest: given.append(module))
    for _ in range(2):
        perturbation.off()
        assert backward(model) == clean_loss
        perturbation.on()
        assert backward(model) != clean_loss
    assert not given


def test_a_pair_that_has_left_reads_clean_while_somebody_else_keeps_its_reader() -> None:
    _, pairs = model_and_pairs()
    for pair in pairs:
        pair.B.grad = torch.ones_like(pair.B)
    perturbation = Perturbation(pairs, "projected")
    perturbation.install()
    perturbation.assign(perturbation.ascend(RHO, at_perturbed=False))
    perturbation.on()
    gone, stays = pairs[0].readers[0], pairs[1].readers[0]
    read_through.install(gone)
    perturbation.follow(pairs[1:])
    perturbation.on()
    assert read_through.shown(gone) is None
    assert read_through.shown(stays) is not None


def test_reading_without_install_is_refused() -> None:
    _, pairs = model_and_pairs()
    with pytest.raises(RuntimeError, match="call install"), Perturbation(pairs).applied():
        pass


def test_bad_arguments_are_named() -> None:
    _, pairs = model_and_pairs()
    with pytest.raises(ValueError, match="estimator must be 'average' or 'projected', got 'projectd'"):
        Perturbation(pairs, estimator="projectd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm_scope must be"):
        Perturbation(pairs, norm_scope="glob")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one LoRAPair"):
        Perturbation([])


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes held at once by the tensors that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        alive = [tensor for tensor in (ref() for ref in self._made) if tensor is not None]
        self._made = [weakref.ref(tensor) for tensor in alive]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        made_here = {pointer: size for pointer, size in storages.items() if pointer not in self._given}
        self.peak = max(self.peak, sum(made_here.values()))
        return out

    def given(self, *tensors: Tensor) -> None:
        """Tensors that were there before: views of them are no new memory."""
        self._given = {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_extra_memory_is_two_copies_of_B_and_one_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The average is one float32 copy of all B, a refresh makes one more, and the temporaries are of one stack."""
    n, m, r, layers = 64, 48, 4, 40
    pairs = [
        LoRAPair(str(i), nn.Parameter(torch.randn(r, m)), nn.Parameter(torch.randn(n, r)), 2.0) for i in range(layers)
    ]
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.randn(r, m), torch.randn(n, r)
    monkeypatch.setattr("lightning_flatlora.perturbation._LARGEST_STACK", 2 * n * r)  # two layers in a stack
    all_B = sum(pair.B.numel() * 4 for pair in pairs)
    perturbation = Perturbation(pairs)
    kept = sum(group.E.numel() * group.E.element_size() for group in perturbation._groups)
    assert kept == all_B
    watch = PeakMemory()
    watch.given(*(t for p in pairs for t in (p.A, p.B, p.A.grad, p.B.grad)), *(g.E for g in perturbation._groups))
    with watch:
        perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.9)
    one_stack = all_B * 2 // layers
    assert all_B < watch.peak < all_B + 12 * one_stack


@pytest.mark.parametrize(("device", "groups"), [("cpu", 5), ("meta", 2)])
def test_an_accelerator_takes_four_times_as_many_layers_at_once(
    monkeypatch: pytest.MonkeyPatch, device: str, groups: int
) -> None:
    """There the launches count, on a CPU the size of what is allocated."""
    monkeypatch.setattr("lightning_flatlora.perturbation._LARGEST_STACK", 8)
    pairs = []
    for i in range(5):
        A, B = (nn.Parameter(torch.zeros(shape, device=device)) for shape in ((2, 4), (4, 2)))
        pairs.append(LoRAPair(str(i), A, B, 2.0))
    assert len(Perturbation(pairs)._groups) == groups


class Copies(TorchDispatchMode):
    """Between two devices, during everything inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        kinds = {t.device.type for t in pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        if len(kinds) > 1:
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("also", [False, True])
def test_a_step_copies_nothing_between_host_and_device(also: bool) -> None:
    """Such a copy would make the host wait. Here the device is one that holds shapes alone, and refuses to be read."""
    A, B = (nn.Parameter(torch.zeros(shape, device="meta")) for shape in ((2, 5), (4, 2)))
    perturbation = Perturbation([LoRAPair("B", A, B, 2.0)])
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    with Copies() as copies, torch.no_grad():  # not ascend(), as it knows no autocast
        fresh = perturbation._ascend(RHO, at_perturbed=True, also_finite=[A, B] if also else [])
        perturbation.average(fresh, beta=0.9)
        perturbation.assign(fresh)
    assert not copies.seen


# -- pairs that stop or start to learn, and scalings that change


def averaged_once(pairs: list[LoRAPair], model: nn.Module, **settings: object) -> Perturbation:
    perturbation = Perturbation(pairs, **settings)  # type: ignore[arg-type]
    perturbation.install()
    backward(model)
    perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.5)
    return perturbation


def test_a_frozen_B_is_read_clean_and_its_E_rests() -> None:
    """Also where A is still trained: its gradient does not enter the norm of the others' perturbation."""
    model, pairs = model_and_pairs()
    perturbation = averaged_once(pairs, model)
    before = perturbation.state_dict()["E"]
    frozen = pairs[0]
    frozen.B.requires_grad_(False)
    with perturbation.applied():
        assert frozen.readers[0].weight is frozen.B
        assert not torch.equal(pairs[1].readers[0].weight, pairs[1].B)
    model.zero_grad()
    backward(model)
    assert frozen.A.grad is not None
    fresh_E = perturbation.ascend(RHO, at_perturbed=True)
    perturbation.average(fresh_E, beta=0.5)
    assert torch.equal(perturbation.state_dict()["E"][frozen.name], before[frozen.name])
    perturbation.uninstall()
    together, alone = fresh(pairs), fresh(pairs[1:])
    for pair in pairs[1:]:
        torch.testing.assert_close(together[pair.name], alone[pair.name])


def test_a_pair_that_misses_some_steps_keeps_its_E() -> None:
    """An expert, a dropped layer: what it missed does not enter its average."""
    model, pairs = model_and_pairs()
    perturbation = averaged_once(pairs, model)
    before = perturbation.state_dict()
    pairs[0].A.grad = pairs[0].B.grad = None
    for _ in range(3):
        perturbation.forget_missing()
        perturbation.average(perturbation.ascend(RHO, at_perturbed=True), beta=0.5)
    state = perturbation.state_dict()
    assert torch.equal(state["E"][pairs[0].name], before["E"][pairs[0].name])
    assert not torch.equal(state["E"][pairs[1].name], before["E"][pairs[1].name])
    assert state["missed"] == {pairs[0].name: 3}
    backward(model)
    perturbation.forget_missing()
    assert perturbation.state_dict()["missed"] == {}


def test_a_pair_that_misses_many_steps_in_a_row_starts_anew() -> None:
    """The count is part of the state: here a second one goes on with it, and forgets at the same step."""
    model, pairs = model_and_pairs()
    first = averaged_once(pairs, model)
    pairs[0].A.grad = pairs[0].B.grad = None
    for _ in range(60):
        first.forget_missing()
    perturbation = Perturbation(pairs)
    perturbation.load_state_dict(first.state_dict())
    for _ in range(39):
        perturbation.forget_missing()
    assert perturbation.state_dict()["E"][pairs[0].name].any()
    perturbation.forget_missing()
    E = perturbation.state_dict()["E"]
    assert not E[pairs[0].name].any()
    assert E[pairs[1].name].any()
    assert perturbation.started
    model.zero_grad()
    backward(model)
    fresh_E = perturbation.ascend(RHO, at_perturbed=True)
    perturbation.average(fresh_E, beta=0.25)
    assert torch.equal(perturbation.state_dict()["E"][pairs[0].name], _flat(fresh_E.stacks)[0])
    model.zero_grad()
    for _ in range(99):
        perturbation.forget_missing()
    assert perturbation.started
    perturbation.forget_missing()
    assert not perturbation.started


def test_following_keeps_what_is_known() -> None:
    """A new pair's first E is taken whole, the others go on; s E stays where a scaling changes."""
    model, pairs = model_and_pairs()
    perturbation = averaged_once(pairs[1:], model)
    before = perturbation.state_dict()["E"]
    rescaled = dataclasses.replace(pairs[1], scaling=10 * pairs[1].scaling)
    now = [pairs[0], rescaled, *pairs[2:]]
    perturbation.follow(now)
    E = perturbation.state_dict()["E"]
    assert not E[pairs[0].name].any()
    torch.testing.assert_close(E[rescaled.name] * 10, before[rescaled.name])
    assert torch.equal(E[pairs[2].name], before[pairs[2].name])
    fresh_E = perturbation.ascend(RHO, at_perturbed=True)
    perturbation.average(fresh_E, beta=0.25)
    kept = perturbation.state_dict()["E"]
    first, second, third = _flat(fresh_E.stacks)
    assert torch.equal(kept[pairs[0].name], first)
    torch.testing.assert_close(kept[rescaled.name], 0.75 * E[rescaled.name] + 0.25 * second)
    torch.testing.assert_close(kept[pairs[2].name], 0.75 * E[pairs[2].name] + 0.25 * third)
    perturbation.follow(pairs[:1])
    assert not read_through.is_installed(pairs[1].readers[0])
    perturbation.uninstall()
    assert not read_through.is_installed(model)


def test_a_state_waits_for_pairs_that_come_later() -> None:
    model, pairs = model_and_pairs()
    state = averaged_once(pairs, model).state_dict() | {"missed": {pairs[0].name: 7}}
    other = Perturbation(pairs[1:])
    other.load_state_dict(state, may_come=[pairs[0].name])
    assert all(torch.equal(other.state_dict()["E"][name], E) for name, E in state["E"].items())
    assert other.state_dict()["missed"] == state["missed"]
    other.follow(pairs)
    assert all(torch.equal(other.state_dict()["E"][name], E) for name, E in state["E"].items())
    assert other.state_dict()["missed"] == state["missed"]


def test_a_state_of_an_older_version_loads() -> None:
    """There one boolean said for all pairs whether the average had begun."""
    model, pairs = model_and_pairs()
    state = averaged_once(pairs, model).state_dict()
    other = Perturbation(pairs)
    del state["missed"]
    other.load_state_dict(state | {"averaged": True})
    assert other.state_dict()["missed"] == {}
    assert other.state_dict()["averaged"] == state["averaged"]


def test_a_state_that_waits_and_is_of_another_shape_starts_anew() -> None:
    """(6, 1) would be broadcast into (6, 3) without a word."""
    model, pairs = model_and_pairs()
    state = averaged_once(pairs, model).state_dict()
    state["E"][pairs[1].name] = state["E"][pairs[1].name][:, :1]
    other = Perturbation(pairs[:1])
    other.load_state_dict(state, may_come=[pair.name for pair in pairs[1:]])
    with pytest.warns(UserWarning, match=r"starts anew.*one\S* has shape \(6, 3\), in the checkpoint \(6, 1\)"):
        other.follow(pairs)
    E = other.state_dict()["E"]
    assert not E[pairs[1].name].any()
    assert torch.equal(E[pairs[2].name], state["E"][pairs[2].name])
    assert other.state_dict()["averaged"] == state["averaged"] | {pairs[1].name: False}
