"""Small helpers that users of the earlier implementations call directly."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from negative_cache.distributed.collectives import Ranks
from negative_cache.retrieval.dense import grouped_top_k

__all__ = ["approximate_top_k_with_indices", "cross_replica_concat", "gather_nd", "tensor_update"]


def approximate_top_k_with_indices(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the best element of each of k contiguous groups; of equal elements, the first.

    Args:
        scores: `[batch, n]`. If k does not divide n, the last groups are shorter by one.
        k: Number of groups, from 1 to n.

    Returns:
        Scores and int64 indices, `[batch, k]`, in the order of the groups.
    """
    if scores.dim() != 2:
        raise ValueError(f"`scores` has shape {list(scores.shape)}; expected [batch, n].")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"`k` is {k}; it must be from 1 to the {scores.shape[1]} columns of `scores`.")
    return grouped_top_k(scores, k)


def cross_replica_concat(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate the tensors of all ranks in rank order, without gradient.

    Args:
        tensor: `[n, ...]` on a device that the group's backend supports. n may differ between ranks; the other
            dimensions must be equal.
        group: Process group; None for the default group. If there is none, the tensor itself is returned.
    """
    tensor = tensor.detach().contiguous()
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    ranks = Ranks(dist.group.WORLD if group is None else group)
    return ranks.gather([tensor], ranks.sizes(len(tensor), tensor.device))[0]


def gather_nd(params: Tensor, indices: Tensor) -> Tensor:
    """`params[indices[i, 0], indices[i, 1], ...]` for each i.

    Args:
        params: `[d0, d1, ..., rest]`.
        indices: int `[n, depth]`, depth at most the number of dimensions of `params`.

    Returns:
        `[n, rest]`, with gradient to `params`.
    """
    if indices.dim() != 2 or indices.shape[1] > params.dim():
        raise ValueError(
            f"`indices` has shape {list(indices.shape)}; expected [n, depth] with depth at most {params.dim()}."
        )
    return params[tuple(indices.to(params.device, torch.int64).unbind(dim=1))]


def tensor_update(
    tensor: Tensor, indices: Tensor, updates: Tensor, padding: bool = False, padding_token: float = 0
) -> Tensor:
    """Write `updates[i]` to `tensor[indices[i, 0], ...]` for each i, in place.

    Args:
        tensor: Changed in place and returned.
        indices: int `[n, depth]`.
        updates: `[n, rest]`, cast to the tensor's dtype.
        padding: Whether to pad updates that are too short in their first dimension after `n`.
        padding_token: The padding value.
    """
    if indices.dim() != 2 or indices.shape[1] > tensor.dim():
        raise ValueError(
            f"`indices` has shape {list(indices.shape)}; expected [n, depth] with depth at most {tensor.dim()}."
        )
    updates = updates.to(tensor.device, tensor.dtype)
    depth = indices.shape[1]
    if padding and depth < tensor.dim():
        missing = tensor.shape[depth] - updates.shape[1]
        pad = [0, 0] * (updates.dim() - 2) + [0, missing]
        updates = torch.nn.functional.pad(updates, pad, value=padding_token)
    tensor[tuple(indices.to(tensor.device, torch.int64).unbind(dim=1))] = updates
    return tensor
