"""The machine, the installed packages and the memory of a cache, for `negative-cache doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from negative_cache import RaggedFeature, predict_bytes
from negative_cache.cache.columns import quantize
from negative_cache.retrieval import RowPool, Search, explain
from negative_cache.sampling.config import documents_per_query, draws_per_query
from negative_cache.workbench.training.config import EMBEDDING_DTYPES, check_choice

PACKAGE = "negative-cache"
PACKAGES = (
    PACKAGE, "torch", "triton", "sentence-transformers", "transformers", "datasets", "accelerate", "tokenizers",
    "lightning", "peft", "tensorboard",
)  # fmt: skip
BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")


def predict(
    *,
    dim: int,
    cache_size: int,
    batch_size: int,
    embedding_dtype: str,
    mean_tokens: float,
    max_tokens: int,
    num_samples: float | Literal["auto"],
    shared: bool,
    guide_dim: int,
    ranks: int,
) -> dict[str, int]:
    """`predict_bytes` for a cache of texts, per rank."""
    return predict_bytes(
        -(-cache_size // ranks),
        dim,
        batch_size,
        embedding_dtype=dtype_of(embedding_dtype),
        specs={"tokens": RaggedFeature(torch.int32, max_tokens)},
        mean_lengths={"tokens": mean_tokens},
        num_samples=num_samples,
        shared=shared,
        guide_dim=guide_dim,
    )._asdict()


def dtype_of(name: str) -> torch.dtype:
    """The dtype that --embedding-dtype names; RunError for a dtype that a cache does not support."""
    check_choice("embedding_dtype", name, EMBEDDING_DTYPES)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def describe() -> dict[str, Any]:
    """Versions (None for packages that are not installed), unmet requirements, threads, distributed backends."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "extras": {extra: list(_unmet(extra)) for extra in _extras()},
        "threads": {
            "cores": os.cpu_count(),
            "torch": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "distributed": [name for name in BACKENDS if dist.is_available() and dist.is_backend_available(name)],
    }


def devices(dim: int, embedding_dtype: str, num_samples: float | Literal["auto"], shared: bool) -> list[dict[str, Any]]:
    """The devices, their memory, and the implementation that would search a cache on each."""
    draws = draws_per_query(documents_per_query(num_samples, shared, in_batch=True), shared)
    return [
        {
            "device": str(device),
            "name": name,
            "memory_bytes": total,
            "free_bytes": free,
            "retrieval": explain(_example(device, dim, dtype_of(embedding_dtype), draws)),
        }
        for device, name, total, free in _devices()
    ]


def _devices() -> Iterator[tuple[torch.device, str, int | None, int | None]]:
    yield torch.device("cpu"), platform.processor() or platform.machine(), *_host_memory()
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        yield torch.device("cuda", number), torch.cuda.get_device_name(number), total, free
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None and other.type != "cuda":
        yield other, {"mps": "Metal"}.get(other.type, other.type.upper()), None, None


def _host_memory() -> tuple[int | None, int | None]:
    """Total and free bytes, if the system reports them."""
    try:
        size = os.sysconf("SC_PAGE_SIZE")
        return size * os.sysconf("SC_PHYS_PAGES"), size * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None, None


def _example(device: torch.device, dim: int, dtype: torch.dtype, num_samples: int) -> Search:
    """A small search, with rows as a cache would store them."""
    rows, scales = torch.zeros(64, dim, device=device), None
    if dtype == torch.int8:
        rows, scales = quantize(rows)
    pool = RowPool(rows.to(dtype), torch.ones(64, dtype=torch.bool, device=device), scales)
    return Search(torch.zeros(8, dim, device=device), pool, num_samples=num_samples)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> list[str]:
    try:
        return importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:  # not installed, only on the path
        return []


def _unmet(extra: str) -> Iterator[str]:
    """Requirements of an extra that are not met, each with the installed version if there is one."""
    for text in importlib.metadata.requires(PACKAGE) or []:
        wanted = Requirement(text)
        if wanted.marker is None or not wanted.marker.evaluate({"extra": extra}):
            continue
        if wanted.name == PACKAGE:
            for other in sorted(wanted.extras):
                yield from _unmet(other)
            continue
        found = _version(wanted.name)
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted.name}{wanted.specifier}" + (f" (has {found})" if found else "")
