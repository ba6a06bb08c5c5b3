"""Run functions on several processes, as torchrun does, and bring back what each rank returns."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def launch(
    folder: Path, runs: dict[str, tuple[str, dict[str, Any]]], ranks: int = 2, timeout: float = 280
) -> "Results":
    """Run several functions one after another in the same processes: starting these takes longer than most runs.

    Args:
        folder: for the results.
        runs: by name, the function as "module:name" in this folder and its keyword arguments (what JSON can hold).
        ranks: number of processes.
        timeout: seconds after which all are killed: something hangs.
    """
    (folder / "runs.json").write_text(json.dumps(runs))
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*torchrun(ranks), str(HERE / "worker.py"), str(folder)], cwd=HERE, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass  # the runs that are missing tell
        finally:
            process.terminate()  # torchrun ends its workers, each in a session of its own
            process.wait()
    return Results(folder, ranks)


def torchrun(ranks: int) -> list[str]:
    """The command that starts a script on several processes of this machine."""
    run = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return [*run, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]


class Results:
    """What each rank returned, by the run's name; asking for a run that failed tells why."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks

    def __getitem__(self, name: str) -> list[dict[str, Any]]:
        files = [self._folder / f"{name}.rank{rank}.pt" for rank in range(self._ranks)]
        output = (self._folder / "output.txt").read_text()[-6000:]
        assert all(file.exists() for file in files), f"{name} did not come to its end:\n{output}"
        results = [torch.load(file, weights_only=True) for file in files]
        failed = [result["error"] for result in results if "error" in result]
        assert not failed, f"{name} failed:\n{failed[0]}"
        return results

    def error(self, name: str) -> list[str]:
        """The traceback of each rank in a run that has to fail."""
        files = [self._folder / f"{name}.rank{rank}.pt" for rank in range(self._ranks)]
        return [str(torch.load(file, weights_only=True).get("error", "")) for file in files]
