"""A SLURM of two nodes on this machine: its daemons run in the foreground, and write everything into one folder."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

DAEMONS = ("munged", "slurmctld", "slurmd", "srun")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# The first node has this machine's own name, which is a valid address, since Lightning's ranks meet there.
HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, f"{HOST}-second")
SETTINGS = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
KillWait=5
FirstJobId={job}
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName={host}-second NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=all Nodes=ALL Default=YES MaxTime=10 State=UP
"""


def missing() -> str:
    """The reason why no cluster can be started here, or an empty string."""
    lacking = [name for name in DAEMONS if not shutil.which(name, path=PATH)]
    if lacking:
        return f"needs {', '.join(lacking)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "needs root, which SLURM's daemons run as"


class Cluster:
    """Two nodes of one CPU each, started by the constructor; :meth:`stop` ends all that runs there.

    Args:
        folder: for configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        variables = {"PATH": PATH, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **variables, "SLURM_CONF": str(self.conf)}
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        controller, first, second = free_ports(3)
        places: dict[str, Any] = {"folder": self.folder, "controller": controller, "first": first, "second": second}
        # Lightning's ranks meet at port 15000 plus the last four digits of the job's number.
        self.conf.write_text(SETTINGS.format(host=HOST, job=controller % 9000 + 1, **places))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")  # containers can't change their cgroups
        for name in ("controller", *NODES):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        places = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid"}
        places |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in places.items()))
        self._wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        self._wait_for(lambda: self.ask("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"], "the nodes")

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.txt").open("ab") as output:
            how: dict[str, Any] = {"stdout": output, "stderr": output, "start_new_session": True}
            self._daemons.append(subprocess.Popen(command, env=self.environment, **how))

    def _wait_for(self, condition: Any, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise TimeoutError(f"waited for {what}, ended: {dead}\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        files = [self.folder / "daemons.txt", *self.folder.glob("*.log")]
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in files if file.exists())

    def ask(self, *command: str, timeout: float = 30) -> str:
        """Run one of SLURM's commands, and return its output."""
        how: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
        return subprocess.run(command, env=self.environment, timeout=timeout, **how).stdout

    def work(self, script: str, *arguments: object, output: Path, timeout: float) -> str:
        """Run a Python program on both nodes by srun in a job, and again whenever the job is requeued.

        Returns:
            How the job ended, such as "COMPLETED", and how often it was restarted.
        """
        work = " ".join([sys.executable, script, *map(str, arguments)])
        job_file = self.folder / "job.sh"
        job_file.write_text(f"#!/bin/sh\nexec srun {work}\n")
        options = ("--nodes=2", "--ntasks-per-node=1", "--time=9", "--requeue", "--open-mode=append")
        job = self.ask("sbatch", "--parsable", *options, f"--output={output}", str(job_file)).strip()
        deadline = time.monotonic() + timeout
        hurried = 0.0
        state = self._state(job)
        while state.startswith(("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")) and time.monotonic() < deadline:
            requeued = state.startswith("PENDING") and state != "PENDING 0"
            if requeued and time.monotonic() > hurried + 5:
                # SLURM itself would wait for two minutes. Its clock knows whole seconds, and a node refuses a job
                # that comes back within the second in which the node has ended it.
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+2")
                hurried = time.monotonic()
            time.sleep(0.2)
            state = self._state(job)
        return state

    def _state(self, job: str) -> str:
        fields = [field.partition("=") for field in self.ask("scontrol", "show", "job", job).split()]
        return " ".join(value for name, _, value in fields if name in ("JobState", "Restarts"))

    def stop(self) -> None:
        """End jobs, daemons and all that they have started, in whatever state they are."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        # A job and its helpers, which hide their environment but log here, outlive the daemons.
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._has_started(process):
                    os.kill(int(process.name), signal.SIGKILL)
        for daemon in self._daemons:
            daemon.wait(10)

    def _has_started(self, process: Path) -> bool:
        if f"SLURM_CONF={self.conf}".encode() in (process / "environ").read_bytes().split(b"\0"):
            return True
        files = [os.readlink(file) for file in (process / "fd").iterdir()]
        return "slurmstepd" in (process / "comm").read_text() and any(str(self.folder) in file for file in files)


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
