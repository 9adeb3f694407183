"""The loss with a cache by its dense formulas in float64, row by row: the oracle for `NegativeCacheLoss`.

Cached embeddings may be stale: other than what the encoder computes now. The exact gradient then has the softmax of
the cached embeddings and the scores of re-encoded ones: `sum_k softmax_k grad s_k - grad s_positive`. The documents of
the batch are among the k.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """A batch and a cache; documents have numbers, which are their ids and their rows of the table.

    Attributes:
        queries: float64 `[batch, dim]`.
        table: float64 `[num_documents, dim]`: the encoder's embedding of each document.
        documents: int64 `[batch]`: the positives.
        given: int64 `[m]`: given negatives.
        positives: int64 `[batch, n]`: further positives, padded with -1.
        stale: float64 `[num_rows, dim]`: the cache's embeddings of the first documents.
        scale: float64 `[]`.
        log_q: float64 `[num_documents]`: log of the probability with which each occurs; None without a correction.
    """

    queries: Tensor
    table: Tensor
    documents: Tensor
    given: Tensor
    positives: Tensor
    stale: Tensor
    scale: Tensor
    log_q: Tensor | None = None


class Exact(NamedTuple):
    """Of the mean loss: gradients to queries, documents, given negatives, table and log scale, flat; and its value."""

    gradient: Tensor
    value: Tensor


def exact(
    problem: Problem,
    with_ids: bool = True,
    in_batch: bool = True,
    is_reencoded: bool = False,
    counts_twice: bool = False,
) -> Exact:
    """The dense loss.

    Args:
        problem: The batch and the cache.
        with_ids: Whether ids are known: a document counts once, and known positives do not count.
        in_batch: Whether the batch's documents are negatives of its other queries.
        is_reencoded: A mistake: the cache's part of the softmax is computed from re-encoded embeddings.
        counts_twice: A mistake: a document that occurs several times counts each time.
    """
    queries, documents, given, table, log_scale = leaves = [
        x.clone().requires_grad_()
        for x in (
            problem.queries,
            problem.table[problem.documents],
            problem.table[problem.given],
            problem.table,
            problem.scale.log(),
        )
    ]
    scale, num_rows, batch = log_scale.exp(), len(problem.stale), len(queries)
    ids = torch.cat([problem.documents, problem.given]).tolist()
    ids = ids if with_ids else [-1] * len(ids)
    others = torch.cat([documents, given]) if in_batch else given
    ids = ids if in_batch else ids[batch:]
    total, losses = torch.zeros((), dtype=torch.float64), []
    for query in range(batch):
        own = {*problem.positives[query].tolist(), int(problem.documents[query])} - {-1} if with_ids else set()
        columns, seen = [], set()
        for column, document in enumerate(ids):
            is_repeated = document in seen - {-1} and not counts_twice
            if not (is_repeated or (in_batch and column == query) or document in own):
                columns.append(column)
            seen.add(document)
        hidden = own if counts_twice else own | seen
        rows = [row for row in range(num_rows) if row not in hidden]
        cached = torch.full((num_rows,), -torch.inf, dtype=torch.float64)
        cached[rows] = problem.scale * problem.stale[rows] @ problem.queries[query]
        shift = torch.zeros(len(columns) + num_rows, dtype=torch.float64)
        if problem.log_q is not None:
            members = torch.cat([problem.documents, problem.given])[-len(others) :][columns]
            shift = -problem.log_q[torch.cat([members, torch.arange(num_rows)])]
            shift = shift - math.log(num_rows + len(others) - in_batch)
        positive = scale * queries[query] @ documents[query]
        batch_scores = torch.cat([positive[None], scale * others[columns] @ queries[query]])
        cached_scores = scale * table[:num_rows] @ queries[query]
        shift = torch.cat([positive.new_zeros(1), shift])
        live = torch.cat([batch_scores, cached_scores])
        scores = live.detach() if is_reencoded else torch.cat([batch_scores.detach(), cached])
        scores = scores + shift
        losses.append(scores.logsumexp(0) - scores[0])
        total = total + (scores.softmax(0) * live).sum() - positive
    gradients = torch.autograd.grad(total / batch, leaves)
    return Exact(torch.cat([gradient.flatten() for gradient in gradients]), torch.stack(losses).mean())
