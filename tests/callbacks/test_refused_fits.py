"""What can't work is refused before the first step, in a single message, and everything is left as it was."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import BASELINES, FromIterator, assert_no_trace, build, fit, make_loader, make_net, same, trains, weights
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_flatlora import CosineRho, EFMLoRA, FMLoRA

CALLBACKS = ("efmlora", "fmlora")
SINGLE = (*CALLBACKS, "module")


def trained(module: Any, skip: str = "nothing") -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters() if p.requires_grad and skip not in name]


def without_lora() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3))


def second_adapter() -> nn.Module:
    net = make_net()
    net.add_adapter("second", net.peft_config["default"])
    return net


def of_dora() -> nn.Module:
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
    return get_peft_model(nn.Sequential(nn.Linear(6, 3)), config)


def frozen(factor: str) -> Callable[[Any], None]:
    def prepare(module: Any) -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and factor not in name)

    return prepare


def named(rho: float) -> EFMLoRA:
    return EFMLoRA(rho, adapter_name="default")


def merged(module: Any) -> None:
    module.net.merge_adapter()
    # With another trained part next to it, nothing would have failed.
    module.head = nn.Linear(3, 3)


class ByHand:
    """Manual optimization."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False


class TwoOptimizers(ByHand):
    """One optimizer for the A factors and one for the rest."""

    def configure_optimizers(self) -> Any:
        of_A = [p for name, p in self.named_parameters() if p.requires_grad and "lora_A" in name]
        return [SGD(of_A, lr=0.1), SGD(trained(self, "lora_A"), lr=0.1)]


class Apart(ByHand):
    """Two adapters, each with its own network and optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.other = make_net()

    def configure_optimizers(self) -> Any:
        return [SGD(trained(self.net), lr=0.1), SGD(trained(self.other), lr=0.1)]


class Searching(SGD):
    """Takes a second gradient within its step, as SAM's optimizer does."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class StepsInside:
    """Steps the inner optimizer within Lightning's step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.optimizer.step(closure=optimizer_closure)


class TakesTheBareOne(ByHand):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch, batch_idx))
        self.optimizers(use_pl_optimizer=False).step()


class Around:
    """A training_step around FMLoRAModule's, or in its place."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class Endless(IterableDataset):
    """A stream whose length is unknown."""

    def __iter__(self) -> Any:
        yield from (sample for sample in make_loader(6).dataset)


def endless() -> DataLoader:
    return DataLoader(Endless(), batch_size=4)


def uses(optimizer_class: Any, scheduler: Any = None) -> Callable[[Any], None]:
    def prepare(module: Any) -> None:
        module.optimizer_class, module.scheduler = optimizer_class, scheduler

    return prepare


Private = type("DPOptimizer", (SGD,), {"__module__": "opacus.optimizers.optimizer"})


def overrides(hook: str) -> type[Any]:
    return type("Own", (), {hook: lambda self, *args: None})


def automatic(module: Any) -> None:
    module.automatic_optimization = True


@dataclass
class Case:
    """The front ends under which something is refused, and the words of the message."""

    words: tuple[str, ...]
    front_ends: tuple[str, ...] = CALLBACKS
    own: type[Any] = object
    net: Callable[[], nn.Module] = make_net
    prepare: Callable[[Any], None] = lambda module: None
    rho: Any = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    beside: tuple[Any, ...] = ()
    loader: Callable[[], Any] = make_loader
    trainer: dict[str, Any] = field(default_factory=dict)


NO_END = {"max_epochs": -1, "max_steps": -1}
REMEDIES = ("total_steps", "max_steps", "max_epochs")
CASES: dict[str, Case] = {
    "merged": Case(
        ("the adapter is merged into its base, as in net.base_model.model.", "unmerge_adapter() first"),
        SINGLE,
        prepare=merged,
    ),
    "no LoRA layer": Case(("no LoRA pair", "GELU", "Linear", "peft.get_peft_model"), net=without_lora),
    "every B frozen": Case(("Every B is frozen", "default"), prepare=frozen("lora_B")),
    "unknown adapter": Case(
        ("adapter_name must be None or one of ['default', 'second'], got 'third'",),
        SINGLE,
        net=second_adapter,
        settings={"adapter_name": "third"},
    ),
    "both callbacks": Case(("the same weights as FMLoRA: keep one",), ("efmlora",), beside=(FMLoRA,)),
    "FMLoRA beside a module": Case(("it perturbs the same weights as", "keep one"), ("module",), beside=(FMLoRA,)),
    "a baseline beside EFMLoRA": Case(("keep one", "EFMLoRA"), tuple(BASELINES), beside=(EFMLoRA,)),
    "a baseline beside FMLoRA": Case(("keep one", "FMLoRA"), tuple(BASELINES), beside=(FMLoRA,)),
    "two on the same pairs": Case(("keep one",), ("efmlora",), Apart, beside=(named,)),
    "manual optimization": Case(("manual optimization", "FMLoRAModule", "EFMLoRA"), ("fmlora",), ByHand),
    "two passes by hand": Case(("a second pass can't be added to manual optimization",), ("SAM", "LoRASAM"), ByHand),
    "several optimizers": Case(("use EFMLoRA",), ("fmlora",), Apart),
    "spread": Case(
        ("spread over optimizers", "one optimizer must hold A and B of all of them"), ("efmlora",), TwoOptimizers
    ),
    "B in no optimizer": Case(
        ("in no optimizer", "net.base_model.model.0.lora_B.default.weight"),
        own=trains(lambda name, parameter: parameter.requires_grad and "0.lora_B" not in name),
    ),
    "A in no optimizer": Case(
        ("in no optimizer", "net.base_model.model.0.lora_B.default.weight"),
        own=trains(lambda name, parameter: parameter.requires_grad and "0.lora_A" not in name),
    ),
    "two optimizers where one is needed": Case(("must return one optimizer, got 2",), ("module",), TwoOptimizers),
    "nothing in the optimizer": Case(
        ("holds no trainable parameter",), ("SAM",), trains(lambda name, parameter: not parameter.requires_grad)
    ),
    "balance with a frozen A": Case(
        ("A of 3 pairs is frozen, as in net.base_model.model.0.lora_B.default.weight",),
        ("nBAR",),
        prepare=frozen("lora_A"),
    ),
    "no whole weight": Case(("no LoRA layer on a Linear",), ("RandomPerturbation", "BiLoRA"), net=of_dora),
    "differential privacy": Case(("which the privacy budget does not cover",), prepare=uses(Private)),
    "LBFGS": Case(("LBFGS needs several gradients",), prepare=uses(torch.optim.LBFGS)),
    "dataloader_iter": Case(
        ("training_step(dataloader_iter)", "training_step(batch, batch_idx)"), ("fmlora",), FromIterator
    ),
    "no end, cosine": Case(("CosineRho", *REMEDIES), SINGLE, rho=CosineRho(1.0, 0.0), trainer=NO_END),
    # Lightning takes max_steps as the length of such a run, which is -1 if it isn't set.
    "no length": Case(("total_steps",), SINGLE, rho=CosineRho(1.0, 0.0), loader=endless, trainer={"max_epochs": 1}),
    "another schedule": Case(
        ("give start_step and every_n_steps to EFMLoRA",),
        ("module",),
        settings={"every_n_steps": 2},
        beside=(EFMLoRA,),
    ),
    "another module's settings": Case(
        ("rho must be equal", "1.0", "2.0", "estimator must be equal", "norm_scope must be equal", "'global'"),
        ("module",),
        settings={"estimator": "projected", "norm_scope": "layer"},
        beside=(lambda rho: EFMLoRA(2.0),),
    ),
    "training_step for compute_loss": Case(
        ("Manual overrides FMLoRAModule's training_step", "rename it to compute_loss"), ("module",), Around
    ),
    "automatic optimization": Case(("automatic_optimization must be False",), ("module",), prepare=automatic),
    "a plateau scheduler": Case(
        ("ReduceLROnPlateau", "on_validation_epoch_end"),
        ("module",),
        prepare=uses(SGD, lr_scheduler.ReduceLROnPlateau),
    ),
    # One message, with a line for each problem.
    "several at once": Case(
        ("FMLoRA: 4 problems", "keep one", "manual optimization", "adapter_name must be", "steps its optimizer itself"),
        ("fmlora",),
        ByHand,
        rho=CosineRho(1.0, 0.0),
        settings={"adapter_name": "third"},
        beside=(lambda rho: EFMLoRA(1.0),),
        trainer={"max_epochs": -1},
    ),
}
# These are found at the first step.
AT_THE_FIRST_STEP: dict[str, Case] = {
    "several gradients": Case(
        ("Searching needs several gradients",),
        (*CALLBACKS, "LoRASAM", "RandomPerturbation"),
        prepare=uses(Searching),
    ),
    "past Lightning": Case(("optimizer.step(closure=optimizer_closure)",), (*CALLBACKS, *BASELINES), own=StepsInside),
    "the bare optimizer": Case(("stepped without Lightning", "self.optimizers()"), ("efmlora",), own=TakesTheBareOne),
}
CASES |= AT_THE_FIRST_STEP
for hook in ("optimizer_step", "optimizer_zero_grad", "on_before_zero_grad"):
    CASES[hook] = Case((f"Manual overrides {hook}, which Lightning does not call",), ("module",), overrides(hook))
for name, baseline in BASELINES.items():
    CASES[f"{name} beside a module"] = Case(("keep one",), ("module",), beside=(baseline,))


REFUSED = []
for name, each in CASES.items():
    REFUSED += [(name, front_end) for front_end in each.front_ends]


@pytest.mark.parametrize(("title", "front_end"), REFUSED)
def test_refused_before_the_first_step_is_taken(tmp_path: Any, title: str, front_end: str) -> None:
    case = CASES[title]
    module, callbacks, _ = build(front_end, case.rho, net=case.net(), own=case.own, **case.settings)
    case.prepare(module)
    callbacks += [make(case.rho) for make in case.beside]
    before, kinds, steps = weights(module), [type(m) for m in module.modules()], []
    module.inside.append(lambda module, batch_idx: steps.append(batch_idx))
    with pytest.raises(MisconfigurationException) as caught:
        fit(tmp_path, module, callbacks, case.loader(), **case.trainer)
    for word in case.words:
        assert word in str(caught.value)
    assert {"efmlora": "EFMLoRA", "fmlora": "FMLoRA", "module": "FMLoRA"}.get(front_end, "") in str(caught.value)
    assert not steps or title in AT_THE_FIRST_STEP
    assert same(weights(module), before)
    assert [type(m) for m in module.modules()] == kinds
    assert_no_trace(module)
    if title == "both callbacks":
        # The same objects train once the problem is fixed.
        fit(tmp_path, module, callbacks[:1])
        assert callbacks[0].step == 12
        assert_no_trace(module)
