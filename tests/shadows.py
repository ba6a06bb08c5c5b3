"""A shadow of the weights, taken right after the optimizer's own update, and spies that compare it in every hook."""

from typing import Any

import torch
from helpers import Classifier, TwoPassClassifier, build, is_perturbed, make_net, same
from lightning.pytorch import Callback
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from torch import nn

from lightning_flatlora import FMLoRAModule, perturbed_read
from lightning_flatlora.module import _NOT_CALLED

CALLBACK_HOOKS = [name for name in dir(Callback) if name.startswith("on_")] + ["setup", "teardown"]


MODULE_HOOKS = [
    *(name for name in {**vars(ModelHooks), **vars(DataHooks), **vars(CheckpointHooks)} if name.startswith("on_")),
    "setup",
    "teardown",
    "transfer_batch_to_device",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "backward",
]


class Shadow:
    """What the weights must be: copied at the start and after each update by the optimizer, and at no other time.

    Args:
        net: the network.
        trained_only: ignore frozen weights, which peft's MultiheadAttention recreates in each pass.
    """

    def __init__(self, net: nn.Module, trained_only: bool = False) -> None:
        self.net, self.trained_only = net, trained_only
        self.parameters = self.looked_at()
        self.keys = [] if trained_only else list(net.state_dict())
        self.seen: dict[str, set[str]] = {}
        self.take()

    def take(self) -> None:
        self.stored = {name: p.detach().clone() for name, p in self.looked_at().items()}

    def looked_at(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad or not self.trained_only}

    def look(self, who: str, where: str) -> None:
        """The stored bits, read in every possible way, are the shadow's."""
        now = self.looked_at()
        assert list(now) == list(self.parameters), (who, where)
        assert all(now[name] is parameter for name, parameter in self.parameters.items()), (who, where)
        assert same({name: p.data for name, p in now.items()}, self.stored), (who, where)
        state = self.net.state_dict()
        assert self.trained_only or list(state) == self.keys, (who, where)
        assert same({name: state[name] for name in self.stored}, self.stored), (who, where)
        self.seen.setdefault(where, set()).add(who)
        if is_perturbed(self.net):
            self.seen.setdefault("perturbed", set()).add(where)

    def optimizer_class(self) -> type[torch.optim.AdamW]:
        shadow = self

        class Shadowed(torch.optim.AdamW):
            def step(self, closure: Any = None) -> Any:
                loss = None
                if closure is not None:
                    with torch.enable_grad():
                        loss = closure()
                shadow.look("optimizer", "step")
                super().step()
                shadow.take()
                return loss

        return Shadowed


def spy(shadow: Shadow, name: str) -> Callback:
    """A callback that looks in every hook."""

    def hook_of(hook: str) -> Any:
        return lambda self, *args, **kwargs: shadow.look(name, hook)

    return type(f"Spy{name}", (Callback,), {hook: hook_of(hook) for hook in CALLBACK_HOOKS})()


def spied(base: type[Any]) -> type[Any]:
    """A module class that looks around each of its hooks that Lightning calls."""

    def hook_of(hook: str) -> Any:
        original = getattr(base, hook)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.shadow.look("module", hook)
            answer = original(self, *args, **kwargs)
            self.shadow.look("module", hook)
            return answer

        return method

    # An FMLoRAModule refuses hooks that would never be called.
    hooks = [hook for hook in MODULE_HOOKS if not (issubclass(base, FMLoRAModule) and hook in _NOT_CALLED)]
    return type(f"Spied{base.__name__}", (base,), {hook: hook_of(hook) for hook in hooks})


def watched(front_end: str, **settings: Any) -> tuple[Any, list[Callback], dict[str, Any], Shadow]:
    """A front end with spies in its module and between its callbacks."""
    net = make_net(dropout=0.2)
    shadow = Shadow(net)
    module, callbacks, kwargs = build(
        front_end, net=net, classes=(spied(Classifier), spied(TwoPassClassifier)), **settings
    )
    module.shadow = shadow
    module.optimizer_class = shadow.optimizer_class()
    module.scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)
    module.inside.append(lambda *_: shadow.look("module", "training_step"))
    return module, [spy(shadow, "Before"), *callbacks, spy(shadow, "After")], kwargs, shadow


def shown(net: nn.Module) -> dict[str, torch.Tensor]:
    """The E that each reader adds now, by the module's name."""
    E = {name: perturbed_read.shown(module) for name, module in net.named_modules()}
    return {name: tensor.clone() for name, tensor in E.items() if tensor is not None}
