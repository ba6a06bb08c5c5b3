"""The recipes' command line: Lightning's options, with which a configuration must not interfere."""

import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, get_peft_model
from recipe_runs import packaged_arguments
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_flatlora import EFMLoRA
from recipes.command_line.cli import RecipeCLI
from recipes.training.module import RecipeModule

RECIPES = ("classification", "clip_contrastive", "clip_fewshot", "instruction_tuning", "nlg", "vqa")

pytestmark = [
    pytest.mark.usefixtures("command_line"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]


class Tiny(RecipeModule):
    """Learns a sum of three numbers with LoRA; its parameters are created late, as in the recipes."""

    def __init__(self, learning_rate: float = 0.1, **kwargs: Any) -> None:
        super().__init__(learning_rate, **kwargs)
        self.rates: list[float] = []

    @override
    def load_net(self) -> Any:
        return get_peft_model(nn.Sequential(nn.Linear(3, 1)), LoraConfig(r=1, target_modules=["0"]))

    @override
    def recipe_schedule(self, optimizer: Any) -> LRScheduler:
        steps = self.optimizer_steps()
        return LambdaLR(optimizer, lambda step: 1 - step / steps)

    @override
    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    @override
    def loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch).squeeze(1) - batch.sum(1)).square().mean()

    @override
    def evaluate(self, stage: str, batch: Tensor) -> None:
        self.log(f"{stage}_loss", self.loss(batch))

    @override
    def log_evaluation(self, stage: str) -> None:
        """Everything is already logged."""


class Numbers(L.LightningDataModule):
    """Eight rows in four batches."""

    @override
    def train_dataloader(self) -> Any:
        return DataLoader(torch.arange(24.0).view(8, 3) / 24, batch_size=2)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration with the recipes' usual parts; this file's classes are accepted like the recipes' own."""
    monkeypatch.setattr("recipes.command_line.taken._CLASSES", re.compile(rf"({__name__}|lightning_flatlora)\.\w+"))
    saver = {"class_path": "lightning_flatlora.AdapterCheckpoint", "init_args": {"save_last": True}}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "tiny"}}
    trainer = {
        "accelerator": "cpu",
        "precision": "32-true",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "callbacks": [saver],
        "logger": [logger],
    }
    path = tmp_path / "tiny.yaml"  # JSON is YAML
    path.write_text(json.dumps({"trainer": trainer, "data": f"{__name__}.Numbers"}))
    return str(path)


def run(command: str, config: str, *options: str) -> RecipeCLI:
    arguments = [command, f"--config={config}", f"--model={__name__}.Tiny", "--trainer.enable_progress_bar=false"]
    return RecipeCLI([*arguments, *options])


# -- every recipe's parser


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_configuration_takes_lightnings_usual_options(recipe: str) -> None:
    options = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.logger=false"]
    options += [f"--trainer.enable_{part}=false" for part in ("progress_bar", "checkpointing", "model_summary")]
    options += ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss", "--trainer.max_steps=3"]
    options += ["--seed_everything=5", "--optimizer=torch.optim.SGD", "--optimizer.lr=0.5"]
    options += ["--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"]
    cli = RecipeCLI([*packaged_arguments(recipe), *options], run=False)
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    assert not [callback for callback in callbacks if isinstance(callback, Checkpoint | ProgressBar)]
    assert any(isinstance(callback, EarlyStopping) for callback in callbacks)
    cli.model.weight = nn.Parameter(torch.zeros(2, 2))
    configured = cli.model.configure_optimizers()
    (optimizer,), (scheduler,) = configured
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["params"] == [cli.model.weight]
    assert scheduler.gamma == 0.5


def test_a_run_whose_output_is_a_file_shows_its_progress_in_lines(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    RecipeCLI(["fit", f"--config={config}", f"--model={__name__}.Tiny"])
    out = capsys.readouterr().out
    assert "fit, Epoch 0: 4 of 4" in out
    assert "fit, Validation DataLoader 0: 4 of 4" in out


# -- the optimizer and the schedule


def test_the_chosen_optimizer_keeps_the_recipes_schedule(config: str) -> None:
    cli = run("fit", config, "--optimizer=SGD", "--optimizer.lr=0.2")
    assert type(cli.trainer.optimizers[0]) is torch.optim.SGD
    assert sorted(set(cli.model.rates), reverse=True) == pytest.approx([0.2, 0.15, 0.1, 0.05])
    moved = [p for name, p in cli.model.named_parameters() if "lora_B" in name]
    assert all(p.abs().sum() > 0 for p in moved)


def test_the_chosen_schedule_is_stepped_once_an_epoch(config: str) -> None:
    chosen = ["--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5", "--trainer.max_epochs=2"]
    cli = run("fit", config, *chosen)
    assert type(cli.trainer.optimizers[0]) is torch.optim.AdamW
    rates = cli.model.rates
    assert rates == pytest.approx([0.1] * (len(rates) // 2) + [0.05] * (len(rates) // 2))


def test_a_plateau_schedule_watches_its_metric(config: str) -> None:
    chosen = ["--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val_loss", "--lr_scheduler.patience=0"]
    chosen += ["--lr_scheduler.threshold=1e9", "--lr_scheduler.factor=0.5", "--trainer.max_epochs=3"]
    cli = run("fit", config, *chosen)
    assert cli.model.rates == pytest.approx([0.1] * 4 + [0.05] * 4 + [0.025] * 4)


def test_resuming_under_another_schedule_is_refused(config: str) -> None:
    run("fit", config)
    longer, other = ["--ckpt_path=last", "--trainer.max_epochs=2"], ["--lr_scheduler=ExponentialLR"]
    other.append("--lr_scheduler.gamma=0.5")
    with pytest.raises(MisconfigurationException, match=r"--lr_scheduler: None there, .*Exp.* here"):
        run("fit", config, *other, *longer)
    assert run("fit", config, *longer).trainer.current_epoch == 2
    run("test", config, *other, "--ckpt_path=last")  # it needs no schedule


# -- checkpoints by name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt_path=last"], "no last checkpoint, searched for in runs/tiny. Leave"),
        (["--ckpt_path=last", "--trainer.logger=false"], "searched for in no folder, as no logger names one"),
        (["--ckpt_path=last-if-any"], "no last checkpoint, searched for in runs/tiny. Leave"),
        (["--ckpt_path=saved/last.ckpt", "--trainer.enable_checkpointing=false"], "but found `ModelCheckpoint`"),
        (["--ckpt_path=best"], "best: there is no such file: give one"),
        (["--ckpt_path=saved/last"], "saved/last: there is no such file: give one"),
    ],
)
def test_checkpoints_that_are_not_there_are_refused(options: list[str], message: str, config: str) -> None:
    Path("saved/last").mkdir(parents=True)
    Path("saved/last.ckpt").touch()
    with pytest.raises(MisconfigurationException, match=message):
        run("test", config, *options)


def test_last_is_the_newest_of_the_runs_in_one_folder(config: str, tmp_path: Path) -> None:
    first = run("fit", config)
    assert first.trainer.global_step == 4
    second = run("fit", config, "--ckpt_path=last", "--trainer.max_epochs=3")
    assert len(second.model.rates) == 8  # steps 5 to 12
    assert len(list(tmp_path.glob("runs/tiny/*/checkpoints/last.ckpt"))) == 2
    third = run("fit", config, "--ckpt_path=last", "--trainer.max_epochs=3")  # of the second run, which is at its end
    assert third.model.rates == []
    tested = run("test", config, "--ckpt_path=last")
    trained = second.trainer.lightning_module.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in tested.model.state_dict().items() if "lora" in name)


class Stops(L.Callback):
    """Stops as max_time does, after the third of the first epoch's four steps."""

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended:UserWarning")
def test_a_run_that_is_told_to_stop_resumes_within_its_epoch(config: str) -> None:
    stopped = run("fit", config, f"--trainer.callbacks+={__name__}.Stops", "--trainer.max_epochs=2")
    assert (stopped.trainer.global_step, "val_loss" in stopped.trainer.callback_metrics) == (3, True)
    resumed = run("fit", config, "--ckpt_path=last", "--trainer.max_epochs=2")
    assert (len(resumed.model.rates), resumed.trainer.global_step) == (1 + 4, 8)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_fit_that_goes_on_with_other_settings_is_named(config: str) -> None:
    efmlora, quiet = "--trainer.callbacks+=lightning_flatlora.EFMLoRA", "--trainer.enable_model_summary=false"
    first = [efmlora, "--trainer.callbacks.rho=0.1", "--trainer.accumulate_grad_batches=2"]
    first.append("--trainer.precision=32-true")
    run("fit", config, *first)
    run("fit", config, *first, "--ckpt_path=runs/tiny/version_0/checkpoints/last.ckpt", "--trainer.max_epochs=2")
    other = [efmlora, "--trainer.callbacks.rho=0.2", "--trainer.precision=bf16-mixed", quiet]
    other.append("--model.learning_rate=0.2")
    message = "learning_rate 0.1 there, 0.2 here; trainer.precision '32-true' there, 'bf16-mixed' here; trainer.EFMLoRA"
    with pytest.warns(UserWarning, match=message):
        run("fit", config, *other, "--ckpt_path=last", "--trainer.max_epochs=3")
    run("test", config, "--ckpt_path=last", "--trainer.precision=32-true")


@pytest.mark.filterwarnings("ignore:.*other settings. trainer.EFMLoRA.rho 0.1 there, 0.3 here:UserWarning")
def test_every_command_has_the_settings_of_the_checkpoints_run(config: str) -> None:
    efmlora = ["--trainer.callbacks+=lightning_flatlora.EFMLoRA", "--trainer.callbacks.rho=0.1"]
    first = run("fit", config, *efmlora, "--model.learning_rate=0.2", "--trainer.accumulate_grad_batches=2")
    file = "--ckpt_path=runs/tiny/version_0/checkpoints/last.ckpt"
    quiet = "--trainer.enable_progress_bar=false"
    tested = RecipeCLI(["test", file, quiet])
    assert type(tested.model) is Tiny
    assert all(torch.equal(a, b) for a, b in zip(tested.model.parameters(), first.model.parameters(), strict=True))
    for given, rho in (([], 0.1), (["--rho=0.3"], 0.3)):
        resumed = RecipeCLI(["fit", file, quiet, "--trainer.max_epochs=2", *given])
        (method,) = (callback for callback in resumed.trainer.callbacks if isinstance(callback, EFMLoRA))
        assert method.rho == rho
        assert (resumed.model.learning_rate, resumed.trainer.accumulate_grad_batches) == (0.2, 2)
        assert resumed.trainer.global_step == 4


# -- others


def test_a_fit_tells_where_it_is_and_what_comes_next(config: str, caplog: pytest.LogCaptureFixture) -> None:
    fitted = run("fit", config, "--trainer.callbacks.monitor=val_loss")
    (told,) = [message for message in caplog.messages if message.startswith("The run is in runs/tiny/version_0")]
    _, best, after = told.splitlines()
    file = after.rpartition("test --ckpt_path ")[2]
    assert best == f"Its best checkpoint: {file}, val_loss {fitted.trainer.callback_metrics['val_loss']:.4g}"
    tested = run("test", config, f"--ckpt_path={file}")
    assert tested.trainer.callback_metrics["test_loss"] > 0


@pytest.mark.filterwarnings("default:Only .* optimizer steps:UserWarning")
def test_a_fit_begins_with_its_steps_and_warns_of_few(config: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="^Only 4 optimizer steps"):
        run("fit", config)
    run("fit", config, "--trainer.max_epochs=5", "--ckpt_path=last")
    assert [each for each in caplog.messages if "optimizer" in each] == [
        "4 optimizer steps",
        "20 optimizer steps, 4 of them done",
    ]
    run("fit", config, "--trainer.fast_dev_run=true", "--trainer.enable_checkpointing=false")


def test_an_evaluation_is_written_into_the_folder_of_its_run(config: str, tmp_path: Path) -> None:
    run("fit", config)
    folder = tmp_path / "runs/tiny/version_0"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    file = tmp_path / "free.yaml"
    settings = json.loads(Path(config).read_text())
    settings["trainer"]["logger"][0]["init_args"]["name"] = None
    file.write_text(json.dumps({**settings, "run_name": "tiny"}))
    for epochs in (1, 2):
        run("test", str(file), "--ckpt_path=last", f"--trainer.max_epochs={epochs}")
    assert {path.name for path in folder.iterdir()} == {*(path.relative_to(folder).parts[0] for path in before)} | {
        "test",
        "test-1",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert all(path.read_bytes() == content for path, content in before.items())
    for name, epochs in (("test", 2), ("test-1", 1)):
        assert "test_loss" in (folder / name / "metrics.csv").read_text()
        assert f"max_epochs: {epochs}" in (folder / name / "config.yaml").read_text()


def test_the_adapters_folder_has_a_card_of_its_run(config: str) -> None:
    run("fit", config, "--trainer.callbacks+=lightning_flatlora.EFMLoRA", "--trainer.callbacks.rho=0.125")
    card = Path("runs/tiny/version_0/checkpoints/last/README.md").read_text()
    for line in ("library_name: peft", "# Tiny, fine-tuned with EFMLoRA", "rho: 0.125", "learning_rate: 0.1"):
        assert line in card
    assert "More Information Needed" not in card


def test_fast_dev_run_leaves_no_file(config: str, tmp_path: Path) -> None:
    run("fit", config, "--trainer.fast_dev_run=true")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml"}


def test_the_runs_configuration_repeats_it(config: str, tmp_path: Path) -> None:
    first = run("fit", config, "--optimizer=SGD", "--optimizer.lr=0.2", "--seed_everything=3")
    again = RecipeCLI(["fit", f"--config={tmp_path / 'runs/tiny/version_0/config.yaml'}"])
    ours, theirs = (cli.model.state_dict() for cli in (first, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
