"""`retrieve`: which implementation it runs, what it refuses, and what must not change its result."""

from __future__ import annotations

import logging

import pytest
import torch

from negative_cache import retrieval
from negative_cache.retrieval import Ceilings, Scale, Search, explain, retrieve
from negative_cache.retrieval.dense import retrieve_dense
from negative_cache.retrieval.fused import launch
from negative_cache.retrieval.tiled import retrieve_tiled
from retrieval_problems import DIM, generator, pool_of, random_search


def test_padding_of_excluded_rows_excludes_nothing():
    search = random_search(3, 20, torch.float32)._replace(num_best=4)
    padded = search._replace(excluded=torch.full((3, 4), -1))
    for a, b in zip(retrieve(search, generator())[:4], retrieve(padded, generator())[:4], strict=True):
        assert torch.equal(a, b)


def test_draws_are_reproducible_and_advance_the_generator():
    search, source = random_search(64, 100, torch.float32), generator(3)
    first = retrieve(search, source).rows
    assert torch.equal(first, retrieve(search, generator(3)).rows)
    assert not torch.equal(first, retrieve(search, source).rows)


@pytest.mark.parametrize("top_k", [0, 11])
def test_top_k_must_fit_the_rows(top_k: int):
    with pytest.raises(ValueError, match=rf"top_k is {top_k}; .* 1 to the 10 rows"):
        retrieve(random_search(2, 10, torch.float32)._replace(top_k=top_k), generator())


def test_wrong_queries_are_refused():
    search = random_search(2, 10, torch.float32)
    for queries in (torch.ones(2, DIM + 1), torch.ones(DIM)):
        with pytest.raises(ValueError, match=rf"expected \[batch, {DIM}\]"):
            retrieve(search._replace(queries=queries), generator())
    with pytest.raises(ValueError, match="on meta, the cache is on cpu"):
        retrieve_tiled(search._replace(queries=torch.ones(2, DIM, device="meta")), generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype):
    search = random_search(16, 200, dtype)._replace(num_best=5)
    plain = retrieve(search, generator())
    with torch.autocast("cpu", torch.bfloat16):
        around = retrieve(search, generator())
        unguarded = retrieve_dense(search, generator())
    for a, b in zip(plain[:4], around[:4], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert dtype == torch.bfloat16 or not torch.equal(unguarded.lse, plain.lse)  # autocast does matter here


def test_nothing_gets_a_gradient():
    search = random_search(3, 20, torch.float32)
    search.queries.requires_grad_()
    found = retrieve(search._replace(num_best=2), generator())
    assert not any(value.requires_grad for value in found if value is not None)


def test_the_implementation_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retrieval, "_logged", set())
    with caplog.at_level(logging.INFO, logger="negative_cache"):
        for _ in range(3):
            retrieve(random_search(2, 4, torch.float32), generator())
    assert [record.message for record in caplog.records] == ["Retrieval on cpu: tiled PyTorch, float32 rows."]


class QueriesOnAGpu:
    """As much of a tensor as is read to choose an implementation."""

    device = torch.device("cuda")
    dtype = torch.float32


def test_the_reason_against_the_fused_kernel_is_named(monkeypatch: pytest.MonkeyPatch):
    pool, tiled = pool_of(torch.ones(4, 2)), "tiled PyTorch, float32 rows: "
    search = Search(QueriesOnAGpu(), pool)
    transform = "the score transform is not a multiplication; the fused kernel needs one."
    assert retrieval._why_not_fused(search._replace(score_transform=torch.tanh)) == tiled + transform
    unsupported = "the fused kernel supports no margins, guide or log_q."
    assert explain(search._replace(ceilings=Ceilings(torch.ones(2)))) == tiled + unsupported
    assert explain(search._replace(pool=pool._replace(biases=torch.ones(4)))) == tiled + unsupported
    monkeypatch.setattr(launch, "HAS_TRITON", False)
    assert explain(search) == tiled + "Triton is not installed."
    monkeypatch.setattr(launch, "HAS_TRITON", True)
    many = "it draws at most 16 samples per query, whose state is in registers."
    assert explain(search._replace(num_samples=17, score_transform=Scale(2.0))) == tiled + many
