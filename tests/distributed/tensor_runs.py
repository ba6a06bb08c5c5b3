"""Tensor parallelism on CPU processes: transformers' and Lightning's, and the same runs on one process."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from deepspeed_runs import weights
from fits import E_of, full_weights, parts, places
from float64_runs import Automatic, Manual, fit_in_float64, network
from hf_runs import llama
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM

from lightning_flatlora import AdapterCheckpoint, EFMLoRA, loops
from lightning_flatlora.sharding import Sharding, average_gradients

STEPS, RHO, BETA = 10, 0.3, 0.7
LOADED: dict[str, dict[str, Any]] = {"loaded": {"fsdp_size": 2}, "tensor": {"tp_size": 2}}
"""How ``from_pretrained`` splits a model over two processes: by FSDP2 or by tensor parallelism."""


def loaded(how: str, folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model, split by ``from_pretrained`` if so wanted."""
    if how not in LOADED:
        return llama().to(dtype)
    from transformers.distributed.configuration_utils import DistributedConfig

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    # It knows no processes on CPUs.
    ParallelismConfig._validate_accelerator = lambda *args: None
    if not dist.get_rank():
        llama().to(dtype).save_pretrained(f"{folder}/base")
    dist.barrier()
    config = DistributedConfig(**LOADED[how])
    return LlamaForCausalLM.from_pretrained(f"{folder}/base", dtype=dtype, distributed_config=config)


def same_start(model: Any) -> None:
    """Give every A the same values in each run, which peft draws in another way for a split layer."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_embedding_B" in name:
            value = torch.randn(parameter.shape, dtype=parameter.dtype) / 4
            parameter.data.copy_(Sharding().part(value, parameter))


def with_lora(base: Any) -> Any:
    targets = ["embed_tokens", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    net = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).train()
    for module in net.modules():
        # peft 0.21 leaves the size of this process's part, with which the forward pass raises an error.
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            module.out_features, module.in_features = module.weight.shape
    same_start(net)
    return net


def clip(parameters: list[nn.Parameter], limit: float) -> None:
    """Clip by norm, which torch's function can't for DTensors next to plain tensors."""
    norms = []
    for parameter in parameters:
        grad = parameter.grad
        norms.append((grad.full_tensor() if isinstance(grad, DTensor) else grad).norm())  # type: ignore[union-attr]
    factor = min(1.0, limit / float(torch.stack(norms).norm()))
    for parameter in parameters:
        parameter.grad.mul_(factor)  # type: ignore[union-attr]


def by_loop(
    how: str,
    folder: str,
    name: str | None = "EFMLoRA",
    window: int = 1,
    limit: float | None = None,
    stops: bool = False,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Train in a plain loop in float64; with ``stops`` in two objects, the second of which loads the first's state."""
    net = with_lora(loaded(how, folder, torch.float64))
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if how == "loaded" else (1, 0)
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(2, 42, (steps, window, 4, 8), generator=generator)[:, :, rank::ranks]

    def started() -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(trained, lr=5e-3, foreach=False)
        own = {"beta": BETA} if name == "EFMLoRA" else {}
        return optimizer, getattr(loops, name)(net, optimizer, RHO, **own) if name else None

    optimizer, flat = started()
    for index, micro_batches in enumerate(data):
        if stops and index == steps // 2:
            state = optimizer.state_dict()
            flat.close()
            optimizer, flat = started()
            optimizer.load_state_dict(state)
        for tokens in micro_batches:
            for each_pass in passes(flat):
                with each_pass:
                    (net(input_ids=tokens, labels=tokens).loss / window).backward()
        if how == "loaded":  # the adapter is the loop's own to average
            average_gradients(trained)
        if limit:
            clip(trained, limit)
        optimizer.step()
        optimizer.zero_grad()
    found = {"weights": weights(net)}
    if flat:
        found["E"] = flat.perturbation.state_dict()["E"]
        flat.close()
    return found


def passes(flat: Any) -> Any:
    """The passes of a method, or of plain LoRA."""
    return flat.training_passes() if hasattr(flat, "training_passes") else [nullcontext()]


# -- Lightning


class _Splits:
    """Splits one layer and its B by rows, and another layer and its A by columns, with whole results."""

    net: Any
    device_mesh: Any

    def configure_model(self) -> None:
        if self.device_mesh is None or getattr(self, "is_split", False):
            return
        layers, mesh = self.net.base_model.model, self.device_mesh["tensor_parallel"]
        by_rows = ColwiseParallel(output_layouts=Replicate())
        by_columns = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        parallelize_module(layers[0], mesh, {"base_layer": by_rows, "lora_B.default": by_rows})
        parallelize_module(layers[2], mesh, {"base_layer": by_columns, "lora_A.default": by_columns})
        self.is_split = True


class SplitAutomatic(_Splits, Automatic):
    """Automatic optimization."""


class SplitManual(_Splits, Manual):
    """FMLoRAModule."""


def by_lightning(
    front_end: str, accumulate: int = 1, folder: str | None = None, ckpt_path: str | None = None
) -> dict[str, Any]:
    """Fit under Lightning's tensor parallelism; the full trained weights and E. Save each epoch into the folder."""
    net = network()
    module, callbacks, trainer = parts(front_end, net, accumulate)
    module.__class__ = SplitManual if front_end == "FMLoRAModule" else SplitAutomatic
    sizes = {"data_parallel_size": 1, "tensor_parallel_size": 2}
    strategy = ModelParallelStrategy(process_group_backend="gloo", **sizes)
    # "32-true" keeps the weights' dtype.
    trainer |= {"strategy": strategy, "precision": "32-true", **places()}
    saves = [AdapterCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else []
    fit_in_float64(module, 2, [*callbacks, *saves], **trainer, ckpt_path=ckpt_path)
    return {"weights": full_weights(strategy, net), "E": E_of(module, callbacks)}


def saved(folder: str) -> dict[str, Any]:
    """The trained weights of an adapter's folder, as peft loads them."""
    return weights(PeftModel.from_pretrained(network().unload(), folder, is_trainable=True))


# -- what is refused on eight ranks


def refused(kind: str) -> dict[str, Any]:
    """The error of a model split over two dimensions, or over some of the ranks, which is raised on purpose."""
    if kind == "Lightning":
        sizes = {"data_parallel_size": 4, "tensor_parallel_size": 2}
        strategy = ModelParallelStrategy(process_group_backend="gloo", **sizes)
        module = SplitAutomatic(network().float())
        return fit_in_float64(module, 1, [EFMLoRA(RHO)], strategy=strategy, precision="32-true", **places())
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "tensor"))
    net: Any = network()
    if kind != "HSDP":
        parallelize_module(net.base_model.model[0], mesh["tensor"], {"lora_B.default": ColwiseParallel()})
    if kind != "some of the ranks":
        fully_shard(net, mesh=mesh if kind == "HSDP" else mesh["data"])
    return loops.EFMLoRA(net, torch.optim.SGD(net.parameters(), lr=0.1), RHO)
