"""One command starts a run and resumes it after signals at any moment; the result is the uninterrupted run's."""

import multiprocessing
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
from helpers import same
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import packaged_arguments, quick, trained
from torch.utils.data.distributed import DistributedSampler

from lightning_flatlora import Requeue
from recipes.data.resumable import ResumableData

pytestmark = [
    pytest.mark.usefixtures("command_line", "own_datasets"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

SEND = f"--trainer.callbacks+={__name__}.Send"
FILES = "runs/instruction_tuning/efmlora/version_{}/checkpoints/*.ckpt"


class Send(L.Callback):
    """Sends a signal to this process at a given call of a hook, in the first start only."""

    moment: tuple[str, int, int] = ("", 0, 0)
    calls: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.calls.clear()
        for hook in ("on_after_backward", "on_train_batch_end", "on_validation_batch_start"):
            setattr(self, hook, lambda *args, hook=hook: self._count(hook))

    def _count(self, hook: str) -> None:
        self.calls.append(hook)
        name, call, number = Send.moment
        if hook == name and self.calls.count(hook) == call:
            os.kill(os.getpid(), number)


def fit(*options: str) -> Any:
    command = [SEND, "--ckpt_path=last-if-any", "--trainer.num_sanity_val_steps=0", *options]
    return quick("fit", packaged_arguments("instruction_tuning", "efmlora"), "--method=efmlora", *command)


MOMENTS = {
    "within an epoch": ("on_after_backward", 3, signal.SIGUSR1),
    "Ctrl-C": ("on_train_batch_end", 8, signal.SIGINT),
    "last batch": ("on_train_batch_end", 6, signal.SIGTERM),
    "validation": ("on_validation_batch_start", 2, signal.SIGTERM),
}


@pytest.fixture
def options(tiny: str, sums: str) -> list[str]:
    """Two epochs, each with several batches of validation, and dropout."""
    options = [f"--model.model={tiny}", f"--data.dataset={sums}", "--data.batch_size=8", "--data.test_share=0"]
    options.append("--data.validation_share=0.3")
    return [*options, "--trainer.max_epochs=2", "--model.lora.lora_dropout=0.2"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_command_goes_on(
    moment: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Bit for bit, with each batch and validation, and with the best checkpoint, in the first start's folder."""
    monkeypatch.setattr(Send, "moment", ("", 0, 0))
    whole = fit(*options)
    assert "--ckpt_path last-if-any: none yet, so the run begins" in caplog.messages
    steps = whole.trainer.global_step
    assert (steps % 2, Send.calls.count("on_train_batch_end")) == (0, steps)
    before = signal.getsignal(signal.SIGINT)
    folder = tmp_path / "ended"
    folder.mkdir()
    monkeypatch.chdir(folder)
    name, call, number = MOMENTS[moment]
    monkeypatch.setattr(Send, "moment", (name, steps // 2 if moment == "last batch" else call, number))
    with pytest.raises(SystemExit) as end:
        fit(*options)
    assert end.value.code == 128 + number
    assert caplog.messages[-1].startswith("Requeue: saved step")
    assert caplog.messages[-1].endswith("/checkpoints/last.ckpt")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(Send, "moment", ("", 0, 0))
    resumed = fit(*options)
    assert any("last-if-any: runs/" in message for message in caplog.messages)
    assert resumed.trainer.global_step == steps
    assert same(trained(resumed), trained(whole))
    assert same(resumed.trainer.callback_metrics["val_loss"], whole.trainer.callback_metrics["val_loss"])
    files = {path.name for path in folder.glob(FILES.format(0))}
    assert files == {path.name for path in tmp_path.glob(FILES.format(0))}
    assert not list(folder.glob(FILES.format(1)))
    fit(*options)  # nothing is left to do
    assert "on_train_batch_end" not in Send.calls


def test_it_does_not_go_on_with_another_run(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's name is not enough."""
    monkeypatch.setattr(Send, "moment", ("", 0, 0))
    options.append("--trainer.max_steps=2")
    fit(*options)
    for other in ("--model.learning_rate=0.5", "--seed_everything=7", "--rho=0.5"):
        with pytest.raises(MisconfigurationException, match=r"last.ckpt is of a run with other settings: .* there,"):
            fit(*options, other)
    fit(*options, "--seed_everything=7", "--run_name=other")
    quick("fit", packaged_arguments("instruction_tuning", "efmlora"), *options)
    with pytest.raises(MisconfigurationException, match=r"last-if-any: several runs have saved: .*version_0"):
        fit(*options)


def test_workers_outlive_a_signal_to_all_processes_of_a_job() -> None:
    """Otherwise their death would end the run within a step. torchrun and scancel signal the workers, too."""
    data = ResumableData()
    data.num_workers, data.seed = 1, 0
    rows = list(range(8))
    sampler: Any = DistributedSampler(rows, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
    batches = iter(data.whole_batches(rows, sampler))
    first = next(batches)
    for worker in multiprocessing.active_children():
        # Not sent by this process, because PyTorch's workers end when their parent signals them.
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert [first, *batches] == rows


def test_a_run_that_saves_no_last_checkpoint_holds_no_signal(options: list[str]) -> None:
    cli = quick(
        "fit", packaged_arguments("instruction_tuning"), *options, "--trainer.max_steps=1", "--trainer.callbacks=[]"
    )
    assert not [each for each in cli.trainer.callbacks if isinstance(each, Requeue)]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_no_command_takes_lightnings_checkpoint_of_another_job(
    command: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the working directory, where Lightning looks for it under SLURM."""
    monkeypatch.setattr("lightning.fabric.plugins.environments.SLURMEnvironment.detect", lambda: True)
    of_task = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NNODES": "1"}
    for name, value in {"JOB_ID": "77", "NODELIST": "localhost", **of_task}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    Path("hpc_ckpt_1.ckpt").write_text("another job's")
    cli = quick(command, packaged_arguments("instruction_tuning"), *options, "--trainer.max_steps=1")
    assert Path(cli.trainer.default_root_dir).resolve() == Path(str(cli.trainer.log_dir)).resolve()
