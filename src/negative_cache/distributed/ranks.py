"""Processes that share one pool of rows: who owns which rows, and what travels between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from negative_cache.cache.specs import (
    RaggedFeature,
    RaggedRows,
    Specs,
    batch_size,
    padding_value,
    to_device,
)

T = TypeVar("T")

# Every tensor in a message starts at a multiple of this, so that it can be read in place.
_ALIGNMENT = 8
_RAISED = {"ValueError": ValueError, "TypeError": TypeError}


def shard_sizes(num_rows: int, num_ranks: int) -> list[int]:
    """Rows per rank: all the same, the first ones one more where it does not divide."""
    return [num_rows // num_ranks + (rank < num_rows % num_ranks) for rank in range(num_ranks)]


def rank_seed(seed: int, rank: int) -> int:
    """A seed of its own for each rank; that of rank 0 is `seed`. torch's CPU generator takes the low 32 bits."""
    return (seed + rank * 0x9E3779B1) % 2**63


def world() -> dist.ProcessGroup | None:
    """The default process group; None where there is none."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def process_rank() -> int:
    """The rank of this process among all; 0 if it is alone."""
    return 0 if world() is None else dist.get_rank()


def separate(generator: torch.Generator, first_state: Tensor) -> None:
    """Give this process random numbers of its own: processes are often seeded alike.

    Args:
        generator: Left alone if it was used, seeded or loaded since it was made.
        first_state: Its state then.
    """
    if process_rank() and torch.equal(generator.get_state(), first_state):
        generator.manual_seed(rank_seed(generator.initial_seed(), process_rank()))


# Gloo's threads drop a finished work without Python's lock if nobody else holds it, and a process that ends at that
# moment hangs or aborts: they wait for the lock to free the work's tensors. So the last works are held here.
_finished_works: deque[Any] = deque(maxlen=8)


def _finish(work: Any) -> None:
    """Wait for a message that was sent with `async_op=True`."""
    work.wait()
    _finished_works.append(work)


class Ranks:
    """The processes of a group, and the messages between them. Without a group there is one, and nothing is sent.

    Every method that sends is collective: all ranks of the group must call it, in the same order. Ranks are
    numbered within the group; messages live on the device of the tensors given.

    Args:
        group: A process group of any backend, or None.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("This process is not a member of the process group that it was given.")

    @property
    def first(self) -> int:
        """The first of these ranks, as numbered among all processes."""
        if self.group is not None:
            return dist.get_global_rank(self.group, 0)
        return process_rank()

    @property
    def device(self) -> torch.device:
        """A device from which the group's backend sends."""
        if self.group is not None and "nccl" in dist.get_backend(self.group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def meet(
        self,
        step: Callable[[], int],
        device: torch.device,
        prepare: Callable[[], tuple[T, list[int]]],
        count: int,
    ) -> tuple[T, list[list[int]]]:
        """Run `prepare` on all ranks and share the integers that it makes; if it raises on any rank, raise on all.

        Args:
            step: Says the current step, for an error's message.
            device: Where messages live.
            prepare: Checks and prepares this rank's input; returns it, and the integers to share.
            count: How many integers `prepare` makes.

        Returns:
            What `prepare` returned, and each rank's integers.

        Raises:
            ValueError, TypeError, RuntimeError: The same on all ranks, naming the first that failed and the step.
        """
        if self.size == 1:
            value, numbers = prepare()
            return value, [numbers]
        error: Exception | None = None
        prepared: list[T] = []
        numbers = [0] * count
        try:
            value, numbers = prepare()
            prepared.append(value)
        except Exception as caught:
            error = caught
        table = self.share_integers([error is not None, *numbers], device)
        self.raise_together([bool(row[0]) for row in table], error, step, device)
        return prepared[0], [row[1:] for row in table]

    def raise_together(
        self, failed: Sequence[bool], error: Exception | None, step: Callable[[], int], device: torch.device
    ) -> None:
        """Raise on all ranks if any of them failed.

        Args:
            failed: For each rank, whether it failed; the same list on all of them.
            error: This rank's error.
            step: Says the current step, for the message.
            device: Where messages live.
        """
        if not any(failed):
            return
        if self.size == 1 and error is not None:
            raise error
        text = b"" if error is None else f"{type(error).__name__}\n{error}".encode()
        sizes = [[size] for (size,) in self.share_integers([len(text)], device)]
        message = torch.tensor(list(text), dtype=torch.uint8, device=device)
        (texts,) = self.gather([message], sizes)
        first, start = failed.index(True), sum(size for (size,) in sizes[: failed.index(True)])
        name, _, said = bytes(texts[start : start + sizes[first][0]].tolist()).decode().partition("\n")
        assert self.group is not None
        rank = dist.get_global_rank(self.group, first)
        kind = _RAISED.get(name, RuntimeError)
        said = said if kind is not RuntimeError else f"{name}: {said}"
        raise kind(f"Rank {rank}, step {step()}: {said} Every rank stops here; nothing was written on any.") from error

    def share_integers(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """The integers of each rank, as many on all; messages live on `device`."""
        mine = torch.tensor([int(value) for value in values], dtype=torch.int64, device=device)
        return [part.tolist() for part in self._all_gather(mine)]

    def _all_gather(self, mine: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        _finish(dist.all_gather(parts, mine, group=self.group, async_op=True))
        return parts

    def sizes(self, size: int, device: torch.device) -> list[list[int]]:
        """The sizes of all ranks, as `gather` takes them for one tensor."""
        return self.share_integers([size], device)

    def gather(self, tensors: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Several tensors of every rank, in one message.

        Args:
            tensors: `[n_i, ...]` each, without gradient; all but the first dimension as on all other ranks.
            sizes: For each rank the first dimensions of its tensors.

        Returns:
            The tensors of all ranks, one after the other in the order of ranks: `[sum of n_i, ...]` each.
        """
        if self.size == 1:
            return list(tensors)
        longest = [max(size[i] for size in sizes) for i in range(len(tensors))]
        parts = self._all_gather(_pack(tensors, longest))
        per_rank = [_unpack(part, tensors, longest, size) for part, size in zip(parts, sizes, strict=True)]
        return [torch.cat([tensors[i] for tensors in per_rank]) for i in range(len(tensors))]

    def collect(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of all ranks, of any sizes, on the CPU of the first; empty on the others. One after the other."""
        if self.group is None:
            return [dict(tensors)]
        kinds: list[Any] = [None] * self.size
        dist.all_gather_object(kinds, {key: (value.shape, value.dtype) for key, value in tensors.items()}, self.group)
        collected: list[dict[str, Tensor]] = [{} for _ in range(self.size if self.rank == 0 else 0)]
        for rank in range(self.size):
            for key, (shape, dtype) in kinds[rank].items():
                if self.rank == rank == 0:
                    collected[0][key] = tensors[key].detach().cpu()
                elif self.rank == rank:
                    value = tensors[key].detach().to(self.device).contiguous()
                    _finish(dist.isend(value, dist.get_global_rank(self.group, 0), self.group))
                elif self.rank == 0:
                    value = torch.empty(shape, dtype=dtype, device=self.device)
                    _finish(dist.irecv(value, dist.get_global_rank(self.group, rank), self.group))
                    collected[rank][key] = value.cpu()
        return collected

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Give each rank its part of `rows [n, width]`: the first sent[0] to rank 0, and so on.

        Args:
            rows: `[sum(sent), width]`.
            sent: Rows for each rank.
            received: Rows from each rank.

        Returns:
            `[sum(received), width]`, in the order of ranks.
        """
        if self.size == 1:
            return rows
        result = rows.new_empty(sum(received), rows.shape[1])
        work = dist.all_to_all_single(
            result, rows.contiguous(), list(received), list(sent), group=self.group, async_op=True
        )
        _finish(work)
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, without gradient."""
        if self.size == 1:
            return tensor
        total = tensor.clone(memory_format=torch.contiguous_format)
        _finish(dist.all_reduce(total, group=self.group, async_op=True))
        return total

    def gather_with_gradient(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """`tensor [n, ...]` of all ranks, one after the other; the gradient of all ranks' losses comes back, summed."""
        if self.size == 1:
            return tensor
        result: Tensor = _Gather.apply(tensor, self, list(sizes))  # type: ignore[no-untyped-call]
        return result

    def average_gradient(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, equal on all ranks; its gradient is averaged over them, as DDP does with a model's."""
        if self.size == 1:
            return tensor
        result: Tensor = _Average.apply(tensor, self)  # type: ignore[no-untyped-call]
        return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, sizes: list[int]) -> Tensor:
        ctx.ranks, ctx.start, ctx.size = ranks, sum(sizes[: ranks.rank]), sizes[ranks.rank]
        return ranks.gather([tensor], [[size] for size in sizes])[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.sum(gradient)[ctx.start : ctx.start + ctx.size], None, None


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(gradient) / ctx.ranks.size, None


def _pack(tensors: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """The bytes of tensors, each filled up to its length, in one uint8 tensor."""
    pieces = []
    for tensor, length in zip(tensors, lengths, strict=True):
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        size = _num_bytes(tensor, length)
        pieces.append(torch.nn.functional.pad(raw, (0, -size % _ALIGNMENT + size - raw.numel())))
    return torch.cat(pieces)


def _unpack(raw: Tensor, like: Sequence[Tensor], lengths: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """The tensors of which `_pack` made `raw`, with `sizes` rows each."""
    tensors, start = [], 0
    for tensor, length, size in zip(like, lengths, sizes, strict=True):
        stop = start + _num_bytes(tensor, size)
        tensors.append(raw[start:stop].view(tensor.dtype).view(size, *tensor.shape[1:]))
        full = _num_bytes(tensor, length)
        start += full + -full % _ALIGNMENT
    return tensors


def _num_bytes(like: Tensor, length: int) -> int:
    return length * like.shape[1:].numel() * like.element_size()


def pack_rows(features: Mapping[str, Tensor | RaggedRows], widths: Mapping[str, int]) -> Tensor:
    """Rows as bytes, all of the same number: uint8 `[n, bytes]`.

    Args:
        features: Values `[n, *shape]`, or ragged ones.
        widths: Per ragged feature, the width to which its values are filled up, on all ranks the same.
    """
    columns = []
    for key in sorted(features):
        value = features[key]
        if isinstance(value, RaggedRows):
            columns.append(value.lengths[:, None])
            missing = widths[key] - value.values.shape[1]
            columns.append(torch.nn.functional.pad(value.values, (0, missing)))  # a negative number cuts off padding
        else:
            columns.append(value.flatten(1) if value.dim() > 1 else value[:, None])
    return torch.cat([bytes_of(column) for column in columns], dim=1)


def bytes_of(column: Tensor) -> Tensor:
    """The bytes of `[n, width]`: uint8 `[n, bytes]`."""
    if column.numel() == 0:  # of which torch takes no view
        return torch.empty(
            len(column), column.shape[1] * column.element_size(), dtype=torch.uint8, device=column.device
        )
    return column.contiguous().view(torch.uint8)


def unpack_rows(raw: Tensor, specs: Specs, widths: Mapping[str, int]) -> dict[str, Tensor | RaggedRows]:
    """The rows of which `pack_rows` made `raw`."""
    start = 0

    def take(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        nonlocal start
        size = torch.Size(shape).numel() * dtype.itemsize
        if size == 0 or len(raw) == 0:
            column = torch.empty(len(raw), *shape, dtype=dtype, device=raw.device)
        else:
            column = raw[:, start : start + size].clone().flatten().view(dtype).view(len(raw), *shape)
        start += size
        return column

    rows: dict[str, Tensor | RaggedRows] = {}
    for key in sorted(specs):
        spec = specs[key]
        if isinstance(spec, RaggedFeature):
            lengths, values = take(torch.int64, [1])[:, 0], take(spec.dtype, [widths[key]])
            inside = torch.arange(widths[key], device=raw.device) < lengths[:, None]
            rows[key] = RaggedRows(torch.where(inside, values, values.new_tensor(padding_value(spec))), lengths)
        else:
            rows[key] = take(spec.dtype, list(spec.shape))
    return rows


def gather_rows(
    ranks: Ranks, items: Mapping[str, Tensor | RaggedRows], specs: Specs, device: torch.device
) -> dict[str, Tensor | RaggedRows]:
    """The checked items of all ranks, one after the other in the order of ranks, on `device`."""
    if ranks.size == 1:
        return dict(items)
    items = {key: to_device(value, device) for key, value in items.items()}
    ragged = {key: value.values.shape[1] for key, value in sorted(items.items()) if isinstance(value, RaggedRows)}
    table = ranks.share_integers([batch_size(items), *ragged.values()], device)
    widths = {key: max(row[1 + i] for row in table) for i, key in enumerate(ragged)}
    (raw,) = ranks.gather([pack_rows(items, widths)], [row[:1] for row in table])
    return unpack_rows(raw, specs, widths)


def choose_shard(lse: Tensor, uniform: Tensor) -> Tensor:
    """Draw a shard for each query in proportion to `exp(lse)`, by inverse CDF.

    Every rank finds the same answer from the same numbers, so that nobody has to tell it.

    Args:
        lse: float64 `[shards, batch]`: logsumexp of each shard's scores, -inf where it has no candidate.
        uniform: float64 `[batch, num_samples]` in [0, 1).

    Returns:
        int64 `[batch, num_samples]`: a shard with candidates, or -1 where there is none.
    """
    top = lse.amax(dim=0)
    cumulative = (lse - torch.where(top.isfinite(), top, 0)).exp().cumsum(dim=0).T.contiguous()
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last = cumulative.argmax(dim=1, keepdim=True)  # the first shard that has the full sum
    return torch.where(top.isfinite()[:, None], torch.minimum(drawn, last), -1)
