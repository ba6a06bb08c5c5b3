"""Texts for meanings, with tiny random GPT-2s on files in E2E's schema, through the recipe's command line."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from nlg_sets import END, meanings, save_e2e
from peft import PeftModel
from recipe_runs import packaged_arguments, quick
from torch import nn

from recipes.command_line.cli import RecipeCLI
from recipes.command_line.configs import RECIPES
from recipes.language.export import export
from recipes.language.joint_attention import join_attention, split_attention
from recipes.nlg.module import DEFAULT, NoRepeatInText, TextGeneration, arguments

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")

E2E = [f"--config={RECIPES / 'nlg' / 'configs' / 'e2e.yaml'}"]
SHORT = ["--model.max_new_tokens=6", "--model.metrics=[bleu,nist]"]


@pytest.fixture(scope="module")
def e2e(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_e2e(tmp_path_factory.mktemp("e2e"))


def run(command: str, model: str, dataset: str, *options: str, overlay: Any = E2E) -> RecipeCLI:
    given = [f"--model.init_args.model={model}", f"--data.dataset={dataset}"]
    given += ["--model.warmup_steps=2", "--data.max_length=120", *SHORT]
    return quick(command, [*packaged_arguments("nlg"), *overlay], *given, *options)


# -- the loss


def test_the_loss_is_that_of_the_text_alone_with_smoothed_labels(gpt2: str, e2e: str) -> None:
    options = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--model.lora.lora_dropout=0"]
    cli = run("fit", gpt2, e2e, *options)
    module, data = cli.model.eval(), cli.datamodule
    row = data.parts["train"][5]
    ids = torch.tensor(row["input_ids"])
    text = cli.model.tokenizer.decode(ids)
    meaning, (first, *_) = meanings(2, 3)[0]
    assert text == f"{meaning}{END} {first}{END}"
    # By hand: 0.9 of the right token, 0.1 of the mean over the vocabulary, after the first end token.
    logs = module.net(input_ids=ids[None]).logits[0].log_softmax(-1)
    start = ids.tolist().index(module.tokenizer.eos_token_id) + 1
    expected = []
    for place in range(start, len(ids)):
        log = logs[place - 1]
        expected.append(0.9 * log[ids[place]] + 0.1 * log.mean())
    module.log = lambda *args, **kwargs: None
    batch = next(iter(data.loader("train")))
    labels = torch.tensor([row["labels"]])
    pair = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "labels": labels}
    torch.testing.assert_close(module.loss(pair), -torch.stack(expected).mean())
    sums, numbers = module.log_likelihood(batch)
    module.label_smoothing = 0.0
    torch.testing.assert_close(module.loss(batch), -sums.sum() / numbers.sum())


# -- generated texts


@pytest.fixture(scope="module")
def writer(gpt2: str) -> TextGeneration:
    """A module whose GPT-2 generates texts of different lengths."""
    module = TextGeneration(model=gpt2, max_new_tokens=24)
    module.configure_model()
    return module.eval()


PROMPTS = [meaning for meaning, _ in meanings(0, 5)] + ["pub", "name[The Eagle]"]


def prompts(module: TextGeneration) -> list[list[int]]:
    tokenizer = module.tokenizer
    return [[*tokenizer(prompt)["input_ids"], tokenizer.eos_token_id] for prompt in PROMPTS]


def test_texts_of_a_batch_are_those_of_single_meanings(writer: TextGeneration) -> None:
    together = writer.generate(prompts(writer))
    assert together == [writer.generate([ids])[0] for ids in prompts(writer)]
    assert len(set(map(len, together))) > 1


def test_texts_may_repeat_their_meaning_but_not_themselves(writer: TextGeneration) -> None:
    ids = prompts(writer)[0]
    scores = torch.zeros(1, 400)
    prompt = torch.tensor([[1, 2, 3, 4]])
    rule = NoRepeatInText(3, prompt.shape[1])
    inside = torch.cat([prompt, torch.tensor([[2, 3]])], dim=1)
    assert torch.equal(rule(inside, scores.clone()), scores)  # transformers' own rule would forbid 4 here
    again = torch.cat([prompt, torch.tensor([[7, 8, 9, 7, 8]])], dim=1)
    assert rule(again, scores.clone())[0].isinf().nonzero().tolist() == [[9]]
    for decoding, repeats in ((DEFAULT, False), ({"num_beams": 1}, True)):
        options = {"do_sample": False, "max_new_tokens": 60, "pad_token_id": 0, **arguments(decoding, len(ids))}
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        text = writer.net.generate(**inputs, **options)[0, len(ids) :].tolist()
        fours = [tuple(text[i : i + 4]) for i in range(len(text) - 3)]
        assert (len(fours) > len(set(fours))) is repeats


def test_the_test_writes_one_text_for_each_meaning(gpt2: str, e2e: str, tmp_path: Path) -> None:
    cli = run("test", gpt2, e2e)
    (texts_file,) = tmp_path.glob("runs/**/test_texts.tsv")
    (references_file,) = tmp_path.glob("runs/**/test_references.tsv")
    with texts_file.open(encoding="utf-8", newline="") as file:
        header, *texts = list(csv.reader(file, delimiter="\t"))
    with references_file.open(encoding="utf-8", newline="") as file:
        _, *references = list(csv.reader(file, delimiter="\t"))
    assert header == ["mr", "output"]
    assert [row[0] for row in texts] == [meaning for meaning, _ in meanings(42, 49)]
    expected = []
    for meaning, lines in meanings(42, 49):
        expected += [[meaning, line] for line in lines]
    assert references == expected
    asked = [cli.datamodule.encoder.prompt(meaning) for meaning, _ in meanings(42, 49)]
    dropouts = {name: m.p for name, m in cli.model.net.named_modules() if isinstance(m, nn.Dropout)}
    assert {p for name, p in dropouts.items() if "lora_dropout" not in name} == {0.0} < set(dropouts.values())
    written = cli.model.eval().generate(asked)
    assert [row[1] for row in texts] == [" ".join(text.split()) for text in written]


# -- other models, and exporting


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_export_gives_a_plain_gpt2(gpt2: str, e2e: str, tmp_path: Path) -> None:
    options = ["--model.learning_rate=0.1", "--model.warmup_steps=0"]
    options.append("--model.model_config={activation_function: relu}")
    cli = run("fit", gpt2, e2e, "--trainer.max_steps=2", *options)
    adapter = tmp_path / "runs" / "nlg" / "lora" / "version_0" / "checkpoints" / "last"
    base = transformers.AutoModelForCausalLM.from_pretrained(gpt2, activation_function="relu")
    split_attention(base, ["q_proj", "v_proj"])
    loaded = PeftModel.from_pretrained(base, str(adapter)).eval()
    ids = torch.tensor(prompts(cli.model)[:1])
    expected = cli.model.eval().net(input_ids=ids).logits
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    export(adapter, tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert isinstance(plain.transformer.h[0].attn.c_attn, transformers.pytorch_utils.Conv1D)
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    with loaded.disable_adapter():
        assert (plain(input_ids=ids).logits - loaded(input_ids=ids).logits).abs().max() > 1e-2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "plain").eos_token == END
    with pytest.raises(ValueError, match="merge it first"):
        join_attention(loaded)


# -- what is refused


def test_decoding_that_generate_does_not_know_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"\['beams'\] can't be set"):
        TextGeneration(model="gpt2", decoding={"beams": 3})


def test_bad_models_are_refused_before_training(gpt2: str, e2e: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"can't be loaded .*unexpected keyword argument 'pdrop'"):
        run("fit", gpt2, e2e, "--model.model_config={pdrop: 0.1}")
