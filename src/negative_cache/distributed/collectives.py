"""The collectives: every message between ranks is sent here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from negative_cache.cache.specs import Specs
from negative_cache.cache.validation import Items, RaggedRows, batch_size, to_device
from negative_cache.distributed import process_rank
from negative_cache.distributed.packing import pack_rows, pack_tensors, unpack_rows, unpack_tensors

T = TypeVar("T")

_RAISED = {"ValueError": ValueError, "TypeError": TypeError}


# Gloo's threads release a finished work object without holding Python's lock. A process that exits at that moment
# hangs or aborts, because freeing the work's tensors needs the lock. So the last work objects are kept alive here.
_finished_works: deque[Any] = deque(maxlen=8)


def _finish(work: Any) -> None:
    """Wait for a message that was sent with `async_op=True`."""
    work.wait()
    _finished_works.append(work)


class Ranks:
    """The processes of a group, and the messages between them. Without a group there is one process; nothing is sent.

    Every method that sends is collective: all ranks of the group must call it, in the same order. Ranks are numbered
    within the group. Messages are on the device of the given tensors.

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
        """The global rank of the first of these ranks."""
        if self.group is not None:
            return dist.get_global_rank(self.group, 0)
        return process_rank()

    @property
    def device(self) -> torch.device:
        """A device from which the group's backend can send."""
        if self.group is not None and "nccl" in dist.get_backend(self.group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def run_checked(
        self,
        step: Callable[[], int],
        device: torch.device,
        prepare: Callable[[], tuple[T, list[int]]],
        count: int,
    ) -> tuple[T, list[list[int]]]:
        """Run a function on all ranks and share the integers that it returns; if it raises on one rank, raise on all.

        Args:
            step: Function that returns the current step, for error messages.
            device: Device of the messages.
            prepare: Function that checks and prepares this rank's input; returns it and the integers to share.
            count: How many integers `prepare` returns.

        Returns:
            The input that `prepare` returned, and the integers of each rank.

        Raises:
            ValueError, TypeError, RuntimeError: The same error on all ranks; it names the first rank that failed, and
                the step.
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
            failed: For each rank, whether it failed; the same list on all ranks.
            error: This rank's error; None for none.
            step: Function that returns the current step, for the message.
            device: Device of the messages.
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
        """Gather the integers of each rank, the same number on all ranks; messages are on `device`."""
        mine = torch.tensor([int(value) for value in values], dtype=torch.int64, device=device)
        return [part.tolist() for part in self._all_gather(mine)]

    def _all_gather(self, mine: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        _finish(dist.all_gather(parts, mine, group=self.group, async_op=True))
        return parts

    def sizes(self, size: int, device: torch.device) -> list[list[int]]:
        """Gather the sizes of all ranks, in the form that `gather` takes for one tensor."""
        return self.share_integers([size], device)

    def gather(self, tensors: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Gather several tensors of every rank in one message.

        Args:
            tensors: `[n_i, ...]` each, without gradient; all dimensions but the first must be equal on all ranks.
            sizes: For each rank, the first dimensions of its tensors.

        Returns:
            The tensors of all ranks, concatenated in rank order: `[sum of n_i, ...]` each.
        """
        if self.size == 1:
            return list(tensors)
        longest = [max(size[i] for size in sizes) for i in range(len(tensors))]
        parts = self._all_gather(pack_tensors(tensors, longest))
        per_rank = [unpack_tensors(part, tensors, longest, size) for part, size in zip(parts, sizes, strict=True)]
        return [torch.cat([tensors[i] for tensors in per_rank]) for i in range(len(tensors))]

    def collect(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Collect tensors of any sizes on the CPU of the first rank, one by one; other ranks get an empty list."""
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
        """Send each rank its part of `rows [n, width]`: the first sent[0] rows to rank 0, and so on.

        Args:
            rows: `[sum(sent), width]`.
            sent: Rows for each rank.
            received: Rows from each rank.

        Returns:
            `[sum(received), width]`, in rank order.
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
        """Concatenate `tensor [n, ...]` of all ranks; its gradient is summed over the losses of all ranks."""
        if self.size == 1:
            return tensor
        result: Tensor = _Gather.apply(tensor, self, list(sizes))  # type: ignore[no-untyped-call]
        return result

    def average_gradient(self, tensor: Tensor) -> Tensor:
        """Return `tensor`, which is equal on all ranks, with its gradient averaged over ranks, as in DDP."""
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


def gather_rows(ranks: Ranks, items: Items, specs: Specs, device: torch.device) -> dict[str, Tensor | RaggedRows]:
    """Concatenate the validated items of all ranks in rank order, on `device`."""
    if ranks.size == 1:
        return dict(items)
    items = {key: to_device(value, device) for key, value in items.items()}
    ragged = {key: value.values.shape[1] for key, value in sorted(items.items()) if isinstance(value, RaggedRows)}
    table = ranks.share_integers([batch_size(items), *ragged.values()], device)
    widths = {key: max(row[1 + i] for row in table) for i, key in enumerate(ragged)}
    (raw,) = ranks.gather([pack_rows(items, widths)], [row[:1] for row in table])
    return unpack_rows(raw, specs, widths)
