"""How the ranks share factors and gradients, and what makes them whole again: all collectives of the package."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from typing_extensions import override


class Layout:
    """Factors that each rank holds whole (one device, DDP), or as DTensors (FSDP2).

    What it returns is the same on every rank, and never read from a local shard. Its methods communicate under FSDP, so
    every rank has to call them in one order.

    Attributes:
        only_views: whether layers compute with views of the parameters, see :func:`read_through.install`.
    """

    only_views = False

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The full shape, whatever this rank holds."""
        return parameter.shape

    def stack(self, parameters: Sequence[nn.Parameter], *, gradients: bool = False) -> Tensor:
        """Parameters of one shape, or their gradients (zero where one is missing), as a plain tensor.

        Returns:
            Shape (L, rows, columns), a kernel's dimensions among the columns; dtype of the parameters; a copy.
        """
        tensors = [_gradient(parameter) for parameter in parameters] if gradients else parameters
        with torch.no_grad():  # once, not a detach() for each of them
            return whole(torch.stack([tensor.flatten(1) for tensor in tensors]))

    def gather(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """What is split as a parameter is (itself, or an optimizer's average of it), whole, to the bit."""
        tensor = tensor.detach()
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # not a sum, which turns -0.0 into 0.0

    def part(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """What a rank keeps of a whole value, every rank having the same; undoes :meth:`gather`."""
        if isinstance(parameter, DTensor):
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    def splits(self, parameter: nn.Parameter) -> bool:
        """Whether ranks hold parts of a parameter."""
        return isinstance(parameter, DTensor)

    def merged(self, table: dict[Any, Any]) -> dict[Any, Any]:
        """A small table as all ranks know it together, in one order; the first rank that has an entry decides it."""
        return table

    def has_gradient(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether any of them has a gradient at all, known to the host."""
        return any(parameter.grad is not None for parameter in parameters)

    def have_gradients(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """Which of them have a gradient, known to the host, the same on every rank."""
        return [parameter.grad is not None for parameter in parameters]

    def all_finite(self, parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
        """Whether every gradient is finite, as a boolean on a device, shape (); true where there is none.

        The host does not wait.
        """
        grads = [p.grad for p in {id(p): p for p in parameters}.values() if p.grad is not None]
        kinds = ([g for g in grads if isinstance(g, DTensor)], [g for g in grads if not isinstance(g, DTensor)])
        norms = [whole(nn.utils.get_total_norm(kind, norm_type=torch.inf)) for kind in kinds if kind]
        return torch.isfinite(sum((norm.to(device) for norm in norms), start=torch.zeros((), device=device)))


class FlatShards(Layout):
    """Factors of which each rank holds a part of the flattened values, maybe none (FSDP1 between its passes).

    Ranks write what they have into a tensor of zeros and add these up: exact, in one all-reduce a stack, whatever the
    wrapping policy has put where.

    Args:
        model: its FSDP units hold the parameters.
        parameters: what is going to be asked for, in the same order on every rank; any trained parameters will do.
        group: the ranks over which the model is sharded.

    Raises:
        ValueError: the parts of a parameter don't add up to it.
    """

    only_views = True

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], group: Any) -> None:
        parameters = list({id(p): p for p in parameters}.values())
        shapes = _full_shapes(model)
        parameters = [p for p in parameters if id(p) in shapes]
        self._group = group
        self._shapes = {id(p): shapes[id(p)] for p in parameters}
        sizes = torch.tensor([p.numel() for p in parameters], device=parameters[0].device)
        of_ranks = [torch.zeros_like(sizes) for _ in range(group.size())]
        dist.all_gather(of_ranks, sizes, group=group)
        table = torch.stack(of_ranks)
        totals = table.sum(0).tolist()
        if any(self._shapes[id(p)].numel() != total for p, total in zip(parameters, totals, strict=True)):
            raise ValueError("the ranks' parts of a parameter don't add up to it: it is not sharded flat")
        offsets = table[: group.rank()].sum(0).tolist()
        self._offsets = {id(p): int(offset) for p, offset in zip(parameters, offsets, strict=True)}

    @override
    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return self._shapes.get(id(parameter), parameter.shape)

    @override
    def stack(self, parameters: Sequence[nn.Parameter], *, gradients: bool = False) -> Tensor:
        first, shape = parameters[0], self.shape(parameters[0])
        full = torch.zeros(len(parameters), shape.numel(), dtype=first.dtype, device=first.device)
        for row, parameter in zip(full, parameters, strict=True):
            tensor = parameter.grad if gradients else parameter.detach()
            if tensor is None:
                continue
            if tensor.ndim > 1:  # a gradient in FSDP's no_sync: whole, of this rank's samples alone
                row.copy_(tensor.flatten()).div_(self._group.size())
            else:
                offset = self._offsets[id(parameter)]
                row[offset : offset + tensor.numel()].copy_(tensor)
        dist.all_reduce(full, group=self._group)
        return full.view(len(parameters), *matrix_shape(shape))

    @override
    def gather(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        if not self.splits(parameter):
            return super().gather(tensor, parameter)
        full = torch.zeros(self.shape(parameter).numel(), dtype=tensor.dtype, device=tensor.device)
        offset = self._offsets[id(parameter)]
        full[offset : offset + tensor.numel()].copy_(tensor.detach().flatten())
        dist.all_reduce(full.view(torch.uint8), group=self._group)  # as bytes: a sum of floats turns -0.0 into 0.0
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
        return {key: value for table in reversed(tables) for key, value in table.items()}

    @override
    def has_gradient(self, parameters: Iterable[nn.Parameter]) -> bool:
        """True where other ranks may have one: Lightning lets no rank skip a batch of several."""
        return self._group.size() > 1 or super().has_gradient(parameters)

    @override
    def have_gradients(self, parameters: Sequence[nn.Parameter]) -> list[bool]:
        """A rank without a part of one can't tell, so all that are trained count."""
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


def layout_of(model: nn.Module | None, factors: Iterable[nn.Parameter]) -> Layout:
    """How the ranks share a model's factors.

    Args:
        model: as the strategy has wrapped it.
        factors: the A and B, or other trained parameters, that are going to be asked for.
    """
    units = FullyShardedDataParallel.fsdp_modules(model) if model is not None else []
    if units:  # the model itself, or modules that its configure_model has wrapped
        return FlatShards(model, factors, units[0].process_group)  # type: ignore[arg-type]
    return Layout()


def is_sharded(model: nn.Module | None) -> bool:
    """Whether any rank holds only a part of a parameter."""
    if model is None:
        return False
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return sharded or bool(FullyShardedDataParallel.fsdp_modules(model))


def matrix_shape(shape: torch.Size) -> torch.Size:
    """(rows, columns) of a factor, a kernel's dimensions among the columns."""
    return torch.Size([shape[0], shape[1:].numel()])


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's full value, gathered from the ranks; a plain tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, placement = tensor.device_mesh, tensor.placements[0]
    if mesh.ndim == 1 and isinstance(placement, Shard) and tensor.shape[placement.dim] % mesh.size():
        return _sum_of_shards(tensor, placement.dim)
    return tensor.full_tensor()


def _sum_of_shards(tensor: DTensor, dim: int) -> Tensor:
    """What full_tensor gives, without padding every rank's shard to the largest: a factor may have few rows."""
    group, rows = tensor.device_mesh.get_group(), tensor.shape[dim]
    local = tensor.to_local()
    full = local.new_zeros(tensor.shape)
    start = min(-(-rows // group.size()) * group.rank(), rows)
    full.narrow(dim, start, local.shape[dim]).copy_(local)
    dist.all_reduce(full, group=group)
    return full


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each parameter's gradient by its mean over the ranks, in one all-reduce for each dtype and device.

    A missing gradient counts as zero and stays missing only where no process group is running. Every rank must call it
    with the same parameters in the same order.

    Args:
        parameters: the small factors whose gradients travel.
    """
    if not _has_ranks():
        return
    grads = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    average(grads)


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in one all-reduce for each dtype and device.

    Every rank must call it with the same shapes in the same order; without a process group it does nothing.

    Args:
        tensors: floating, written to in place.
    """
    if not _has_ranks():
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


def _has_ranks() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _full_shapes(model: nn.Module) -> dict[int, torch.Size]:
    """The shape of every parameter that FSDP1 has flattened, by its id: FSDP's own record, as nothing public has it."""
    handles: list[Any] = [unit._handle for unit in FullyShardedDataParallel.fsdp_modules(model)]
    flat = [handle.flat_param for handle in handles if handle is not None]
    return {id(p): shape for each in flat for p, shape in zip(each._params or [], each._shapes, strict=False)}


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
