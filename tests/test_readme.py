"""What the README asks people to do works: the example runs, the commands and links exist."""

import re
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    ended = processes.run(processes.run_code, code, output=tmp_path / "output.txt")
    said = (tmp_path / "output.txt").read_text()
    assert ended == 0, said
    assert "max_epochs=1` reached" in said


def test_commands_and_links_exist() -> None:
    for target in re.findall(r"^make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for module in re.findall(r"python -m (recipes[\w.]*)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        for variable, value in re.findall(r"^(\w+)=(.+)$", text, re.MULTILINE):
            text = re.sub(rf"\${variable}\b", value.strip("\"'"), text)
        for config in re.findall(r"--config[ =]([\w./]+/[\w./]+\.yaml)", text):
            assert (ROOT / config).exists(), f"{page}: {config}"
        for link, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", text):
            target = page.parent / link
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{page}: {link}#{anchor}"


def anchors(page: str) -> set[str]:
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_method_page_names_functions_and_tests_that_exist() -> None:
    page = (ROOT / "docs" / "method.md").read_text()
    for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", page):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)
    for module, function in re.findall(r"`(functional|schedules)\.(\w+)`", page):
        assert re.search(rf"(def|class) {function}\b", (ROOT / "lightning_flatlora" / f"{module}.py").read_text())
