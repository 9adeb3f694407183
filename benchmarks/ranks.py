"""Time and communication of a step of a cache that several ranks share (gloo, on this machine), without encoders.

Each rank has one thread, `--batch-size` queries and an equal part of the rows. A step re-encodes one document per query
(num_samples=1). The encoder looks up embeddings. A document has two int32 features of `--length` values. The bytes that
one rank sends to all others in a step are counted in the calls of torch.distributed. On Linux, the table also has the
kernel's counter of the loopback device: the bytes that all ranks send, with all headers and any other traffic of this
device.

python -m benchmarks.ranks --ranks 1 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from negative_cache import NegativeCacheLoss

LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
# The content of each call of torch.distributed in a step, in order; calls with the same name are added up.
CALLS = (
    *("integers", "integers", "documents", "queries", "results"),
    *("weights", "weights", "weights", "weights", "features", "embeddings", "documents"),
)
MESSAGES = tuple(dict.fromkeys(CALLS))


class Counter:
    """Counts the bytes that this rank sends to others in each call of torch.distributed."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self._wrap("all_gather", lambda parts, mine: mine.nbytes * (len(parts) - 1))
        self._wrap("all_reduce", lambda total: 2 * total.nbytes * (dist.get_world_size() - 1) // dist.get_world_size())
        self._wrap("all_to_all_single", self._of_all_to_all)

    def _wrap(self, name: str, bytes_of: Callable[..., int]) -> None:
        original = getattr(dist, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.sent.append(bytes_of(*args))
            return original(*args, **kwargs)

        setattr(dist, name, counting)

    def _of_all_to_all(self, result: Tensor, rows: Tensor, received: list[int], sent: list[int]) -> int:
        to_others = sum(sent) - sent[dist.get_rank()]
        return to_others * rows.shape[1] * rows.element_size()


def make_step(options: argparse.Namespace, rank: int, world_size: int) -> Callable[[], Tensor]:
    """A training step against a full cache."""
    torch.manual_seed(rank)
    num_rows = options.cache_size // world_size
    table = torch.nn.functional.normalize(torch.randn(num_rows, options.dim), dim=1)

    def encode(features: dict[str, Tensor]) -> Tensor:
        return table[features["first"][:, 0].long() % num_rows]

    def items(rows: Tensor) -> dict[str, Tensor]:
        first = rows[:, None].expand(-1, options.length).to(torch.int32)
        return {"first": first, "second": first}

    loss_fn = NegativeCacheLoss(encode, options.cache_size, num_samples=1, seed=0, process_group="world")
    rows = torch.arange(num_rows)
    zeros = torch.zeros(1, options.dim, requires_grad=True)
    loss_fn(zeros, table[:1], items(rows[:1]))  # creates the cache
    assert loss_fn.cache is not None
    loss_fn.cache.write(rows, {"embedding": table, **items(rows)})
    queries = torch.nn.functional.normalize(torch.randn(options.batch_size, options.dim), dim=1).requires_grad_()
    documents, features = table[: options.batch_size].clone(), items(torch.arange(options.batch_size))

    unknown = torch.full((options.batch_size,), -1)  # otherwise, each document would be found in its row

    def step() -> Tensor:
        loss: Tensor = loss_fn(queries, documents, features, unknown)
        return loss

    return step


def measure(rank: int, world_size: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    step = make_step(options, rank, world_size)
    step()
    counter = Counter()
    dist.barrier()
    wire = int(LOOPBACK.read_text()) if LOOPBACK.exists() else 0
    times = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    dist.barrier()
    wire = int(LOOPBACK.read_text()) - wire if LOOPBACK.exists() else 0
    if rank == 0:
        print(f"{world_size:5}  {options.batch_size:14}  {1000 * statistics.median(times):8.1f}", end="")
        calls = len(counter.sent) // options.repeats
        assert calls in (0, len(CALLS)), f"{calls} messages per step"
        named = zip(CALLS * options.repeats, counter.sent, strict=False)
        sent = dict.fromkeys(MESSAGES, 0.0)
        for name, size in named:
            sent[name] += size / options.repeats
        shown = list(sent.values())
        print("".join(f"  {n / 1e3:10.1f}" for n in shown), end="")
        print(f"  {sum(shown) / 1e3:8.1f}  {wire / options.repeats / 1e3:10.1f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=32, help="queries per rank")
    parser.add_argument("--cache-size", type=int, default=131_072, help="rows of all ranks together")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    print(
        f"N={options.cache_size} D={options.dim} float32, features 2 x {options.length} int32, 1 thread per rank, "
        f"torch {torch.__version__}"
    )
    print("ranks  batch per rank  ms, step" + "".join(f"  {name:>10}" for name in MESSAGES) + "   all, kB    wire, kB")
    print("(kB that rank 0 sends to the other ranks; wire: kB of all ranks)")
    for world_size in options.ranks:
        sizes = (
            [options.batch_size] if world_size > 1 else [options.batch_size * n for n in sorted({1, *options.ranks})]
        )
        for size in sizes:
            given = argparse.Namespace(**{**vars(options), "batch_size": size})
            with tempfile.TemporaryDirectory() as folder:
                arguments = world_size, given, folder
                start_processes(measure, arguments, world_size, start_method="forkserver")  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["negative_cache"])  # imported once for all ranks
    main()
