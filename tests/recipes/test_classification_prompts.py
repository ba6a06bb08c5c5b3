"""Prompts and label words on a tiny random RoBERTa and Llama: the shipped configurations, and faulty ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hub_sets import prepared
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from recipe_runs import quick, trained
from tokenizers.processors import TemplateProcessing

from recipes.classification import data as recipe_data
from recipes.classification.prompts import Prompt, word_tokens
from recipes.command_line.cli import RecipeCLI

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

CONFIGS = Path(recipe_data.__file__).parent / "configs"
EFMLORA = ["--trainer.callbacks+=lightning_flatlora.EFMLoRA", "--trainer.callbacks.rho=0.05"]


def run(command: str, model: str, glue: str, task: str, *options: str) -> RecipeCLI:
    configs = [f"--config={CONFIGS / name}.yaml" for name in ("base", "prompt", f"prompt/{task}")]
    given = [f"--model.model={model}", f"--data.dataset={glue}", "--data.shots=12", "--data.batch_size=8"]
    given += ["--trainer.max_steps=9", "--trainer.val_check_interval=3"] if command == "fit" else []
    return quick(command, configs, *given, *options)


CAUSAL = [
    "--data.template={sentence} It was",
    "--model.lora.target_modules=[q_proj,v_proj]",
    "--model.label_words={negative: bad, positive: good}",
]


# -- training


def test_a_masked_model_learns_and_its_best_checkpoint_is_what_a_test_loads(roberta: str, glue: str) -> None:
    options = ["--model.learning_rate=1e-2", "--trainer.max_steps=30", "--trainer.val_check_interval=10"]
    cli = run("fit", roberta, glue, "sst2", *options, *EFMLORA)
    assert cli.trainer.global_step == 30
    assert len(cli.datamodule.parts["train"]) == len(cli.datamodule.parts["validation"]) == 24
    saver = cli.trainer.checkpoint_callback
    assert saver.best_model_score > 0.9
    best = run("validate", roberta, glue, "sst2", f"--ckpt_path={saver.best_model_path}").trainer.callback_metrics
    assert best["val_score"] == saver.best_model_score
    with pytest.raises(MisconfigurationException, match=r"was trained on .*, except for .*shots_seed 13: give these"):
        run("validate", roberta, glue, "sst2", "--data.shots_seed=21", f"--ckpt_path={saver.best_model_path}")
    tested = run("test", roberta, glue, "sst2").trainer.callback_metrics
    assert set(tested) == {"test_loss", "test_accuracy", "test_score"}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
def test_the_whole_head_is_trained_and_untied(roberta: str, glue: str) -> None:
    before = trained(run("fit", roberta, glue, "sst2", "--trainer.max_steps=0"))
    cli = run("fit", roberta, glue, "sst2", "--trainer.max_steps=3")
    head = {
        name for name, weight in trained(cli).items() if "lora_" not in name and not torch.equal(weight, before[name])
    }
    endings = {name.partition("modules_to_save.default.")[2] for name in head}
    assert endings >= {"dense.weight", "layer_norm.weight", "decoder.weight"}
    pretrained = transformers.AutoModelForMaskedLM.from_pretrained(roberta)
    base = cli.model.net.get_base_model()
    assert torch.equal(base.get_input_embeddings().weight, pretrained.get_input_embeddings().weight)
    ids = torch.tensor([[0, 5, 4, 2]])
    (saved,) = Path().glob("runs/*/lora/version_1/checkpoints/last/adapter_config.json")
    with torch.no_grad():
        expected = cli.model.eval().net(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(pretrained, str(saved.parent)).eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded, expected)


@pytest.fixture(scope="module")
def gpt2(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random GPT-2, whose tokenizer has no padding token, and pads on the left."""
    folder = str(tmp_path_factory.mktemp("gpt2"))
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.GPT2TokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, padding_side="left").save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("kind", ["masked", "llama", "gpt2"])
def test_logits_are_the_label_words_at_the_mask_or_after_the_prompt(
    kind: str, roberta: str, tiny: str, gpt2: str, glue: str
) -> None:
    model = {"masked": roberta, "llama": tiny, "gpt2": gpt2}[kind]
    options = [] if kind == "masked" else CAUSAL
    if kind == "gpt2":
        options = [*options, "--model.lora.target_modules=[c_attn]", "--model.lora.fan_in_fan_out=true"]
    cli = run("fit", model, glue, "sst2", *options, "--trainer.max_steps=0")
    auto = transformers.AutoModelForMaskedLM if kind == "masked" else transformers.AutoModelForCausalLM
    plain, tokenizer = auto.from_pretrained(model), transformers.AutoTokenizer.from_pretrained(model)
    batch = next(iter(cli.datamodule.loader("train")))
    assert not batch["attention_mask"].all()
    cli.model.eval()
    words = [" terrible", " great"] if kind == "masked" else [" bad", " good"]
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    with torch.no_grad():
        for row, logits in enumerate(cli.model.logits(batch)):
            own = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            place = own.tolist().index(tokenizer.mask_token_id) if kind == "masked" else -1
            expected = plain(input_ids=own[None]).logits[0, place, ids]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


# -- the shipped prompts

ROWS = {
    "sst2": (["A fine film"], "A fine film It was<mask>."),
    "sst5": (["A fine film"], "A fine film It was<mask>."),
    "trec": (["Who was it ?"], "<mask>: Who was it ?"),
    "mnli": (["It was good.", "The film was good."], "It was good?<mask>, the film was good."),
    "snli": (["It was good.", "The film was good."], "It was good?<mask>, the film was good."),
    "rte": (["It was good.", "The film was good."], "It was good?<mask>, the film was good."),
}


@pytest.mark.parametrize("task", ROWS)
def test_the_prompts_of_the_protocol(task: str, roberta: str) -> None:
    settings = yaml.safe_load((CONFIGS / "prompt" / f"{task}.yaml").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(roberta)
    data, words = settings["data"]["init_args"], settings["model"]["init_args"]["label_words"]
    length = data.get("max_length", 128)
    columns = recipe_data.TextData(**data).text_columns
    prompt = Prompt(data["template"], columns, tokenizer, length, data.get("text_tokens"))
    texts, expected = ROWS[task]
    encoded = prompt({"texts": texts})
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=False) == f"<s>{expected}</s>"
    assert encoded["input_ids"][encoded["position"]] == tokenizer.mask_token_id
    tokens = word_tokens(words, list(words), tokenizer)
    assert [tokenizer.decode([token]) for token in tokens] == [f" {word}" for word in words.values()]
    long = prompt({"texts": ["bad " * 300] * len(texts)})
    kept = tokenizer.decode(long["input_ids"]).count("bad")
    assert kept == 110 if "text_tokens" in data else long["length"] == length
    assert long["input_ids"].count(tokenizer.mask_token_id) == 1


@pytest.mark.parametrize("task", ["sst2", "mnli", "rte"])
def test_the_data_of_the_protocol_have_the_classes_of_the_label_words(task: str, roberta: str, glue: str) -> None:
    common, own = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("prompt.yaml", f"prompt/{task}.yaml"))
    settings = common["data"]["init_args"] | own["data"]["init_args"] | {"dataset": glue, "shots": 4, "test_rows": 5}
    data = prepared(roberta, **settings)
    assert set(data.classes) == set(own["model"]["init_args"]["label_words"])
    for part in ("train", "validation"):
        assert sorted(data.parts[part]["labels"]) == sorted(4 * list(range(len(data.classes))))
    assert len(prepared(roberta, "test", **settings).parts["test"]) == 5


@pytest.mark.parametrize("text", ["good \U0001f600\U0001f601", "\u6f22\u5b57" * 9])
def test_characters_of_several_tokens_are_kept_or_dropped_whole(text: str, roberta: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(roberta)
    template = len(tokenizer(" It was<mask>.")["input_ids"])
    for tokens in range(12):
        for limits in ({"max_length": template + tokens}, {"max_length": 100, "text_tokens": tokens}):
            prompt = Prompt("{text} It was {mask}.", ["text"], tokenizer, **limits)
            encoded = prompt({"texts": [text]})
            assert encoded["length"] <= template + tokens
            kept = tokenizer.decode(encoded["input_ids"], skip_special_tokens=True).removesuffix(" It was.")
            assert text.startswith(kept)


def test_the_end_of_a_text_is_changed_before_it_is_cut(roberta: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(roberta)
    for text_tokens, expected in ((None, "It was good? Yes"), (2, "It was? Yes")):
        prompt = Prompt("{text:no_end}? {other}", ["text", "other"], tokenizer, 32, text_tokens)
        ids = prompt({"texts": [" It was good. ", "Yes "]})["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == expected


def test_the_word_follows_a_causal_prompt_and_not_its_end_token(tiny: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    plain = Prompt("{text} It was", ["text"], tokenizer, 32)({"texts": ["A film"]})
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    assert tokenizer("It was")["input_ids"][-1] == tokenizer.eos_token_id
    assert Prompt("{text} It was", ["text"], tokenizer, 32)({"texts": ["A film"]}) == plain


# -- what is refused


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("It was {mask}.", r"must hold texts out of \['{text}'\]"),
        ("{review} It was {mask}.", "must hold texts"),
        ("{text} {mask} {mask}.", r"may hold {mask} once"),
        ("{text} It was ", "must not end in a space"),
        ("{text", r"can't be read: .*; write \{\{ or \}\}"),
        ("{text!r} {mask}.", "optionally with :no_end or :lower"),
        ("{text} {mask:lower}.", "optionally with :no_end or :lower"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template: str, message: str, roberta: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(roberta)
    with pytest.raises(MisconfigurationException, match=message):
        Prompt(template, ["text"], tokenizer, 32)


def test_prompts_that_cannot_be_read_are_refused(roberta: str, tokenizer: Any) -> None:
    masked, template = transformers.AutoTokenizer.from_pretrained(roberta), "{text} It was {mask}."
    with pytest.raises(MisconfigurationException, match="if the model has a mask token"):
        Prompt(template, ["text"], tokenizer, 32)
    for text, length, message in (
        ("a <mask> film", 32, "the mask token itself"),
        ("a", 4, "is longer than max_length=4, and '' can't be cut further"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            Prompt(template, ["text"], masked, length)({"texts": [text]})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"negative": "terrible"}, r"must have a word for each of \['negative', 'positive'\]"),
        ({"negative": "terrible", "positive": "splendid"}, r"'splendid' must be one token, .* but is \["),
        ({"negative": "great", "positive": "great"}, "must be one token, different for each class"),
    ],
)
def test_words_that_do_not_fit_are_refused(words: dict[str, str], message: str, roberta: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        word_tokens(words, ["negative", "positive"], transformers.AutoTokenizer.from_pretrained(roberta))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.template=null", "template=None: prompts need both"),
        (
            "--model.label_words=null",
            "label_words=None and .*set model.label_words and data.template to null for a new head",
        ),
        ("--model.head_learning_rate=0.1 --model.lora.modules_to_save=[]", "nothing is trained next to the adapter"),
    ],
)
def test_settings_of_a_head_and_of_words_are_not_mixed(option: str, message: str, roberta: str, glue: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        run("fit", roberta, glue, "sst2", *option.split())
