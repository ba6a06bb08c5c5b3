"""EFMLoRA and FMLoRA for any training loop: plain PyTorch, Fabric, accelerate, transformers' Trainer and others.

EFMLoRA takes one line, after the optimizer is made and before its state is loaded::

    flat = EFMLoRA(model, optimizer, rho=0.05)

From then on the LoRA layers read B + Ê inside their forward, in training mode while autograd records. Each optimizer
step moves Ê by its gradients, and the optimizer's state dict carries Ê. FMLoRA also needs a loop around the pass, see
:meth:`FMLoRA.training_passes`. Both share the engine of the callbacks of these names, and give the same weights.
"""

from lightning_flatlora.loops.fmlora import EFMLoRA as EFMLoRA
from lightning_flatlora.loops.fmlora import FMLoRA as FMLoRA
