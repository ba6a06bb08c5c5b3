"""The callback behind FMLoRAModule."""

from lightning_flatlora.callbacks.module_driver.driver import FMLoRAModuleDriver

__all__ = ["FMLoRAModuleDriver"]
