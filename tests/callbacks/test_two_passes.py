"""Two passes see one batch: gradients, counts and hooks are those of a step, also where batches are skipped."""

from typing import Any

import pytest
import torch
from helpers import (
    FRONT_ENDS,
    Classifier,
    TwoPassClassifier,
    build,
    driver_of,
    fit,
    make_dataset,
    make_loader,
    make_net,
    same,
    weights,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, default_collate
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.aggregation import CatMetric
from transformers import BatchEncoding
from two_pass_runs import TWO_PASSES, two_passes

from lightning_flatlora import EFMLoRA, FMLoRA, LearningRateRho, LinearRho
from lightning_flatlora.baselines import SAM, LoRASAM, RandomPerturbation


def taking(kind: str) -> Any:
    """A batch of the kind that a training_step takes apart."""

    def collate(samples: Any) -> Any:
        inputs, labels, factor = default_collate(samples)
        if kind == "dict":
            return {"inputs": inputs, "labels": labels, "factor": factor}
        if kind == "nested":
            return {"inputs": inputs}, [factor, labels]
        return BatchEncoding({"inputs": inputs, "labels": labels, "factor": factor})

    return collate


def emptied(batch: Any) -> Any:
    """The inputs, labels and factors, popped out of the batch."""
    if isinstance(batch, tuple):
        labels, factor = batch[1].pop(), batch[1].pop()
        return batch[0].pop("inputs"), labels, factor
    return tuple(batch.pop(name) for name in ("inputs", "labels", "factor"))


@pytest.mark.parametrize("kind", ["dict", "nested", "encoding"])
@pytest.mark.parametrize("front_end", ["fmlora", "module", "lora_sam"])
def test_a_step_may_take_its_batch_apart(tmp_path: Any, front_end: str, kind: str) -> None:
    class Popping(Classifier):
        def loss(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            return super().loss(emptied(batch), batch_idx)

    class TwoPassPopping(TwoPassClassifier):
        def loss(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            return super().loss(emptied(batch), batch_idx)

    trained = []
    for classes, collate in (((Classifier, TwoPassClassifier), None), ((Popping, TwoPassPopping), taking(kind))):
        name = "plain" if front_end == "lora_sam" else front_end
        module, callbacks, more = build(name, net=make_net(), classes=classes)
        callbacks += [LoRASAM(0.5)] * (front_end == "lora_sam")
        loader = DataLoader(make_dataset(16), batch_size=4, collate_fn=collate)
        fit(tmp_path, module, callbacks, loader=loader, **more)
        trained.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))


def test_a_skipped_batch_leaves_the_average_as_it_is(tmp_path: Any) -> None:
    import lightning as L

    averages = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            averages.append(trainer.callbacks[0].perturbation.state_dict()["E"])

    module = Classifier()
    module.inside.append(lambda self, batch_idx: "skip" if batch_idx == 3 else None)
    fit(tmp_path, module, [EFMLoRA(0.5), Look()], max_epochs=1)
    assert all(torch.equal(averages[2][name], E) for name, E in averages[3].items())
    assert any(not torch.equal(averages[3][name], E) for name, E in averages[4].items())


def test_rho_that_falls_to_zero_lets_the_average_decay_beside_the_module(tmp_path: Any) -> None:
    """A refresh step with rho = 0 moves the average by a zero perturbation, as EFMLoRA alone does."""
    module, callbacks, more = build("efmlora+module", LinearRho(1.0, 0.0, total_steps=4), every_n_steps=1)
    fit(tmp_path, module, callbacks, **more)
    E = callbacks[0].perturbation.state_dict()["E"]  # type: ignore[attr-defined]
    assert all(value.abs().max() < 1e-6 for value in E.values())


def test_a_manual_module_that_passes_the_hooks_by_is_refused(tmp_path: Any) -> None:
    class Inner(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, batch_idx))
            optimizer.step()

    with pytest.raises(MisconfigurationException, match=r"stepped without Lightning.*self\.optimizers\(\)"):
        fit(tmp_path, Inner(), [EFMLoRA(0.5)], max_epochs=1)


def test_what_cannot_be_right_is_refused(tmp_path: Any) -> None:
    module = Classifier()
    module.optimizer_class = type("DPOptimizer", (torch.optim.SGD,), {"__module__": "opacus.optimizers.optimizer"})
    with pytest.raises(MisconfigurationException, match="which the privacy budget does not cover"):
        fit(tmp_path, module, [EFMLoRA(0.5)])
    module.optimizer_class = torch.optim.LBFGS
    with pytest.raises(MisconfigurationException, match="LBFGS takes several gradients"):
        fit(tmp_path, module, [EFMLoRA(0.5)])

    class Tensored(torch.optim.AdamW):
        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, lr=torch.tensor(lr), foreach=False, capturable=False)

    module = Classifier()
    module.optimizer_class = Tensored
    with pytest.raises(MisconfigurationException, match="a tensor here"):
        fit(tmp_path, module, [EFMLoRA(LearningRateRho(0.5))])


def test_a_batch_that_can_be_read_only_once_is_refused(tmp_path: Any) -> None:
    class Summed(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return sum(self.loss(part, batch_idx) for part in batch)

    def loader() -> Any:
        return DataLoader(list(make_loader(4)), batch_size=2, collate_fn=iter)

    fit(tmp_path, Summed(), [], loader(), max_epochs=1)
    with pytest.raises(RuntimeError, match="a list_iterator can be read only once: let the loader give lists"):
        fit(tmp_path, Summed(), [FMLoRA(0.5)], loader(), max_epochs=1)


class Searching(torch.optim.SGD):
    """Takes a second gradient within its step, as SAM's optimizer does."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


METHODS = [EFMLoRA(0.5), FMLoRA(0.5), LoRASAM(0.5), RandomPerturbation(0.5)]


@pytest.mark.parametrize("callback", METHODS, ids=lambda c: type(c).__name__)
def test_an_optimizer_that_takes_a_second_gradient_is_refused_before_its_first_step(
    tmp_path: Any, callback: Any
) -> None:
    module = Classifier()
    module.optimizer_class = Searching
    before = weights(module)
    with pytest.raises(MisconfigurationException, match="Searching takes several gradients"):
        fit(tmp_path, module, [callback])
    assert same(before, weights(module))


HALVES = (EFMLoRA(1e-6), FMLoRA(1e-6), LoRASAM(1e-6), SAM(1e-6))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("callback", HALVES, ids=lambda callback: type(callback).__name__)
def test_a_modules_own_hook_changes_each_gradient_once(tmp_path: Any, callback: Any, accumulate: int) -> None:
    """At rho near 0 the step is plain LoRA's, whatever the hooks around backward do to its gradient."""

    class Halving(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norms: list[torch.Tensor] = []

        def on_after_backward(self) -> None:
            for p in self.parameters():
                if p.grad is not None:
                    p.grad *= 0.5

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.norms.append(torch.nn.utils.get_total_norm(grads))

    norms = []
    for callbacks in ([], [callback]):
        module = Halving()
        module.optimizer_class = torch.optim.SGD  # Adam would make steps of 1e-6's gradients, too
        fit(tmp_path, module, callbacks, max_epochs=1, accumulate_grad_batches=accumulate)
        norms.append(torch.stack(module.norms))
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)


class Wrapping(torch.optim.Optimizer):
    """An optimizer around another one, as Lookahead is."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.optimizer = torch.optim.AdamW(parameters, lr=lr)
        super().__init__(self.optimizer.param_groups, {})
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_an_optimizer_around_another_one_takes_the_same_steps(tmp_path: Any, front_end: str) -> None:
    runs = []
    for optimizer in (torch.optim.AdamW, Wrapping):
        module, callbacks, more = build(front_end, LinearRho(0.5, 0.1))
        module.optimizer_class = optimizer
        trainer = fit(tmp_path, module, callbacks, **more)
        runs.append((driver_of(trainer).step, weights(module)))
    assert runs[0][0] == 12
    assert same(*runs)


def test_a_schedule_that_gives_no_radius_stops_the_run(tmp_path: Any) -> None:
    class Falling(LinearRho):
        def __call__(self, step: int, horizon: float, *more: Any) -> float:
            return 1.0 - step

    for kind in (EFMLoRA, FMLoRA):
        with pytest.raises(MisconfigurationException, match=r"must give a finite number >= 0, and gave -1.0 at step 2"):
            fit(tmp_path, Classifier(), [kind(Falling(1.0, 0.0))])


def test_a_whole_window_of_skipped_batches_is_no_step(tmp_path: Any) -> None:
    module = TwoPassClassifier(0.5, accumulate_grad_batches=2)
    module.inside.append(lambda self, batch_idx: "skip" if batch_idx in (2, 3) else None)
    trainer = fit(tmp_path, module, [], make_loader(6), max_epochs=1)
    assert trainer.global_step == 2
    assert module._callback.step == 3


def test_a_batch_called_off_leaves_nothing_behind(tmp_path: Any) -> None:
    """on_train_batch_start returns -1: the step that was waited for never comes, and the module is as before."""

    class CalledOff(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    for kind in (EFMLoRA, FMLoRA):
        module = CalledOff()
        trainer = fit(tmp_path, module, [kind(0.5)], max_epochs=1)
        assert "training_step" not in module.__dict__
        assert "backward" not in trainer.strategy.__dict__


class FreeWeights:
    """Loss weights in a plain list, which no module lists as parameters; one joins the optimizer in mid-fit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.free = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
        self.seen: list[list[torch.Tensor]] = []

    def loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        weighted = sum((weight * batch_idx).sum() for weight in self.free)
        return super().loss(batch, batch_idx) + weighted  # type: ignore[misc, no-any-return]

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()  # type: ignore[misc]
        optimizer.add_param_group({"params": self.free[:]})
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.net.late = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))  # type: ignore[attr-defined]
            self.free.append(self.net.late)  # type: ignore[attr-defined]
            self.trainer.optimizers[0].add_param_group({"params": [self.free[-1]]})  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append([weight.grad.clone() for weight in self.free if weight.grad is not None])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", TWO_PASSES)
def test_parameters_outside_the_module_have_one_gradient(tmp_path: Any, kind: str, accumulate: int) -> None:
    module, callbacks, more = two_passes(kind, FreeWeights, net=make_net().double(), accumulate=accumulate)
    fit(tmp_path, module, callbacks, make_loader(4, dtype=torch.float64), max_epochs=1, **more)
    means = [0.0, 1.0, 2.0, 3.0] if accumulate == 1 else [0.5, 2.5]
    for step, (mean, grads) in enumerate(zip(means, module.seen, strict=True)):
        assert len(grads) == (2 if step * accumulate >= 2 else 1)
        for grad in grads:
            torch.testing.assert_close(grad, torch.full_like(grad, mean))


def test_sam_moves_what_is_unfrozen_in_mid_fit(tmp_path: Any) -> None:
    moved = []

    class Thawing(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.bias.requires_grad_(batch_idx >= 1)

        def loss(self, batch: Any, batch_idx: int) -> Any:
            moved.append(self.bias.detach().clone())
            return super().loss(batch, batch_idx)

    module = Thawing(lr=0.0)
    module.bias = module.net.base_model.model[4].base_layer.bias
    module.bias.requires_grad_(True)
    module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [p for p in module.parameters() if p.requires_grad], lr=0.0
    )
    frozen = SAM(0.5)
    module.on_fit_start = lambda: module.bias.requires_grad_(False)  # type: ignore[method-assign]
    fit(tmp_path, module, [frozen], make_loader(2), max_epochs=1)
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[2], moved[3])


class Counting:
    """BatchNorm, torchmetrics and a buffer that is replaced: all that a step counts in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = torch.nn.BatchNorm1d(6)
        self.other = torch.nn.InstanceNorm1d(3, track_running_stats=True)  # whose kernel leaves no mark on its buffers
        self.accuracy = MetricCollection([MeanMetric(), CatMetric()])
        self.register_buffer("queue", torch.zeros(0))  # type: ignore[attr-defined]

    def loss(self, batch: Any, batch_idx: int) -> Any:
        inputs = self.other(self.norm(batch[0]).view(-1, 3, 2)).view(-1, 6)
        loss = super().loss((inputs, *batch[1:]), batch_idx)  # type: ignore[misc]
        self.accuracy.update(loss.detach())
        self.log("mean", self.accuracy["MeanMetric"], on_epoch=True, on_step=False)  # type: ignore[attr-defined]
        self.queue = torch.cat([self.queue, loss.detach()[None]])
        return loss


@pytest.mark.parametrize("kind", TWO_PASSES)
def test_a_module_counts_each_batch_once(tmp_path: Any, kind: str) -> None:
    """As a plain run does, whose losses at rate 0 are those of the clean passes."""
    states = []
    for each in ("plain", kind):
        module, callbacks, more = two_passes(each, Counting, lr=0.0)
        module.optimizer_class = torch.optim.SGD
        norm = module.norm.running_mean
        trainer = fit(tmp_path, module, callbacks, max_epochs=1, **more)
        assert module.norm.running_mean is norm
        counted = module.accuracy["CatMetric"]
        assert counted.update_count == module.norm.num_batches_tracked == len(module.queue) == 6
        states.append([counted.compute(), trainer.callback_metrics["mean"], dict(module.named_buffers())])
    assert same(*states)
