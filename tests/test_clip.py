"""open_clip models with split attention: same outputs, LoRA on each projection, and the way back."""

import copy
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import Attention
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig

from lightning_flatlora import find_pairs
from lightning_flatlora.clip import (
    SplitMultiheadAttention,
    check_reached,
    joined_state_dict,
    lora_targets,
    split_attention,
)

SIZE, LENGTH, WORDS = 32, 12, 50
VISION: dict[str, Any] = {"image_size": SIZE, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
TEXT: dict[str, Any] = {"context_length": LENGTH, "vocab_size": WORDS, "width": 24, "heads": 3, "layers": 2}
OWN_BLOCKS = {"block_type": "custom", "qk_norm": True, "scale_heads": True, "scale_attn_inner": True}
DECODER = {"context_length": LENGTH, "vocab_size": WORDS, "width": 24, "heads": 3, "layers": 2}


def clip(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, kind: Any = CLIP) -> nn.Module:
    torch.manual_seed(0)
    return kind(embed_dim=16, vision_cfg=VISION | (vision or {}), text_cfg=TEXT | (text or {}))


def coca() -> nn.Module:
    torch.manual_seed(0)
    pooled = {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    text = TEXT | {"embed_cls": True, "output_tokens": True, "layers": 2}
    model = CoCa(embed_dim=24, vision_cfg=VISION | pooled, text_cfg=text, multimodal_cfg=DECODER)
    nn.init.normal_(model.text_decoder.text_projection, std=0.2)  # open_clip leaves it uninitialized
    return model


def siglip() -> nn.Module:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "map"}
    return clip(
        vision | {"timm_proj": "none", "image_size": 224}, {"no_causal_mask": True, "proj_bias": True}, CustomTextCLIP
    )


def hf_text(tmp_path: Path) -> nn.Module:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    BertConfig(vocab_size=WORDS, **sizes).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "hf_proj_type": "mlp"}
    return clip(text=text | {"hf_pooler_type": "mean_pooler"}, kind=CustomTextCLIP)


MODELS: dict[str, Any] = {
    "CLIP": clip,
    "own attention": lambda: clip(OWN_BLOCKS, OWN_BLOCKS),
    "CustomTextCLIP": lambda: clip(kind=CustomTextCLIP),
    "no causal mask": lambda: clip(text={"no_causal_mask": True}),
    "class token": lambda: clip(text={"embed_cls": True}, kind=CustomTextCLIP),
    "attention pooling": lambda: clip({"attentional_pool": True, "attn_pooler_heads": 4}),
    "CoCa": coca,
}
BATCH_OF_THREE = torch.Generator().manual_seed(1)
IMAGES = torch.randn(3, 3, SIZE, SIZE, generator=BATCH_OF_THREE)
TEXTS = torch.randint(1, WORDS - 1, (3, LENGTH), generator=BATCH_OF_THREE)
TEXTS[:, 7:] = 0  # padding
TEXTS[:, 6] = WORDS - 1  # the end token, which CLIP finds as the largest number


def outputs(model: Any) -> list[Tensor]:
    """All outputs of a model; CoCa also has logits of captions."""
    found = model(IMAGES, TEXTS)
    values = found.values() if isinstance(found, dict) else found
    return [model.encode_image(IMAGES), model.encode_text(TEXTS), *(v for v in values if torch.is_floating_point(v))]


def assert_equal_outputs(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    for first, second in zip(outputs(one), outputs(other), strict=True):
        assert torch.isfinite(first).all()
        assert (first - second).abs().max() <= tolerance * (1 + first.abs().max())


def perturb_all(model: nn.Module) -> None:
    """Random values for every parameter, including biases and scales, which start as zeros and ones."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def names_of(model: nn.Module, targets: str) -> list[str]:
    return [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]


def lora(model: nn.Module, **settings: Any) -> PeftModel:
    targets = lora_targets(model, **settings)
    torch.manual_seed(2)
    peft_model = get_peft_model(model, LoraConfig(r=2, lora_alpha=1, target_modules=targets))
    for pair in find_pairs(peft_model).pairs:
        nn.init.normal_(pair.B, std=0.3)
    return peft_model


# -- same outputs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_stay_the_same(name: str, training: bool) -> None:
    original = MODELS[name]().train(training)
    perturb_all(original)
    split = copy.deepcopy(original)
    replaced = split_attention(split)
    attentions = [n for n, m in original.named_modules() if isinstance(m, nn.MultiheadAttention | Attention)]
    assert replaced == attentions
    assert len(replaced) >= 5
    assert split_attention(split) == []
    assert not any(isinstance(m, nn.MultiheadAttention | Attention) for m in split.modules())
    assert_equal_outputs(original, split)
    for model in (original, split):
        sum(output.square().mean() for output in outputs(model)).backward()
    gradients = dict(original.named_parameters())
    for n in replaced:
        joined = gradients.get(f"{n}.in_proj_weight")
        parts = [split.get_submodule(n).get_submodule(f"{letter}_proj").weight.grad for letter in "qkv"]
        if joined is not None:
            assert (torch.cat(parts) - joined.grad).abs().max() < 1e-5
            assert joined.grad.abs().max() > 0


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dimensions", [{}, {"kdim": 10, "vdim": 14}], ids=["one size", "three sizes"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_mask_of_multihead_attention(batch_first: bool, dimensions: dict[str, int], bias: bool) -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first, **dimensions)
    split = SplitMultiheadAttention(copy.deepcopy(original))
    q, k, v = torch.randn(4, 5, 12), torch.randn(4, 6, dimensions.get("kdim", 12)), torch.randn(4, 6, original.vdim)
    inputs = (q, k, v) if batch_first else tuple(x.transpose(0, 1) for x in (q, k, v))
    allowed = torch.rand(5, 6) > 0.3
    allowed[:, 0] = True
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[1:, 4:] = True
    masks: list[dict[str, Tensor]] = [
        {},
        {"attn_mask": ~allowed},
        {"attn_mask": torch.randn(5, 6)},
        {"attn_mask": torch.randn(4 * 3, 5, 6)},
        {"key_padding_mask": padding},
        {"attn_mask": ~allowed, "key_padding_mask": padding},
    ]
    results = []
    for mask in masks:
        expected, _ = original(*inputs, need_weights=False, **mask)
        found, weights = split(*inputs, need_weights=False, **mask)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert weights is None
        results.append(found)
    for one, other in combinations(results, 2):
        assert (one - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="need_weights=False"):
        split(*inputs)


def test_dropout_of_the_attention_is_kept() -> None:
    torch.manual_seed(0)
    split = SplitMultiheadAttention(nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True))
    x = torch.randn(4, 5, 12)
    assert not torch.equal(split(x, x, x, need_weights=False)[0], split(x, x, x, need_weights=False)[0])
    split.eval()
    assert torch.equal(split(x, x, x, need_weights=False)[0], split(x, x, x, need_weights=False)[0])


def test_what_is_frozen_stays_so_and_dtypes_too() -> None:
    model = clip().to(torch.bfloat16)
    model.visual.requires_grad_(False)
    split_attention(model)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad and "q_proj" in n}
    assert trained == {"transformer"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_features_that_no_clip_uses_are_refused(settings: dict[str, bool]) -> None:
    model = nn.ModuleDict({"block": nn.MultiheadAttention(8, 2, **settings)})
    with pytest.raises(ValueError, match=r"block can't be split: it has add_bias_kv or add_zero_attn"):
        split_attention(model)
    model = nn.ModuleDict({"block": Attention(8, 2, scaled_cosine=True)})
    with pytest.raises(ValueError, match="scaled cosine"):
        split_attention(model)


# -- LoRA


@pytest.mark.parametrize("name", MODELS)
def test_the_way_back_to_plain_open_clip(name: str) -> None:
    """With the adapter merged, the weights are loaded strictly by a model that was never split."""
    plain = MODELS[name]().eval()
    adapted = copy.deepcopy(plain)
    split_attention(adapted)
    unchanged = joined_state_dict(adapted)
    assert unchanged.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, unchanged[key]) for key, value in plain.state_dict().items())
    peft_model = lora(adapted, projections=["q", "k", "v", "out", "mlp"]).eval()
    expected = copy.deepcopy(peft_model).base_model.model
    with pytest.raises(ValueError, match="merge_and_unload"):
        joined_state_dict(adapted)
    state = joined_state_dict(peft_model.merge_and_unload())
    assert state.keys() == plain.state_dict().keys()
    before = outputs(plain)
    plain.load_state_dict(state, strict=True)
    assert_equal_outputs(expected, plain, 1e-5)
    assert not torch.allclose(before[0], outputs(plain)[0])
    assert not torch.allclose(before[1], outputs(plain)[1])


@pytest.mark.parametrize("kind", ["siglip", "hf"])
def test_towers_with_linears_of_their_own(kind: str, tmp_path: Path) -> None:
    """timm's fused qkv and attention pooling, and a transformers text tower: LoRA on these Linears reaches them all."""
    model = siglip() if kind == "siglip" else hf_text(tmp_path)
    split_attention(model)
    targets = lora_targets(model)
    image = torch.zeros(1, 3, *model.visual.image_size)
    check_reached(model, targets, image, TEXTS[:1])
    names = names_of(model, targets)
    own = {"siglip": {"qkv", "q", "kv"}, "hf": {"query", "key", "value"}}[kind]
    assert {name.rpartition(".")[2] for name in names} == own | {"q_proj", "k_proj", "v_proj"}
    assert len([name for name in names if name.startswith("text.")]) == 3 * 2


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 3 * 5),
        ({"towers": "vision"}, 3 * 3),
        ({"towers": "text", "projections": ["q", "v"]}, 2 * 2),
        ({"blocks": 1}, 3 * 2),
        ({"blocks": [0, 1]}, 3 * 4),
        ({"projections": ["out"]}, 5),
        ({"projections": ["mlp"], "blocks": 2, "towers": "vision"}, 2 * 2),
    ],
)
def test_the_settings_choose(settings: dict[str, Any], count: int) -> None:
    model = clip()
    split_attention(model)
    names = names_of(model, lora_targets(model, **settings))
    assert len(names) == count
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in names)
    if settings.get("blocks") == 1:
        assert {name.split("resblocks.")[1][0] for name in names if name.startswith("visual")} == {"2"}
    assert len(find_pairs(lora(model, **settings)).pairs) == count


def test_blocks_leave_attention_pooling_out() -> None:
    model = coca()
    split_attention(model)
    names = names_of(model, lora_targets(model))
    assert len([name for name in names if "attn_pool" in name]) == 3
    assert not any("text_decoder" in name for name in names)
    assert "attn_pool" not in lora_targets(model, blocks=3, towers="vision")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"projections": ["qkv"]}, "projections must be of .*'qkv'"),
        ({"projections": []}, r"has no \[\] as a Linear that LoRA could adapt"),
        ({"towers": "image"}, "towers must be one of .*'image'"),
        ({"blocks": 4}, "blocks=4: the tower has 3 blocks, so give 'all', 1 to 3, or numbers from 0 on"),
        ({"blocks": [2, 5]}, r"blocks=\[2, 5\]: the tower has 3 blocks"),
        ({"blocks": 0}, r"blocks=0: the tower has 3 blocks"),
        ({"blocks": -1}, r"blocks=-1: the tower has 3 blocks"),
        ({"blocks": True}, r"blocks=True: the tower has 3 blocks"),
        ({"blocks": "last"}, r"blocks='last': the tower has 3 blocks"),
    ],
)
def test_settings_that_choose_nothing(settings: dict[str, Any], words: str) -> None:
    model = clip()
    split_attention(model)
    with pytest.raises(ValueError, match=words):
        lora_targets(model, **settings)


def test_weights_that_the_model_reads_itself_are_refused() -> None:
    """CLIP's ResNet stores q, k and v in Linears that it never calls."""
    model = clip({"layers": [1, 1, 1, 1], "width": 8, "patch_size": None})
    split_attention(model)
    targets = lora_targets(model)
    with pytest.raises(ValueError, match=r"not call 3 of 9 layers, such as visual.attnpool.k_proj in AttentionPool2d"):
        check_reached(model, targets, IMAGES[:1], TEXTS[:1])
    check_reached(model, lora_targets(model, towers="text"), IMAGES[:1], TEXTS[:1])


def test_a_tower_without_attention_is_named() -> None:
    vision = {"timm_model_name": "resnet18", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}
    model = clip(vision)
    split_attention(model)
    with pytest.raises(ValueError, match=r"the vision tower, TimmModel, has no \['q', 'k', 'v'\] as a Linear"):
        lora_targets(model)
    assert len(names_of(model, lora_targets(model, towers="text"))) == 6
