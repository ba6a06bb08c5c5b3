"""Recipes: one folder a task, run from a clone."""

import logging

# bitsandbytes says it when peft is imported, of 4-bit weights on a CPU, in commands that quantize nothing, too.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)
