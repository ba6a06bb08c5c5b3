"""The pages name only what exists and all that is public, their programs run, and versions agree everywhere."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from helpers import since_lightning
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from packaging.requirements import Requirement
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_flatlora
from lightning_flatlora import EFMLoRA, flatness
from recipes.command_line.cli import RecipeCLI
from recipes.language.model import PACKAGED, load_tokenizer

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api"
MODULES = (
    "lightning_flatlora",
    "lightning_flatlora.baselines",
    "lightning_flatlora.callbacks",
    "lightning_flatlora.flatness",
    "lightning_flatlora.loops",
    "lightning_flatlora.pytorch_lightning",
    "lightning_flatlora.transformers",
)


def documented() -> set[str]:
    """The full names that the pages of the API reference list or describe."""
    names = set()
    for page in API.glob("*.md"):
        module = ""
        for line in page.read_text(encoding="utf-8").splitlines():
            current = re.match(r"\.\. currentmodule:: (\S+)", line)
            if current:
                module = current[1]
            described = re.match(r"(?:\.\. (?:auto|py:)\w+::|  ) (\w[\w.]*)$", line)
            if described:
                name = described[1]
                names.add(name if name.startswith("lightning_flatlora.") else f"{module}.{name}")
    return names


def public_names(module: str) -> list[str]:
    """The names in a module's ``__all__``, or else those of ``from ... import name as name`` and of its classes."""
    imported: Any = importlib.import_module(module)
    if hasattr(imported, "__all__"):
        return imported.__all__
    names = []
    for node in ast.parse(Path(imported.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.name for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            names.append(node.name)
    assert names
    return names


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_the_site(module: str) -> None:
    # The callbacks are documented under the shorter name by which people import them.
    place = module.removesuffix(".callbacks")
    wanted = {f"{place}.{name}" for name in public_names(module)}
    assert wanted - documented() == set()


def test_every_page_of_the_reference_is_in_its_table() -> None:
    index = (API / "index.md").read_text(encoding="utf-8")
    for page in API.glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name


def programs(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# Those of the other loops have their own test below, and those of the recipes read a run's files.
PAGES_WITH_PROGRAMS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS_ALONE = []
for each in PAGES_WITH_PROGRAMS:
    if each.name not in ("other_loops.md", "many_devices.md"):
        for number, text in enumerate(programs(each)):
            PROGRAMS_ALONE.append(pytest.param(text, id=f"{each.name}-{number}"))


@pytest.mark.parametrize("program", PROGRAMS_ALONE)
def test_the_program_of_a_page_runs_in_a_process_of_its_own(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = processes.run(processes.run_code, program, output=tmp_path / "output.txt")
    assert ended == 0, (tmp_path / "output.txt").read_text()


def test_the_program_for_many_devices_runs_on_two_processes(tmp_path: Path) -> None:
    (program,) = programs(ROOT / "docs" / "many_devices.md")
    (tmp_path / "program.py").write_text(program)
    # Lightning starts the second process with the first one's command.
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "GLOBAL_RANK: 1" in done.stderr
    assert len(list(tmp_path.glob("lightning_logs/version_0/checkpoints/*/adapter_config.json"))) == 1


def test_modules_of_the_recipes_that_pages_name_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        # A block of plain text contains the commands of an earlier commit, which the page names.
        text = re.sub(r"```text\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for name in re.findall(r"\brecipes(?:\.[a-z_]+)+", text):
            place = name.removesuffix(".py").replace(".", "/")
            # The last part may be a function of the module.
            places = (ROOT / place, ROOT / f"{place}.py", (ROOT / place).parent.with_suffix(".py"))
            assert any(each.exists() for each in places), f"{page}: {name}"


def test_what_pages_import_exists() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for program in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in re.findall(r"^from (?:lightning_flatlora|recipes)\b.* import .*", program, re.MULTILINE):
                exec(line, {})


@pytest.mark.filterwarnings("ignore")  # LightningCLI's warnings about its parser
@pytest.mark.parametrize("name", ["callbacks.md", "choosing_rho.md", "flatness.md"])
def test_the_configurations_of_a_page_make_its_callback(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit"])
    page = (API.parent / name).read_text(encoding="utf-8")
    texts = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert texts
    for text in texts:
        settings = {"trainer.logger": False, "trainer.accelerator": "cpu", **yaml.safe_load(text)}
        cli = LightningCLI(
            BoringModel, run=False, args=settings, save_config_callback=None, seed_everything_default=False
        )
        assert any(isinstance(callback, EFMLoRA) for callback in cli.trainer.callbacks)


PROGRAMS = ("diff of plain PyTorch", "fabric", "transformers", "trl", "fused", "FMLoRA")
PROGRAMS += ("FMLoRA in transformers", "unlearning")


HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def tiny_of_hub(folder: Path) -> Path:
    """A folder with the tokenizer of the page's model, and a smaller model."""
    tokenizer = load_tokenizer(PACKAGED)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # trl's own warning
@pytest.mark.parametrize("index", range(len(PROGRAMS)), ids=PROGRAMS)
def test_the_programs_for_other_loops_run(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (API.parent / "other_loops.md").read_text(encoding="utf-8")
    changed = re.search(r"```diff\n(.*?)```", page, re.DOTALL)
    assert changed is not None
    programs = [re.sub(r"^[+ ]", "", changed[1], flags=re.MULTILINE)]
    programs += re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(programs) == len(PROGRAMS)
    monkeypatch.chdir(tmp_path)
    if "trl" in programs[index]:
        pytest.importorskip("trl", reason="trl is not installed")
        programs[index] = programs[index].replace(HUB_NAME, str(tiny_of_hub(tmp_path / "model")))
    names: dict[str, Any] = {}
    if PROGRAMS[index] == "fused":  # it uses the model of the first program
        exec(programs[0], names)
        names["batch"] = torch.randn(16, 8)
    exec(programs[index], names)
    if PROGRAMS[index] == "FMLoRA in transformers":  # it uses another program's model and arguments
        of_trainer: dict[str, Any] = {}
        exec(programs[2], of_trainer)
        settings = {"model": of_trainer["model"], "args": of_trainer["args"], "train_dataset": of_trainer["rows"]}
        (method,) = re.findall(r"`callbacks=\[(FMLoRA\(.*?\))\]`", page)
        callback = eval(method, names)
        names["TwoPassTrainer"](**settings, callbacks=[callback]).train()
        assert callback.flat.step == 4
        return
    if "callback" in names:
        names["flat"] = names["callback"].flat
    steps = {"transformers": 4, "trl": 4}
    assert names["flat"].step == steps.get(PROGRAMS[index], 10)
    assert names["flat"].perturbation.may_be_nonzero == (PROGRAMS[index] not in ("FMLoRA", "unlearning"))
    assert (tmp_path / "out" / "checkpoint-4").exists() == (PROGRAMS[index] in ("transformers", "trl"))


def test_litgpts_line_is_the_one_that_the_tests_insert() -> None:
    page = (API.parent / "other_loops.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"\n \s+max_steps = .*\n\+(.*)\n", page)
    assert line.strip() == "flat = EFMLoRA(model, optimizer, rho=0.05, finder=litgpt_pairs)"


# -- commands, links and names


def test_commands_and_links_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"^make (\S+)", readme, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for module in re.findall(r"python -m (recipes[\w.]*)", readme):
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
    """The anchor of each heading, as GitHub creates them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path) -> list[str]:
    """The code and commands shown on a page or in a notebook."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return re.findall(r"^ *```[a-z]+\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)


DOCS = ROOT / "docs"
SITE = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "recipes").glob("*.md"))]
SITE.append(DOCS / "tutorial.ipynb")


@pytest.mark.parametrize("page", SITE, ids=lambda page: page.stem)
def test_lines_of_code_fit_the_column_of_the_site(page: Path) -> None:
    wide = [line for block in blocks(page) for line in block.splitlines() if len(line) > 88]
    assert not wide


def test_the_method_page_names_functions_and_tests_that_exist() -> None:
    page = (ROOT / "docs" / "method.md").read_text()
    for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", page):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)
    for module, function in re.findall(r"`(functional|schedules)\.(\w+)`", page):
        assert re.search(rf"(def|class) {function}\b", (ROOT / "lightning_flatlora" / f"{module}.py").read_text())


PAGE = (ROOT / "docs" / "compatibility.md").read_text()
ROWS = re.findall(r"^\| ([\w-]+)[^|]*\| (>=[\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
ACCEPTED = {name: floor for name, floor, _, _ in ROWS}
OLDEST = {name: oldest for name, _, oldest, _ in ROWS}
DECLARED = (ROOT / "pyproject.toml").read_text()


def test_the_floors_are_those_of_the_package() -> None:
    declared = {"Python": re.findall(r'^requires-python = "(.+)"', DECLARED, re.MULTILINE)}
    # An excluded release comes after the lower bound.
    for line in re.findall(r'"([\w-]+(?:\[\w+\])?>=[\d.]+)[,!=\d.]*"', DECLARED):
        requirement = Requirement(line)
        declared.setdefault(requirement.name, []).append(str(requirement.specifier))
    assert ACCEPTED.keys() >= {"Python", "torch", "lightning", "peft", "torchmetrics", "transformers"}
    for name, floor in ACCEPTED.items():
        assert set(declared[name]) == {floor}, name


def test_the_oldest_releases_are_those_that_are_installed() -> None:
    pinned = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE)
    assert pinned
    for name, version in pinned:
        assert OLDEST[name] == version, name


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == lightning_flatlora.__version__


FLATNESS_PAGE = (ROOT / "docs" / "flatness.md").read_text()
TABLE = [line for line in FLATNESS_PAGE.splitlines() if line.startswith("| ")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


INSTRUMENTS = [cells(line) for line in TABLE[1:]]


@since_lightning("2.6.0", "Lightning 2.5.0 prints no configuration with the jsonargparse of today")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["flatness.md", "baselines.md", "recipes/instruction_tuning.md"])
def test_callbacks_that_a_command_adds_leave_the_configurations(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / name).read_text().replace("\\\n", "")
    for variable, value in re.findall(r"^(\w+)=(.+)$", text, re.MULTILINE):
        text = text.replace(f"${variable}", value.strip("\"'"))
    (command,) = re.findall(r"python -m recipes.instruction_tuning (fit .*callbacks\+=[^`\n]*)", text)
    arguments = shlex.split(command, comments=True)
    with pytest.raises(SystemExit):
        RecipeCLI(args=[*arguments, "--print_config"], recipe="instruction_tuning")
    made = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    base = ROOT / "recipes" / "instruction_tuning" / "configs" / "base.yaml"
    kept = [one["class_path"] for one in yaml.safe_load(base.read_text())["trainer"]["callbacks"]]
    kept += ["lightning_flatlora.EFMLoRA"] if "efmlora" in command else []
    assert [one["class_path"] for one in made[: len(kept)]] == kept
    added = re.findall(r"callbacks\+=(?:\w+\.)*(\w+) --trainer.callbacks.rho=(\S+)", command)
    assert [(one["class_path"].split(".")[-1], str(one["init_args"]["rho"])) for one in made[len(kept) :]] == added


def test_the_table_names_what_exists_and_all_of_it() -> None:
    assert [row[0].strip("`") for row in INSTRUMENTS if row[0]] == list(flatness.MEASURES)
    for row in INSTRUMENTS:
        assert hasattr(flatness, row[4].strip("`")), row


PAGES = ("docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md", ".github/pull_request_template.md")
PATH = re.compile(r"[\w.-]*(/[\w.-]+)+/?|[\w-]+\.(py|md|toml|txt|cff|yaml)|Makefile")
ANYWHERE = {"conftest.py", "__main__.py", "results.jsonl"}
"""Names of files without a folder, of which there are several or none in the repository."""


def quoted(page: str) -> list[str]:
    """Everything in backticks, except blocks of commands."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The functions, classes and variables of a module or a class, by name."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    names[target.id] = node
    return names


def defines(path: Path, dotted: str) -> bool:
    body = ast.parse(path.read_text()).body
    for name in dotted.split("."):
        node = names_in(body).get(name)
        if node is None:
            return False
        body = node.body if isinstance(node, ast.ClassDef) else []
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_name_exists(page: str) -> None:
    missing = []
    for text in quoted(page):
        path, _, name = text.partition("::")
        if not PATH.fullmatch(path) or path in ANYWHERE:
            continue
        if not (ROOT / path).exists() or (name and not defines(ROOT / path, name)):
            missing.append(text)
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_target_of_make_exists(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)`|^make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE):
        name = target[0] or target[1]
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def test_missing_files_and_names_are_seen() -> None:
    assert PATH.fullmatch("lightning_flatlora/nothing.py")
    assert not defines(ROOT / "lightning_flatlora" / "functional.py", "ascent_nothing")
    assert defines(ROOT / "lightning_flatlora" / "functional.py", "Ascent.direction")
    assert len([text for text in quoted("docs/architecture.md") if "::" in text]) > 25
