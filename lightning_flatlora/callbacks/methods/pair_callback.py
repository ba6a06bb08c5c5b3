"""The pairs that a method works on, and the optimizer that trains each: found at the start, followed during the fit."""

from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import WarningCache
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.methods.checks import message, refuse
from lightning_flatlora.callbacks.methods.pair_groups import PairAssignment, PairGroup, assign_pairs
from lightning_flatlora.callbacks.methods.training_step import takes_no_step
from lightning_flatlora.lightning_names import callbacks_of, is_lightning
from lightning_flatlora.lora_pair import Finder, NoPairsError, PairSearch
from lightning_flatlora.pair_stacks import MOST_MISSED_STEPS
from lightning_flatlora.pair_watch import PairWatch
from lightning_flatlora.perturbation import Perturbation


class PairCallback(Callback):
    """Base of the callbacks that train LoRA pairs: it knows the pairs of each optimizer.

    The pairs are those that the model trains at the moment: it may freeze and unfreeze them, change their scaling, and
    activate or add adapters in the middle of a fit.

    Attributes:
        search: the pairs, and what was left out, as they are now.
        pair_groups: for each optimizer, the pairs that it trains, with their step count.
        takes_several_optimizers: whether pairs may be in different optimizers.
    """

    adapter_name: str | None
    finder: Finder | None
    takes_several_optimizers: ClassVar[bool] = False

    def begin(self) -> None:
        """Set everything that belongs to one fit to what it is before the fit; subclasses add their own."""
        self.search = PairSearch([], [])
        self.pair_groups = [PairGroup(0)]
        self._watch: PairWatch | None = None
        self._assignment = PairAssignment([], [], [], [])
        self._is_sharded = False
        self._warnings = WarningCache()

    # -- nearly every run has one optimizer, and its group is the callback's

    @property
    def main_group(self) -> PairGroup:
        """The group of the first optimizer that trains pairs."""
        return next((pair_group for pair_group in self.pair_groups if pair_group.pairs), self.pair_groups[0])

    @property
    def step(self) -> int:
        """Steps that the main group's optimizer has taken, from 0; steps that a loss scaler skipped count."""
        return self.main_group.step

    @step.setter
    def step(self, step: int) -> None:
        self.main_group.step = step

    @property
    def perturbation(self) -> Perturbation | None:
        """The main group's; None where the method keeps none, or there is no pair yet."""
        return self.main_group.perturbation

    def pair_group_of(self, trainer: Trainer, optimizer: Any) -> PairGroup | None:
        """The group of an optimizer, as a hook receives it; None where it takes no real step."""
        if takes_no_step(trainer):
            return None
        # Only Lightning's wrapper is unpacked: with any other, the wrapper itself is in trainer.optimizers.
        if is_lightning(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return next((each for each in self.pair_groups if trainer.optimizers[each.index] is optimizer), None)

    def holds_pairs(self, trainer: Trainer, optimizer: Any) -> bool:
        """Whether an optimizer, as a hook receives it, is the main group's."""
        return self.pair_group_of(trainer, optimizer) is self.main_group

    # -- the start

    def find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what the method works on.

        Raises:
            ValueError: there is nothing, or no adapter of the given name.
        """
        # Where pairs may be unfrozen or activated later, a start without any is no error.
        may_come = self._may_come(trainer)
        self._watch = PairWatch(pl_module, self.adapter_name, self.finder, must_be_active=not may_come)
        self.search = self._watch.search(trainer.optimizers)
        if not self.search.pairs and not (may_come and self.search.resting):
            raise NoPairsError(self._watch.refusal(self.search))
        self._assign(trainer)

    def pair_problems(self, trainer: Trainer) -> list[str]:
        """What can't work with what was found, one line for each problem; subclasses add their own."""
        merged = [] if self._watch is None else self._watch.merge_problems()
        return merged + self._assignment_problems(trainer) + self.rate_problems(trainer)

    def rate_problems(self, trainer: Trainer) -> list[str]:
        """What can't work with the learning rates of the pairs, one line for each problem."""
        return []

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare what was found: after all checks and before the first step, and whenever the pairs change."""

    def _may_come(self, trainer: Trainer) -> bool:
        """Whether another callback has the task of unfreezing or activating pairs later."""
        return not self.is_alone_in(trainer) or unfreezes_later(trainer)

    def is_alone_in(self, trainer: Trainer) -> bool:
        """Whether a Trainer has no other callback of this class."""
        return not any(type(other) is type(self) and other is not self for other in callbacks_of(trainer))

    def _assign(self, trainer: Trainer) -> None:
        """Give each group the pairs whose factors its optimizer holds."""
        self._assignment = assign_pairs(self.search.pairs, trainer.optimizers)
        for pair_group in self.pair_groups:
            pair_group.pairs = self._assignment.pairs[pair_group.index] if self._assignment.pairs else []

    def _assignment_problems(self, trainer: Trainer) -> list[str]:
        assignment = self._assignment
        problems = []
        if assignment.orphans and not self._may_come(trainer):
            problems.append(
                f"trainable LoRA factors, such as {assignment.orphans[0].name}, are in no optimizer: give them to it, "
                "or freeze them; where they join it later in the fit, let a BaseFinetuning callback do it"
            )
        several = [index for index, pairs in enumerate(assignment.pairs) if pairs]
        if assignment.spread:
            problems.append(
                f"the factors of pairs, {assignment.spread[0].name} among them, are spread over optimizers "
                f"{sorted(set(assignment.places))}: one optimizer must hold A and B of all of them"
            )
        elif len(several) > 1 and not self.takes_several_optimizers:
            problems.append(
                f"the pairs are spread over optimizers {several}: one optimizer must hold A and B of all of them, or "
                "use EFMLoRA, which follows the pairs of each optimizer"
            )
        return problems

    # -- what a step finds

    def look_for_gradients(self, pair_group: PairGroup) -> None:
        """Say once that the pairs had no gradient in many steps, so that the method does nothing.

        To be called in on_before_optimizer_step.
        """
        pair_group.look_for_gradients(self._is_sharded)
        if pair_group.steps_without_gradient == MOST_MISSED_STEPS:
            self._warn_of_missing_gradients(pair_group)

    def _warn_of_missing_gradients(self, pair_group: PairGroup) -> None:
        others = any(other.pairs for other in self.pair_groups if other is not pair_group)
        of_which = f" of optimizer {pair_group.index}" if others else ""
        self._warn_once(
            f"no B of a pair{of_which} has had a gradient in any step so far, so the method had no effect there: the "
            "loss must depend on what the adapted layers compute (not under torch.no_grad, not detached), and the "
            "gradients must still be there in on_before_optimizer_step, which they are not where an optimizer steps "
            "inside backward"
        )

    # -- the model may change

    def follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what has changed about the pairs since the last batch, which nearly always is nothing."""
        if self._watch is not None and self._watch.changed(trainer.optimizers):
            self._take_over(trainer, pl_module, self._watch.search(trainer.optimizers))

    def follow_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the pairs of adapters that only the step itself activates: they are perturbed from the next one on.

        To be called in on_before_optimizer_step.
        """
        if self._watch is not None and self._watch.meets_others():
            self._take_over(trainer, pl_module, self._watch.search(trainer.optimizers, with_gradient=True))

    def _take_over(self, trainer: Trainer, pl_module: LightningModule, search: PairSearch) -> None:
        self.search = search
        self._assign(trainer)
        for problem in self._assignment_problems(trainer):
            self._warn_once(f"{problem}. Until then these pairs are not perturbed")
        for problem in self.rate_problems(trainer):
            self._warn_once(f"{problem}. Until then the first group's is followed")
        self.install(trainer, pl_module)

    def follow_scaling(self) -> None:
        """Take over scalings alone. This needs no search, so it works at any moment, inside a sharded forward too."""
        if self._watch is None or not self._watch.rescaled():
            return
        scalings = self._watch.scalings()
        for pair_group in self.pair_groups:
            if pair_group.perturbation is not None:
                pair_group.perturbation.rescale(scalings)

    def _warn_once(self, problem: str) -> None:
        # The same problem is found again in every batch.
        self._warnings.warn(message(self, [problem]))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Layers that were put in or replaced are found by a walk over the model, too slow for every batch.
        if self._watch is not None:
            self._watch.is_stale = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.follow(trainer, pl_module)
        if self._watch is not None and not self.main_group.pairs:
            had_some = self.main_group.steps_without_gradient is None
            what = "no pair is trained any more" if had_some else "no pair has been trained so far"
            self._warn_once(
                f"{what}, so nothing is perturbed: every B is frozen, in no optimizer, or computed from other "
                "parameters, as by pruning. What is unfrozen and given to an optimizer later is perturbed from then on"
            )
        for pair_group in self.pair_groups:
            if pair_group.steps_without_gradient:
                self._warn_of_missing_gradients(pair_group)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        left = [pair.name for pair in self._assignment.orphans]
        if left and self._may_come(trainer) and self.main_group.pairs:
            self._warn_once(f"{len(left)} pairs, {left[0]} among them, came into no optimizer and were not perturbed")

    def refuse_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Refuse a step of the pairs' optimizer that no hook announces."""
        pair_group = self.pair_group_of(trainer, optimizer)
        if pair_group is None or self not in callbacks_of(trainer):
            return
        if self.search.pairs and not pair_group.pairs:
            # Another optimizer trains the pairs.
            return
        problem = (
            f"the {type(optimizer).__name__} that learns the pairs is stepped past Lightning, so that "
            "on_before_optimizer_step is not called and nothing would be perturbed: in an optimizer_step "
            "of your own call optimizer.step(closure=optimizer_closure) on the optimizer that it is given, "
            "and in manual optimization step what self.optimizers() gives, not the .optimizer inside it"
        )
        refuse(self, [problem])


def unfreezes_later(trainer: Trainer) -> bool:
    """Whether a callback has the task of unfreezing parameters in the middle of a fit."""
    return any(is_lightning(each, BaseFinetuning) for each in callbacks_of(trainer))
