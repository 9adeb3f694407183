"""What this machine and this environment have, for `negative-cache doctor`; needs torch alone."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from negative_cache import RaggedFeature, predict_bytes
from negative_cache.cache.specs import quantize
from negative_cache.objective.settings import default_candidates
from negative_cache.retrieval import RowPool, explain
from negative_cache.workbench.config import EMBEDDING_DTYPES, RunError

PACKAGE = "negative-cache"
PACKAGES = (
    PACKAGE, "torch", "triton", "sentence-transformers", "transformers", "datasets", "accelerate", "tokenizers",
    "lightning", "peft", "tensorboard",
)  # fmt: skip
BACKENDS = ("gloo", "nccl", "mpi", "ucc", "xccl")


def predict(
    dim: int,
    cache_size: int,
    batch_size: int,
    embedding_dtype: str,
    mean_tokens: float,
    max_tokens: int,
    num_samples: int,
    num_candidates: int | None,
    shared: bool,
    guide_dim: int,
    ranks: int,
    features_on_disk: bool,
) -> dict[str, int]:
    """`predict_bytes` of a cache of texts on one of several ranks."""
    return predict_bytes(
        -(-cache_size // ranks),
        dim,
        batch_size,
        embedding_dtype=dtype_of(embedding_dtype),
        specs={"tokens": RaggedFeature(torch.int32, max_tokens)},
        mean_lengths={"tokens": mean_tokens},
        num_samples=num_samples,
        num_candidates=num_candidates,
        shared=shared,
        guide_dim=guide_dim,
        features_on_disk=features_on_disk,
    )._asdict()


def dtype_of(name: str) -> torch.dtype:
    """The dtype that an option names; `RunError` for one that a cache cannot have."""
    if name not in EMBEDDING_DTYPES:
        raise RunError(f"--embedding-dtype is {name!r}; expected one of {', '.join(EMBEDDING_DTYPES)}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def look() -> dict[str, Any]:
    """Versions (None for what is not installed), what extras miss, threads, and backends of torch.distributed."""
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


def devices(dim: int, embedding_dtype: str, num_samples: int, num_candidates: int | None, shared: bool) -> list[Any]:
    """The devices with their memory, and what would search a cache on each."""
    draws = (num_candidates or default_candidates(num_samples)) if shared else num_samples
    return [
        {
            "device": str(device),
            "name": name,
            "memory_bytes": total,
            "free_bytes": free,
            "retrieval": explain(*_example(device, dim, dtype_of(embedding_dtype)), num_samples=draws),
        }
        for device, name, total, free in _devices()
    ]


def _devices() -> Iterator[tuple[torch.device, str, int | None, int | None]]:
    yield torch.device("cpu"), platform.processor() or platform.machine(), *_host_memory()
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        yield torch.device("cuda", number), torch.cuda.get_device_name(number), total, free
    if torch.backends.mps.is_available():
        yield torch.device("mps"), "Metal", None, None


def _host_memory() -> tuple[int | None, int | None]:
    """All bytes, and those that are free, where the system says it."""
    try:
        size = os.sysconf("SC_PAGE_SIZE")
        return size * os.sysconf("SC_PHYS_PAGES"), size * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None, None


def _example(device: torch.device, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, RowPool]:
    """A few queries and rows, as a cache would have them."""
    rows, scales = torch.zeros(64, dim, device=device), None
    if dtype == torch.int8:
        rows, scales = quantize(rows)
    candidates = torch.ones(64, dtype=torch.bool, device=device)
    return torch.zeros(8, dim, device=device), RowPool([rows.to(dtype)], [candidates], [scales])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> list[str]:
    try:
        return importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:  # the source alone is here
        return []


def _unmet(extra: str) -> Iterator[str]:
    """What an extra needs and this environment does not have, with the version that it has if that does not do."""
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
