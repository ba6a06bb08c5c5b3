"""Conversations as tokens and labels, with templates built like those of well-known models."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from chat_templates import BARE, FOREIGN, GEMMA, LLAMA3, MISTRAL, MISTRAL3, QWEN3, messages, shipped, tokenizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from recipes.language.batches import collate, padding_id
from recipes.language.chat import IGNORED, ChatEncoder
from recipes.language.model import answer_log_likelihood, ending, generate_answers
from recipes.vqa.conversation import sized

NO_THOUGHTS = "<think>\n\n</think>\n\n"
ANSWERED = {  # what is learnt of a last answer "so"
    QWEN3: "so<|im_end|>",
    LLAMA3: "so<|eot|>",
    GEMMA: "so<end_of_turn>",
    MISTRAL: " so<eos>",
    MISTRAL3: " so<eos>",
    BARE: " so<eos>",
}


def learnt(encoder: ChatEncoder, *turns: str) -> str:
    return str(encoder.tokenizer.decode([label for label in encoder.encode(messages(*turns)).labels if label >= 0]))


# -- what is learnt, and the prompts


@pytest.mark.parametrize("template", ANSWERED, ids=["qwen3", "llama3", "gemma", "mistral", "mistral v0.3", "bare"])
def test_a_prompt_and_what_is_learnt_are_the_whole_conversation(template: str) -> None:
    encoder = ChatEncoder(tokenizer(template), 1000)
    ids, labels, *_ = encoder.encode(messages("why?", "so"))
    prompt = encoder.encode_prompt(messages("why?"))
    answer = [label for label in labels if label != IGNORED]
    assert encoder.tokenizer.decode(answer) == ANSWERED[template]
    assert ids[: len(prompt) + len(answer)] == prompt + answer
    assert labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert encoder.tokenizer.decode(ids[len(prompt) + len(answer) :]).strip() == ""


@pytest.mark.parametrize("arguments", [None, {"enable_thinking": False}])
def test_an_empty_block_of_thoughts_belongs_to_the_prompt(arguments: dict[str, Any] | None) -> None:
    encoder = ChatEncoder(tokenizer(QWEN3), 1000, template_arguments=arguments)
    prompt = encoder.tokenizer.decode(encoder.encode_prompt(messages("why?")))
    assert prompt == f"<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n{NO_THOUGHTS}"
    assert learnt(encoder, "why?", "so") == "so<|im_end|>"
    # An answer whose text also occurs in the block, and one before the last question, which has no block.
    assert learnt(encoder, "a?", "a!", "b?", "think") == "a!<|im_end|>think<|im_end|>"


# -- system messages


@pytest.mark.parametrize("template", [GEMMA, MISTRAL, MISTRAL3, BARE], ids=["gemma", "mistral", "mistral v0.3", "bare"])
def test_a_system_message_that_a_template_takes_not_heads_the_question(template: str) -> None:
    encoder = ChatEncoder(tokenizer(template), 1000, system_prompt="Be brief.")
    assert "Be brief.\n\nwhy?" in encoder.tokenizer.decode(encoder.encode_prompt(messages("why?")))
    own = [{"role": "system", "content": "Be long."}, *messages("why?", "so")]
    encoded = encoder.encode(own)
    assert "Be long.\n\nwhy?" in encoder.tokenizer.decode(encoded.input_ids)
    assert "Be brief." not in encoder.tokenizer.decode(encoded.input_ids)
    turns = messages("a?", "a!", "b?", "b!")
    prompt = encoder.encode_prompt(turns[:3])
    assert encoder.encode(turns).input_ids[: len(prompt)] == prompt
    assert "Be brief.\n\na?" in encoder.tokenizer.decode(prompt)


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3", "gemma", "gemma3", "qwen3_5_think"])
def test_a_developer_message_is_a_system_message(name: str) -> None:
    """In models' own templates, some of which drop that role or write it as an unknown one."""
    encoder = ChatEncoder(tokenizer(shipped(name), end="<|im_end|>"), 1000, system_prompt="Be long.")
    as_developer = [{"role": "developer", "content": "Be brief."}, *messages("why?", "so")]
    encoded = encoder.encode(as_developer)
    assert encoded == encoder.encode([{**as_developer[0], "role": "system"}, *as_developer[1:]])
    text = encoder.tokenizer.decode(encoded.input_ids)
    assert "Be brief." in text
    assert "Be long." not in text
    assert "developer" not in text


@pytest.mark.parametrize("name", ["gptoss", "gemma4_v2"])
def test_a_template_that_knows_developers_gets_their_message(name: str) -> None:
    encoder = ChatEncoder(tokenizer(shipped(name)), 1000, system_prompt="Be long.")
    turns = [{"role": "developer", "content": "Be brief."}, *messages("why?", "so")]
    text = encoder.tokenizer.decode(encoder.encode(turns).input_ids)
    assert text == encoder.tokenizer.apply_chat_template(turns, tokenize=False)


def test_an_option_gets_no_end_that_the_template_does_not_give_it() -> None:
    """It is scored by its own tokens only."""
    for template, answer in ANSWERED.items():
        encoder = ChatEncoder(tokenizer(template), 1000)
        labels = encoder.encode(messages("why?", "so"), ends=False).labels
        learnt_text = encoder.tokenizer.decode([label for label in labels if label != IGNORED])
        assert learnt_text == (" so" if template == BARE else answer)


def test_what_a_template_refuses_is_no_traceback_of_jinja() -> None:
    with pytest.raises(MisconfigurationException, match=r"can't render a conversation: TemplateSyntaxError"):
        ChatEncoder(tokenizer(MISTRAL), 1000, "{% for %}")


# -- padding, and where answers end


@pytest.mark.parametrize(
    ("template", "pad"),
    [(QWEN3, "<eos>"), (LLAMA3, None), (GEMMA, None), (FOREIGN, None)],
    ids=["qwen3", "llama3", "gemma", "foreign"],
)
def test_answers_learnt_without_a_pad_token_are_generated_as_they_are(template: str, pad: str | None) -> None:
    encoder = ChatEncoder(tokenizer(template, pad), 1000)
    examples = {"a?": "no", "bb?": "yes, of course"}
    encoded = [encoder.encode(messages(*turn)) for turn in examples.items()]
    columns: dict[str, list[Any]] = {"gold": [0, 0], "prompt_ids": [[], []], "answer": ["", ""]}
    columns["input_ids"] = [[e.input_ids] for e in encoded]
    columns["labels"] = [[e.labels] for e in encoded]
    batch = collate(columns, padding_id(encoder.tokenizer))
    lengths = [len(e.input_ids) for e in encoded]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    for row, length in enumerate(lengths):
        assert (batch["input_ids"][row, length:] != 0).all()
        assert (batch["labels"][row, length:] == IGNORED).all()
        learnt_ids = batch["labels"][row][batch["labels"][row] != IGNORED]
        assert encoder.tokenizer.decode(learnt_ids).endswith(encoder.answer_end or encoder.tokenizer.eos_token)
    net = trained(encoder.tokenizer, batch)
    prompts = [encoder.encode_prompt(messages(question)) for question in examples]
    assert generate_answers(net, prompts, encoder.tokenizer, 40, answer_end=encoder.answer_end) == list(
        examples.values()
    )


def trained(tokenizer: Any, batch: dict[str, Any]) -> Any:
    """A tiny Llama that has memorized one batch."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    net = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        log_likelihood, tokens = answer_log_likelihood(
            net, {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"]
        )
        optimizer.zero_grad()
        (-log_likelihood.sum() / tokens.sum()).backward()
        optimizer.step()
    return net.eval()


def test_a_tokenizer_that_could_neither_pad_nor_end_is_refused() -> None:
    own = tokenizer(LLAMA3)
    assert padding_id(own) == own.eos_token_id
    own.eos_token = None
    with pytest.raises(MisconfigurationException, match="neither a pad token nor an end token"):
        padding_id(own)


def test_an_answer_ends_at_any_of_the_models_end_tokens_and_where_the_template_ends_it() -> None:
    own = tokenizer(GEMMA)
    net = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[3, 5]))
    assert ending(net, own, "") == {"eos_token_id": [3, 5, own.eos_token_id]}
    end = ChatEncoder(own, 1000).answer_end
    assert end == "<end_of_turn>"
    assert ending(SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None)), own, end) == {
        "eos_token_id": sorted(own.convert_tokens_to_ids(["<end_of_turn>", "<eos>"]))
    }
    assert ending(net, own, "###") == {
        "eos_token_id": [3, 5, own.eos_token_id],
        "stop_strings": ["###"],
        "tokenizer": own,
    }
    assert [ChatEncoder(tokenizer(template), 1000).answer_end for template in (QWEN3, LLAMA3, MISTRAL, BARE)] == [
        ""
    ] * 4


@pytest.mark.parametrize(
    ("size", "largest", "expected"),
    [((100, 50), None, (100, 50)), ((100, 50), 1250, (50, 25)), ((10000, 1), 100, (1000, 1))],
)
def test_sizes(size: tuple[int, int], largest: int | None, expected: tuple[int, int]) -> None:
    assert sized(Image.new("RGB", size), largest).size == expected
