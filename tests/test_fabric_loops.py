"""Other libraries' loops plus one line: Fabric, accelerate, and litgpt's own program."""

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from float64_runs import loss, optimizer_of
from helpers import same, weights
from hf_runs import WORDS, tokenizer_of_words
from loop_runs import METHODS, batches, method_of, net_of, run, schedule, trained_plainly
from torch import nn

from lightning_flatlora import loops
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


LINE = '    max_steps = train.max_steps or float("inf")\n'
"""After which the line is inserted into the loop of ``litgpt finetune_lora``."""


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
