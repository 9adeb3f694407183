"""First phase: find the rows that each query may see, and draw from its softmax over them."""

from __future__ import annotations

import torch
from torch import Tensor

from negative_cache.retrieval import Ceilings, Retrieved, RowPool, Search, retrieve
from negative_cache.retrieval.search import score_rows
from negative_cache.sampling.config import RowSource, SamplingConfig, SamplingRequest

_ROWS_AT_ONCE = 8192


def find_rows(cache: RowSource, request: SamplingRequest) -> tuple[Tensor | None, Tensor | None]:
    """Look up the rows of the new documents, `[n]`, and of the queries' positives, `[batch, m]`; -1 for none."""
    new_ids, positive_ids = request.new_ids, request.positive_ids
    if new_ids is not None and new_ids.dim() > 1:
        new_ids = new_ids[:, 0]  # the first id identifies a document
    if positive_ids is None:
        return None if new_ids is None else cache.find(new_ids), None
    if new_ids is None:
        return None, cache.find(positive_ids.flatten()).view(positive_ids.shape)
    found = cache.find(torch.cat([new_ids, positive_ids.flatten()]))
    return found[: len(new_ids)], found[len(new_ids) :].view(positive_ids.shape)


def row_pool(
    cache: RowSource, embedding_key: str, is_candidate: Tensor | None = None, bias_key: str | None = None
) -> RowPool:
    """The rows of a cache as a pool, restricted to `is_candidate [num_rows]`, or else to the filled rows."""
    embeddings, scales = cache.stored(embedding_key)
    biases = None if bias_key is None else cache.stored(bias_key)[0]
    return RowPool(embeddings, cache.filled if is_candidate is None else is_candidate, scales, biases)


def make_search(
    cache: RowSource,
    config: SamplingConfig,
    request: SamplingRequest,
    in_batch_rows: Tensor | None = None,
    positive_rows: Tensor | None = None,
) -> Search:
    """Build the search of a cache's rows for a request.

    Args:
        cache: The rows.
        config: How to sample.
        request: The queries.
        in_batch_rows: int64 `[n]`: rows of in-batch negatives, which no query may see; -1 for none.
        positive_rows: int64 `[batch, n]`: rows of each query's positives, which it may not see; -1 for none.
    """
    is_candidate = cache.filled
    if in_batch_rows is not None and len(in_batch_rows):
        # one extra element, which index -1 refers to
        is_candidate = torch.cat([is_candidate, is_candidate.new_zeros(1)]).index_fill_(0, in_batch_rows, False)[:-1]
    ceilings = None
    if request.ceilings is not None or request.guide_ceilings is not None:
        guide = None if config.guide_key is None else row_pool(cache, config.guide_key)
        ceilings = Ceilings(request.ceilings, request.guide_queries, guide, request.guide_ceilings)
    return Search(
        queries=request.queries,
        pool=row_pool(cache, config.embedding_key, is_candidate, config.bias_key),
        score_transform=config.score_transform,
        excluded=positive_rows,
        ceilings=ceilings,
        top_k=config.top_k,
        num_samples=config.num_draws,
        num_best=max(config.num_best, int(config.takes_best)),
    )


def draw(search: Search, config: SamplingConfig, has_rows: bool) -> Retrieved:
    """Draw rows for each query from the softmax over the rows that it sees, or take its best row."""
    if not has_rows or search.pool.num_rows == 0:
        return _nothing(search)
    found = retrieve(search, config.generator)
    if config.takes_best and config.num_samples:
        found = found._replace(rows=found.best_rows[:, :1].clamp(min=0))
    return found


def mean_embedding(search: Search, lse: Tensor) -> Tensor:
    """Each query's expected embedding under the softmax over the rows: `[batch, dim]`, 0 for a query without negatives.

    It is the exact gradient of `lse` by the query, without the scale; one product more than the search itself.

    Args:
        search: The search, without top_k.
        lse: `[batch]`: its logsumexp. Over ranks, that over all rows; the result is then the part of this rank's rows.
    """
    shift = torch.where(lse > -torch.inf, lse, 0)[:, None]
    total = torch.zeros_like(search.queries, dtype=lse.dtype)
    for rows in torch.arange(search.pool.num_rows, device=lse.device).split(_ROWS_AT_ONCE):  # type: ignore[no-untyped-call]
        scores, embeddings = score_rows(search, rows)
        scores = scores.masked_fill(~search.pool.is_candidate[rows], -torch.inf)
        total += (scores - shift).exp().to(total.dtype) @ embeddings.to(total.dtype)
    return total


def replace_missing(rows: Tensor, has_negatives: Tensor) -> Tensor:
    """Replace the `rows [batch, n]` of queries without negatives with those of another query, which can be encoded."""
    safe = rows[has_negatives.to(torch.uint8).argmax(dim=0, keepdim=True)]  # a tensor index does not synchronize
    return torch.where(has_negatives[:, None], rows, safe)


def _nothing(search: Search) -> Retrieved:
    """The result of a search without filled rows."""
    batch, device, dtype = len(search.queries), search.queries.device, search.pool.score_dtype
    if search.pool.num_rows:
        search.check()
    return Retrieved(
        lse=torch.full((batch,), -torch.inf, dtype=dtype, device=device),
        rows=torch.zeros(batch, search.num_samples, dtype=torch.int64, device=device),
        best_rows=torch.full((batch, search.num_best), -1, device=device),
        best_scores=torch.full((batch, search.num_best), -torch.inf, dtype=dtype, device=device),
        num_hidden=None if search.ceilings is None else torch.zeros(batch, dtype=torch.int64, device=device),
    )
