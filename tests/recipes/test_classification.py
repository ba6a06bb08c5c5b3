"""Text classification through the recipe's command line, on tiny random models and once on MiniLM."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from hub_sets import prepared
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from recipe_runs import packaged_arguments, quick, trained
from tokenizers.processors import TemplateProcessing

from recipes.classification.labels import class_labels, class_names, numbers
from recipes.classification.readouts import load_with_head
from recipes.command_line.cli import RecipeCLI
from recipes.data.reading import read_table

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

EFMLORA = "--trainer.callbacks+=lightning_flatlora.EFMLoRA"


@pytest.fixture
def animals(jsonl: Callable[..., str]) -> str:
    """A hundred sentences of different lengths, whose class is their animal."""
    rows = []
    for i in range(100):
        animal = ("cat", "dog")[i % 2]
        rows.append({"text": f"The {animal} number {i} " + "runs " * (i % 5), "label": animal})
    return jsonl(rows)


def run(command: str, model: str, dataset: str, *options: str) -> RecipeCLI:
    given = [f"--model.model={model}", "--model.lora.target_modules=[q_proj,v_proj]", f"--data.dataset={dataset}"]
    return quick(command, packaged_arguments("classification"), *given, "--trainer.max_epochs=1", *options)


def fit(model: str, dataset: str, *options: str) -> RecipeCLI:
    return run("fit", model, dataset, *options)


def test_a_decoder_learns_the_classes_with_efmlora(tiny: str, animals: str) -> None:
    """Llama has no padding token, so the head must read each row's last real token."""
    cli = fit(tiny, animals, EFMLORA, "--trainer.callbacks.rho=0.05", "--trainer.max_epochs=4")
    assert cli.trainer.callback_metrics["val_accuracy"] > 0.9
    assert cli.model.net.config.id2label == {0: "cat", 1: "dog"}
    assert any("score" in name for name in trained(cli))


@pytest.mark.parametrize("rate", [None, 0.05])
def test_the_head_may_have_a_rate_of_its_own(tiny: str, animals: str, rate: float | None) -> None:
    options = [] if rate is None else [f"--model.head_learning_rate={rate}"]
    cli = fit(tiny, animals, "--trainer.max_steps=1", "--model.learning_rate=0.01", *options)
    rates = {}
    for group in cli.trainer.optimizers[0].param_groups:
        rates.update(dict.fromkeys(group["params"], group["initial_lr"]))
    found = {name: rates[weight] for name, weight in cli.model.named_parameters() if weight.requires_grad}
    assert len(found) == len(rates)
    for name, value in found.items():
        assert value == (0.01 if "lora_" in name or rate is None else rate)
    assert any("score" in name for name in found)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence": "a", "mood": 0}], r"\['label', 'text'\]: name .* --data.text sentence --data.label mood"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 0}], "must hold numbers or names of at least two classes"),
        ([{"text": "a", "label": [0]}, {"text": "b", "label": [1]}], r"got \[.\[0\].*a text has one label"),
        ([{"text": "a", "label": i} for i in (0, 1)], r"nothing is left for .*texts \(1 different ones\).*share=0"),
    ],
)
def test_bad_data_is_refused_before_training(tiny: str, jsonl: Any, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        prepared(tiny, dataset=jsonl(rows))
    few = jsonl([{"text": f"The {i}", "label": i % 2} for i in range(9)])
    with pytest.raises(MisconfigurationException, match="shots=16 takes all rows for training"):
        prepared(tiny, dataset=few, shots=16)


def test_the_shipped_configuration_runs_with_its_own_model_and_data(tmp_path: Path) -> None:
    options = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2"]
    cli = quick("fit", packaged_arguments("classification"), *options, "--data.batch_size=4")
    assert 0 < cli.trainer.callback_metrics["val_accuracy"] < 1
    assert cli.datamodule.classes == ["negative", "positive"]
    assert list((tmp_path / "runs").rglob("adapter_model.safetensors"))


def test_a_checkpoint_knows_its_classes(tiny: str, animals: str, jsonl: Any, tmp_path: Path) -> None:
    """If classes had other names or another order, scores would be wrong without an error."""
    saved = fit(tiny, animals, "--trainer.max_steps=1").trainer.checkpoint_callback.last_model_path
    kept = Path(animals).rename(tmp_path / "animals.jsonl")
    other = jsonl([{"text": f"The {i}", "label": ("apple", "pear")[i % 2]} for i in range(60)])
    with pytest.raises(MisconfigurationException, match=r"classes: \['cat', 'dog'\] there, \['apple', 'pear'\] here"):
        run("test", tiny, other, f"--ckpt_path={saved}")
    with pytest.raises(MisconfigurationException, match="'apple', 'pear'"):
        fit(tiny, other, f"--ckpt_path={saved}")
    run("test", tiny, str(kept), f"--ckpt_path={saved}")


@pytest.mark.parametrize(
    ("written", "classes", "places"),
    [
        (["1", "", "0"], ["0", "1"], [1, None, 0]),
        (["1.0", "", "0.0"], ["0", "1"], [1, None, 0]),  # as pandas stores integers in a column with missing values
        (["10", "2", "-1"], ["2", "10"], [1, 0, None]),
        (["1", "one", "1.0"], ["1", "1.0", "one"], [0, 2, 1]),
        (["True", "False", "nan"], ["False", "True", "nan"], [1, 0, 2]),
    ],
)
def test_classes_of_a_csv_file(
    written: list[str], classes: list[str], places: list[int | None], tmp_path: Path
) -> None:
    file = tmp_path / "data.csv"
    rows = [f"a,{label}" for label in written]
    file.write_text("\n".join(["text,label", *rows]))
    table = read_table(str(file), "train")
    found = class_names(table, "label", "data")
    assert found == classes
    assert class_labels(table, "label", found, "data") == places


def test_numbers_of_a_csv_file(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("text,label\na,0.5\nb,\nc,-1e3\n")
    table = read_table(str(file), "train")
    assert numbers(table, "label", "data") == [0.5, None, -1000.0]
    file.write_text("text,label\na,0.5\nb,1\nc,2.25\n")
    with pytest.raises(MisconfigurationException, match=r"'label' must hold .* set regression to true"):
        class_names(read_table(str(file), "train"), "label", "data")


def test_labels_are_read_without_spaces_and_empty_ones_are_missing() -> None:
    table = datasets.Dataset.from_dict({"label": ["neg", "pos ", "", " ", None, "pos"]})
    assert class_names(table, "label", "data") == ["neg", "pos"]
    assert class_labels(table, "label", ["neg", "pos"], "data") == [0, 1, None, None, None, 1]


def test_texts_are_classified(tiny: str, animals: str, tmp_path: Path) -> None:
    """Just as the model classifies each text by itself, without padding."""
    saved = fit(tiny, animals, "--model.learning_rate=0.02").trainer.checkpoint_callback.last_model_path
    texts = [f"The {('dog', 'cat')[i % 2]} number {i}" + " runs" * (i % 7) for i in range(20)]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts))
    model = run("predict", tiny, animals, f"--ckpt_path={saved}", f"--data.predict_file={file}").model
    (found,) = tmp_path.glob("runs/classification/lora/version_0/predict/predictions.jsonl")
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert [row["text"] for row in rows] == texts
    for row in rows:
        with torch.inference_mode():
            probabilities = model.net(**model.tokenizer(row["text"], return_tensors="pt")).logits.softmax(dim=1)[0]
        assert row["class"] == ("cat", "dog")[probabilities.argmax()]
        assert row["probability"] == pytest.approx(float(probabilities.max()), abs=1e-5)


def test_numbers_are_predicted_for_pairs(tiny: str, jsonl: Any, tmp_path: Path) -> None:
    rows = [{"one": f"Text {i}", "other": f"Text {i + 1}", "label": i / 10} for i in range(40)]
    options = ["--data.text=[one, other]", "--data.regression=true", "--model.metrics=[pearson]"]
    options.append("--trainer.max_steps=1")
    dataset = jsonl(rows)
    saved = fit(tiny, dataset, *options).trainer.checkpoint_callback.last_model_path
    file = tmp_path / "pairs.csv"
    file.write_text("one,other\nA,B\nC,D\n")
    run("predict", tiny, dataset, *options, f"--ckpt_path={saved}", f"--data.predict_file={file}")
    (found,) = tmp_path.glob("runs/classification/*/version_0/predict/predictions.jsonl")
    first, second = (json.loads(line) for line in found.read_text().splitlines())
    assert (first["one"], first["other"], second["one"]) == ("A", "B", "C")
    assert isinstance(first["number"], float)
    (tmp_path / "bad.csv").write_text("one\nA\n")
    with pytest.raises(MisconfigurationException, match=r"has the columns \['one'\] but not \['other'\]"):
        prepared(tiny, "predict", dataset=dataset, regression=True, text=["one", "other"], predict_file="bad.csv")


@pytest.mark.parametrize("kind", ["deberta-v2", "xlnet", "bart"])
def test_all_that_the_checkpoint_lacks_is_trained_and_saved(kind: str, tmp_path: Path) -> None:
    """Their checkpoints are language models, without the pooler or the head."""
    sizes = {
        "deberta-v2": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "xlnet": {"d_model": 16, "d_inner": 16, "n_layer": 1, "n_head": 2},
        "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    }
    config = transformers.AutoConfig.for_model(kind, vocab_size=100, **sizes[kind])
    model = transformers.AutoModel.from_config(config)
    model.save_pretrained(tmp_path / "base")
    net = load_with_head(str(tmp_path / "base"), {"r": 2, "target_modules": "all-linear"}, "float32", ["a", "b"], 0)
    pretrained = set(model.state_dict())
    for name, parameter in net.get_base_model().named_parameters():
        plain = name.replace(".modules_to_save.default", "").replace(".base_layer", "")
        if "lora_" not in name and "original_module" not in name:
            is_known = plain in pretrained or plain.partition(".")[2] in pretrained
            assert parameter.requires_grad == (not is_known), name
    net.save_pretrained(str(tmp_path / "adapter"))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 6, 7, 2]])  # BART reads the hidden state of its end token, 2
    assert torch.equal(net.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)


def test_a_head_for_other_classes_is_replaced(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.RobertaConfig(**sizes, intermediate_size=8, num_labels=3)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    net = load_with_head(str(tmp_path), {"r": 2, "target_modules": ["query"]}, "float32", ["a", "b"], 1)
    assert net(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2)


def test_a_run_does_not_go_on_at_rate_zero(tiny: str, animals: str, tmp_path: Path) -> None:
    """With larger batches the schedule would have fewer steps than the run has already taken."""
    cli = fit(tiny, animals, "--data.batch_size=4", "--trainer.max_epochs=2")
    last = f"--ckpt_path={cli.trainer.checkpoint_callbacks[0].last_model_path}"
    fit(tiny, animals, "--data.batch_size=4", "--trainer.max_epochs=3", last)
    differs = pytest.warns(UserWarning, match="data.init_args.batch_size 4 there, 32 here")
    with differs, pytest.raises(MisconfigurationException, match="resume with those of its start"):
        fit(tiny, animals, "--data.batch_size=32", "--trainer.max_epochs=4", last)


@pytest.mark.parametrize("bos", ["", "both", "first"])
def test_a_decoder_reads_a_pair_as_two_texts(bos: str, tokenizer: Any, tmp_path: Path, jsonl: Any) -> None:
    """Unless its tokenizer puts a mark between them, as Llama's does."""
    decoder = copy.deepcopy(tokenizer)
    if bos:
        mark, end = (decoder.bos_token, decoder.bos_token_id), " <|im_start|>" * (bos == "both")
        forms = TemplateProcessing("<|im_start|> $A", f"<|im_start|> $A{end} $B", [mark])
        decoder.backend_tokenizer.post_processor = forms
    decoder.save_pretrained(tmp_path / "decoder")
    rows = [{"one": "It rains.", "other": f"Is it wet, {i}?", "label": i % 2} for i in range(4)]
    options = {"text": ["one", "other"], "validation_share": 0, "test_share": 0}
    data = prepared(tmp_path / "decoder", dataset=jsonl(rows), **options)
    mark = decoder.bos_token
    between = {"": "\n", "both": mark, "first": "\n"}[bos]
    assert decoder.decode(data.parts["train"]["input_ids"][3]) == f"{mark * bool(bos)}It rains.{between}Is it wet, 3?"


def test_an_encoder_reads_a_pair_as_its_tokenizer_gives_it(roberta: str, jsonl: Any) -> None:
    rows = [{"one": "It rains.", "other": f"Is it wet, {i}?", "label": i % 2} for i in range(4)]
    data = prepared(roberta, dataset=jsonl(rows), text=["one", "other"], validation_share=0, test_share=0)
    known = transformers.AutoTokenizer.from_pretrained(roberta)
    assert data.parts["train"]["input_ids"][3] == known("It rains.", "Is it wet, 3?")["input_ids"]
    with pytest.raises(MisconfigurationException, match="names more than two columns, which needs a template"):
        prepared(roberta, text=["one", "other", "third"])


def test_a_table_with_each_class_replaces_the_training_data_in_predict(tiny: str, jsonl: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a film")
    few = jsonl([{"text": "x", "label": "good"}, {"text": "y", "label": "bad"}])
    data = prepared(tiny, "predict", dataset=few, predict_file=str(tmp_path / "texts.txt"))
    assert data.classes == ["bad", "good"]
