"""What each process of a launch does: all runs in turn, each result into a file."""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name, (function, arguments) in json.loads((folder / "runs.json").read_text()).items():
        if (folder / f"{name}.rank{rank}.pt").exists():
            continue  # done before the job was requeued
        module, attribute = function.split(":")
        try:
            result: Any = getattr(importlib.import_module(module), attribute)(**arguments)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{name}.rank{rank}.pt")
        if "error" in result and not _all_ended(folder, name):
            os._exit(1)  # this rank failed alone, and the others wait for it
        if dist.is_initialized():
            dist.barrier()


def _all_ended(folder: Path, name: str) -> bool:
    """Whether every rank's result is there, soon after this one's."""
    deadline = time.monotonic() + 30
    files = [folder / f"{name}.rank{rank}.pt" for rank in range(int(os.environ["WORLD_SIZE"]))]
    while time.monotonic() < deadline and not all(file.exists() for file in files):
        time.sleep(0.1)
    return all(file.exists() for file in files)


SLURMS = {"SLURM_PROCID": "RANK", "SLURM_NTASKS": "WORLD_SIZE", "SLURM_NTASKS_PER_NODE": "LOCAL_WORLD_SIZE"}
"""Its names of what the runs read by torchrun's."""

if __name__ == "__main__":
    os.environ.update({name: os.environ[its] for its, name in SLURMS.items() if its in os.environ})
    main(Path(sys.argv[1]))
