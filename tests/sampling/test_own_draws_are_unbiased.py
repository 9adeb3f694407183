"""Whole losses as estimators: the mean gradient of many draws against the gradient of the dense loss.

A batch repeats a few queries many times. Each copy has its own draws, and leaves of its own for the query, the
positive and (through the encoder's output) the drawn rows: one backward pass gives as many independent gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from negative_cache import (
    CacheClassificationLoss,
    FixedLenFeature,
    GumbelMaxRetrievalFn,
    NegativeCache,
    NegativeCacheLoss,
)
from negative_cache.retrieval import Retrieved, Search
from negative_cache.sampling import one_process
from negative_cache.sampling.config import SamplingConfig
from stats import ALPHA, mean_gradient
from support import TableEncoder

NUM_ROWS, DIM, SCALE = 12, 3, 2.0
NUM_QUERIES, COPIES = 2, 1000
# If the temperature is off by 5 %, the mean score of a draw moves by 0.05 of the scores' variance: 0.05 of their
# standard deviation, here 0.85, in units of one draw's noise, and 12 standard errors of the mean of 80,000 draws.
# The line of rejection is at 6.
PASSES = 80


class Gradients(NamedTuple):
    """Of one query: per copy `[n, 2 * dim + num_rows * dim]`, in the order query, positive, each row; values `[n]`."""

    flat: Tensor
    values: Tensor


def make_embeddings() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    queries = 0.7 * torch.randn(NUM_QUERIES, DIM, generator=generator, dtype=torch.float64)
    table = 0.8 * torch.randn(NUM_ROWS + 3, DIM, generator=generator, dtype=torch.float64)
    return queries, table


def exact(query: int, negatives: list[int], top_k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The dense loss: value, gradient as in `Gradients.flat`, and that of the whole table `[num_documents, dim]`."""
    queries, table = (value.clone().requires_grad_() for value in make_embeddings())
    positive = table[query].detach().clone().requires_grad_()
    scores = SCALE * table[negatives] @ queries[query]
    if top_k is not None:  # the best row of each of equal groups
        scores = scores.view(top_k, -1).amax(dim=1)
    own = SCALE * queries[query] @ positive
    loss = torch.cat([own[None], scores]).logsumexp(0) - own
    query_grad, positive_grad, table_grad = torch.autograd.grad(loss, [queries, positive, table])
    flat = torch.cat([query_grad[query], positive_grad, table_grad[:NUM_ROWS].flatten()])
    return loss.detach(), flat, table_grad


def collect(step, encoder: TableEncoder, passes: int = PASSES) -> list[Gradients]:
    """Gradients of `step(queries, positives) -> (loss to differentiate [batch] or mean, values)` per distinct query."""
    queries, table = make_embeddings()
    which = torch.arange(NUM_QUERIES).repeat(COPIES)
    found: list[list[Tensor]] = [[] for _ in range(NUM_QUERIES)]
    values: list[list[Tensor]] = [[] for _ in range(NUM_QUERIES)]
    for _ in range(passes):
        query_leaf = queries[which].clone().requires_grad_()
        positive_leaf = table[which].clone().requires_grad_()
        loss = step(query_leaf, positive_leaf)
        loss.backward()
        size = len(which)
        assert query_leaf.grad is not None
        assert positive_leaf.grad is not None
        assert encoder.output.grad is not None
        rows = torch.zeros(size, NUM_ROWS, DIM, dtype=torch.float64)
        drawn = encoder.rows.view(size, -1)
        rows.scatter_add_(1, drawn[:, :, None].expand(-1, -1, DIM), encoder.output.grad.view(size, -1, DIM))
        flat = size * torch.cat([query_leaf.grad, positive_leaf.grad, rows.flatten(1)], dim=1)
        for query in range(NUM_QUERIES):
            found[query].append(flat[which == query])
            values[query].append(loss.detach().expand(1))
    return [Gradients(torch.cat(a), torch.cat(b)) for a, b in zip(found, values, strict=True)]


def worst_p_value(gradients: list[Gradients], negatives: list[list[int]], top_k: int | None = None) -> float:
    exacts = [exact(query, rows, top_k)[1] for query, rows in enumerate(negatives)]
    return min(mean_gradient(own.flat, truth) for own, truth in zip(gradients, exacts, strict=True))


EVERY_ROW = [list(range(NUM_ROWS))] * NUM_QUERIES


# CacheClassificationLoss


def classification_gradients(retrieval_fn=None, top_k: int | None = None, **caches: slice):
    """Over one cache of all rows, or named caches of parts of them."""
    _, table = make_embeddings()
    encoder = TableEncoder(table)
    parts = caches or {"all": slice(0, NUM_ROWS)}
    cache = {
        name: NegativeCache(
            {"embedding": table[part], "row": torch.arange(len(table))[part]}, [0] * (part.stop - part.start)
        )
        for name, part in parts.items()
    }
    loss_fn = CacheClassificationLoss("embedding", ("row",), lambda scores: SCALE * scores, top_k=top_k)
    loss_fn.generator.manual_seed(0)
    torch.manual_seed(0)  # for a retrieval function of its own
    if retrieval_fn is not None:
        loss_fn._retrieval_fn = retrieval_fn
    return collect(lambda q, p: loss_fn(encoder, q, p, cache).training_loss, encoder)


def test_classification_loss_is_unbiased():
    assert worst_p_value(classification_gradients(), EVERY_ROW) > ALPHA


def test_classification_loss_over_several_caches_is_unbiased():
    gradients = classification_gradients(a=slice(0, 1), b=slice(1, 8), c=slice(8, 12))
    assert worst_p_value(gradients, EVERY_ROW) > ALPHA


def test_classification_loss_with_top_k_is_unbiased_for_the_restricted_softmax():
    gradients = classification_gradients(top_k=4)
    assert worst_p_value(gradients, EVERY_ROW, top_k=4) > ALPHA
    assert worst_p_value(gradients, EVERY_ROW) < ALPHA


def test_a_custom_sampler_of_the_same_law_is_unbiased():
    class Multinomial(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return scores.softmax(dim=1).multinomial(1)

    assert worst_p_value(classification_gradients(Multinomial()), EVERY_ROW) > ALPHA


@pytest.mark.parametrize("inv_temp", [1.05, 0.95])
def test_a_wrong_temperature_is_rejected(inv_temp: float):
    assert worst_p_value(classification_gradients(GumbelMaxRetrievalFn(inv_temp)), EVERY_ROW) < ALPHA


def test_a_lost_row_is_rejected():
    class Forgetful(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            lost = torch.zeros(NUM_ROWS, dtype=torch.bool)
            lost[scores[0].topk(2).indices[1]] = True  # the second likeliest of the first query
            return scores.masked_fill(lost, -torch.inf).softmax(dim=1).multinomial(1)

    assert worst_p_value(classification_gradients(Forgetful()), EVERY_ROW) < ALPHA


# NegativeCacheLoss


def filled_loss(encoder: TableEncoder, **settings) -> NegativeCacheLoss:
    """A loss whose cache holds the table's first rows under ids 0 to 11, and has room for a batch."""
    queries, table = make_embeddings()
    specs = {"row": FixedLenFeature([], torch.int64)}
    size = NUM_ROWS + NUM_QUERIES * COPIES + 8
    settings = {"in_batch": False, "shared": False, **settings}
    loss_fn = NegativeCacheLoss(encoder, size, SCALE, specs=specs, embedding_dtype=torch.float64, seed=0, **settings)
    rows = torch.arange(NUM_ROWS)
    loss_fn(queries[:1].expand(NUM_ROWS, -1), table[:NUM_ROWS], {"row": rows}, rows)
    return loss_fn


def loss_gradients(num_samples: int = 1, passes: int = PASSES, with_ids: bool = True, **negatives):
    """Gradients per query, and per pass those of the shared `negative_embeddings`."""
    encoder = TableEncoder(make_embeddings()[1])
    loss_fn = filled_loss(encoder, num_samples=num_samples)
    filled_cache = loss_fn.cache
    which = torch.arange(NUM_QUERIES).repeat(COPIES)

    def step(queries: Tensor, positives: Tensor) -> Tensor:
        loss_fn.cache = copy.deepcopy(filled_cache)  # without what the last pass wrote
        return loss_fn(queries, positives, {"row": which}, which if with_ids else None, **negatives)

    return collect(step, encoder, passes)


# With ids, a query's own document (its number) is in the cache and is not its negative.
OTHER_ROWS = [[row for row in range(NUM_ROWS) if row != query] for query in range(NUM_QUERIES)]


@pytest.mark.parametrize(("num_samples", "passes"), [(1, PASSES), (4, 5)])
@pytest.mark.parametrize("with_ids", [False, True])
def test_negative_cache_loss_is_unbiased(num_samples: int, passes: int, with_ids: bool):
    gradients = loss_gradients(num_samples, passes, with_ids)
    negatives = OTHER_ROWS if with_ids else EVERY_ROW
    assert worst_p_value(gradients, negatives) > ALPHA
    mean = torch.stack([exact(query, rows)[0] for query, rows in enumerate(negatives)]).mean()
    torch.testing.assert_close(gradients[0].values, mean.expand(passes), rtol=1e-12, atol=0)


def test_the_known_positive_matters():
    """The test without the mask must not accept the masked gradient, nor the reverse."""
    assert worst_p_value(loss_gradients(passes=5, with_ids=False), OTHER_ROWS) < ALPHA
    assert worst_p_value(loss_gradients(passes=5, with_ids=True), EVERY_ROW) < ALPHA


def test_negative_cache_loss_with_given_negatives_is_unbiased():
    """Documents 12 to 14 are new; 4 and 1 are in the cache too, where they must not count again; 1 is a positive."""
    _, table = make_embeddings()
    ids = torch.tensor([12, 13, 14, 4, 1])
    leaf = table[ids].clone().requires_grad_()
    gradients = loss_gradients(
        negative_embeddings=leaf, negative_features={"row": ids}, negative_ids=ids, passes=PASSES
    )
    in_cache = [row for row in range(NUM_ROWS) if row not in (1, 4)]
    negatives = [sorted({*in_cache, *ids.tolist()} - {query}) for query in range(NUM_QUERIES)]
    # The part of rows 1 and 4 is differentiated exactly, through the negatives' leaf.
    truths = []
    for query, rows in enumerate(negatives):
        flat = exact(query, rows)[1].clone()
        flat[2 * DIM :].view(NUM_ROWS, DIM)[[1, 4]] = 0
        truths.append(flat)
    assert min(mean_gradient(own.flat, truth) for own, truth in zip(gradients, truths, strict=True)) > ALPHA
    expected = torch.stack([exact(query, rows)[2][ids] for query, rows in enumerate(negatives)]).mean(0)
    torch.testing.assert_close(leaf.grad, PASSES * expected, rtol=1e-10, atol=1e-12)


def test_the_learnable_scale_is_unbiased():
    encoder = TableEncoder(make_embeddings()[1])
    loss_fn = filled_loss(encoder, learnable_scale=True)
    filled_cache = loss_fn.cache
    queries, table = make_embeddings()
    which = torch.arange(NUM_QUERIES).repeat(COPIES // 10)
    assert loss_fn.log_scale is not None
    # log_scale is float32; the dense loss takes the same rounded value.
    log_scale = loss_fn.log_scale.detach()[0].clone().requires_grad_()
    values = []
    for query, rows in enumerate(OTHER_ROWS):
        scores = log_scale.exp() * (table[[query, *rows]] @ queries[query])
        values.append(scores.logsumexp(0) - scores[0])
    (truth,) = torch.autograd.grad(torch.stack(values).mean(), log_scale)
    found = []
    for _ in range(60):
        loss_fn.cache = copy.deepcopy(filled_cache)
        loss_fn.log_scale.grad = None
        loss_fn(queries[which], table[which], {"row": which}, which).backward()
        found.append(loss_fn.log_scale.grad[0])
    assert mean_gradient(torch.stack(found)[:, None].double(), truth[None].double()) > ALPHA
    assert mean_gradient(torch.stack(found)[:, None].double(), 1.2 * truth[None].double()) < ALPHA


def with_sampler(monkeypatch: pytest.MonkeyPatch, change: Callable[[Search], Search]) -> None:
    """Draw the rows from a changed search, and take everything else from the right one."""
    right = one_process.draw

    def wrong(search: Search, config: SamplingConfig, has_rows: bool) -> Retrieved:
        drawn = right(search, config, has_rows)
        return drawn._replace(rows=right(change(search), config, has_rows).rows)

    monkeypatch.setattr(one_process, "draw", wrong)


def test_a_wrong_temperature_in_negative_cache_loss_is_rejected(monkeypatch: pytest.MonkeyPatch):
    def hotter(search: Search) -> Search:
        assert search.score_transform is not None
        transform = search.score_transform
        return search._replace(score_transform=lambda scores: 1.05 * transform(scores))

    with_sampler(monkeypatch, hotter)
    assert worst_p_value(loss_gradients(), OTHER_ROWS) < ALPHA


def test_a_lost_row_in_negative_cache_loss_is_rejected(monkeypatch: pytest.MonkeyPatch):
    queries, table = make_embeddings()
    likely = 1 + int((table[1:NUM_ROWS] @ queries[0]).argmax())

    def forgetful(search: Search) -> Search:
        is_candidate = search.pool.is_candidate.clone()
        is_candidate[likely] = False
        return search._replace(pool=search.pool._replace(is_candidate=is_candidate))

    with_sampler(monkeypatch, forgetful)
    assert worst_p_value(loss_gradients(passes=5), OTHER_ROWS) < ALPHA


def test_a_swapped_sampler_of_the_right_law_is_unbiased(monkeypatch: pytest.MonkeyPatch):
    """Two independent draws of the right law: what the two tests above reject is not the swap."""
    with_sampler(monkeypatch, lambda search: search)
    assert worst_p_value(loss_gradients(passes=5), OTHER_ROWS) > ALPHA
