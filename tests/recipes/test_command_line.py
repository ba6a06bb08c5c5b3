"""What a command line can omit, as the real parsers read it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from one_command import ParsingCLI
from recipe_runs import config_arguments

from recipes.command_line.arguments import names_method
from recipes.command_line.configs import RECIPES, base_file, is_method, method_file, settings_help

RECIPE_NAMES = ("classification", "clip_contrastive", "clip_fewshot", "instruction_tuning", "nlg", "vqa")

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture(autouse=True)
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ParsingCLI, "_run_subcommand", lambda self, name: None)


def parsed(*arguments: str, recipe: str = "classification") -> Any:
    return ParsingCLI(list(arguments), recipe=recipe).config[arguments[0]]


def saved(path: Path, *arguments: str) -> str:
    """A run's configuration, as it is written to a file."""
    cli = ParsingCLI(list(arguments), recipe="classification")
    path.write_text(cli._parser("fit").dump(cli.config["fit"], skip_none=False))
    return str(path)


def test_the_recipes_base_and_the_method_are_laid_below_what_is_given() -> None:
    settings = parsed("fit", "--data.dataset=my.jsonl", "--model.learning_rate=0.5", "--method=efmlora", "--rho=2")
    assert settings.run_name == settings.method == "efmlora"
    assert (settings.data.init_args.dataset, settings.model.init_args.learning_rate) == ("my.jsonl", 0.5)
    assert settings.trainer.callbacks[-1].init_args.rho == 2
    with pytest.raises(MisconfigurationException, match="--rho is the radius of one method"):
        parsed("fit", "--rho=2")
    with pytest.raises(SystemExit):
        parsed("fit", "--method=sam")


def test_a_method_is_laid_over_a_configuration_with_callbacks_of_its_own(tmp_path: Path) -> None:
    mine = saved(tmp_path / "mine.yaml", "fit", "--data.dataset=my.jsonl")
    settings = parsed("fit", "--method=efmlora", f"--config={mine}")
    assert settings.data.init_args.dataset == "my.jsonl"
    other = parsed("fit", "--data.dataset=other.jsonl", "--config", mine)  # configurations are applied first
    assert other.data.init_args.dataset == "other.jsonl"
    assert [each.class_path for each in settings.trainer.callbacks[-1:]] == ["lightning_flatlora.EFMLoRA"]


def test_a_method_is_named_by_its_option_its_file_or_a_callback(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer:\n  callbacks+:\n    - class_path: lightning_flatlora.SAM\n")
    for named in (["--method=lora"], [f"--config={method_file('vqa', 'fmlora')}"], [f"--config={mine}"]):
        assert names_method("vqa", [*named, "--data.dataset=my.jsonl"])
    mine.write_text("trainer:\n  callbacks+:\n    - class_path: lightning_flatlora.FlatnessMonitor\n")
    assert not names_method("vqa", [f"--config={mine}", "--data.dataset=my.jsonl"])


ADDED = ["--trainer.callbacks+=lightning_flatlora.FMLoRA", "--trainer.callbacks.rho=0.6"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """``--ckpt_path`` with the checkpoint of an EFMLoRA run on other data than the base's."""
    folder = tmp_path / "runs/classification/efmlora/version_0"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({}, folder / "checkpoints" / "last.ckpt")
    saved(folder / "config.yaml", "fit", "--data.dataset=my.jsonl", "--method=efmlora", "--rho=0.3")
    return f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"


@pytest.mark.parametrize(
    ("given", "dataset", "method"),
    [
        (["test"], "my.jsonl", ("EFMLoRA", 0.3)),
        (["predict"], "my.jsonl", ("EFMLoRA", 0.3)),
        (["fit"], "my.jsonl", ("EFMLoRA", 0.3)),
        (["fit", "--method=efmlora"], "my.jsonl", ("EFMLoRA", 0.3)),
        (["fit", "--rho=0.4"], "my.jsonl", ("EFMLoRA", 0.4)),
        (["fit", *config_arguments("classification", "efmlora")], "my.jsonl", ("EFMLoRA", 0.3)),
        (["fit", "--method=efmlora", "--ckpt_path=last"], "my.jsonl", ("EFMLoRA", 0.3)),
        (["test", "--data.dataset=other.jsonl"], "other.jsonl", ("EFMLoRA", 0.3)),
        (["fit", "--method=fmlora", "--rho=0.5"], "my.jsonl", ("FMLoRA", 0.5)),
        (["fit", *ADDED], "my.jsonl", ("FMLoRA", 0.6)),
    ],
)
def test_a_checkpoint_brings_its_runs_settings(
    given: list[str], dataset: str, method: tuple[str, float], checkpoint: str
) -> None:
    command, *options = given
    settings = parsed(command, *([] if "--ckpt_path=last" in options else [checkpoint]), *options)
    assert settings.data.init_args.dataset == dataset
    chosen = [callback for callback in settings.trainer.callbacks if is_method(callback.class_path)]
    assert [(each.class_path.split(".")[-1], each.init_args.rho) for each in chosen] == [method]


def test_a_run_that_goes_on_may_have_another_name(checkpoint: str) -> None:
    for given, name in (([], "efmlora"), (["--run_name=other"], "other")):
        settings = parsed("fit", checkpoint, *given)
        assert {logger.init_args.name for logger in settings.trainer.logger} == {name}


def test_callbacks_take_the_place_of_a_runs_except_for_its_method(checkpoint: str) -> None:
    monitor = "--trainer.callbacks+=lightning_flatlora.FlatnessMonitor"
    for given, rho in (([], 0.3), (["--method=efmlora"], 0.3), (["--rho=0.4"], 0.4), (["--method=fmlora"], 0.05)):
        method, added = parsed("fit", checkpoint, monitor, *given).trainer.callbacks[-2:]
        assert (is_method(method.class_path), method.init_args.rho) == (True, rho)
        assert added.class_path == "lightning_flatlora.FlatnessMonitor"
    (kept,) = parsed("fit", checkpoint, "--trainer.callbacks=[]", "--method=lora", monitor).trainer.callbacks
    assert kept.class_path == "lightning_flatlora.FlatnessMonitor"


LOGGER = [
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
    "--trainer.logger.save_dir=logs",
    "--trainer.logger.name=named",
]
OTHER = ["--trainer.callbacks+=lightning_flatlora.AdapterCheckpoint", "--trainer.callbacks.dirpath=kept"]


@pytest.mark.parametrize(
    ("place", "given"),
    [
        ("runs/classification/lora/version_3/checkpoints", []),
        ("runs/classification/mine/version_0/checkpoints", ["--run_name=mine"]),
        ("logs/named/version_0/checkpoints", LOGGER),
        ("kept", OTHER),
        ("runs/classification/lora/version_0/checkpoints", OTHER),
        ("kept", ["--trainer.logger=false", *OTHER]),
    ],
)
def test_the_last_checkpoint_is_searched_where_the_savers_save(place: str, given: list[str], tmp_path: Path) -> None:
    (tmp_path / place).mkdir(parents=True)
    torch.save({}, tmp_path / place / "last.ckpt")
    assert parsed("fit", "--ckpt_path=last", *given).ckpt_path == f"{place}/last.ckpt"


def test_an_abbreviation_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    """It would be recognized too late to use the run's settings."""
    with pytest.raises(SystemExit):
        parsed("fit", "--ckpt=last")
    assert "unrecognized arguments: --ckpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("lora_alfa=3", "has no lora_alfa, only .*lora_alpha"),
        ("modules_to_save=lm_head", r"a list, such as \[lm_head\]"),
    ],
)
def test_a_wrong_field_of_lora_is_refused_before_anything_is_loaded(wrong: str, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        parsed("fit", f"--model.lora.{wrong}")
    assert parsed("fit", "--model.lora.projections=[q]", recipe="clip_contrastive")


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_base_has_every_setting_of_model_and_data(recipe: str) -> None:
    """Because the help and the pages show the base as all settings."""
    settings = parsed("fit", recipe=recipe)
    base = yaml.safe_load(base_file(recipe).read_text())
    for part in ("model", "data"):
        missing = vars(settings[part].init_args).keys() - base[part]["init_args"].keys()
        # VQA compares its validation_answers instead.
        assert missing <= ({"exact_match_examples"} if recipe == "vqa" else set())
    matter = settings_help(recipe)[0].partition("\n\n")[0].splitlines()[-8:]
    assert all(line.startswith("  --") for line in matter)


# The help imports every possible optimizer and logger, even those whose library is missing.
@pytest.mark.filterwarnings("ignore")
def test_help_has_the_settings_of_model_and_data_and_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("fit", "--help", recipe="vqa")
    shown = capsys.readouterr().out
    settings, _, others = shown.partition("options:")
    head = settings.partition("\n\nAll settings")[0].splitlines()
    assert len(head) <= 15
    for start in ("usage: ", "  python -m recipes.vqa fit", "  --data.dataset ", "  --rho                    0.2 "):
        assert any(line.startswith(start) for line in head), start
    for setting in ("learning_rate: ", "dataset: ", "r: 8", "chat_template: ", "questions: "):
        assert setting in settings
    assert "--trainer.max_epochs" in others
    for path in [*RECIPES.glob("vqa/**/*.yaml"), *RECIPES.glob("configs/**/*.yaml")]:
        assert str(path) in others
