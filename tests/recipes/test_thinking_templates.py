"""Thoughts before answers, and several turns, in templates built like real ones."""

from pathlib import Path
from typing import Any

import pytest
from chat_templates import GEMMA4, GPT_OSS, LLAMA3, PHI, QWEN3, QWEN35, R1, learnt_texts, messages, shipped, tokenizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import config_arguments, quick

from recipes.instruction_tuning.data import encode, template_message
from recipes.instruction_tuning.formats import conversation, turn
from recipes.language.chat import IGNORED, ChatEncoder

TURNS = messages("a?", "a!", "b?", "b!")


def learnt(encoder: ChatEncoder, turns: list[dict[str, Any]]) -> list[str]:
    return learnt_texts(encoder.tokenizer, encoder.encode(turns).labels)


def thinking(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with thoughts before each answer, in the form that a template receives."""
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
        (GPT_OSS, ["a!", "b!<|return|>"], "<|start|>assistant<|channel|>final<|message|>"),
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


THINK = {"enable_thinking": True}
GPT_OSS_THOUGHTS = "<|channel|>analysis<|message|>hm so<|end|><|start|>assistant<|channel|>final<|message|>so<|return|>"


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (QWEN3, "<think>\nhm so\n</think>\n\nso<|im_end|>"),
        (QWEN35, "hm so\n</think>\n\nso<|im_end|>"),
        (GPT_OSS, GPT_OSS_THOUGHTS),
    ],
    ids=["qwen3", "qwen3.5", "gpt-oss"],
)
def test_thoughts_are_learnt_if_prompts_leave_room_for_them(template: str, answer: str) -> None:
    """A prompt with a closed block is not the beginning of a text with thoughts; half of these would be learnt."""
    in_content = messages("why?", "<think>hm so</think>so")
    later = [*messages("a?", "a!"), *in_content]
    forms = [in_content, later]
    if template in (QWEN35, GPT_OSS):  # these read thoughts from a field
        forms.append(thinking(messages("why?", "so")))
    own = tokenizer(template)
    for turns in forms:
        with pytest.raises(MisconfigurationException, match=r'prompt, which ends with .*{"enable_thinking": true}'):
            ChatEncoder(own, 1000).encode(turns)
        room = ChatEncoder(own, 1000, template_arguments=THINK)
        assert learnt(room, turns)[-1] == answer
        prompt = room.encode_prompt(turns[:-1])
        assert room.encode(turns).input_ids[: len(prompt)] == prompt
    row = conversation("why?", "<think>hm so</think>so", [], "why?")
    assert encode(row, room, with_options=True)["answer"] == ""  # it would be compared with an answer without thoughts


def test_thoughts_that_the_template_leaves_out_are_noticed() -> None:
    encoder = ChatEncoder(tokenizer(LLAMA3), 1000)
    row = conversation("why?", "so", [], "why?")
    assert not encode(row, encoder, with_options=True)["leaves_out"]
    row["messages"][1]["thoughts"] = "hm"
    encoded = encode(row, encoder, with_options=True)
    assert encoded["leaves_out"]
    assert learnt(encoder, thinking(messages("why?", "so"))) == ["so<|eot|>"]
    room = ChatEncoder(tokenizer(QWEN35), 1000, template_arguments=THINK)
    kept = encode(row, room, with_options=True)
    assert (kept["leaves_out"], kept["answer"], kept["prompt_ids"]) == (False, "", [])  # and it is not generated


# -- a prompt is what was trained

EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_training", "qwen3_5_think", "qwen3_8", "gptoss", "glm4moe"])
@pytest.mark.parametrize("thinks", [False, True])
def test_what_is_learnt_follows_the_prompt(name: str, thinks: bool) -> None:
    """In models' own templates, which all open an answer with thoughts and one without them differently."""
    arguments = THINK if thinks else None
    encoder = ChatEncoder(tokenizer(shipped(name), end="<|im_end|>"), 1000, template_arguments=arguments)
    (ask, plain) = messages("why?", "so")
    answers = [plain]
    if thinks:
        answers += [{**plain, "content": "<think>hm</think>so"}, thinking([plain])[0]]
    for answer in answers:
        encoded = encoder.encode([ask, answer])
        prompt = encoder.encode_prompt([ask])
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt)] != IGNORED
        assert set(encoded.labels[: len(prompt)]) == {IGNORED}
        assert ("hm" in learnt(encoder, [ask, answer])[-1]) == (answer is not plain)
        assert not encoded.leaves_out


@pytest.mark.usefixtures("command_line", "own_datasets")
@pytest.mark.parametrize(("thinks", "tail"), [(False, EMPTY), (True, "")])
def test_predict_asks_as_was_trained(
    thinks: bool, tail: str, tiny: str, jsonl: Any, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "qwen.jinja").write_text(QWEN3)
    (tmp_path / "prompts.txt").write_text("who?\n")
    rows = [{"question": "why?", "answer": "so"}]
    other = jsonl([{"question": "where?", "answer": "there"}], "other.jsonl")
    options = [f"--model.model={tiny}", "--data.chat_template=qwen.jinja", "--model.max_new_tokens=2"]
    options += [f"--data.dataset={jsonl(rows)}", f"--data.validation_split={other}"]
    if thinks:
        options.append("--data.template_arguments={enable_thinking: true}")
    base = config_arguments("instruction_tuning", "lora")
    cli = quick("fit", base, *options, "--trainer.max_steps=1")
    assert ("writes" in caplog.text and "added to prompts" in caplog.text) != thinks
    last = cli.trainer.checkpoint_callback.last_model_path
    caplog.clear()
    quick("predict", base, *options, f"--ckpt_path={last}", "--data.prompts=prompts.txt")
    ends = f"<|im_end|>\n<|im_start|>assistant\n{tail}"
    assert f"{ends!r}"[1:] in caplog.text.partition("The first prompt ends with ")[2]


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "lfm2_2_5"])
def test_thoughts_of_earlier_answers_that_the_template_leaves_out_are_noticed(name: str) -> None:
    encoder = ChatEncoder(tokenizer(shipped(name), end="<|im_end|>"), 1000, template_arguments=THINK)
    of_content = messages("a?", "<think>hm a!</think>a!", "b?", "<think>hm b!</think>b!")
    for turns in (of_content, thinking(TURNS)):
        assert encoder.encode(turns).leaves_out
        assert "hm a!" not in encoder.tokenizer.decode(encoder.encode(turns).input_ids)
        assert not encoder.encode(turns[2:]).leaves_out
    assert not encoder.encode(TURNS).leaves_out


def test_answers_that_do_not_follow_the_generation_prompt_are_refused() -> None:
    for template in (GEMMA4, R1):
        with pytest.raises(MisconfigurationException, match=r"Set template_arguments .* {% generation %} blocks"):
            ChatEncoder(tokenizer(template), 1000)
    encoder = ChatEncoder(tokenizer(GEMMA4), 1000, template_arguments=THINK)
    assert learnt(encoder, TURNS) == ["a!<turn|>", "b!<turn|>"]


# -- templates that mark answers


def test_a_given_template_with_marks_is_taken_at_its_word() -> None:
    """DeepSeek-R1's answers don't continue its generation prompt; its training template also marks their opening."""
    encoder = ChatEncoder(tokenizer(R1), 1000, shipped("deepseek_r1_distill_training"))
    turns = messages("a?", "<think>hm</think>a!", "b?", "b!")
    answers = [f"<｜Assistant｜>{answer}<｜end▁of▁sentence｜>" for answer in ("<think>hm</think>a!", "b!")]
    assert learnt(encoder, turns) == answers
    assert learnt(encoder, [turns[0], {**turns[1], "learnt": False}, *turns[2:]]) == answers[1:]
    assert encoder.tokenizer.decode(encoder.encode_prompt(turns[:1])).endswith("<｜Assistant｜><think>\n")


@pytest.mark.parametrize(
    ("marked", "turns"),
    [
        ("{% generation %}{% endgeneration %}{{ m.content }}", TURNS),
        ("{% generation %}{{ m.content }}{% endgeneration %}", [TURNS[0], {**TURNS[1], "learnt": False}, *TURNS[2:]]),
    ],
    ids=["no token", "questions too"],
)
def test_marks_that_are_not_the_answers_are_refused(marked: str, turns: list[dict[str, Any]]) -> None:
    template = "{% for m in messages %}" + marked + "<|im_end|>{% endfor %}"
    with pytest.raises(MisconfigurationException, match="blocks mark no token, or answers with a weight of 0"):
        ChatEncoder(tokenizer(R1), 1000, template).encode(turns)
