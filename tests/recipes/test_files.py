"""Files that are written whole or set aside."""

from pathlib import Path

import pytest

from recipes.shared.files import set_aside, write_whole


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


def test_what_is_there_keeps_its_ending_under_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("first", "second"):
        path = tmp_path / "answers.jsonl"
        set_aside(path)
        path.write_text(text)
    set_aside(path)
    assert (tmp_path / "answers-1.jsonl").read_text() == "first"
    assert (tmp_path / "answers-2.jsonl").read_text() == "second"
    (tmp_path / "v1.2").mkdir()
    set_aside(tmp_path / "v1.2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers-1.jsonl", "answers-2.jsonl", "v1.2-1"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{path} was there already, and is now called answers-1.jsonl"
    assert len(said) == 3
