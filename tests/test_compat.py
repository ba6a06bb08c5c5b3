"""Objects and exceptions of Lightning under both of its names."""

import pickle
import sys

import lightning.pytorch.callbacks
import lightning.pytorch.strategies
import pytest
import pytorch_lightning
import pytorch_lightning.utilities.exceptions
from helpers import Classifier
from lightning.pytorch.callbacks import Checkpoint, GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import exceptions

from lightning_flatlora import EFMLoRA
from lightning_flatlora.compat import MisconfigurationException, is_defined_by_lightning, is_lightning

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
    assert is_defined_by_lightning(strategy)


def test_subclasses_and_strangers():
    assert is_lightning(OwnDDP(), DDPStrategy)
    assert not is_lightning(OwnDDP(), DeepSpeedStrategy)
    assert not is_defined_by_lightning(OwnDDP())
    for stranger in (None, "a string", DDPStrategy, Classifier()):
        assert not is_lightning(stranger, DDPStrategy, LightningOptimizer)


@pytest.mark.parametrize(
    "exception",
    [exceptions.MisconfigurationException, pytorch_lightning.utilities.exceptions.MisconfigurationException],
)
def test_an_error_that_users_of_either_name_catch(exception):
    with pytest.raises(exception, match="rho must be a finite number"):
        EFMLoRA(rho=-1)


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(MisconfigurationException("rho")))
    assert isinstance(error, pytorch_lightning.utilities.exceptions.MisconfigurationException)
    assert str(error) == "rho"


def test_the_error_where_nobody_has_imported_the_other_library(monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_fabric.utilities.exceptions")
    error = MisconfigurationException("rho")
    assert type(error) is MisconfigurationException
    assert str(error) == "rho"
