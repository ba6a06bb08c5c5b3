"""Thoughts before answers, several turns and {% generation %} blocks, in templates built like real ones."""

from pathlib import Path
from typing import Any

import pytest
from chat_templates import (
    GEMMA4,
    GLM,
    GPT_OSS,
    LLAMA3,
    PHI,
    QWEN3,
    QWEN35,
    QWEN35_SMALL,
    R1,
    messages,
    shipped,
    tokenizer,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import config_arguments, instruction_data, quick

from recipes.instruction_tuning.encoding import encode, template_message
from recipes.instruction_tuning.formats import conversation, turn
from recipes.language.chat import IGNORED, ChatEncoder

TURNS = messages("a?", "a!", "b?", "b!")


def learnt(encoder: ChatEncoder, turns: list[dict[str, Any]]) -> list[str]:
    """The texts of the tokens that are learnt, one for each run of them."""
    runs: list[list[int]] = [[]]
    for label in encoder.encode(turns).labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [str(encoder.tokenizer.decode(run)) for run in runs if run]


def thinking(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with thoughts before each answer, as the data give them to a template."""
    made = []
    for message in turns:
        thoughts = f"hm {message['content']}" if message["role"] == "assistant" else None
        made.append(template_message(turn(message["role"], message["content"], thoughts)))
    return made


@pytest.mark.parametrize(
    ("template", "answers", "opening"),
    [
        (QWEN3, ["a!<|im_end|>", "b!<|im_end|>"], "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (QWEN35, ["a!<|im_end|>", "b!<|im_end|>"], "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (GPT_OSS, ["a!<|end|>", "b!<|return|>"], "<|start|>assistant<|channel|>final<|message|>"),
        (PHI, ["a!<|end|>", "b!<|end|>\n<eos>"], "<|assistant|>\n"),
    ],
    ids=["qwen3", "qwen3.5", "gpt-oss", "phi"],
)
def test_each_turn_is_learnt_without_its_opening(template: str, answers: list[str], opening: str) -> None:
    encoder = ChatEncoder(tokenizer(template), 1000)
    assert learnt(encoder, TURNS) == answers
    prompt = encoder.encode_prompt(TURNS[:3])
    assert encoder.tokenizer.decode(prompt).endswith(opening)
    assert encoder.encode(TURNS).input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (QWEN35, ["a!<|im_end|>", "hm b!\n</think>\n\nb!<|im_end|>"]),
        (
            GPT_OSS,
            [
                "a!<|end|>",
                "<|channel|>analysis<|message|>hm b!<|end|><|start|>assistant<|channel|>final<|message|>b!<|return|>",
            ],
        ),
    ],
    ids=["qwen3.5", "gpt-oss"],
)
def test_thoughts_that_the_template_writes_are_learnt(template: str, answers: list[str]) -> None:
    assert learnt(ChatEncoder(tokenizer(template), 1000), thinking(TURNS)) == answers


@pytest.mark.parametrize(
    ("template", "arguments", "answer"),
    [
        (QWEN3, {"enable_thinking": False}, "<think>\nhm\n</think>\n\nso<|im_end|>"),
        (QWEN35_SMALL, {}, "hm\n</think>\n\nso<|im_end|>"),
        (QWEN35_SMALL, {"enable_thinking": False}, "hm\n</think>\n\nso<|im_end|>"),
        (GLM, {}, "<think>hm</think>so<|im_end|>"),
    ],
    ids=["qwen3", "qwen3.5 small", "qwen3.5 small, off", "glm"],
)
def test_labels_never_begin_within_thoughts(template: str, arguments: dict[str, Any], answer: str) -> None:
    """A prompt with a closed block is no beginning of a text with thoughts, and half of them would be learnt."""
    encoder = ChatEncoder(tokenizer(template), 1000, template_arguments=arguments)
    assert learnt(encoder, TURNS) == ["a!<|im_end|>", "b!<|im_end|>"]
    for turns in (messages("why?", "<think>hm</think>so"), messages("a?", "a!", "why?", "<think>hm</think>so")):
        refusal = r"the prompt for it ends with '.*template_arguments {\"enable_thinking\": true} would do"
        with pytest.raises(MisconfigurationException, match=refusal):
            encoder.encode(turns)
        room = ChatEncoder(tokenizer(template), 1000, template_arguments={"enable_thinking": True})
        assert learnt(room, turns)[-1] == answer
        prompt = room.encode_prompt(turns[:-1])
        assert room.encode(turns).input_ids[: len(prompt)] == prompt
    row = conversation("why?", "<think>hm</think>so", [], "why?")
    assert encode(row, room, with_options=True)["answer"] == ""  # which would be compared with an answer without any


def test_thoughts_that_the_template_leaves_out_are_noticed() -> None:
    encoder = ChatEncoder(tokenizer(LLAMA3), 1000)
    row = conversation("why?", "so", [], "why?")
    assert not encode(row, encoder, with_options=True)["leaves_thoughts"]
    row["messages"][1]["thoughts"] = "hm"
    encoded = encode(row, encoder, with_options=True)
    assert encoded["leaves_thoughts"]
    assert learnt(encoder, thinking(messages("why?", "so"))) == ["so<|eot|>"]
    kept = encode(row, ChatEncoder(tokenizer(QWEN35), 1000), with_options=True)
    assert (kept["leaves_thoughts"], kept["answer"], kept["prompt_ids"]) == (False, "", [])  # and is not generated


# -- a prompt is what was trained

EMPTY = "<think>\n\n</think>\n\n"
PLAIN = {"question": "why?", "answer": "so"}
WITHOUT = f"without, after {EMPTY!r}, which prompts of `predict` lack"
THINKING = {"question": "how?", "answer": "<think>\nhm\n</think>\n\nso"}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_training", "qwen3_5_think", "qwen3_8", "gptoss", "glm4moe"])
@pytest.mark.parametrize("form", ["content", "field"])
def test_thoughts_follow_the_prompt_that_leaves_room_for_them(name: str, form: str) -> None:
    """In models' own templates, all of which open an answer without thoughts otherwise than one with some."""
    encoder = ChatEncoder(tokenizer(shipped(name), end="<|im_end|>"), 1000)
    (ask, plain) = messages("why?", "so")
    thought = {**plain, "content": "<think>hm</think>so"} if form == "content" else thinking([plain])[0]
    for answer, thinks in ((plain, False), (thought, True)):
        encoded = encoder.encode([ask, answer])
        prompt = encoder.encode_prompt([ask], thinks)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt)] != IGNORED
        assert set(encoded.labels[: len(prompt)]) == {IGNORED}
        assert encoded.thinks == thinks
        assert ("hm" in learnt(encoder, [ask, answer])[-1]) == thinks
        assert not encoded.leaves_thoughts


@pytest.mark.usefixtures("command_line", "own_datasets")
@pytest.mark.parametrize(
    ("rows", "tail", "told"),
    [
        ([PLAIN, PLAIN], EMPTY, None),
        ([THINKING, THINKING], "", f"; 2 of them with thoughts before their answers, 0 {WITHOUT}"),
        ([THINKING, PLAIN], "", f"; 1 of them with thoughts before their answers, 1 {WITHOUT}"),
    ],
    ids=["without", "with", "half"],
)
def test_predict_asks_as_was_trained(
    rows: list[Any], tail: str, told: str | None, tiny: str, jsonl: Any, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "qwen.jinja").write_text(QWEN3)
    (tmp_path / "prompts.txt").write_text("who?\n")
    other = jsonl([{"question": "where?", "answer": "there"}], "other.jsonl")
    options = [f"--model.model={tiny}", "--data.chat_template=qwen.jinja", f"--data.validation_split={other}"]
    options += [f"--data.dataset={jsonl(rows)}", "--model.max_new_tokens=2"]
    base = config_arguments("instruction_tuning", "lora")
    cli = quick("fit", base, *options, "--trainer.max_steps=1")
    assert cli.datamodule.reports["train"].endswith(told or "2 conversations")
    caplog.clear()
    last = cli.trainer.checkpoint_callback.last_model_path
    quick("predict", base, *options, f"--ckpt_path={last}", "--data.prompts=prompts.txt")
    ends = f"<|im_end|>\n<|im_start|>assistant\n{tail}"
    assert f"The first prompt ends with {ends!r}" in caplog.text


@pytest.mark.usefixtures("command_line", "own_datasets")
def test_what_is_said_of_an_opening_is_true(tiny: str, jsonl: Any, caplog: Any) -> None:
    settings: dict[str, Any] = {"chat_template": QWEN3, "validation_share": 0, "test_share": 0}
    for arguments, told in ((None, "train: 1 conversations"), ({"enable_thinking": True}, f"answers, 1 {WITHOUT}")):
        caplog.clear()
        data = instruction_data("fit", tiny, dataset=jsonl([PLAIN]), template_arguments=arguments, **settings)
        assert f"writes {EMPTY!r} before an answer without thoughts" in caplog.text
        assert "It is not learnt, and prompts for such answers get it too" in caplog.text
        assert data.reports["train"].endswith(told)


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "lfm2_2_5"])
def test_thoughts_of_earlier_answers_that_the_template_leaves_out_are_noticed(name: str) -> None:
    encoder = ChatEncoder(tokenizer(shipped(name), end="<|im_end|>"), 1000)
    of_content = messages("a?", "<think>hm a!</think>a!", "b?", "<think>hm b!</think>b!")
    for turns in (of_content, thinking(TURNS)):
        assert encoder.encode(turns).leaves_thoughts
        assert "hm a!" not in encoder.tokenizer.decode(encoder.encode(turns).input_ids)
        assert not encoder.encode(turns[2:]).leaves_thoughts
    assert not encoder.encode(TURNS).leaves_thoughts


def test_a_refusal_names_the_arguments_that_help() -> None:
    with pytest.raises(MisconfigurationException, match=r'Here template_arguments {"enable_thinking": true} would do'):
        ChatEncoder(tokenizer(GEMMA4), 1000)
    encoder = ChatEncoder(tokenizer(GEMMA4), 1000, template_arguments={"enable_thinking": True})
    assert learnt(encoder, TURNS) == ["a!<turn|>", "b!<turn|>"]
    with pytest.raises(MisconfigurationException, match=r"Set chat_template to one with .*use single-turn data$"):
        ChatEncoder(tokenizer(R1), 1000)


# -- {% generation %} blocks

# As in training templates: the block begins before what opens an answer, in each turn.
MARKED_QWEN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' + m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_marks_leave_the_opening_of_every_turn_out() -> None:
    encoder = ChatEncoder(tokenizer(MARKED_QWEN), 1000)
    assert learnt(encoder, TURNS) == ["a!<|im_end|>", "b!<|im_end|>"]
    assert learnt(encoder, thinking(TURNS)) == [f"hm {x}!\n</think>\n\n{x}!<|im_end|>" for x in ("a", "b")]
    first = [TURNS[0], {**TURNS[1], "learnt": False}, *TURNS[2:]]
    assert learnt(encoder, first) == ["b!<|im_end|>"]


def test_marks_behind_another_prompt_are_warned_of() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}Q:{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:<think>{% endif %}"
    )
    with pytest.warns(UserWarning, match="is not what answers follow in training"):
        encoder = ChatEncoder(tokenizer(template), 1000)
    assert learnt(encoder, TURNS) == ["a!", "b!"]
