"""FMLoRAModule and all callbacks, as subclasses of ``pytorch_lightning``'s classes, for projects that import it.

Each of Lightning's two names has its own classes, and a Trainer accepts only a LightningModule of its own library.
Everything else is as in the package itself, including checkpoints: a run can be resumed under the other name. Errors
are of ``lightning.pytorch``'s class ``MisconfigurationException``.

Example:
    >>> import pytorch_lightning as pl
    >>> from lightning_flatlora.pytorch_lightning import EFMLoRA
    >>> trainer = pl.Trainer(callbacks=[EFMLoRA(rho=0.05)], accelerator="cpu", logger=False)
"""

from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_flatlora import baselines, callbacks
from lightning_flatlora.callbacks.adapter_checkpoint.callback import SavesAdapters
from lightning_flatlora.module import FMLoRASteps


class FMLoRAModule(FMLoRASteps, LightningModule):
    """:class:`lightning_flatlora.FMLoRAModule` over ``pytorch_lightning.LightningModule``."""


class AdapterCheckpoint(SavesAdapters, ModelCheckpoint):
    """:class:`lightning_flatlora.AdapterCheckpoint` over ``pytorch_lightning``'s ModelCheckpoint."""


class AdapterAveraging(callbacks.AdapterAveraging, Callback):
    """:class:`lightning_flatlora.AdapterAveraging`."""


class EFMLoRA(callbacks.EFMLoRA, Callback):
    """:class:`lightning_flatlora.EFMLoRA`."""


class FMLoRA(callbacks.FMLoRA, Callback):
    """:class:`lightning_flatlora.FMLoRA`."""


class FlatnessMonitor(callbacks.FlatnessMonitor, Callback):
    """:class:`lightning_flatlora.FlatnessMonitor`."""


class Requeue(callbacks.Requeue, Callback):
    """:class:`lightning_flatlora.Requeue`."""


class LoRASAM(baselines.LoRASAM, Callback):
    """:class:`lightning_flatlora.baselines.LoRASAM`."""


class SAM(baselines.SAM, Callback):
    """:class:`lightning_flatlora.baselines.SAM`."""


class RandomPerturbation(baselines.RandomPerturbation, Callback):
    """:class:`lightning_flatlora.baselines.RandomPerturbation`."""


class BalancednessRegularization(baselines.BalancednessRegularization, Callback):
    """:class:`lightning_flatlora.baselines.BalancednessRegularization`."""


class BiLoRA(baselines.BiLoRA, Callback):
    """:class:`lightning_flatlora.baselines.BiLoRA`."""
