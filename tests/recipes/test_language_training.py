"""Training of language models: packing, LoRA+, starting from another adapter, activations, rates, lengths."""

from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from recipe_runs import trainer
from torch import Tensor

from lightning_flatlora import AdapterCheckpoint, EFMLoRA
from recipes.instruction_tuning.data import InstructionData
from recipes.instruction_tuning.module import InstructionTuning
from recipes.language.batches import collate
from recipes.language.model import add_adapter, answer_log_likelihood, load_base, positions
from recipes.language.packing import check_packing, fill_rows, packed

pytestmark = pytest.mark.usefixtures("command_line", "own_datasets")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "pad_token_id": 0}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4}


def model(kind: str, attention: str, **more: Any) -> Any:
    """A tiny random model in float64."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    config._attn_implementation = attention
    return getattr(transformers, f"{kind}ForCausalLM")(config).double()


# -- packing


def drawn(lengths: tuple[int, ...] = (5, 9, 3, 7, 6)) -> dict[str, list[Any]]:
    """Encoded conversations of random tokens; the first token of each is learnt, too."""
    generator = torch.Generator().manual_seed(0)
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": list(lengths)}
    for length in lengths:
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        columns["input_ids"].append([ids])
        columns["labels"].append([[ids[0], -100, *ids[2:]]])
    return columns


def gradients(net: Any, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The batch's loss and its gradients."""
    net.zero_grad()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    sums, tokens = answer_log_likelihood(net, inputs, batch["labels"])
    loss = -sums.sum() / tokens.sum()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("kind", "attention", "more"),
    [
        ("Llama", "sdpa", {}),
        ("Llama", "eager", {}),
        ("Mistral", "sdpa", {"sliding_window": 4, "num_key_value_heads": 2}),
        ("Qwen3", "sdpa", {"head_dim": 8, "num_key_value_heads": 2}),
    ],
)
def test_packed_conversations_give_the_gradients_of_separate_ones(kind: str, attention: str, more: Any) -> None:
    net = model(kind, attention, **more)
    embedding = net.get_input_embeddings().eval()
    check_packing(net, 2, torch.device("cpu"))
    assert [part for part in net.modules() if not part.training] == [embedding]  # each is in its former mode
    columns = drawn()
    rows = packed(columns, room=16)
    assert len(rows["input_ids"]) == 2
    extra = {"gold": [0] * 5, "prompt_ids": [[]] * 5, "answer": [""] * 5}
    loss, wanted = gradients(net, collate({**columns, **extra}, 0))
    packed_loss, got = gradients(net, collate(rows, 0))
    tolerance = 1e-6 if attention == "eager" else 1e-12  # transformers' eager softmax is in float32
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=0)  # the likelihoods are in float32
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "more"), [("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 32}), ("Mamba", {})])
def test_models_that_mix_conversations_are_refused(kind: str, more: Any) -> None:
    with pytest.raises(MisconfigurationException, match=rf"{kind}ForCausalLM .*of a row apart.*packing to false"):
        check_packing(model(kind, "eager", **more), 2, torch.device("cpu"))


def test_no_row_is_longer_than_its_room() -> None:
    lengths = torch.randint(1, 50, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = fill_rows(lengths, 64)
    assert sorted(chain.from_iterable(rows)) == list(range(300))
    for row in rows:
        assert sum(lengths[index] for index in row) <= 64
    assert len(rows) * 64 < 1.1 * sum(lengths)


def test_a_packed_run_learns_and_counts_rows(tiny: str, sums: str, tmp_path: Path) -> None:
    module = InstructionTuning(model=tiny, lora=LORA, learning_rate=1e-2, exact_match_examples=0)
    data = InstructionData(sums, batch_size=2, max_length=120, packing=True, system_prompt="Add.")
    fit = trainer(tmp_path, EFMLoRA(rho=0.1), max_epochs=1)
    fit.fit(module, data)
    rows = data.parts["train"]
    assert fit.global_step == -(-len(rows) // 2)
    assert max(rows["length"]) <= 120
    assert sum(row.count(0) for row in rows["position_ids"]) > 1.5 * len(rows)  # conversations
    assert "val_loss" in fit.callback_metrics


# -- attention and start


def fitted(tiny: str, sums: str, folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    module = InstructionTuning(model=tiny, lora=LORA, exact_match_examples=0, **{"learning_rate": 1e-2, **settings})
    fit = trainer(folder, *callbacks, max_steps=2, limit_val_batches=0, enable_checkpointing=bool(callbacks))
    fit.fit(module, InstructionData(sums, batch_size=4))
    return fit


def test_a_run_starts_from_another_ones_adapter(tiny: str, sums: str, tmp_path: Path) -> None:
    first = fitted(tiny, sums, tmp_path / "first", AdapterCheckpoint(tmp_path / "first", save_last=True))
    second = fitted(tiny, sums, tmp_path, start_from=str(tmp_path / "first" / "last"), learning_rate=0.0)
    torch.testing.assert_close(trained(second), trained(first), rtol=0, atol=0)
    with pytest.raises(MisconfigurationException, match="is not an adapter's folder: it has no adapter_config"):
        fitted(tiny, sums, tmp_path / "third", start_from=str(tmp_path))
    (tmp_path / "first" / "last" / "adapter_model.safetensors").unlink()
    with pytest.raises(MisconfigurationException, match=r"last holds no weights of an adapter: copy adapter_model"):
        fitted(tiny, sums, tmp_path / "third", start_from=str(tmp_path / "first" / "last"))


def test_a_model_that_sees_its_targets_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="'packaged:minilm' reads a text in both directions, and so"):
        load_base("packaged:minilm", "float32", None)


def test_attention_is_the_one_asked_for(tiny: str) -> None:
    module = InstructionTuning(model=tiny, lora=LORA, attn_implementation="eager")
    module.configure_model()
    assert module.net.get_base_model().config._attn_implementation == "eager"


# -- activations, rates and positions


def trained(fit: L.Trainer) -> dict[str, Tensor]:
    """Copies of the trained weights."""
    return {name: p.detach().clone() for name, p in fit.lightning_module.named_parameters() if p.requires_grad}


def test_activations_computed_twice_change_nothing(
    tiny: str, sums: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = transformers.models.llama.modeling_llama.LlamaMLP
    forward = part.forward
    calls: list[bool] = []

    def counted(self: Any, hidden: Tensor) -> Tensor:
        calls.append(self.training)
        return forward(self, hidden)

    monkeypatch.setattr(part, "forward", counted)
    plain = trained(fitted(tiny, sums, tmp_path, EFMLoRA(rho=0.5)))
    once = len(calls)
    again = trained(fitted(tiny, sums, tmp_path, EFMLoRA(rho=0.5), gradient_checkpointing=True))
    assert len(calls) == 3 * once  # forward once more, then again in backward
    assert all(torch.equal(weight, again[name]) for name, weight in plain.items())


def test_adamw_takes_the_betas_and_warms_up_over_a_share(tiny: str, sums: str, tmp_path: Path) -> None:
    fit = fitted(tiny, sums, tmp_path, betas=(0.8, 0.95), warmup_share=0.5)
    assert fit.optimizers[0].param_groups[0]["betas"] == (0.8, 0.95)
    (schedule,) = fit.lr_scheduler_configs
    shares = [schedule.scheduler.lr_lambdas[0](step) for step in range(3)]
    assert shares == [0, 1, 0]


SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "pad_token_id": 1}
SMALL |= {"intermediate_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8}


@pytest.mark.parametrize(
    ("kind", "readable"), [("gpt2", 20), ("opt", 20), ("bert", 20), ("roberta", 18), ("mpnet", 18)]
)
def test_a_model_reads_as_many_tokens_as_it_has_positions(kind: str, readable: int) -> None:
    """The last two count positions from after the padding's index."""
    config = transformers.AutoConfig.for_model(kind, max_position_embeddings=20, **SMALL)
    model = transformers.AutoModel.from_config(config).eval()
    assert positions(model) == readable
    model(input_ids=torch.full((1, readable), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, readable + 1), 5))


def test_all_linear_layers_of_a_classifier_leave_its_head_whole() -> None:
    """DistilBERT's head has two layers, one of which peft counts as one of the linear layers."""
    config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1, hidden_dim=8)
    base = transformers.DistilBertForSequenceClassification(config)
    for field, name in (("modules_to_save", "line"), ("target_modules", "lin")):  # peft would silently skip it
        with pytest.raises(MisconfigurationException, match=f"{field} names '{name}', which the model does not have"):
            add_adapter(base, {"target_modules": ["q_lin"], field: ["q_lin", name]})
    net = add_adapter(base, {"r": 2, "target_modules": "all-linear"}, task_type="SEQ_CLS")
    layers = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
    assert {name.split(".")[-1] for name in net.targeted_module_names} == set(layers)
    whole = [name for name, p in net.named_parameters() if p.requires_grad and "lora_" not in name]
    assert sorted(name.split(".")[-4] for name in whole) == ["classifier"] * 2 + ["pre_classifier"] * 2


def test_conversations_longer_than_a_model_reads_are_refused(tiny: str, sums: str, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path / "short")
    config = transformers.GPT2Config(n_positions=48, n_embd=8, n_layer=1, n_head=1, vocab_size=len(tokenizer))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    lora = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}

    def fit(exact_match_examples: int = 0, **options: Any) -> L.Trainer:
        model = InstructionTuning(model=str(tmp_path / "short"), lora=lora, exact_match_examples=exact_match_examples)
        runner = trainer(tmp_path, max_steps=1, limit_val_batches=0)
        runner.fit(model, InstructionData(sums, batch_size=4, **options))
        return runner

    with pytest.raises(MisconfigurationException, match=r"reads at most 48 tokens. The longest text .*data.max_length"):
        fit()
    # There is no room for an answer of max_new_tokens, which matters only if answers are generated.
    with pytest.raises(MisconfigurationException, match=r"reads at most 48 tokens. .*max_new_tokens=64"):
        fit(max_length=48, exact_match_examples=1)
    assert fit(max_length=48).global_step == 1
