"""The dense pass against loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch

from negative_cache.retrieval import Ceilings
from negative_cache.retrieval.dense import grouped_top_k, retrieve_dense
from negative_cache.retrieval.search import dense_scores, group_bounds, score_rows
from retrieval_problems import generator, pool_of, random_search


def test_scores_equal_a_loop():
    search = random_search(3, 11, torch.float64, has_masks=True)
    search = search._replace(score_transform=lambda s: 3 * s, ceilings=Ceilings(torch.tensor([4.0, 5.0, torch.inf])))
    biases = torch.randn(11, generator=generator())
    search = search._replace(pool=search.pool._replace(biases=biases))
    scores, num_hidden = dense_scores(search), [0, 0, 0]
    for query in range(3):
        for row in range(11):
            is_hidden = not search.pool.is_candidate[row] or row in search.excluded[query].tolist()
            dot = sum(float(a * b) for a, b in zip(search.queries[query], search.pool.embeddings[row], strict=True))
            is_above = 3 * dot > float(search.ceilings.scores[query])
            num_hidden[query] += is_above and not is_hidden
            expected = -math.inf if is_hidden or is_above else 3 * dot + float(biases[row])
            assert float(scores[query, row]) == pytest.approx(expected, rel=1e-12)
    assert retrieve_dense(search, generator()).num_hidden.tolist() == num_hidden
    assert sum(num_hidden) > 0


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (7, 3), (8, 4), (9, 9), (10, 4), (13, 1)])
def test_best_rows_of_groups_equal_a_loop(rows: int, k: int):
    scores = torch.randint(0, 4, (5, rows), generator=generator()).double()
    values, positions = grouped_top_k(scores, k)
    size, num_longer = group_bounds(rows, k)
    for query in range(5):
        start = 0
        for group in range(k):
            length = size + (group < num_longer)
            members = scores[query, start : start + length].tolist()
            assert float(values[query, group]) == max(members)
            assert int(positions[query, group]) == start + members.index(max(members))
            start += length
        assert start == rows


def test_scores_of_a_few_rows_are_those_of_the_pass():
    search = random_search(5, 30, torch.float64, has_masks=True)
    guide_queries, guide_rows = (torch.randn(count, 2, generator=generator(count)).double() for count in (5, 30))
    ceilings = Ceilings(torch.full((5,), 2.0), guide_queries, pool_of(guide_rows), torch.full((5,), 1.0))
    biases = torch.randn(30, generator=generator())
    pool = search.pool._replace(biases=biases)
    search = search._replace(pool=pool, ceilings=ceilings, score_transform=lambda s: 2 * s)
    rows = pool.is_candidate.nonzero().squeeze(1).repeat(2)
    truth = dense_scores(search)
    scores, embeddings = score_rows(search, rows)
    assert torch.equal(embeddings, pool.embeddings[rows])
    torch.testing.assert_close(scores, truth[:, rows])
    assert 0 < int(scores.isfinite().sum()) < scores.numel()
