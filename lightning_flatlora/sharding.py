"""How the ranks share factors and gradients, and how to gather them: all collectives of the engine."""

from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from typing_extensions import override


class Sharding:
    """Factors that each rank holds whole (one device, DDP), or as DTensors (FSDP2, tensor parallelism).

    Its methods return equal values on every rank, never those of a local shard. Under FSDP they communicate, so every
    rank must call them in the same order.

    Attributes:
        only_views: whether layers compute with views of the parameters, see :func:`perturbed_read.perturb`.
    """

    only_views = False

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the full shape, independent of this rank's part."""
        return parameter.shape

    @contextmanager
    def fetched(
        self, values: Iterable[nn.Parameter], gradients: Iterable[nn.Parameter], also_finite: Iterable[nn.Parameter]
    ) -> Iterator[None]:
        """Let :meth:`stack` and :meth:`all_finite` be called inside, once a step's gradients are complete.

        Args:
            values: the parameters that will be stacked.
            gradients: those whose gradients will be.
            also_finite: those whose gradients must be finite, too.
        """
        yield

    def stack(self, parameters: Sequence[nn.Parameter], *, gradients: bool = False) -> Tensor:
        """Stack parameters of one shape, or their gradients (zero if one is missing), as a plain tensor.

        Returns:
            Shape (L, rows, columns), with a kernel's dimensions among the columns, in the parameters' dtype. A single
            parameter's stack may share its memory, since copying a large factor costs as much as a product with it.
        """
        tensors: Sequence[Tensor] = parameters
        if gradients:
            tensors = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        with torch.no_grad():  # faster than a detach() for each tensor
            stacked = tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
            return whole(stacked.flatten(2))

    def gather(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """Gather a tensor that is split like a parameter, bit for bit: the parameter, or an optimizer's average."""
        tensor = tensor.detach()
        # Not whole(), whose sum over the ranks may turn -0.0 into 0.0.
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return this rank's part of a whole value, which is equal on every rank; the inverse of :meth:`gather`."""
        if isinstance(parameter, DTensor):
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    def splits(self, parameter: nn.Parameter) -> bool:
        """Say whether ranks hold parts of a parameter."""
        return isinstance(parameter, DTensor)

    def as_read(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return a whole value, or a view of it, so that a layer can add it to the parameter in its forward pass."""
        return value

    def merged(self, table: dict[Any, Any]) -> dict[Any, Any]:
        """Merge all ranks' small tables, in one order everywhere; the first rank with an entry decides."""
        return table

    def have_gradients(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """Say which parameters have a gradient, known to the host and equal on every rank."""
        return [parameter.grad is not None for parameter in parameters]

    def all_finite(self, parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
        """Say whether every gradient is finite, as a boolean on a device, shape (); true if there is none.

        The host does not wait.
        """
        sharded, plain = [], []
        for parameter in dict.fromkeys(parameters):
            if isinstance(parameter.grad, DTensor):
                sharded.append(parameter.grad)
            elif parameter.grad is not None:
                # For a sparse gradient, as an embedding's may be, the nonzero entries.
                plain.append(parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad)
        total = torch.zeros((), device=device)
        # PyTorch can't compute one norm over both kinds.
        for gradients in (sharded, plain):
            if gradients:
                total = total + whole(nn.utils.get_total_norm(gradients, norm_type=torch.inf)).to(device)
        return torch.isfinite(total)


class TensorParallel(Sharding):
    """Factors that tensor parallelism splits, by rows or by columns: as DTensors in the forward pass, too."""

    @override
    def as_read(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        if not isinstance(parameter, DTensor):
            return value
        mesh, placements, own = parameter.device_mesh, parameter.placements, value
        if isinstance(placements[0], Shard):
            dim = placements[0].dim
            own = value.narrow(dim, _start(parameter, dim), parameter.to_local().shape[dim])
        return DTensor.from_local(own, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


class FlatShards(Sharding):
    """Factors of which each rank holds a part of the flattened values, maybe none (FSDP1 between passes).

    Each rank writes its part into a tensor of zeros, and these are summed. This is exact and takes one all-reduce per
    stack, for any wrapping policy.

    Args:
        model: the model whose FSDP units hold the parameters.
        group: the ranks over which the model is sharded.
    """

    only_views = True

    def __init__(self, model: nn.Module, group: Any) -> None:
        self._group = group
        self._shapes: dict[int, torch.Size] = {}
        self._offsets: dict[int, int] = {}
        handles: list[Any] = [unit._handle for unit in FullyShardedDataParallel.fsdp_modules(model)]
        for flat in [handle.flat_param for handle in handles if handle is not None]:
            # FSDP's internal record, since no public one says where each rank's part begins.
            for parameter, shape, part in zip(flat._params or [], flat._shapes, flat._shard_param_infos, strict=False):
                self._shapes[id(parameter)] = shape
                self._offsets[id(parameter)] = part.intra_param_start_idx or 0  # None if the rank has no part

    @override
    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return self._shapes.get(id(parameter), parameter.shape)

    @override
    def stack(self, parameters: Sequence[nn.Parameter], *, gradients: bool = False) -> Tensor:
        rows = []
        for parameter in parameters:
            tensor = parameter.grad if gradients else parameter.detach()
            part = parameter.new_empty(0) if tensor is None else tensor.to(parameter.dtype)
            # A gradient in FSDP's no_sync is whole, and of this rank's samples only.
            rows.append(part.flatten() / self._group.size() if part.ndim > 1 else self._among_zeros(part, parameter))
        full = torch.stack(rows)
        dist.all_reduce(full, group=self._group)
        return full.view(len(rows), *matrix_shape(self.shape(parameters[0])))

    def _among_zeros(self, part: Tensor, parameter: nn.Parameter) -> Tensor:
        """Put this rank's part of a tensor, split like a parameter, into a flattened whole of zeros."""
        full = torch.zeros(self.shape(parameter).numel(), dtype=part.dtype, device=part.device)
        offset = self._offsets[id(parameter)]
        full[offset : offset + part.numel()].copy_(part.detach().flatten())
        return full

    @override
    def gather(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        if not self.splits(parameter):
            return super().gather(tensor, parameter)
        full = self._among_zeros(tensor, parameter)
        # Summed as bytes, because a sum of floats would turn -0.0 into 0.0.
        dist.all_reduce(full.view(torch.uint8), group=self._group)
        return full.view(self.shape(parameter))

    @override
    def part(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        if not self.splits(parameter):
            return super().part(value, parameter)
        offset = self._offsets[id(parameter)]
        return value.flatten()[offset : offset + parameter.numel()].view(parameter.shape).clone()

    @override
    def splits(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._shapes

    @override
    def merged(self, table: dict[Any, Any]) -> dict[Any, Any]:
        tables: list[dict[Any, Any]] = [{} for _ in range(self._group.size())]
        dist.all_gather_object(tables, table, group=self._group)
        return dict(ChainMap(*tables))

    @override
    def have_gradients(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """Say so for all trained ones, since a rank without a part of a parameter can't know about its gradient."""
        if self._group.size() == 1:
            return super().have_gradients(parameters)
        return [parameter.requires_grad for parameter in parameters]

    @override
    def all_finite(self, parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
        parameters = list(parameters)
        finite = super().all_finite(parameters, device)
        if not parameters:
            return finite
        flag = finite.to(torch.float32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return flag > 0


class ZeroShards(Sharding):
    """Factors under DeepSpeed's ZeRO, which keeps gradients in parts of the flattened values, with ZeRO-3 values too.

    All that a step reads is gathered in one all-reduce: each rank writes its parts among zeros, which is exact.
    """

    def __init__(self) -> None:
        self._whole: dict[tuple[int, bool], Tensor] = {}
        self._finite = torch.ones((), dtype=torch.bool)

    @override
    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    @override
    def splits(self, parameter: nn.Parameter) -> bool:
        # Between a backward pass and the step ZeRO-3 puts even small parameters away, which it calls persistent.
        return parameter.numel() < self.shape(parameter).numel()

    @override
    @contextmanager
    def fetched(
        self, values: Iterable[nn.Parameter], gradients: Iterable[nn.Parameter], also_finite: Iterable[nn.Parameter]
    ) -> Iterator[None]:
        wanted = [(each, False) for each in dict.fromkeys(values) if self.splits(each)]
        wanted += [(each, True) for each in dict.fromkeys(gradients)]
        watched = [_zero_part(each, True)[1] for each in dict.fromkeys(also_finite)]
        watched = [part for part in watched if len(part)]
        is_finite = torch.isfinite(nn.utils.get_total_norm(watched, norm_type=torch.inf))
        sizes = [self.shape(each).numel() for each, _ in wanted]
        first = wanted[-1][0]
        flat = torch.zeros(sum(sizes) + 1, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        *slots, not_finite = torch.split(flat, [*sizes, 1])
        for (parameter, is_gradient), slot in zip(wanted, slots, strict=True):
            start, part = _zero_part(parameter, is_gradient)
            slot[start : start + len(part)].copy_(part)
        not_finite.copy_(~is_finite)
        dist.all_reduce(flat, group=getattr(first, "ds_process_group", None) or first._dp_group)  # type: ignore[attr-defined]
        for (parameter, is_gradient), slot in zip(wanted, slots, strict=True):
            self._whole[id(parameter), is_gradient] = slot.view(self.shape(parameter))
        self._finite = not_finite[0] == 0
        try:
            yield
        finally:
            self._whole = {}

    @override
    def stack(self, parameters: Sequence[nn.Parameter], *, gradients: bool = False) -> Tensor:
        rows = [self._whole.get((id(each), gradients), each.detach()) for each in parameters]
        return torch.stack(rows).flatten(2)

    @override
    def have_gradients(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """Say so for all trained ones, since a rank without a part of a parameter can't know about its gradient."""
        return [parameter.requires_grad for parameter in parameters]

    @override
    def all_finite(self, parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
        """Say so for the parameters given to :meth:`fetched`."""
        return self._finite.to(device)


def _zero_part(parameter: Any, is_gradient: bool) -> tuple[int, Tensor]:
    """Return where this rank's part of a flattened parameter, or of its averaged gradient, begins, and the part."""
    if hasattr(parameter, "ds_id"):
        part = parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter) if is_gradient else parameter.ds_tensor
        if part is None:  # the gradient of a frozen parameter
            return 0, parameter.new_empty(0)
        start = part.numel() * dist.get_rank(parameter.ds_process_group)
        return start, part.flatten()[: max(parameter.ds_numel - start, 0)]  # the last parts are padded
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return 0, parameter.new_empty(0)
    start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    part = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    # With bfloat16 weights ZeRO-1 keeps whole gradients, each in a part's place.
    return start, part[start : start + size] if len(part) == parameter.numel() else part


def sharding_of(model: nn.Module | None) -> Sharding:
    """Return how the ranks share the parameters of a model, as the strategy has wrapped it."""
    units = FullyShardedDataParallel.fsdp_modules(model) if model is not None else []
    if units:  # the model itself, or modules that its configure_model wrapped
        return FlatShards(model, units[0].process_group)  # type: ignore[arg-type]
    if model is not None and any(is_zeros(parameter) for parameter in model.parameters()):
        return ZeroShards()
    return TensorParallel() if is_tensor_parallel(model) else Sharding()


def is_tensor_parallel(model: nn.Module | None) -> bool:
    """Say whether a model's layers compute with DTensors, which FSDP2 shows them as whole plain tensors."""
    if model is None or any(isinstance(module, FSDPModule) for module in model.modules()):
        return False
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_zeros(parameter: nn.Parameter) -> bool:
    """Say whether DeepSpeed's ZeRO holds a parameter's gradient in parts."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def is_sharded(model: nn.Module | None) -> bool:
    """Say whether any rank holds only a part of a parameter."""
    if model is None:
        return False
    return sharding_of(model).only_views or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Give FSDP2's modules their sharded parameters back, which a pass without a backward leaves gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def matrix_shape(shape: torch.Size) -> torch.Size:
    """Return (rows, columns) of a factor, with a kernel's dimensions among the columns."""
    return torch.Size([shape[0], shape[1:].numel()])


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor's full value, gathered from the ranks; a plain tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, placement = tensor.device_mesh, tensor.placements[0]
    # full_tensor pads uneven shards, which sends several times the size of a factor with few rows.
    if mesh.ndim == 1 and isinstance(placement, Shard) and tensor.shape[placement.dim] % mesh.size():
        return _sum_of_shards(tensor, placement.dim)
    return tensor.full_tensor()


def _sum_of_shards(tensor: DTensor, dim: int) -> Tensor:
    """Compute full_tensor's result, without its padding."""
    local = tensor.to_local()
    full = local.new_zeros(tensor.shape)
    full.narrow(dim, _start(tensor, dim), local.shape[dim]).copy_(local)
    dist.all_reduce(full, group=tensor.device_mesh.get_group())
    return full


def _start(tensor: DTensor, dim: int) -> int:
    """Return where this rank's part of a dimension begins.

    It is cut like torch.chunk: in pieces of equal size, rounded up, except that the last ones are shorter or empty.
    """
    size, group = tensor.shape[dim], tensor.device_mesh.get_group()
    return min(-(-size // group.size()) * group.rank(), size)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each parameter's gradient by its mean over the ranks, in one all-reduce per dtype and device.

    A missing gradient counts as zero; it stays missing only if no process group is running. Gradients of DTensors are
    left to FSDP2. Every rank must call it with the same parameters in the same order.
    """
    if world_size() == 1:
        return
    grads = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    average(grads)


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each floating tensor by its mean over the ranks, in place, in one all-reduce per dtype and device.

    Every rank must call it with the same shapes in the same order; without a process group it does nothing.
    """
    if world_size() == 1:
        return
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for bucket in buckets.values():
        flat = torch.cat([tensor.flatten() for tensor in bucket]) / dist.get_world_size()
        dist.all_reduce(flat)
        means = torch.split(flat, [tensor.numel() for tensor in bucket])
        for tensor, mean in zip(bucket, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
