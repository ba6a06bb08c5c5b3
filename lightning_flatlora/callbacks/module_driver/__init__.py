"""The callback behind FMLoRAModule."""
