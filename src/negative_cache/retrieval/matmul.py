"""Scores of one tile of rows against all queries, at the speed that the device has for the rows' dtype."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from negative_cache.cache.specs import quantize
from negative_cache.retrieval.search import RowPool

# Rows that are converted before the product: as many as stay in a CPU core's cache.
_CONVERTED_ELEMENTS = 2048 * 768
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


class TileProduct:
    """`rows @ queries.T` for tiles of rows, in float32 (float64 for float64 rows).

    Rows come first: oneDNN is faster that way, and what follows reduces over rows. int8 rows are multiplied with
    queries that are rounded to int8 too, in integers, on CPUs with AVX-512; on other devices as float32. bfloat16
    rows are multiplied as bfloat16 with float32 sums on CPUs that can.

    Args:
        queries: `[batch, dim]`.
        pool: The rows.
        max_rows: How many rows are multiplied at once where they, or the products, have to be converted.
    """

    def __init__(self, queries: Tensor, pool: RowPool, max_rows: int) -> None:
        device, (batch, dim) = queries.device, queries.shape
        self.dtype = pool.score_dtype
        self.queries = queries.to(self.dtype).T
        self.is_integer = any(scales is not None for _, scales in pool.parts) and multiplies_integers(device)
        self.max_rows = max(min(max_rows, _CONVERTED_ELEMENTS // dim), 1)
        self.integers = torch.empty(self.max_rows if self.is_integer else 0, batch, dtype=torch.int32, device=device)
        if self.is_integer:
            rounded, self.scales = quantize(queries)
            self.rounded = rounded.T
        is_converted = any(
            rows.dtype != self.dtype and not (scales is not None and self.is_integer) for rows, scales in pool.parts
        )
        self.converted = torch.empty(self.max_rows if is_converted else 0, dim, dtype=self.dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes that a product needs beside its result; for integers oneDNN reorders a copy of the tile."""
        copied = len(self.integers) * len(self.queries)
        return copied + self.integers.nbytes + self.converted.nbytes

    def __call__(self, rows: Tensor, scales: Tensor | None, out: Tensor) -> None:
        """Write the scores of `rows [n, dim]` to `out [n, batch]`."""
        if rows.dtype == self.dtype:
            torch.mm(rows, self.queries, out=out)
            return
        for start in range(0, len(rows), self.max_rows):
            part = slice(start, start + self.max_rows)
            self._convert(rows[part], None if scales is None else scales[part], out[part])

    def _convert(self, rows: Tensor, scales: Tensor | None, out: Tensor) -> None:
        if scales is not None and self.is_integer:
            integers = self.integers[: len(rows)]
            out.copy_(torch._int_mm(rows, self.rounded, out=integers))
            out *= self.scales
        else:
            torch.mm(self.converted[: len(rows)].copy_(rows), self.queries, out=out)
        if scales is not None:
            out *= scales[:, None]


def multiplies_integers(device: torch.device) -> bool:
    """Whether int8 products are faster than float32 ones on this device; "meta" stands for the CPU."""
    return device.type in ("cpu", "meta") and _HAS_AVX512


def describe(pool: RowPool) -> str:
    """How tiles of these rows are multiplied, for a log line."""
    dtypes = sorted({str(part.dtype).removeprefix("torch.") for part in pool.embeddings})
    how = " in integers" if "int8" in dtypes and multiplies_integers(pool.embeddings[0].device) else ""
    return f"{' and '.join(dtypes)} rows{how}"


@contextlib.contextmanager
def narrow_products(pool: RowPool) -> Iterator[None]:
    """Let CPUs multiply bfloat16 rows as bfloat16, and int8 rows that were not multiplied as integers.

    The setting is the process's; it is put back when the last pass that runs has ended.
    """
    mkldnn: Any = torch.backends.mkldnn
    settings = mkldnn.matmul
    is_narrow = all(part.dtype in (torch.bfloat16, torch.int8) for part in pool.embeddings)
    if not is_narrow or pool.embeddings[0].device.type != "cpu" or torch.compiler.is_compiling():
        yield
        return
    with _setting.lock:
        if _setting.depth == 0:
            _setting.before = settings.fp32_precision
            if _setting.before == mkldnn.fp32_precision:
                _setting.before = "none"  # it is inherited, and is to follow what it inherits from
            settings.fp32_precision = "bf16"
        _setting.depth += 1
    try:
        yield
    finally:
        with _setting.lock:
            _setting.depth -= 1
            if _setting.depth == 0:
                settings.fp32_precision = _setting.before


class _Setting:
    """How many passes need the process's setting changed, and what it was."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0
        self.before = "none"


_setting = _Setting()
