"""What a sparse tensor consists of, such as a graph's adjacency: PyTorch can't read its bits or its size at once."""

from collections.abc import Iterable

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> int:
    """The size of what a tensor stores, in bytes.

    Example:
        >>> bytes_of(torch.eye(1000)), bytes_of(torch.eye(1000).to_sparse())
        (4000000, 20000)
    """
    return sum(part.nbytes for part in dense_parts(tensor))


def size_text(sizes: Iterable[int]) -> str:
    """The sum of sizes in bytes, for messages.

    Example:
        >>> size_text([1000, 500]), size_text([2_000_000])
        ('1.5 kB', '2.0 MB')
    """
    total = sum(sizes)
    return f"{total / 1e6:.1f} MB" if total >= 1e5 else f"{total / 1e3:.1f} kB"


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that a sparse one consists of, its values last; of any other tensor, the tensor itself.

    Example:
        >>> places, values = dense_parts(torch.tensor([[0.0, 5.0], [0.0, 0.0]]).to_sparse())
        >>> places.tolist(), values.tolist()
        ([[0], [1]], [5.0])
    """
    if tensor.layout is torch.sparse_coo:
        # Until it is coalesced, its elements may be in any order.
        coalesced = tensor.coalesce()
        return [coalesced.indices(), coalesced.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]
