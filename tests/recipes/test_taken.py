"""What someone else's config.yaml must not choose: code of others, and where files are written."""

import inspect
from pathlib import Path
from pydoc import locate
from typing import Any, get_args

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from one_command import ParsingCLI

from recipes.classification.module import TextClassification
from recipes.clip.export import trained
from recipes.command_line.configs import RECIPES, written_settings
from recipes.command_line.taken import _PLAIN, runs_no_code, taken
from recipes.data.foreign import EVENTS

pytestmark = pytest.mark.usefixtures("command_line")

EVIL = {"class_path": "payload.Evil"}
PAYLOAD = 'from pathlib import Path\nPath("PWNED").touch()\nclass Evil:\n    pass\n'
MODEL, DATA = "recipes.classification.module.TextClassification", "recipes.classification.data.TextData"


def folder_of(tmp_path: Path, changes: dict[str, Any]) -> Path:
    """A run's checkpoint, with changes to its settings by their dotted names."""
    settings: dict[str, Any] = {
        "seed_everything": 3,
        "model": {"class_path": MODEL, "init_args": {"model": "mine", "lora": {"r": 2}}},
        "data": {"class_path": DATA, "init_args": {"dataset": "my.jsonl"}},
        "trainer": {"max_epochs": 7, "precision": "32-true", "strategy": "auto", "callbacks": []},
    }
    for name, value in changes.items():
        part = settings
        *parents, last = name.split(".")
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    folder = tmp_path / "foreign" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({}, folder / "last.ckpt")
    (folder.parent / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "last.ckpt"


SAVER = {"class_path": "lightning_flatlora.AdapterCheckpoint", "init_args": {"monitor": "val/loss", "dirpath": "x"}}
SAVING = "trainer.callbacks (lightning_flatlora.AdapterCheckpoint)"
LAMBDA = {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "payload.Evil"}}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *((f"trainer.{name}", EVIL, None) for name in ("strategy", "plugins", "logger", "profiler")),
        ("trainer.default_root_dir", "/x", None),
        ("trainer.model_registry", "x", None),
        ("weights_only", False, None),
        ("trainer.accelerator", EVIL, "trainer.accelerator"),
        ("trainer.callbacks", [EVIL], "trainer.callbacks (payload.Evil)"),
        ("trainer.callbacks", ["EarlyStopping"], "trainer.callbacks (EarlyStopping)"),
        ("trainer.callbacks", [SAVER], SAVING),
        ("trainer.callbacks", [{**SAVER, "init_args": {"filename": "../../x"}}], SAVING),
        ("trainer.callbacks", [{**SAVER, "init_args": {"filename": "{x].__class__}"}}], SAVING),
        ("trainer.callbacks", [{**SAVER, "init_args": {}, "dict_kwargs": {"dirpath": "x"}}], SAVING),
        ("run_name", "../../x", "run_name"),
        ("optimizer", EVIL, "optimizer"),
        ("lr_scheduler", LAMBDA, "lr_scheduler"),
        ("model.class_path", "payload.Evil", "model (payload.Evil)"),
        ("model.init_args.predictions", "/x/predictions.jsonl", "model.predictions"),
        ("model.init_args.lora.x", EVIL, "model.lora"),
        ("model.init_args.lora.x", '{"class\\x5fpath": payload.Evil}', "model.lora"),
        ("model.init_args.lora.x", "{\tclass_path: payload.Evil}", "model.lora"),
        ("model.init_args.lora.x", "{class_path: payload.Evil, d: 2026-13-45}", "model.lora"),
        ("model.init_args.lora.x", "&a [*a, {class_path: payload.Evil}]", "model.lora"),
        ("model.init_args.lora", "{class_path: payload.Evil}", "model.lora"),
        ("model.init_args", {"rho.class_path": "payload.Evil"}, "model.rho.class_path"),
        ("model.init_args.model_config", {"attn_implementation": "someone/kernel"}, "model.model_config"),
        ("model.init_args.lora", {"megatron_core": "payload", "megatron_config": {"a": 1}}, "model.lora"),
        ("model.init_args.model_config", {"trust_remote_code": True}, "model.model_config"),
        ("model.init_args.attn_implementation", "someone/kernel", "model.attn_implementation"),
        ("data.class_path", "lightning.pytorch.demos.boring_classes.BoringDataModule", "data (lightning"),
        ("data.init_args.root", EVIL, "data.root"),
    ],
)
def test_a_foreign_run_chooses_no_code_and_no_folder(name: str, value: Any, said: str | None, tmp_path: Path) -> None:
    settings = yaml.safe_load((folder_of(tmp_path, {name: value}).parent.parent / "config.yaml").read_text())
    found, others = taken(settings)
    assert [other[: len(said)] for other in others] == [said] if said else others == []
    assert "payload" not in str(found)
    assert found["trainer"].keys() <= {"max_epochs", "precision", "callbacks"}
    # The data's settings are left out only if the message says so.
    assert (found.get("data", {}).get("init_args", {}).get("dataset") == "my.jsonl") == ("data (" not in str(others))


@pytest.fixture(autouse=True)
def _payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that leaves a file if it is imported; command lines are only parsed."""
    monkeypatch.setattr(ParsingCLI, "_run_subcommand", lambda self, name: None)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "payload.py").write_text(PAYLOAD)


def parsed(*arguments: str) -> Any:
    return ParsingCLI(list(arguments), recipe="classification").config[arguments[0]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trainer.callbacks", [EVIL]),
        ("trainer.strategy", EVIL),
        ("model.init_args.lora.x", EVIL),
        ("model.init_args.lora.x", "{class_path: payload.Evil}"),
        ("optimizer", EVIL),
    ],
)
def test_the_parser_imports_nothing_that_a_foreign_run_names(name: str, value: Any, tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, {name: value})
    settings = parsed("fit", f"--ckpt_path={checkpoint}")
    assert not (tmp_path / "PWNED").exists()
    assert settings.trainer.max_epochs == 7
    assert settings.data.init_args.dataset == "my.jsonl"


def test_the_hyper_parameters_in_a_checkpoint_choose_nothing(tmp_path: Path) -> None:
    """Lightning would let them override the model's settings, including its class."""
    checkpoint = folder_of(tmp_path, {})
    torch.save({"hyper_parameters": {"_class_path": "payload.Evil", "model": "theirs"}}, checkpoint)
    settings = parsed("test", f"--ckpt_path={checkpoint}")
    assert not (tmp_path / "PWNED").exists()
    assert (settings.model.class_path, settings.model.init_args.model) == (MODEL, "mine")


@pytest.mark.parametrize("path", ["runs/a/../../mine", "local:///home/mine"])
@pytest.mark.parametrize("name", ["last_model_path", "best_k_models"])
def test_a_checkpoint_names_no_folder_to_delete(name: str, path: str) -> None:
    module = TextClassification(model="mine")
    module.on_load_checkpoint({"callbacks": {"Saver": {"last_model_path": "../runs/a/last.ckpt"}, "Other": 3}})
    named = {path: 0.5} if name == "best_k_models" else path
    with pytest.raises(MisconfigurationException, match="the checkpoint names another checkpoint of its run as"):
        module.on_load_checkpoint({"callbacks": {"Saver": {name: named}}})


def test_what_is_left_out_is_named(tmp_path: Path, caplog: Any) -> None:
    parsed("fit", f"--ckpt_path={folder_of(tmp_path, {'trainer.callbacks': [EVIL], 'data.init_args.root': EVIL})}")
    assert any("write files: data.root, trainer.callbacks (payload.Evil). Give" in each for each in caplog.messages)


def test_what_a_run_of_ours_had_is_taken(tmp_path: Path) -> None:
    schedule = {"class_path": "lightning_flatlora.LinearRho", "init_args": {"start": 0.1, "end": 0.0}}
    changes = {
        "run_name": "mine",
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "nesterov": False}},
        "trainer.gradient_clip_val": 0.5,
        "trainer.accumulate_grad_batches": 2,
        "trainer.logger": [{"class_path": "CSV", "init_args": {"save_dir": "runs", "name": "mine", "prefix": ""}}],
        "trainer.callbacks": [
            {"class_path": "lightning_flatlora.EFMLoRA", "init_args": {"rho": schedule, "estimator": "average"}},
            {"class_path": "lightning_flatlora.AdapterCheckpoint", "init_args": {"filename": "{epoch}-{loss:.2f}"}},
            {"class_path": "recipes.training.random_state.RandomState", "init_args": {}},
        ],
        "data.init_args.text": ["premise", "hypothesis"],
        "model.init_args.predictions": "answers.jsonl",
    }
    settings = yaml.safe_load((folder_of(tmp_path, changes).parent.parent / "config.yaml").read_text())
    found, others = taken(settings)
    assert others == []
    expected = {name: value for name, value in settings["trainer"].items() if name not in ("strategy", "logger")}
    assert found == {**dict.fromkeys(_PLAIN), **settings, "trainer": expected}


def test_the_export_of_clip_imports_nothing_either(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, {"model": EVIL})
    with pytest.raises(MisconfigurationException, match=r"which are not imported: model \(payload.Evil\)"):
        trained(checkpoint, checkpoint.parent.parent / "config.yaml")
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("text", ["a: 1", "- 1", ""])
def test_a_file_that_is_not_a_runs_is_passed_over(text: str, tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, {})
    (checkpoint.parent.parent / "config.yaml").write_text(text)
    assert written_settings(checkpoint) == {}


PLAIN = (str, int, float, bool, dict, type(None), Any, ...)


def leaves(annotation: Any) -> set[Any]:
    """The basic types in an annotation; for a Literal, the types of its values."""
    if not get_args(annotation):
        return {type(annotation) if isinstance(annotation, str) else annotation}
    return set().union(*map(leaves, get_args(annotation)))


@pytest.mark.parametrize("part", ["model", "data"])
@pytest.mark.parametrize("base", sorted(RECIPES.glob("*/configs/base.yaml")), ids=lambda path: path.parts[-3])
def test_no_argument_of_a_recipe_is_an_object(base: Path, part: str) -> None:
    """Otherwise a text given for it could be a class's path, which the parser would import."""
    ours: Any = locate(yaml.safe_load(base.read_text())[part]["class_path"])
    objects = set()
    for kind in ours.__mro__:
        if kind.__module__.startswith(("recipes.", "lightning_flatlora.")) and "__init__" in vars(kind):
            for name, parameter in inspect.signature(kind.__init__, eval_str=True).parameters.items():
                if name != "self" and not leaves(parameter.annotation) <= set(PLAIN):
                    objects.add(name)
    assert not objects


HEAD = "model: {class_path: recipes.vqa.module.VQAModule, init_args: {"
BOMB = "x: &a0 [1, 1], " + ", ".join(f"y{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))
DEEP = "it has more than 50 levels|exceeded maximum nesting depth"  # of libyaml, since 0.2.6
CHAIN = "x: &a0 [1], " + ", ".join(f"y{i}: &a{i} [[[*a{i - 1}]]]" for i in range(1, 40))
MERGED = "x: &a0 {b: 1}, " + ", ".join(f"y{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40))


@pytest.mark.parametrize("saved", ["checkpoints/last.ckpt", "checkpoints/last"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + BOMB + "}}\n", "ValueError: it stands for more than 100,000 values or 50 levels of them"),
        (HEAD + MERGED + "}}\n", r"or a merge key \(<<\): write its values out. Copy it again, or remove it"),
        (HEAD + CHAIN + "}}\n", "more than 100,000 values or 50 levels"),
        (HEAD + "x: &a [*a]}}\n", "more than 100,000 values or 50 levels"),
        (HEAD + "x: " + "[" * 60 + "]" * 60 + "}}\n", "ValueError: it has more than 50 levels"),
        (HEAD + "x: " + "[" * 100_000, DEEP),
        ("- " * 100_000, DEEP),
        ("model: {a: [\n", "ParserError: while parsing a flow"),
        ("model: !!python/object/apply:os.system [true]\n", "ConstructorError: could not determine a constructor"),
        ("model: !!bool x\n", "KeyError"),
        ("model: !!timestamp x\n", "AttributeError"),
        ("model: 1" + "0" * 5000 + "\n", "ValueError: Exceeds the limit"),
        ("model: \udcff\n", "can't be read: ReaderError"),
        ("model: " + "x" * 2_100_000, "larger than 2,097,152 bytes"),
        ("model: {init_args: 3}\n", "model and its init_args must be dicts, got {'init_args': 3}"),
        ("model: {}\ndata: 3\n", "data and its init_args must be dicts, got 3"),
        ("model: {}\ntrainer: [3]\n", r"trainer and its init_args must be dicts, got \[3\]"),
    ],
    ids=lambda text: text[-30:-20] if isinstance(text, str) else None,
)
def test_settings_that_can_not_be_parsed_within_bounds(text: str, says: str, saved: str, tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, {})
    (checkpoint.parent.parent / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    for read in (written_settings, lambda path: parsed("fit", f"--ckpt_path={checkpoint}")):
        with pytest.raises(MisconfigurationException, match=says) as raised:
            read(checkpoint.parent.parent / saved)
        assert "config.yaml" in str(raised.value)
        assert len(str(raised.value)) < 1000
    with pytest.raises(MisconfigurationException, match=says):
        trained(checkpoint, checkpoint.parent.parent / "config.yaml")


@pytest.mark.parametrize("callbacks", [3, "EarlyStopping", {"a": 1}, [[3]], {1: 2}])
def test_callbacks_that_are_no_list_are_left_out(callbacks: Any, tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, {"trainer.callbacks": callbacks})
    found, others = taken(written_settings(checkpoint))
    assert found["trainer"]["callbacks"] == []
    assert others[0].startswith("trainer.callbacks (")


@pytest.mark.parametrize("loader", [yaml.BaseLoader, EVENTS])
def test_a_long_text_in_the_settings_ends_in_an_answer(loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with PyYAML's parser in Python, for which a level is a call, and with 6.0.2's in C, where it is one too."""
    monkeypatch.setattr("recipes.data.foreign.EVENTS", loader)
    assert not runs_no_code("[" * 400 + "]" * 400)
    for text in ("[" * 300_000, "{a: " * 100_000, "- " * 100_000):
        assert runs_no_code(text) in (True, False)  # for the parser it may be a text, too
    assert runs_no_code("x" * 300_000)


def test_a_few_aliases_are_read(tmp_path: Path) -> None:
    """PyYAML writes one for an object that occurs twice."""
    same = ["q_proj"]
    checkpoint = folder_of(tmp_path, {"model.init_args.lora": {"target_modules": same, "modules_to_save": same}})
    path = checkpoint.parent.parent / "config.yaml"
    assert "*id001" in path.read_text()
    path.write_text(path.read_text() + "other: '<<'\n")
    settings = written_settings(checkpoint)
    assert settings["model"]["init_args"]["lora"] == {"target_modules": same, "modules_to_save": same}
    assert settings["other"] == "<<"
