"""Checks that must pass before anything is measured: the real operations against the dense reference in float64.

The allowed error is twice that of a dense float64 pass whose queries are rounded to the rows' dtype, plus a small
tolerance: the bare product of that dtype has this error, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.dense_baseline import SCALE
from benchmarks.sizes import Size
from benchmarks.workload import EMBEDDING, make_features, make_workload, unit_rows
from negative_cache import NegativeCache
from negative_cache.cache.columns import dequantize, quantize
from negative_cache.retrieval import RowPool, Scale, Search, retrieve
from negative_cache.retrieval.dense import grouped_top_k
from negative_cache.retrieval.search import dense_scores, group_bounds
from negative_cache.sampling.draw import row_pool

TOLERANCE = 1e-4
NUM_BEST = 8
NUM_DRAWS = 4096
LARGEST_DEVIATION = 6.0  # standard deviations of a count
MIN_ROWS = 1021  # not a multiple of any block size


class CheckError(AssertionError):
    """The result of an operation differs from the reference."""


def failures(sizes: Iterable[Size], device: torch.device) -> list[str]:
    """Run all checks on each distinct shape, with few rows.

    Returns:
        One line for each check that fails; an operation that raises fails too.
    """
    problems = []
    shapes = dict.fromkeys(replace(size, rows=max(MIN_ROWS, 3 * size.batch + 1), target=None) for size in sizes)
    for size in shapes:
        for name, check in (("pass", check_pass), ("draws", check_draws), ("step", check_step)):
            try:
                check(size, device)
            except Exception as error:
                problems.append(f"{name} of B={size.batch} D={size.dim} {size.dtype} {size.mode}: {error!r}")
    return problems


def check_pass(size: Size, device: torch.device) -> None:
    """Logsumexp, drawn rows and best rows, with rows that are hidden from all or from some queries."""
    torch.manual_seed(1)
    search = Search(
        unit_rows(size.batch, size.dim, device),
        _pool(size, device),
        Scale(SCALE),
        excluded=torch.randint(-1, size.rows, (size.batch, 2), device=device),
        top_k=size.top_k,
        num_samples=3,
        num_best=NUM_BEST,
    )
    got = retrieve(search, torch.Generator())
    exact, plain = _scores(search), _scores(search._replace(queries=_as_stored(search.queries, size)))
    truth, rounded = (_maxima(scores, size.top_k) for scores in (exact, plain))
    is_visible = exact.isfinite()
    allowed = 2 * float((exact - plain)[is_visible].abs().amax()) + TOLERANCE
    _require_close("lse", got.lse, truth.logsumexp(1), _allowed(rounded.logsumexp(1), truth.logsumexp(1)))
    best = truth.sort(dim=1, descending=True).values[:, :NUM_BEST]
    _require_close("scores of the best rows", got.best_scores, best, allowed)
    _require_close("best rows", exact.gather(1, got.best_rows), best, allowed)
    _require(bool(is_visible.gather(1, got.rows).all()), "a hidden row was drawn")
    if size.top_k is not None:
        group_best = truth.gather(1, group_of(got.rows, size.rows, size.top_k))
        _require_close("drawn rows of groups", exact.gather(1, got.rows), group_best, allowed)


def check_draws(size: Size, device: torch.device) -> None:
    """Frequencies of drawn rows against the softmax."""
    torch.manual_seed(2)
    size = replace(size, rows=64, top_k=size.top_k and 16)
    search = Search(unit_rows(1, size.dim, device), _pool(size, device), Scale(SCALE), top_k=size.top_k)
    many = search._replace(queries=search.queries.expand(NUM_DRAWS, -1))
    drawn = retrieve(many, torch.Generator().manual_seed(0)).rows[:, 0]
    scores, rows = _scores(search), torch.arange(size.rows, device=device)[None]
    if size.top_k is not None:
        scores, rows = grouped_top_k(scores, size.top_k)
    expected = torch.zeros(size.rows, dtype=torch.float64, device=device)
    expected[rows[0]] = scores[0].softmax(0)
    counts = drawn.bincount(minlength=size.rows)
    spread = (NUM_DRAWS * expected * (1 - expected) + 1).sqrt()
    worst = float(((counts - NUM_DRAWS * expected).abs() / spread).amax())
    _require(worst <= LARGEST_DEVIATION, f"counts of drawn rows are off by {worst:.1f} standard deviations")


def check_step(size: Size, device: torch.device) -> None:
    """The loss of a step on a full cache, and the content of every row after it."""
    work = make_workload(size, device)
    cache, encode = work.cache, work.loss_fn.document_encoder
    calls: list[dict[str, Tensor]] = []

    def record(features: dict[str, Tensor]) -> Tensor:
        calls.append(features)
        return encode(features)

    work.loss_fn.document_encoder = record
    for number in range(3):  # so that ages differ before the last one
        work.features = make_features((2 + number) * size.rows, size.batch, size.length, device)
        work.documents = encode(work.features)
        before = _Contents(cache)
        pool = row_pool(cache, EMBEDDING)
        scales = None if pool.scales is None else pool.scales.clone()
        pool = pool._replace(embeddings=pool.embeddings.clone(), scales=scales)
        loss = work.step(size.top_k)
    drawn = before.find(calls[-1])
    ages = before.age.clone()
    ages[drawn] = -1
    oldest = ages.sort(descending=True, stable=True).indices[: size.batch]
    before.write(drawn, encode(calls[-1]), size)
    before.write(oldest, work.documents, size, work.features)
    before.require_equal(_Contents(cache))
    queries = work.queries.detach()
    truth, rounded = (
        _loss(_maxima(_scores(Search(operand, pool, Scale(SCALE))), size.top_k), queries, work.documents)
        for operand in (queries, _as_stored(queries, size))
    )
    _require_close("loss", loss.detach()[None], truth[None], _allowed(rounded, truth))


class _Contents:
    """A copy of the rows of a cache."""

    def __init__(self, cache: NegativeCache) -> None:
        items = cache.read(torch.arange(cache.num_rows, device=cache.device), [EMBEDDING, "first", "second"])
        self.embeddings = items.pop(EMBEDDING).float()
        self.features = items
        self.age = cache.age.clone()
        self.is_written = torch.zeros_like(self.age, dtype=torch.bool)

    def find(self, features: dict[str, Tensor]) -> Tensor:
        """The rows of documents, which are numbered by their first feature."""
        is_match = features["first"][:, :1] == self.features["first"][None, :, 0]
        _require(bool(is_match.any(dim=1).all()), "the encoder got a document that no row has")
        return is_match.to(torch.uint8).argmax(dim=1)

    def write(self, rows: Tensor, embeddings: Tensor, size: Size, features: dict[str, Tensor] | None = None) -> None:
        self.embeddings[rows] = _as_stored(embeddings, size).float()
        for key, value in (features or {}).items():
            self.features[key][rows] = value
        self.is_written[rows] = True

    def require_equal(self, after: _Contents) -> None:
        """Raise unless the rows are these, each a step older or just written."""
        for key, value in self.features.items():
            _require(torch.equal(value, after.features[key]), f"feature {key!r} is not what was inserted")
        _require_close("stored embeddings", after.embeddings, self.embeddings, 1e-6)
        ages = torch.where(self.is_written, 0, self.age + 1)
        _require(torch.equal(ages, after.age), "ages are wrong")


def _pool(size: Size, device: torch.device) -> RowPool:
    """Random rows, a tenth of them no candidates."""
    rows, scales = unit_rows(size.rows, size.dim, device), None
    if size.dtype == "int8":
        rows, scales = quantize(rows)
    return RowPool(rows.to(size.torch_dtype), torch.rand(size.rows, device=device) > 0.1, scales)


def _scores(search: Search) -> Tensor:
    """All scores in float64."""
    pool = search.pool
    rows = pool.embeddings if pool.scales is None else dequantize(pool.embeddings, pool.scales)
    return dense_scores(
        search._replace(queries=search.queries.double(), pool=pool._replace(embeddings=rows.double(), scales=None))
    )


def _maxima(scores: Tensor, top_k: int | None) -> Tensor:
    return scores if top_k is None else grouped_top_k(scores, top_k)[0]


def _loss(scores: Tensor, queries: Tensor, documents: Tensor) -> Tensor:
    positive = SCALE * (queries.double() * documents.double()).sum(dim=1)
    return torch.nn.functional.softplus(scores.logsumexp(dim=1) - positive).mean()


def _as_stored(values: Tensor, size: Size) -> Tensor:
    """The values after they were stored in a cache of this dtype."""
    return dequantize(*quantize(values)) if size.dtype == "int8" else values.detach().to(size.torch_dtype)


def _allowed(rounded: Tensor, truth: Tensor) -> float:
    return 2 * float((rounded - truth).abs().amax()) + TOLERANCE


def _require_close(name: str, got: Tensor, expected: Tensor, allowed: float) -> None:
    error = float((got.double() - expected.double()).abs().amax())
    _require(got.shape == expected.shape and error <= allowed, f"{name}: error {error:.2g}, allowed {allowed:.2g}")


def _require(is_right: bool, message: str) -> None:
    if not is_right:
        raise CheckError(message)


def group_of(rows: Tensor, num_rows: int, num_groups: int) -> Tensor:
    """The group of each of `rows [n]`: int64 `[n]`."""
    size, num_longer = group_bounds(num_rows, num_groups)
    boundary = num_longer * (size + 1)
    return torch.where(rows < boundary, rows // (size + 1), num_longer + (rows - boundary) // size)
