"""Lightning callbacks: the methods, adapter checkpoints and averages, requeued jobs, and the flatness monitor."""

from lightning_flatlora.callbacks.adapter_checkpoint.callback import AdapterCheckpoint as AdapterCheckpoint
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import load_adapter_checkpoint as load_adapter_checkpoint
from lightning_flatlora.callbacks.averaging import AdapterAveraging as AdapterAveraging
from lightning_flatlora.callbacks.flatness_monitor import FlatnessMonitor as FlatnessMonitor
from lightning_flatlora.callbacks.fmlora import EFMLoRA as EFMLoRA
from lightning_flatlora.callbacks.fmlora import FMLoRA as FMLoRA
from lightning_flatlora.callbacks.requeue import Requeue as Requeue
