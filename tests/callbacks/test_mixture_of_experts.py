"""transformers' mixtures of experts in a Trainer: trained with their routers, resumed, exported, checkpointed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Classifier, E_hat, assert_no_trace, fit, same, weights
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GptOssConfig, OlmoeConfig, Qwen3MoeConfig

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, FMLoRA
from lightning_flatlora.callbacks.adapter_checkpoint.transfer import HINT

pytestmark = [
    pytest.mark.skipif(
        not hasattr(ParamWrapper, "get_delta_factors"), reason="this peft knows no experts by all-linear"
    ),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
]
TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 4096,
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    # Attention, experts and routers.
    "Qwen3-MoE": (Qwen3MoeConfig(**TINY, moe_intermediate_size=8, num_experts=8), {"target_modules": "all-linear"}),
    "OLMoE": (OlmoeConfig(**TINY, num_experts=8), {"target_modules": "all-linear"}),
    # all-linear doesn't know the names of its experts.
    "gpt-oss": (
        GptOssConfig(**TINY, num_local_experts=8),
        {
            "target_modules": "all-linear",
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"],
        },
    ),
}


def base(title: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[title][0])


class OfTokens(Classifier):
    """A language model's loss."""

    def loss(self, batch: Tensor, batch_idx: int) -> Tensor:
        value: Tensor = self.net(input_ids=batch, labels=batch).loss
        return value


def learner(title: str, checkpointing: bool = False) -> Any:
    return OfTokens(net=network(title, checkpointing), lr=3e-3)


def network(title: str, checkpointing: bool = False) -> nn.Module:
    net: Any = get_peft_model(base(title), LoraConfig(r=2, lora_alpha=4, **MODELS[title][1]))
    if checkpointing:
        net.enable_input_require_grads()
        net.gradient_checkpointing_enable({"use_reentrant": False})
    return net.train()


def train(folder: Path, module: Any, callbacks: list[Any], ckpt_path: Any = None) -> None:
    # With so few tokens, some experts get none in some steps.
    loader = DataLoader(torch.randint(2, 32, (3, 1, 6), generator=torch.Generator().manual_seed(1)), batch_size=None)
    fit(folder, module, callbacks, loader, ckpt_path=ckpt_path)


@pytest.mark.parametrize("title", MODELS)
def test_everything_that_is_trained_is_perturbed(title: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, flat = learner(title), EFMLoRA(0.3)
    train(tmp_path, module, [flat])
    trained = {name.removeprefix("net.") for name, p in module.named_parameters() if p.requires_grad}
    E = E_hat(flat)
    assert {name.removeprefix("net.") for name in E} == {name for name in trained if "lora_B" in name}
    experts = [pair for pair in flat.perturbation.pairs if pair.experts == 8]
    assert len(experts) == 4
    assert all(pair.products(pair.A, E[pair.name])[1].abs().sum((1, 2)).count_nonzero() > 1 for pair in experts)
    assert_no_trace(module)


@pytest.mark.parametrize("title", MODELS)
def test_a_run_is_resumed_and_its_adapter_is_loaded_by_peft(title: str, tmp_path: Path) -> None:
    saver: Any = {"save_top_k": -1, "filename": "{step}"}
    module, flat = learner(title), EFMLoRA(0.3)
    train(tmp_path, module, [flat, AdapterCheckpoint(tmp_path, **saver)])
    resumed, again = learner(title), EFMLoRA(0.3)
    train(tmp_path, resumed, [again, AdapterCheckpoint(tmp_path / "b", **saver)], ckpt_path=tmp_path / "step=3.ckpt")
    assert same(weights(module), weights(resumed))
    assert same(E_hat(flat), E_hat(again))
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"]
    saved.pop(HINT)
    assert saved.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    loaded = PeftModel.from_pretrained(base(title), str(tmp_path / "step=6"))
    tokens = torch.arange(2, 12)[None]
    assert torch.equal(loaded.eval()(tokens).logits, module.net.eval()(tokens).logits)


@pytest.mark.parametrize("method", [EFMLoRA, FMLoRA])
def test_checkpointed_activations_change_nothing(method: Any, tmp_path: Path) -> None:
    plain, checkpointed = learner("Qwen3-MoE"), learner("Qwen3-MoE", checkpointing=True)
    for module in (plain, checkpointed):
        train(tmp_path, module, [method(0.3)])
    torch.testing.assert_close(weights(checkpointed), weights(plain), rtol=0, atol=1e-6)
