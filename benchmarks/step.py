"""Time and memory of one step of the cache, encoders excluded, against the bare product of the same size.

python -m benchmarks.step --batch-size 128 --cache-size 131072 --dim 768
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from negative_cache import NegativeCacheLoss


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def make_step(batch: int, rows: int, dim: int, top_k: int | None) -> Callable[[], Tensor]:
    """A training step against a full cache; the encoder looks up embeddings, so that it costs next to nothing."""
    table = torch.nn.functional.normalize(torch.randn(rows, dim), dim=1)
    features = torch.arange(rows)[:, None]
    loss_fn = NegativeCacheLoss(lambda x: table[x["row"][:, 0]], rows, top_k=top_k, seed=0)
    queries = torch.nn.functional.normalize(torch.randn(batch, dim), dim=1).requires_grad_()
    for start in range(0, rows, 8192):
        part = slice(start, min(start + 8192, rows))
        with torch.no_grad():
            filling = table[part]
        loss_fn(torch.zeros_like(filling).requires_grad_(), filling, {"row": features[part]})
    documents = table[:batch].clone()

    def step() -> Tensor:
        loss: Tensor = loss_fn(queries, documents, {"row": features[:batch]})
        return loss

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--cache-size", type=int, default=131_072)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    batch, rows, dim = options.batch_size, options.cache_size, options.dim
    print(f"B={batch} N={rows} D={dim} float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("step            ms   / bare product   peak memory beyond the cache, MB")
    for name, top_k in (("all rows", None), ("top_k=64", 64)):
        step = make_step(batch, rows, dim, top_k)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = median_seconds(step, options.repeats)
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        queries, matrix = torch.randn(batch, dim), torch.randn(rows, dim)
        product = median_seconds(lambda q=queries, m=matrix: q @ m.T, options.repeats)  # type: ignore[misc]
        print(f"{name:12} {seconds * 1000:6.0f}   {seconds / product:14.2f}   {extra:8.0f}")


if __name__ == "__main__":
    main()
