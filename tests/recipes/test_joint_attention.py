"""GPT-2's joint projection, split: the same weights and outputs, and the way back to a plain GPT-2."""

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from recipes.language.joint_attention import SplitProjection, join_attention, split_attention

TARGETS = ["q_proj", "v_proj"]


def gpt2(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_head=2, n_layer=2, vocab_size=50, n_positions=40, bos_token_id=0, eos_token_id=0, **settings
    )
    model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # transformers starts with zeros, which would hide a misplaced bias
    return model


def tokens(rows: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_stay_up_to_rounding_and_weights_bit_for_bit(dtype: torch.dtype) -> None:
    model = gpt2(dtype)
    before, logits = {name: value.clone() for name, value in model.state_dict().items()}, model(tokens()).logits
    names = split_attention(model, TARGETS)
    assert names == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    # The product with a third of the columns may be summed in another order.
    torch.testing.assert_close(model(tokens()).logits, logits, rtol=0, atol=20 * torch.finfo(dtype).eps)
    projection = model.transformer.h[1].attn.c_attn
    assert isinstance(projection, SplitProjection)
    for place, part in enumerate((projection.q_proj, projection.k_proj, projection.v_proj)):
        weight = before["transformer.h.1.attn.c_attn.weight"][:, 32 * place : 32 * (place + 1)]
        assert torch.equal(part.weight, weight.T)
        assert torch.equal(part.bias, before["transformer.h.1.attn.c_attn.bias"][32 * place : 32 * (place + 1)])
    join_attention(model)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert torch.equal(model(tokens()).logits, logits)


def test_texts_are_the_same_with_a_cache_and_without() -> None:
    model = gpt2(torch.float64, initializer_range=0.3)
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens())
    expected = model.generate(tokens(), attention_mask=mask, **options)
    split_attention(model, TARGETS)
    assert torch.equal(model.generate(tokens(), attention_mask=mask, **options), expected)
    assert torch.equal(model.generate(tokens(), attention_mask=mask, use_cache=False, **options), expected)


@pytest.mark.parametrize("targets", [["c_attn"], r".*\.c_attn", None])
def test_a_joint_layer_that_is_adapted_itself_stays(targets: Any) -> None:
    model = gpt2()
    assert split_attention(model, targets) == []
    if targets is not None:
        get_peft_model(model, LoraConfig(target_modules=targets, fan_in_fan_out=True))


def test_all_linears_and_patterns_reach_the_parts() -> None:
    assert len(split_attention(gpt2(), "all-linear")) == 2
    assert len(split_attention(gpt2(), r".*\.0\.attn\.c_attn\.[qv]_proj")) == 2
