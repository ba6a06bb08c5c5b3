"""Run functions on several processes, in the environment that torchrun sets up, and collect what each returns."""

import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import CAN_FORK, end, start
from torch.distributed import TCPStore
from torch.distributed.run import main as torchrun

Runs = dict[str, "partial[dict[str, Any]]"]
"""By name, a function that the processes can import, with its arguments."""


def launch(folder: Path, runs: Runs, ranks: int = 2, timeout: float = 500) -> "Results":
    """Run several functions one after another in the same processes: starting these takes longer than most runs.

    Args:
        folder: for the results.
        runs: the functions, by name.
        ranks: number of processes.
        timeout: seconds after which all are killed, because something hangs.
    """
    plan(folder, runs)
    run_on(ranks, work, folder, output=folder / "output.txt", timeout=timeout)
    return Results(folder, ranks)  # a missing result means that its run hung


def launch_on_nodes(folder: Path, runs: Runs, timeout: float = 300) -> "Results":
    """Do as :func:`launch` does, on two nodes of one rank each, whose torchruns meet on this machine."""
    plan(folder, runs)
    run_by_torchrun(__file__, folder, nodes=2, output=folder / "output.txt", timeout=timeout)
    return Results(folder, 2)


def plan(folder: Path, runs: Runs) -> None:
    """Write the runs that :func:`work` is to do into a folder."""
    (folder / "runs.pickle").write_bytes(pickle.dumps(runs))


def work(folder: Path) -> None:
    """Do all runs in turn, as each process of a launch does, and write each result into a file."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name, function in pickle.loads((folder / "runs.pickle").read_bytes()).items():
        if (folder / f"{name}.rank{rank}.pt").exists():
            continue  # done before the job was requeued
        try:
            result: Any = function()
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{name}.rank{rank}.pt")
        if "error" in result and not _all_ended(folder, name):
            os._exit(1)  # only this rank failed, and the others are waiting for it
        if dist.is_initialized():
            dist.barrier()


def _all_ended(folder: Path, name: str) -> bool:
    """Whether every rank's result is there, at the latest 30 seconds from now."""
    deadline = time.monotonic() + 30
    files = [folder / f"{name}.rank{rank}.pt" for rank in range(int(os.environ["WORLD_SIZE"]))]
    while time.monotonic() < deadline and not all(file.exists() for file in files):
        time.sleep(0.1)
    return all(file.exists() for file in files)


def run_by_torchrun(
    script: str,
    *arguments: object,
    nodes: int = 1,
    ranks: int = 1,
    restarts: int = 0,
    output: Path,
    timeout: float = 300,
) -> list[int | None]:
    """Start torchrun on every node, as ``torchrun --nnodes NODES --nproc_per_node RANKS ... script arguments`` does.

    Returns:
        The exit code of each torchrun that ended by itself.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    options: dict[str, Any] = {
        "nnodes": nodes,
        "nproc-per-node": ranks,
        "rdzv-backend": "c10d",
        "rdzv-endpoint": f"localhost:{port}",
        "rdzv-id": "tests",
        "max-restarts": restarts,
        "monitor-interval": 0.1,
        "shutdown-timeout": 3,
        "start-method": "fork" if CAN_FORK else "spawn",
    }
    # Ranks are forked from torchrun, which has imported the libraries, and then run the script.
    command = ["--run-path", *(f"--{name}={value}" for name, value in options.items()), script, *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1"}
    if restarts:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    agents = [start(torchrun, command, output=output, environment=environment) for _ in range(nodes)]
    return _ended(agents, timeout)


def run_on(
    ranks: int, function: Callable[..., Any], *arguments: Any, output: Path, timeout: float = 500
) -> list[int | None]:
    """Call a function on several processes at once, and kill them all if one fails, as torchrun does.

    Returns:
        The exit code of each that ended by itself.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(ranks):
        variables = _of_torchrun(rank, ranks, store.port)
        processes.append(start(function, *arguments, output=output, environment=variables))
    return _ended(processes, timeout)


def _ended(processes: list[BaseProcess], timeout: float) -> list[int | None]:
    """Wait until all have ended, one has failed or the time is over; then end those that still run."""
    deadline = time.monotonic() + timeout
    codes: list[int | None] = [None]
    while None in codes and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.05)
        codes = [process.exitcode for process in processes]
    for process in processes:
        end(process)
    return codes


def _of_torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets; the store is this process's, as torchrun would keep its own."""
    variables: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    return {name: str(value) for name, value in variables.items()}


class Results:
    """What each rank returned, by the run's name; looking up a run that failed raises its error."""

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
        """The traceback of each rank in a run that should fail."""
        files = [self._folder / f"{name}.rank{rank}.pt" for rank in range(self._ranks)]
        return [str(torch.load(file, weights_only=True).get("error", "")) for file in files]


SLURMS = {"SLURM_PROCID": "RANK", "SLURM_NTASKS": "WORLD_SIZE", "SLURM_NTASKS_PER_NODE": "LOCAL_WORLD_SIZE"}
"""Its names of what the runs read by torchrun's."""

if __name__ == "__main__":
    os.environ.update({name: os.environ[its] for its, name in SLURMS.items() if its in os.environ})
    work(Path(sys.argv[1]))
