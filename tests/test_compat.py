"""Objects and exceptions of Lightning under both of its names."""

import lightning.pytorch.callbacks
import lightning.pytorch.strategies
import pytest
import pytorch_lightning
import pytorch_lightning.utilities.exceptions
from helpers import Classifier
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ParallelStrategy, SingleDeviceStrategy

from lightning_flatlora.compat import is_lightning

BOTH = pytest.mark.parametrize("library", [lightning.pytorch, pytorch_lightning])


class OwnDDP(pytorch_lightning.strategies.DDPStrategy):
    """A user's own."""


@BOTH
def test_objects_of_either_name(library):
    strategy = library.strategies.SingleDeviceStrategy()
    assert is_lightning(strategy, SingleDeviceStrategy)
    assert is_lightning(strategy, DDPStrategy, SingleDeviceStrategy)
    assert not is_lightning(strategy, DDPStrategy, ParallelStrategy)
    assert is_lightning(library.strategies.DDPStrategy(), ParallelStrategy)
    assert is_lightning(library.callbacks.ModelCheckpoint(), Checkpoint)
    assert is_lightning(library.callbacks.GradientAccumulationScheduler({0: 2}), GradientAccumulationScheduler)


def test_subclasses_and_strangers():
    assert is_lightning(OwnDDP(), DDPStrategy)
    assert not is_lightning(OwnDDP(), DeepSpeedStrategy)
    for stranger in (None, "a string", DDPStrategy, Classifier()):
        assert not is_lightning(stranger, DDPStrategy, LightningOptimizer)
