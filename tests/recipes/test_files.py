"""Files are written whole or set aside, and a user's files where a command writes are never lost."""

from pathlib import Path

import pytest

from recipes.command_line.cli import RecipeCLI
from recipes.data.files import write_whole


def fit(*more: str) -> None:
    """A short run without a logger, which writes its files into the working directory."""
    quiet = ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    short = ["--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.precision=32-true"]
    RecipeCLI(
        ["fit", "--model=test_cli.Tiny", "--data=test_cli.Numbers", "--trainer.logger=false", *quiet, *short, *more]
    )


@pytest.mark.usefixtures("command_line")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_a_run_without_a_logger_keeps_another_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("my own")
    fit()
    assert Path("config-1.yaml").read_text() == "my own"
    first = Path("config.yaml").read_text()
    fit("--seed_everything=3")
    assert Path("config-2.yaml").read_text() == first
    assert Path("config.yaml").read_text() != first


def test_a_stop_in_the_middle_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_whole(path, "old")
    real = Path.write_text

    def stops(self: Path, text: str, **settings: str) -> int:
        real(self, text[:2], **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stops)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new and longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_whole(path, "new and longer")
    assert path.read_text() == "new and longer"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
