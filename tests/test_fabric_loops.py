"""Other libraries' loops plus one line: Fabric, accelerate, litgpt's own program, transformers' Trainer and trl's."""

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from float64_runs import BETA, loss, optimizer_of
from helpers import assert_no_trace, same, weights
from hf_runs import RHO, SIZE, Samples, TwoPasses, trained_by, trainer_of
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from loop_runs import METHODS, batches, method_of, net_of, run, schedule, trained_plainly
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lightning_flatlora import EFMLoRA as LightningEFMLoRA
from lightning_flatlora import FMLoRA as LightningFMLoRA
from lightning_flatlora import LinearRho, loops
from lightning_flatlora.loops import EFMLoRA
from lightning_flatlora.loops.loop_method import STATE_KEY
from lightning_flatlora.pairs.finders import litgpt_pairs


def fabric_run(name: str, data: list[Any], file: Path | None = None, resume: bool = False, **settings: Any) -> Any:
    fabric = L.Fabric(accelerator="cpu", devices=1, **settings)
    net = net_of(torch.float32)
    model, optimizer = fabric.setup(net, optimizer_of(net))
    flat = method_of(name, model, optimizer, 0.3)
    state = {"model": model, "optimizer": optimizer}
    if resume:
        fabric.load(file, state)
    run(flat, model, optimizer, data, backward=fabric.backward)
    if file is not None and not resume:
        fabric.save(file, state)
    return net, flat


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_fabric_has_saved_is_resumed(name: str, tmp_path: Path) -> None:
    data = batches(torch.float32)
    whole, _ = fabric_run(name, data)
    fabric_run(name, data[:4], tmp_path / "saved.ckpt")
    second, flat = fabric_run(name, data[4:], tmp_path / "saved.ckpt", resume=True)
    assert flat.step == 10
    assert same(weights(second), weights(whole))
    assert not [pair.name for pair in flat.perturbation.pairs if "_module" in pair.name]


@pytest.fixture
def own_accelerate() -> Iterator[None]:
    """accelerate keeps its settings for the whole process."""
    yield
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def by_fabric(net: nn.Module, optimizer: Any) -> tuple[Any, Any, Any]:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    return *fabric.setup(net, optimizer), fabric.backward


def by_accelerate(net: nn.Module, optimizer: Any) -> tuple[Any, Any, Any]:
    accelerator = Accelerator(cpu=True)
    return *accelerator.prepare(net, optimizer), accelerator.backward


@pytest.mark.parametrize("wrap", [by_fabric, by_accelerate])
@pytest.mark.parametrize("made", ["before", "after", "after, with the bare ones"])
@pytest.mark.parametrize("name", METHODS)
def test_the_object_may_be_made_before_and_after_wrapping(
    own_accelerate: None, name: str, made: str, wrap: Callable[..., Any]
) -> None:
    """When accelerate wraps an optimizer, it loads the optimizer's own state into it again."""
    net = net_of()
    bare = optimizer_of(net)
    flat = method_of(name, net, bare) if made == "before" else None
    model, optimizer, backward = wrap(net, bare)
    if flat is None:
        flat = method_of(name, net, bare) if "bare" in made else method_of(name, model, optimizer)
    run(flat, model, optimizer, batches(), backward=backward)
    assert flat.step == 10
    assert same(weights(net), weights(trained_plainly(name, batches(), schedule())))


def test_loops_of_accelerate(own_accelerate: None) -> None:
    """Its own loop without a Trainer, in which accumulating doesn't count as a step; and its own checkpoints."""
    whole, first, second = trained_plainly("EFMLoRA", batches(), window=2), net_of(), net_of()
    with TemporaryDirectory() as folder:
        for net, data in ((first, batches()[:4]), (second, batches()[4:])):
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            model, optimizer = accelerator.prepare(net, optimizer_of(net))
            flat = method_of("EFMLoRA", model, optimizer, 0.3)
            if net is second:
                accelerator.load_state(folder)
            for batch in data:
                with accelerator.accumulate(model):
                    accelerator.backward(loss(model, batch))
                    optimizer.step()
                    optimizer.zero_grad()
            if net is first:
                accelerator.save_state(folder)
    assert flat.step == 5
    assert same(weights(second), weights(whole))


# -- litgpt's own program


WORDS = ["<pad>", "</s>", *(f"w{index}" for index in range(40))]
LINE = '    max_steps = train.max_steps or float("inf")\n'
"""After which the line is inserted into the loop of ``litgpt finetune_lora``."""


def tokenizer_of_words() -> Any:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A pretrained model in litgpt's format: random weights, a tokenizer of words, and instructions next to it."""
    pytest.importorskip("litgpt", reason="litgpt is not installed: pip install --no-deps litgpt")
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import save_config

    folder = tmp_path / "pretrained"
    folder.mkdir()
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "padded_vocab_size": len(WORDS)}
    config = Config(name="tiny", block_size=64, **sizes)
    torch.manual_seed(0)
    torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
    save_config(config, folder)
    tokenizer_of_words().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer"}))
    rows = []
    for index in range(14):
        rows.append({"instruction": f"w{index} w{index + 1}", "output": f"w{index + 2} w{index + 3}"})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def finetune(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, rho: float | None) -> Path:
    """Run litgpt's program, with our line unless rho is None; returns the output folder."""
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import JSON
    from litgpt.finetune import lora

    source = inspect.getsource(lora.fit)
    names = {**vars(lora), "EFMLoRA": loops.EFMLoRA, "RHO": rho, "litgpt_pairs": litgpt_pairs}
    if rho is not None:
        assert source.count(LINE) == 1
        source = source.replace(LINE, LINE + "    EFMLoRA(model, optimizer, rho=RHO, finder=litgpt_pairs)\n")
    exec(source, names)
    out = checkpoint.parent / f"out-{rho}"
    with monkeypatch.context() as patched:
        patched.setattr(lora, "fit", names["fit"])
        patched.setattr(sys, "argv", ["finetune_lora", str(checkpoint)])
        lora.setup(
            checkpoint,
            out,
            precision="32-true",
            data=JSON(checkpoint / "rows.json", val_split_fraction=0.15, num_workers=0),
            train=TrainArgs(global_batch_size=4, micro_batch_size=2, lr_warmup_steps=1, epochs=5, max_steps=4),
            eval=EvalArgs(interval=2, max_new_tokens=2, max_iters=1),
        )
    return out / "final"


@pytest.mark.filterwarnings("ignore")  # from jsonargparse, with which litgpt reads its settings
def test_litgpts_own_loop_with_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rho = 0 equals litgpt's own run bit for bit; a larger rho doesn't."""
    folders = [finetune(checkpoint, monkeypatch, rho) for rho in (None, 0.0, 0.5)]
    trained = [torch.load(folder / "lit_model.pth.lora")["model"] for folder in folders]
    assert same(trained[0], trained[1])
    assert not same(trained[0], trained[2])


WINDOW, STEPS = 2, 8


RUNS = [("EFMLoRA", 1, None), ("EFMLoRA", WINDOW, None), ("EFMLoRA", 1, 0.05), ("FMLoRA", WINDOW, None)]


@pytest.mark.parametrize(("name", "window", "clip"), RUNS)
def test_transformers_trainer_gives_the_weights_of_a_plain_loop(
    tmp_path: Path, name: str, window: int, clip: float | None
) -> None:
    """Bit for bit, with a schedule over the run; test_own_loops.py compares such a loop with the callbacks."""
    net = net_of()
    settings = {"gradient_accumulation_steps": window, "max_grad_norm": clip or 0.0}
    _, flat = trained_by(name, tmp_path, rho=LinearRho(RHO, 0.1), net=net, **settings)
    samples = Samples(STEPS * window * SIZE)
    data = list(zip(samples.x.split(SIZE), samples.y.split(SIZE), strict=True))
    rho = LinearRho(RHO, 0.1, total_steps=STEPS)
    assert same(weights(net), weights(trained_plainly(name, data, rho, window=window, clip=clip)))
    assert flat.step == STEPS
    flat.close()
    assert_no_trace(net)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": WINDOW, "max_grad_norm": 0.05}])
@pytest.mark.parametrize("name", ["EFMLoRA", "FMLoRA"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """optimizer.pt carries the state, wherever the checkpoint is."""
    saves = {"save_strategy": "steps", "save_steps": 3, **settings}
    whole, _ = trained_by(name, tmp_path / "whole", **saves)
    folder = tmp_path / "whole" / "checkpoint-3"
    assert STATE_KEY in torch.load(folder / "optimizer.pt", weights_only=True)
    second, flat = trained_by(name, tmp_path / "elsewhere", resume=str(folder), **saves)
    assert flat.step == STEPS
    assert same(weights(second.model), weights(whole.model))


class Flat(TrainerCallback):  # type: ignore[misc]
    """As on docs/other_loops.md, with the settings of these tests."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.flat = EFMLoRA(model, optimizer, RHO, beta=BETA)
        if state.global_step:
            saved = torch.load(Path(args.output_dir, f"checkpoint-{state.global_step}", "optimizer.pt"))
            self.flat.load_state_dict(saved[STATE_KEY]["EFMLoRA"])


def test_a_callback_that_makes_the_object_trains_and_resumes_as_the_line_does(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 3}
    line, _ = trained_by("EFMLoRA", tmp_path / "line", **saves)
    for resume in (None, str(tmp_path / "callback" / "checkpoint-3")):
        trainer, callback = trainer_of(tmp_path / "callback", **saves), Flat()
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        assert callback.flat.step == STEPS
        assert same(weights(trainer.model), weights(line.model))
        callback.flat.close()


def test_compiled_by_the_trainer(tmp_path: Path) -> None:
    net, compiled = net_of(), net_of()
    trained_by("EFMLoRA", tmp_path, net=net, steps=3)
    trained_by("EFMLoRA", tmp_path, net=compiled, steps=3, torch_compile=True, torch_compile_backend="eager")
    assert same(weights(compiled), weights(net))


@pytest.mark.parametrize("kind", [LightningEFMLoRA, LightningFMLoRA])
def test_the_callback_of_the_other_trainer_names_the_line(tmp_path: Path, kind: type[Any]) -> None:
    trainer = trainer_of(tmp_path)
    with pytest.raises(MisconfigurationException, match=r"loops\.EFMLoRA\(trainer\.model, trainer\.create_optimizer"):
        Trainer(trainer.model, trainer.args, callbacks=[kind(RHO)])


# -- a language model, with transformers and trl


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, **sizes)).double()


def arguments(folder: Path, kind: type[Any] = TrainingArguments, **settings: Any) -> Any:
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return kind(
        str(folder), learning_rate=0.01, bf16=False, **{**quiet, "max_steps": STEPS, "save_steps": 4, **settings}
    )


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
@pytest.mark.filterwarnings("ignore")  # trl's own warnings
def test_trls_trainers(tmp_path: Path, kind: str) -> None:
    """rho = 0 equals their own run bit for bit, a larger rho doesn't, and a resumed run equals an uninterrupted one."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    rows = []
    for i in range(16):
        prompt, answers = f"w{i} w{i + 1}", {"chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i + 9} w{i + 4}"}
        rows.append({"text": prompt + answers["chosen"]} if kind == "SFT" else {"prompt": prompt, **answers})
    ends = []
    for place, rho in (("plain", None), ("zero", 0.0), ("flat", 0.5), ("resumed", 0.5)):
        trainer = getattr(trl, f"{kind}Trainer")(
            llama(),
            args=arguments(tmp_path / place, getattr(trl, f"{kind}Config"), gradient_accumulation_steps=2),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=tokenizer_of_words(), eos_token="</s>", pad_token="<pad>"
            ),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )
        if rho is not None:
            flat = EFMLoRA(trainer.model, trainer.create_optimizer(), rho)
        trainer.train(resume_from_checkpoint=str(tmp_path / "flat" / "checkpoint-4") if place == "resumed" else None)
        ends.append(weights(trainer.model))
    assert flat.step == STEPS
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])
    assert same(ends[2], ends[3])


class Spied:
    """What a trl trainer's step reads: the rollouts of each pass, and whether B is perturbed without gradients."""

    def __init__(self, trainer: Any, flat: Any) -> None:
        self.losses: list[Any] = []
        self.without_gradients: list[bool] = []
        own = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            read = {key: inputs[key].sum().item() for key in sorted(inputs) if "ids" in key}
            self.losses.append((getattr(trainer, "_step", None), read))
            return own(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        for layer in flat.method.pairs[0].layers:
            part = layer.lora_B["default"]
            part.register_forward_hook(lambda module, *_: self.note(module))

    def note(self, module: Any) -> None:
        if not torch.is_grad_enabled():
            self.without_gradients.append(not same(module.weight, module._parameters["weight"]))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "KTO"])
@pytest.mark.filterwarnings("ignore")  # trl's own warnings
def test_trls_trainers_that_read_without_gradients(tmp_path: Path, kind: str, name: str) -> None:
    """Both passes of FMLoRA see the rollouts of one pass of LoRA, which the clean weights have drawn."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    prompts = [f"w{i} w{i + 1}" for i in range(16)]
    rows = [{"prompt": each} for each in prompts]
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "beta": 0.1}
    of_trainer: dict[str, Any] = {}
    if kind == "KTO":
        rows = [{"prompt": each, "completion": " w5 w6", "label": i % 2 == 0} for i, each in enumerate(prompts)]
    else:
        settings |= {"num_generations": 2, "max_completion_length": 4}
        of_trainer["reward_funcs"] = lambda completions, **_: [float(len(set(each))) for each in completions]
    base = getattr(trl, f"{kind}Trainer")
    spied = {}
    for rho in (0.0, 30.0):
        trainer_class = type(f"Flat{kind}", (base, TwoPasses), {}) if name == "FMLoRA" else base
        trainer = trainer_class(
            llama(),
            args=arguments(tmp_path, getattr(trl, f"{kind}Config"), **settings, max_steps=2),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=tokenizer_of_words(), eos_token="</s>", pad_token="<pad>", padding_side="left"
            ),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
            **of_trainer,
        )
        trainer.flat = getattr(loops, name)(trainer.model, trainer.create_optimizer(), rho)
        spied[rho] = Spied(trainer, trainer.flat)
        torch.manual_seed(0)
        trainer.train()
        assert trainer.flat.step == 2
    passes = 2 if name == "FMLoRA" else 1
    assert len(spied[0.0].losses) == 4
    # The first optimizer step, whose weights are equal: each micro-batch in each of its passes.
    for index, expected in enumerate(spied[0.0].losses[:2]):
        assert spied[30.0].losses[passes * index : passes * (index + 1)] == [expected] * passes
    assert len(spied[30.0].losses) == 4 * passes
    assert spied[30.0].without_gradients
    assert not any(spied[30.0].without_gradients)
