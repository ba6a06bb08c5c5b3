"""Byte-level tokenizers, and chat templates built like those of well-known models."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from recipes.language.chat import IGNORED

# Writes thoughts before the last answer, or an empty block if there are none; the generation prompt contains an empty
# block only if enable_thinking is false.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set thoughts = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}"
    "{{ '<think>\n' + thoughts + '\n</think>\n\n' + parts[-1].lstrip('\n') }}"
    "{% else %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Its prompt opens a block of thoughts, which is closed at once before a last answer without thoughts.
QWEN35 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Names a channel before an answer, and ends the last answer with another token than earlier ones.
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if loop.last and m.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Its prompt has an empty block of thoughts unless enable_thinking is true; its answers have none.
GEMMA4 = (
    "{% for m in messages %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content }}"
    "{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}"
    "{% if not enable_thinking | default(false) %}{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
# Refuses a system message; its end of turn is not the tokenizer's end token.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
)
# Like Mistral v0.3's, Nemo's and Codestral's: a system message shows in the last question, if no answer follows it.
MISTRAL3 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
# Silently drops a system message, and ends an answer without any mark.
BARE = (
    "{% for m in messages if m.role != 'system' %}{{ 'Q: ' if m.role == 'user' else 'A:' }}"
    "{{ m.content if m.role == 'user' else ' ' + m.content }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
# Its prompt opens a block of thoughts, but its answers are written without one.
R1 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<think>\n' }}{% endif %}"
)
# Ends an answer with another model's mark, which is plain text for this tokenizer.
FOREIGN = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '<|end_of_message|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<bos>", "<eos>", "<start_of_turn>"),
    *("<end_of_turn>", "[INST]", "[/INST]", "<image>", "<|message|>", "<|channel|>", "<|return|>", "<turn|>"),
)
_ENDS = {QWEN3: "<|im_end|>", QWEN35: "<|im_end|>", LLAMA3: "<|eot|>", GPT_OSS: "<|return|>"}


def shipped(name: str) -> str:
    """A model's own chat template, as shipped with trl; the test is skipped if trl has none."""
    trl = find_spec("trl")
    path = Path(str(trl.origin)).parent / "chat_templates" / f"{name}.jinja" if trl else Path()
    if not path.is_file():
        pytest.skip(f"trl is not installed, or has no template {name}")
    return path.read_text(encoding="utf-8")


def tokenizer(template: str, pad_token: str | None = None, end: str = "<eos>") -> Any:
    """Token 0 is "!", as in Llama 3 and GPT-2; without a pad token unless one is given."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own,
        bos_token="<bos>",
        eos_token=_ENDS.get(template, end),
        pad_token=pad_token,
        chat_template=template,
    )
    assert made.convert_tokens_to_ids("!") == 0
    return made


def learnt_texts(tokenizer: Any, labels: list[int]) -> list[str]:
    """The text of each run of consecutive learnt tokens."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [str(tokenizer.decode(run)) for run in runs if run]


def messages(*turns: str) -> list[dict[str, str]]:
    """Turns of user and assistant, starting with the user's."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
