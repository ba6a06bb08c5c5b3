"""Loading an open_clip model, its adapter and its export, with a tiny random CLIP in a folder."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clip_contrastive_runs import CLIP, save_model
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from open_clip.transformer import QuickGELU
from peft import PeftModel
from torch import nn

from lightning_flatlora import find_pairs
from recipes.clip.model import DEFAULT_LORA, add_lora, export_open_clip, image_features, load_clip, text_features


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("clip") / "model", CLIP)


def test_a_configuration_file_gives_a_model_with_random_weights(tmp_path: Path) -> None:
    (tmp_path / "my-tiny-clip.json").write_text(json.dumps(CLIP))
    torch.manual_seed(0)
    first = load_clip(str(tmp_path / "my-tiny-clip.json")).net
    torch.manual_seed(1)
    second = load_clip(str(tmp_path / "my-tiny-clip.json")).net
    assert not torch.equal(first.visual.conv1.weight, second.visual.conv1.weight)
    torch.save(export_open_clip(first), tmp_path / "weights.pt")
    third = load_clip(str(tmp_path / "my-tiny-clip.json"), str(tmp_path / "weights.pt")).net
    assert torch.equal(first.visual.conv1.weight, third.visual.conv1.weight)


# -- the activation


def activations(net: nn.Module) -> dict[str, set[type]]:
    """For each tower, the classes of its blocks' activations."""
    found: dict[str, set[type]] = {"visual": set(), "text": set()}
    for name, module in net.named_modules():
        if name.endswith("mlp.gelu"):
            found["visual" if "visual" in name else "text"].add(type(module))
    return found


@pytest.fixture
def tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration without QuickGELU; its tag "quick" was trained with QuickGELU, and "plain" was not."""
    path = tmp_path / "my-tagged-clip.json"
    path.write_text(json.dumps(CLIP))
    torch.manual_seed(0)
    torch.save(export_open_clip(load_clip(str(path)).net), tmp_path / "weights.pt")
    tags = {tag: {"url": "nowhere", "quick_gelu": tag == "quick"} for tag in ("quick", "plain")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, path.stem, tags)
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: str(tmp_path / "weights.pt"))
    return str(path)


def test_a_tags_weights_run_with_the_activation_they_were_trained_with(tagged: str) -> None:
    assert activations(load_clip(tagged, "quick").net) == {"visual": {QuickGELU}, "text": {QuickGELU}}
    assert activations(load_clip(tagged, "plain").net) == {"visual": {nn.GELU}, "text": {nn.GELU}}
    with pytest.warns(UserWarning, match="QuickGELU mismatch"):  # open_clip's own warning, since this was requested
        assert activations(load_clip(tagged, "plain", True).net) == {"visual": {QuickGELU}, "text": {QuickGELU}}
    with pytest.warns(UserWarning, match="QuickGELU mismatch"):
        assert activations(load_clip(tagged, "quick", False).net) == {"visual": {nn.GELU}, "text": {nn.GELU}}
    file = str(Path(tagged).parent / "weights.pt")  # a file has no tag, so the argument decides
    assert activations(load_clip(tagged, file).net)["text"] == {nn.GELU}
    assert activations(load_clip(tagged, file, True).net)["text"] == {QuickGELU}


def test_split_and_merged_it_keeps_that_activation(tagged: str) -> None:
    """Compared with plain open_clip with QuickGELU, whose attention is not split."""
    torch.manual_seed(0)
    images, net = torch.randn(2, 3, 32, 32), load_clip(tagged, "quick").net.eval()
    plain = open_clip.create_model(Path(tagged).stem, "quick", force_quick_gelu=True).eval()
    other = open_clip.create_model(Path(tagged).stem).eval()
    other.load_state_dict(plain.state_dict())
    assert torch.allclose(image_features(net, images), plain.encode_image(images, normalize=True), atol=1e-6)
    assert not torch.allclose(image_features(net, images), other.encode_image(images, normalize=True), atol=1e-4)
    adapted = add_lora(net, DEFAULT_LORA).eval()
    for pair in find_pairs(adapted).pairs:
        nn.init.normal_(pair.B, std=0.2)
    plain.load_state_dict(export_open_clip(adapted), strict=True)
    assert torch.allclose(image_features(adapted, images), plain.encode_image(images, normalize=True), atol=1e-5)


# -- the adapter


def test_the_default_adapter_is_of_clip_lora(name: str) -> None:
    net = add_lora(load_clip(name).net, DEFAULT_LORA)
    pairs = find_pairs(net).pairs
    number = CLIP["vision_cfg"]["layers"] + CLIP["text_cfg"]["layers"]
    assert len(pairs) == 3 * number
    assert {(pair.A.shape[0], pair.scaling, pair.B.dtype) for pair in pairs} == {(2, 1 / 2**0.5, torch.float32)}
    assert {p.p for n, p in net.named_modules() if "lora_dropout.default" in n} == {0.25}
    assert sum(p.requires_grad for p in net.parameters()) == 2 * len(pairs)


def test_the_adapter_goes_where_it_is_told(name: str) -> None:
    net = add_lora(load_clip(name).net, {"r": 2, "projections": ["v"], "towers": "text", "blocks": 1})
    (pair,) = find_pairs(net).pairs
    assert re.search(r"model\.transformer\.resblocks\.\d\.attn\.v_proj", pair.name)
    net = add_lora(load_clip(name).net, {"r": 2, "target_modules": ["c_fc"]})
    assert all("c_fc" in pair.name for pair in find_pairs(net).pairs)


def test_the_export_is_loaded_by_plain_open_clip_with_equal_features(name: str) -> None:
    clip = load_clip(name)
    net = add_lora(clip.net, DEFAULT_LORA).eval()
    for pair in find_pairs(net).pairs:
        nn.init.normal_(pair.B, std=0.2)
    images, tokens = torch.randn(2, 3, 32, 32), clip.tokenizer(["a cat", "two dogs"])
    before = copy.deepcopy(net.state_dict())
    plain = open_clip.create_model(name).eval()
    untrained = plain.encode_image(images, normalize=True)
    plain.load_state_dict(export_open_clip(net), strict=True)
    assert torch.allclose(plain.encode_image(images, normalize=True), image_features(net, images), atol=1e-5)
    assert torch.allclose(plain.encode_text(tokens, normalize=True), text_features(net, tokens), atol=1e-5)
    assert not torch.allclose(untrained, plain.encode_image(images, normalize=True), atol=1e-3)
    assert isinstance(net, PeftModel)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ViT-B-33",), r"model='ViT-B-33'.* can't be loaded: .*ViT-B-33' not found in built-ins"),
        (("ViT-B-32", "opnai"), r"'opnai' is not a known tag or valid file path"),
        (("local-dir:missing", "openai"), "brings its own weights: set pretrained to null"),
        (("missing.json",), r"can't be loaded: .*No such file or directory: .*missing.json"),
    ],
)
def test_models_that_are_not_there(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        load_clip(*arguments)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 2}, r"lora={'rank': 2} can't be used: .*rank"),
        ({"towers": "image"}, "towers must be one of"),
        ({"blocks": 9}, "the tower has 2 blocks, so give"),
        ({"towers": "text", "target_modules": ["c_fc"]}, "says twice where the adapter goes"),
    ],
)
def test_adapters_that_cannot_be(name: str, lora: dict[str, Any], words: str) -> None:
    with pytest.raises(MisconfigurationException, match=words):
        add_lora(load_clip(name).net, lora)
