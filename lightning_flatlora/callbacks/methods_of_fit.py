"""The methods of a callback in a fit, one for each optimizer, with their pairs and their state."""

import math
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch.optim import Optimizer

from lightning_flatlora.callbacks.both_lightnings import callbacks_of, is_lightning
from lightning_flatlora.callbacks.training_step import optimizer_steps
from lightning_flatlora.methods.assignment import PairAssignment, assign_pairs
from lightning_flatlora.methods.checks import refuse
from lightning_flatlora.methods.step_method import StepMethod
from lightning_flatlora.pairs.find import nothing_found, search_pairs
from lightning_flatlora.pairs.lora_pair import NoPairsError, PairSearch
from lightning_flatlora.sharding import reshard

S = TypeVar("S", bound=StepMethod)


class MethodsOfFit(Generic[S]):
    """A method for each optimizer of a fit; nearly every fit has one.

    Attributes:
        methods: in the order of the optimizers.
        first: the method of the first optimizer that trains pairs.
        search: the result of the last search: the model's pairs, and the layers that were left out.
        assignment: which optimizer trains which pair.
        needs_pairs: whether the model is searched for pairs.

    Args:
        method: the first one, with the settings of all.
    """

    def __init__(self, method: S) -> None:
        self.methods = [method]
        self.needs_pairs = method.needs_pairs
        self.begin(continues=False)

    def begin(self, continues: bool) -> None:
        """Forget the last fit, except for the counts if this one continues it."""
        self.search = PairSearch([], [])
        self.assignment = PairAssignment([], [], [])
        # Whether another callback is going to unfreeze or activate pairs later.
        self.may_come = False
        self.first = self.methods[0]
        for method in self.methods:
            count = method.step, method.initial_lr
            method.reset()
            # The optimizers are new, and Ê starts again with them, but schedules continue from the old count.
            if continues:
                method.step, method.initial_lr = count

    def take_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Make one method for each optimizer; those of the last fit keep their counts."""
        while len(self.methods) < len(optimizers):
            self.methods.append(self.methods[0].for_another_optimizer())
        del self.methods[max(len(optimizers), 1) :]
        for index, optimizer in enumerate(optimizers):
            self.methods[index].optimizer = optimizer
            self.methods[index].place = f" of optimizer {index}" if len(optimizers) > 1 else ""
        self.first = self.methods[0]

    def set_horizon(self, trainer: Trainer) -> None:
        """Take the number of optimizer steps of the run, which is known once the loaders are set up."""
        for method in self.methods:
            method.horizon = optimizer_steps(trainer)
        method = self.first
        if not method.lacks_horizon:
            return
        if math.isinf(method.horizon):
            refuse(method, [f"{method.argument} spreads over an endless run: set total_steps, max_steps or max_epochs"])
        # No checkpoint has brought a count. Next to EFMLoRA an FMLoRAModule's callback has no pairs.
        if method.rate_parameters and method.step == 0 and trainer.global_step > 0:
            method.warn(
                f"it joins this run only now, at step {trainer.global_step} of {method.horizon:g}, so "
                f"{method.argument} begins now and will not end: set its total_steps to the steps that are left"
            )

    # -- the pairs

    def find(self, trainer: Trainer, module: LightningModule, must_be_there: bool = False) -> None:
        """Search the model, and give each method the pairs whose factors its optimizer holds.

        Raises:
            ValueError: a pair is required and there is none, or there is no adapter of the given name.
        """
        if not self.needs_pairs:
            return
        adapter_name, finder = self.methods[0].adapter_name, self.methods[0].finder
        # As after a validation.
        reshard(module)
        # If pairs may be unfrozen or activated later, a start without any is not an error.
        self.search = search_pairs(module, adapter_name, finder, must_be_active=not self.may_come)
        if must_be_there and not self.search.pairs and not (self.may_come and self.search.resting):
            raise NoPairsError(nothing_found(module, adapter_name, finder, self.search))
        self.assignment = assign_pairs(self.search, trainer.optimizers, [method.pairs for method in self.methods])
        for method, pairs in zip(self.methods, self.assignment.pairs, strict=False):
            method.take_pairs(pairs, module, trainer.strategy.model or module)
        self.first = next((method for method in self.methods if method.pairs), self.methods[0])

    def assignment_problems(self) -> list[str]:
        """List why the pairs can't be trained as the optimizers hold them."""
        problems = []
        if self.assignment.orphans and not self.may_come:
            problems.append(
                f"trainable LoRA factors, such as {self.assignment.orphans[0].name}, are in no optimizer: add them to "
                "one, or freeze them; a BaseFinetuning callback may add them later in the fit"
            )
        holders = [pairs for pairs in self.assignment.pairs if pairs]
        if self.assignment.spread or (len(holders) > 1 and not self.methods[0].takes_several_optimizers):
            problems.append(
                "the pairs, or the factors of one, are spread over optimizers: one optimizer must hold A and B of all "
                "of them, or use EFMLoRA, which follows several if each holds A and B of its pairs"
            )
        return problems

    def install_again(self) -> None:
        """Prepare the layers of pairs that a later search has found, and warn of problems with them."""
        self.first.warn(*(f"{each}. Until then these pairs are not perturbed" for each in self.assignment_problems()))
        for method in self.methods:
            method.install()
            method.warn(*(f"{each}. Until then the first group's is followed" for each in method.rate_problems()))

    def warn_without_effect(self) -> None:
        """Warn at the end of an epoch if nothing was perturbed, and say why."""
        if self.needs_pairs and not self.first.pairs:
            self.first.warn(
                "no pair is trained now, so nothing is perturbed: every B is frozen, in no optimizer, or computed from "
                "other parameters, as by pruning. Pairs that are unfrozen later are perturbed from the next epoch on"
            )
        for method in self.methods:
            method.warn_without_gradient()

    # -- the state

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all methods; with a single optimizer it is at the top level, as in a loop."""
        if len(self.methods) == 1:
            return self.first.state_dict()
        return {"step": self.first.step, "optimizers": [method.state_dict() for method in self.methods]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`.

        Raises:
            MisconfigurationException: the state has other settings, optimizers or pairs.
        """
        optimizers = state.get("optimizers") if isinstance(state, dict) else None
        states = optimizers if isinstance(optimizers, list) else [state]
        # A single state, such as a loop's or one from before the optimizers were known, is for the first optimizer's
        # pairs.
        if len(states) not in (1, len(self.methods)):
            problem = f"the checkpoint has {len(states)} optimizers, this run {len(self.methods)}: configure as many"
            refuse(self.first, [problem])
        methods = [self.first] if len(states) == 1 else self.methods
        for method, of_method in zip(methods, states, strict=True):
            # Another optimizer's pairs have their own state.
            known = set(self.search.names)
            for other in self.methods:
                if other is not method:
                    known -= {pair.name for pair in other.pairs}
            method.load_state_dict(of_method, known)


def unfreezes_later(trainer: Trainer) -> bool:
    """Say whether a callback is going to unfreeze parameters in the middle of a fit."""
    return any(is_lightning(each, BaseFinetuning) for each in callbacks_of(trainer))
