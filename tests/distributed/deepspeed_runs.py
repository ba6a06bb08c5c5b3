"""Runs under DeepSpeed's ZeRO on CPU processes, which gloo connects; and the same runs in plain PyTorch on one."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, PartialState
from accelerate.state import AcceleratorState
from fits import Collectives, Sharded
from float64_runs import SIZE, dataset, loss, network
from hf_runs import llama
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, DeepSpeedStrategy
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from typing_extensions import override

from lightning_flatlora import loops
from lightning_flatlora.loops.loop_method import STATE_KEY
from lightning_flatlora.sharding import Sharding

STEPS, RHO, BETA = 20, 0.4, 0.7
RHOS = {"flat": RHO, "zero": 0.0}


def start() -> Any:
    """Import DeepSpeed and start its process group."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It would compile a speed-up for CPUs at the first start, and a build that is killed leaves a lock, on which each
    # later start waits.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda *args: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def of_experts() -> nn.Module:
    """A mixture of experts with LoRA on its embedding, attention, routers and experts."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "vocab_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2))
    modules = ["embed_tokens", "q_proj", "v_proj"]
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=modules, target_parameters=parameters)
    return get_peft_model(base, config).train()


def loss_of_experts(net: nn.Module, batch: Any) -> Tensor:
    value: Tensor = net(input_ids=batch[0], labels=batch[0]).loss
    return value


class Task:
    """A network, its loss and its batches."""

    def __init__(self, name: str) -> None:
        self.loss = loss_of_experts if name == "experts" else loss
        self.net = of_experts() if name == "experts" else network().float()
        if name == "experts":
            generator = torch.Generator().manual_seed(2)
            self.data = TensorDataset(torch.randint(0, 32, (8 * SIZE, 6), generator=generator))
        else:
            x, y = dataset().tensors
            self.data = TensorDataset(x.float(), y)

    def batches(self, count: int, ranks: int, rank: int) -> Iterator[Any]:
        """This rank's share of each batch, again and again."""
        share = list(Sharded(self.data, ranks, rank))
        for index in range(count):
            yield share[index % len(share)]


def trained_of(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained_of(net), lr=3e-3, weight_decay=0.1)


def method_on(model: nn.Module, optimizer: Any, method: str) -> Any:
    """EFMLoRA, or None for plain LoRA."""
    if method == "LoRA":
        return None
    return loops.EFMLoRA(model, optimizer, RHOS[method], beta=BETA)


def alone(task: str, window: int = 1, clip: float = 0.0, method: str = "flat") -> dict[str, Tensor]:
    """Train in plain PyTorch with the whole batches."""
    job = Task(task)
    optimizer = adamw(job.net)
    flat = method_on(job.net, optimizer, method)
    for index, batch in enumerate(job.batches(STEPS * window, 1, 0)):
        (job.loss(job.net, batch) / window).backward()
        if (index + 1) % window == 0:
            if clip:
                nn.utils.clip_grad_norm_(trained_of(job.net), clip)
            optimizer.step()
            optimizer.zero_grad()
    if flat is not None:
        flat.close()
    return weights(job.net)


def weights(net: nn.Module) -> dict[str, Tensor]:
    """All trained weights in full; under ZeRO-3 and FSDP2 they are gathered."""
    deepspeed: Any = sys.modules.get("deepspeed")
    found = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        is_split = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if is_split else contextlib.nullcontext():
            found[name] = Sharding().gather(parameter, parameter).clone()
    return found


def engine_of(net: nn.Module, stage: int, window: int = 1, clip: float = 0.0, threshold: int = 0, **config: Any) -> Any:
    """Make DeepSpeed's engine; ``threshold`` is the size up to which ZeRO-3 leaves a parameter whole."""
    deepspeed = start()
    zero = {"stage": stage, "stage3_param_persistence_threshold": threshold, **config.pop("zero", {})}
    optimizer = config.pop("optimizer", None) or adamw(net)
    settings = {
        "train_micro_batch_size_per_gpu": SIZE,
        "gradient_accumulation_steps": window,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **config,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    return engine


def steps(engine: Any, job: Task, first: int, last: int, window: int = 1) -> None:
    """Take the optimizer steps from ``first`` to ``last`` on this rank's share."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    batches = list(job.batches(last * window, ranks, rank))
    for batch in batches[first * window :]:
        engine.backward(job.loss(engine, batch))
        engine.step()


def train(
    task: str, stage: int, window: int = 1, clip: float = 0.0, method: str = "flat", **config: Any
) -> dict[str, Any]:
    """Train on this rank's share of each batch."""
    job = Task(task)
    engine = engine_of(job.net, stage, window, clip, **config)
    flat = method_on(engine, engine.optimizer, method)
    steps(engine, job, 0, STEPS, window)
    count = flat.step if flat else STEPS
    if flat:
        flat.close()
    return {"weights": weights(job.net), "step": count, "class": type(engine.optimizer).__name__}


def resumed(folder: str, before: int, after: int) -> dict[str, Any]:
    """Train with a stop in the middle, between two stages."""
    for stage, first, last in ((before, 0, STEPS // 2), (after, STEPS // 2, STEPS)):
        job = Task("linear")
        engine = engine_of(job.net, stage, clip=0.3)
        flat: Any = method_on(engine, engine.optimizer, "flat")
        client: Any = {}
        if first:
            _, client = engine.load_checkpoint(folder, tag="middle")
            assert flat.step == first
        steps(engine, job, first, last)
        if last < STEPS:
            engine.save_checkpoint(folder, "middle", {"mine": 1})
        flat.close()
    return {"weights": weights(job.net), "mine": client["mine"], "has_state": STATE_KEY in client}


def calls(stage: int, method: str) -> dict[str, Any]:
    """Count the collectives of one step."""
    job = Task("linear")
    engine = engine_of(job.net, stage)
    flat = method_on(engine, engine.optimizer, method)
    steps(engine, job, 0, 3)
    with Collectives() as mode:
        steps(engine, job, 3, 4)
    if flat:
        flat.close()
    return {"calls": sum(mode.calls.values())}


def gathered(stage: int, dtype: str) -> dict[str, Any]:
    """The gradients and values that a step reads, and what DeepSpeed's own functions return for them."""
    deepspeed = start()
    job = Task("linear")
    settings: dict[str, Any] = {"bf16": {"enabled": True}} if dtype == "bf16" else {}
    if dtype == "bf16, float32 gradients":
        settings = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine = engine_of(job.net, stage, window=2, **settings)
    flat = loops.EFMLoRA(engine, engine.optimizer, RHO)
    factors = [p for name, p in job.net.named_parameters() if ".lora_" in name]
    batches = list(job.batches(6, int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])))
    for index, (x, y) in enumerate(batches):
        engine.backward(job.loss(engine, (x.to(factors[0].dtype), y)))
        if index < 5:  # two steps, and a window that is complete except for its step
            engine.step()
    found: dict[str, Any] = {"ours": [], "deepspeeds": [], "values": list(weights(job.net).values())[: len(factors)]}
    sharding = flat.method.sharding
    with sharding.fetched(factors, factors, []):
        found["ours"] = [sharding.stack([each], gradients=True)[0].clone() for each in factors]
        found["our values"] = [sharding.stack([each])[0].clone() for each in factors]
    found["deepspeeds"] = [deepspeed.utils.safe_get_full_grad(each).flatten(1) for each in factors]
    flat.close()
    return {**found, "class": type(engine.optimizer).__name__}


def skipped(stage: int) -> dict[str, Any]:
    """A step that DeepSpeed skips, since a gradient outside of the pairs is infinite on one rank."""
    job = Task("linear")
    engine = engine_of(job.net, stage)
    flat = loops.EFMLoRA(engine, engine.optimizer, RHO)
    steps(engine, job, 0, 3)
    before, E = weights(job.net), flat.perturbation.state_dict()["E"]
    (head,) = [p for name, p in job.net.named_parameters() if "modules_to_save" in name and name.endswith("bias")]
    is_first = os.environ["RANK"] == "0"
    hook = head.register_hook(lambda gradient: gradient * (torch.inf if is_first else 1))
    steps(engine, job, 3, 4)
    hook.remove()
    after = {"weights": weights(job.net), "E": flat.perturbation.state_dict()["E"]}
    assert engine.skipped_steps == 1
    steps(engine, job, 4, 5)
    moved = flat.perturbation.state_dict()["E"]
    flat.close()
    return {"before": {"weights": before, "E": E}, "after": after, "moved": moved}


def by_accelerate(folder: str, stage: int) -> dict[str, Any]:
    """Train with accelerate in windows of 2, with a stop in the middle."""
    start()
    # It would take a CPU for one process.
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_CPU)
    for first, last in ((0, STEPS // 2), (STEPS // 2, STEPS)):
        AcceleratorState._reset_state(True)
        plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=2, gradient_clipping=0.3)
        settings = plugin.deepspeed_config
        settings.update(train_micro_batch_size_per_gpu=SIZE, zero_allow_untested_optimizer=True)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2)
        job = Task("linear")
        model, optimizer = accelerator.prepare(job.net, adamw(job.net))
        flat = loops.EFMLoRA(model, optimizer, RHO, beta=BETA)
        if first:
            accelerator.load_state(folder)
            assert flat.step == first
        batches = list(job.batches(2 * last, accelerator.num_processes, accelerator.process_index))
        for batch in batches[2 * first :]:
            with accelerator.accumulate(model):
                accelerator.backward(job.loss(model, batch))
                optimizer.step()
                optimizer.zero_grad()
        if last < STEPS:
            accelerator.save_state(folder)
        flat.close()
    found = {"weights": weights(job.net), "type": str(accelerator.distributed_type)}
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    return found


class OnCPU:
    """Lightning's or Fabric's DeepSpeedStrategy without its checks that each process has a GPU."""

    ddp: Any
    """The same library's DDPStrategy."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        self.ddp.setup_environment(self)


class FabricOnCPU(OnCPU, DeepSpeedStrategy):
    """Fabric's."""

    ddp = DDPStrategy

    @override
    def _setup_distributed(self) -> None:
        start()
        self._set_world_ranks()
        self._init_deepspeed_distributed()


def by_fabric(folder: str, stage: int) -> dict[str, Any]:
    """Train with Fabric, with a stop in the middle."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": SIZE, "zero_allow_untested_optimizer": True}
    for first, last in ((0, STEPS // 2), (STEPS // 2, STEPS)):
        strategy = FabricOnCPU(config=config, process_group_backend="gloo")
        fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2)
        fabric.launch()
        job = Task("linear")
        model, optimizer = fabric.setup(job.net, adamw(job.net))
        flat: Any = method_on(model, optimizer, "flat")
        state = {"model": model, "optimizer": optimizer}
        if first:
            fabric.load(folder, state)
            assert flat.step == first
        for batch in list(job.batches(last, fabric.world_size, fabric.global_rank))[first:]:
            fabric.backward(job.loss(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        if last < STEPS:
            fabric.save(folder, state)
        flat.close()
    return {"weights": weights(job.net)}


def refused(kind: str) -> None:
    """Make the object where it can't work; the error is the result."""
    net = network().float()
    if kind == "made before":
        optimizer = adamw(net)
        flat = loops.EFMLoRA(net, optimizer, RHO)
        engine = engine_of(net, 2, optimizer=optimizer)
        try:
            steps(engine, Task("linear"), 0, 1)
        finally:
            flat.close()
        return
    engine = engine_refused(kind, net)
    method = loops.FMLoRA if kind.startswith("FMLoRA") else loops.EFMLoRA
    method(net if kind == "FMLoRA on the model itself" else engine, engine.optimizer, RHO)


def engine_refused(kind: str, net: Any) -> Any:
    """An engine under which a method is refused."""
    deepspeed = start()
    if kind == "offload":
        zero = {"offload_optimizer": {"device": "cpu"}}
        return engine_of(net, 2, zero=zero, zero_force_ds_cpu_optimizer=False)
    if kind == "pipeline":
        from deepspeed.pipe import PipelineModule

        return engine_of(PipelineModule(list(net.base_model.model), num_stages=2), 1, window=2)
    if kind == "experts":
        from deepspeed.moe.layer import MoE
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

        net.base_model.model.append(MoE(3, nn.Linear(3, 3), num_experts=2))
        groups = split({"params": trained_of(net), "name": "all"})
        return engine_of(net, 2, optimizer=torch.optim.AdamW(groups))
    if kind == "tensor parallelism":
        base = deepspeed.tp_model_init(llama(), tp_size=2, dtype=torch.float32)
        net = get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
        return engine_of(net, 1, tensor_parallel={"autotp_size": 2})
    if kind == "Muon":
        muon = {"type": "Muon", "params": {"lr": 1e-3}}
        config = {"train_micro_batch_size_per_gpu": SIZE, "optimizer": muon}
        return deepspeed.initialize(model=net, model_parameters=trained_of(net), config=config)[0]
    if kind == "bf16 without ZeRO":
        return engine_of(net, 0, bf16={"enabled": True})
    return engine_of(net, 2)
