"""Which pairs a method is about, and which optimizer learns them: found at the start, followed in mid-fit."""

from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_flatlora.callbacks.checks import message
from lightning_flatlora.callbacks.courses import Course, Owners, owners_of
from lightning_flatlora.callbacks.horizon import takes_no_step
from lightning_flatlora.lightning_names import MisconfigurationException, callbacks_of, is_lightning
from lightning_flatlora.pair_watch import PairWatch
from lightning_flatlora.pairs import LoRAPair, PairSearch
from lightning_flatlora.perturbation import Perturbation


class FindsPairs(Callback):
    """Base of the callbacks that train LoRA pairs: it knows the pairs of each optimizer.

    The pairs are those that the model trains at the moment: it may freeze and unfreeze them, change their scaling, and
    activate or add adapters in the middle of a fit.

    Attributes:
        search: the pairs, and what was left out, as they are now.
        courses: the way of each optimizer through the fit.
        takes_several_optimizers: whether pairs may be in different optimizers.
    """

    adapter_name: str | None
    takes_several_optimizers: ClassVar[bool] = False

    def begin(self) -> None:
        """Set all that belongs to one fit to what it is before the fit; subclasses add theirs."""
        self.search = PairSearch([], [])
        self.courses = [Course(0)]
        self._watch: PairWatch | None = None
        self._orphans: list[LoRAPair] = []
        self._is_sharded = False
        self._warned: set[str] = set()

    # -- one optimizer is what nearly every run has, and its course is the callback's

    @property
    def main(self) -> Course:
        """The course of the first optimizer that learns pairs."""
        return next((course for course in self.courses if course.pairs), self.courses[0])

    @property
    def step(self) -> int:
        """Steps that the main course's optimizer has taken, from 0; steps that a loss scaler skipped count."""
        return self.main.step

    @step.setter
    def step(self, step: int) -> None:
        self.main.step = step

    @property
    def perturbation(self) -> Perturbation | None:
        """Of the main course; None where the method keeps none, or there is no pair yet."""
        return self.main.perturbation

    def course_of(self, trainer: Trainer, optimizer: Any) -> Course | None:
        """The course of an optimizer, as a hook is given it; None where it takes no real step."""
        if takes_no_step(trainer):
            return None
        if is_lightning(optimizer, LightningOptimizer):  # others that keep one inside are themselves what is stepped
            optimizer = optimizer.optimizer
        return next((course for course in self.courses if trainer.optimizers[course.index] is optimizer), None)

    def holds_pairs(self, trainer: Trainer, optimizer: Any) -> bool:
        """Whether an optimizer, as a hook is given it, is the main course's."""
        return self.course_of(trainer, optimizer) is self.main

    # -- the start

    def find(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Find what the method is about, and say what can't work with it, one line each."""
        may_come = self._may_come(trainer)
        try:
            self._watch = PairWatch(pl_module, self.adapter_name, must_be_active=not may_come)
        except ValueError as error:
            return [str(error)]
        self.search = self._watch.search(trainer.optimizers)
        if not self.search.pairs and not (may_come and self.search.resting):
            return [self._watch.refusal(self.search)]
        owners = self._assign(trainer)
        return self._owner_problems(owners, may_come) + self.rate_problems(trainer)

    def rate_problems(self, trainer: Trainer) -> list[str]:
        """What about the learning rates of the pairs can't work, one line each."""
        return []

    def install(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make ready what was found, after all checks and before the first step."""

    def _may_come(self, trainer: Trainer) -> bool:
        """Whether somebody is there whose task it is to unfreeze or activate pairs later."""
        beside = any(type(each) is type(self) and each is not self for each in callbacks_of(trainer))
        return beside or unfreezes_later(trainer)

    def _assign(self, trainer: Trainer) -> Owners:
        """Give each course the pairs whose factors its optimizer holds."""
        owners = owners_of(self.search.pairs, trainer.optimizers)
        self._orphans = owners.orphans
        for course in self.courses:
            course.pairs = owners.pairs[course.index] if owners.pairs else []
        return owners

    def _owner_problems(self, owners: Owners, may_come: bool) -> list[str]:
        problems = []
        if owners.orphans and not may_come:
            names = ", as " + owners.orphans[0].name
            problems.append(
                f"trainable LoRA factors are in no optimizer{names}: give them to it, or freeze them; where they join "
                "it later in the fit, let a BaseFinetuning callback do it"
            )
        several = [i for i, pairs in enumerate(owners.pairs) if pairs]
        if owners.spread:
            problems.append(
                f"the factors of pairs, {owners.spread[0].name} among them, are spread over optimizers "
                f"{sorted(set(owners.places))}: one optimizer must hold A and B of all of them"
            )
        elif len(several) > 1 and not self.takes_several_optimizers:
            problems.append(
                f"the pairs are spread over optimizers {several}: one optimizer must hold A and B of all of them, or "
                "use EFMLoRA, which follows the pairs of each optimizer"
            )
        return problems

    # -- the model may change

    def follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what has changed about the pairs since the last batch: nearly always nothing."""
        if self._watch is None or not self._watch.changed(trainer.optimizers):
            return
        self.search = self._watch.search(trainer.optimizers)
        owners = self._assign(trainer)
        for problem in self._owner_problems(owners, self._may_come(trainer)):
            self._warn_once(f"{problem}. Until then these pairs are not perturbed")
        for problem in self.rate_problems(trainer):
            self._warn_once(f"{problem}. Until then the first group's is followed")
        self.install(trainer, pl_module)

    def follow_scaling(self) -> None:
        """Take over scalings alone, which needs no search: at any moment, inside a sharded forward as well."""
        if self._watch is not None and self._watch.rescaled():
            scalings = self._watch.scalings()
            for course in self.courses:
                if course.perturbation is not None:
                    course.perturbation.rescale(scalings)

    def _warn_once(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            rank_zero_warn(message(self, [problem]))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            self._watch.is_stale = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.follow(trainer, pl_module)
        if self._watch is not None and not any(course.pairs for course in self.courses):
            self._warn_once(
                "no pair has been trained so far, so nothing was perturbed: every B is frozen or in no optimizer. "
                "Those that are unfrozen and given to an optimizer later are perturbed from then on"
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        left = [pair.name for pair in self._orphans]
        if left and self._may_come(trainer) and any(course.pairs for course in self.courses):
            self._warn_once(f"{len(left)} pairs, {left[0]} among them, came into no optimizer and were not perturbed")

    def refuse_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Refuse a step of the pairs' optimizer that no hook announces."""
        course = self.course_of(trainer, optimizer)
        if course is not None and (course.pairs or not self.search.pairs) and self in callbacks_of(trainer):
            raise MisconfigurationException(
                message(
                    self,
                    [
                        f"the {type(optimizer).__name__} that learns the pairs is stepped past Lightning, so that "
                        "on_before_optimizer_step is not called and nothing would be perturbed: in an optimizer_step "
                        "of your own call optimizer.step(closure=optimizer_closure) on the optimizer that it is given, "
                        "and in manual optimization step what self.optimizers() gives, not the .optimizer inside it"
                    ],
                )
            )


def unfreezes_later(trainer: Trainer) -> bool:
    """Whether a callback is there whose task it is to unfreeze parameters in the middle of a fit."""
    return any(is_lightning(each, BaseFinetuning) for each in callbacks_of(trainer))
