"""Documents that serve the queries of all ranks: the same as one process with all rows and all queries."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dense import Problem, exact
from negative_cache import FixedLenFeature, NegativeCacheLoss
from stats import ALPHA, mean_gradient
from support import TableEncoder, run_ranks

DIM, NUM_ROWS, NUM_DOCUMENTS, CACHE_SIZE = 3, 12, 20, 40
# Document 12 is on both ranks, 0 and 4 are in the cache too; rank 1 alone gives negatives, of which 2 is in the cache.
BATCHES, DOCUMENTS, GIVEN = [3, 5], torch.tensor([0, 12, 13, 12, 14, 4, 15, 16]), torch.tensor([2, 17])
POSITIVES = torch.full((8, 2), -1)
POSITIVES[1, 0], POSITIVES[5, 1], POSITIVES[6, 0] = 14, 5, 12
ROWS = [7, 5]  # of the first documents, on each rank


def problem() -> Problem:
    generator = torch.Generator().manual_seed(5)
    queries, table, noise = (
        torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in (8, NUM_DOCUMENTS, NUM_ROWS)
    )
    scale = torch.tensor(2.0).log().exp().double()
    table = 0.8 * table
    return Problem(0.7 * queries, table, DOCUMENTS, GIVEN, POSITIVES, table[:NUM_ROWS] + 0.4 * noise, scale)


def part(values: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    return values[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


def make_loss(encoder: Any, ranks: str | None, **settings: Any) -> NegativeCacheLoss:
    settings = {"embedding_dtype": torch.float64, "learnable_scale": True, "seed": 3, "num_samples": 1, **settings}
    specs = {"row": FixedLenFeature([], torch.int64)}
    return NegativeCacheLoss(encoder, CACHE_SIZE, 2.0, specs=specs, process_group=ranks, **settings)


def fill(loss_fn: NegativeCacheLoss, given: Problem, sizes: Sequence[int], rank: int, **extras: Tensor) -> None:
    """The cache gets the stale embeddings of this rank's part of the first documents."""
    stale, rows = part(given.stale, sizes, rank), part(torch.arange(NUM_ROWS), sizes, rank)
    has_ids = "log_q" not in extras
    extras = {key: part(value[:NUM_ROWS], sizes, rank) for key, value in extras.items()}
    if "guide_documents" in extras:
        extras["guide_queries"] = extras["guide_documents"]
    loss_fn(stale, stale, {"row": rows}, rows if has_ids else None, **extras)


def call(
    loss_fn: NegativeCacheLoss, given: Problem, batches: Sequence[int], rank: int, **extras: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The loss of this rank's part of the batch, and its leaves; the last rank gives negatives."""
    has_given, has_ids = rank == len(batches) - 1, "log_q" not in extras
    own = part(given.documents, batches, rank)
    leaves = [part(given.queries, batches, rank), given.table[own], given.table[given.given]]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    negatives: dict[str, Any] = {}
    documents = own
    if has_given:
        documents = torch.cat([own, given.given])
        negatives = {"negative_embeddings": leaves[2], "negative_features": {"row": given.given}}
        negatives |= {"negative_ids": given.given} if has_ids else {}
    rest = {key: value[documents] for key, value in extras.items() if key != "guide_queries"}
    if "guide_queries" in extras:
        rest["guide_queries"] = part(extras["guide_queries"], batches, rank)
    ids = [own, part(given.positives, batches, rank)] if has_ids else []
    return loss_fn(*leaves[:2], {"row": own}, *ids, **negatives, **rest), leaves


def check_unbiased(num_samples: float, steps: int, rank: int, world_size: int, folder: Path) -> None:
    given = problem()
    encoder = TableEncoder(given.table)
    loss_fn = make_loss(encoder, "world", num_samples=num_samples)
    fill(loss_fn, given, ROWS, rank)
    cache, truth = loss_fn.cache, exact(given)
    gradients = []
    for _ in range(steps):
        loss_fn.cache = copy.deepcopy(cache)
        loss_fn.log_scale.grad = None
        loss, leaves = call(loss_fn, given, BATCHES, rank)
        loss.backward()
        whole = [torch.zeros_like(x) for x in (given.queries, given.queries, given.table[GIVEN], given.table)]
        for slot, leaf in zip(whole, leaves[:2], strict=False):
            part(slot, BATCHES, rank).copy_(leaf.grad)
        if rank == 1:
            whole[2].copy_(leaves[2].grad)
        whole[3].index_add_(0, encoder.rows, encoder.output.grad)
        # averaged already, so that all ranks have the same
        parts = [slot.flatten() for slot in whole] + [loss_fn.log_scale.grad.double(), loss.detach()[None]]
        gradients.append(torch.cat(parts))
    everything = torch.stack(gradients)
    dist.all_reduce(everything)
    everything /= 2
    found, values = everything[:, :-1], everything[:, -1]
    torch.testing.assert_close(values, truth.value.expand_as(values), rtol=1e-12, atol=0)
    assert mean_gradient(found, truth.gradient) > ALPHA
    # what the test must notice
    assert mean_gradient(found, exact(given, is_reencoded=True).gradient) < ALPHA
    assert mean_gradient(found, exact(given, counts_twice=True).gradient) < ALPHA
    assert mean_gradient(found, exact(given, in_batch=False).gradient) < ALPHA
    lone = given._replace(positives=torch.full_like(POSITIVES, -1))
    assert mean_gradient(found, exact(lone).gradient) < ALPHA
    table = slice(given.queries.numel() * 2 + GIVEN.numel() * DIM, -1)
    assert mean_gradient(found[:, table], 1.3 * truth.gradient[table]) < ALPHA


def check_values_equal_one_process(rank: int, given: Problem) -> None:
    """Margins, a guide, and log_q: the value of one process with all rows."""
    guide = torch.randn(NUM_DOCUMENTS, 4, generator=torch.Generator().manual_seed(1))
    guide_queries = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    log_q = torch.rand(NUM_DOCUMENTS, generator=torch.Generator().manual_seed(3)).log()
    guided = {"guide_queries": guide_queries, "guide_documents": guide}
    cases: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        ({"absolute_margin": 0.1, "relative_margin": 0.05}, {}),
        ({"guide_margin": 0.3}, guided),
        ({"absolute_margin": -0.5, "guide_margin": -1.0}, guided),
        ({}, {"log_q": log_q}),
        ({"in_batch": False}, {"log_q": log_q}),
    ]
    plain = None
    for settings, extras in [({}, {}), *cases]:
        values = []
        for group, sizes, batches, at in (("world", ROWS, BATCHES, rank), (None, [NUM_ROWS], [8], 0)):
            loss_fn = make_loss(TableEncoder(given.table), group, **settings)
            fill(loss_fn, given, sizes, at, **{k: v for k, v in extras.items() if k != "guide_queries"})
            loss, _ = call(loss_fn, given, batches, at, **extras)  # in training: the value is exact all the same
            values.append(loss.detach().clone())
            masked = torch.tensor(loss_fn.metrics().get("masked", 0.0), dtype=torch.float64)
            values.append(masked * (len(part(DOCUMENTS, batches, at)) / 4 if group else 1))
        for mine in values[:2]:
            dist.all_reduce(mine)
        torch.testing.assert_close(values[0] / 2, values[2], rtol=1e-6, atol=0, msg=str((settings, values)))
        torch.testing.assert_close(values[1] / 2, values[3], rtol=1e-6, atol=0, msg=str((settings, values)))
        plain = values[2] if plain is None else plain
        assert (float((values[2] - plain).abs()) > 1e-3) == (settings != {} or extras != {}), settings


def check_differing_settings(rank: int, given: Problem) -> None:
    guided = {"guide_queries": torch.randn(8, 4), "guide_documents": torch.randn(NUM_DOCUMENTS, 4)}
    for settings, what in (
        ({"shared": rank == 0}, "`shared`"),
        ({"num_samples": 1 + rank}, "`num_samples`"),
        ({"absolute_margin": 0.1 if rank else None}, "settings such as `in_batch`"),
        ({"absolute_margin": 0.1 + rank}, "settings such as `in_batch`"),
        ({"in_batch": rank == 0}, "settings such as `in_batch`"),
        ({"refresh_per_step": rank}, "settings such as `in_batch`"),
    ):
        loss_fn = make_loss(TableEncoder(given.table), "world", **settings)
        with pytest.raises(ValueError, match=f"The ranks differ in {what}"):
            call(loss_fn, given, BATCHES, rank)
        assert loss_fn.cache is None
    loss_fn = make_loss(TableEncoder(given.table), "world")
    with pytest.raises(ValueError, match="The ranks differ in the cached features"):
        call(loss_fn, given, BATCHES, rank, **(guided if rank else {}))
    call(loss_fn, given, BATCHES, rank)
    with pytest.raises(ValueError, match="Rank 1, step 1: `guide_documents` must be given in every step or in none"):
        call(loss_fn, given, BATCHES, rank, **(guided if rank else {}))
    call(loss_fn, given, BATCHES, rank)[0].backward()


def check_refresh_is_together(rank: int, given: Problem) -> None:
    """All ranks encode in each step, however few rows are refreshed: a wrapped encoder waits for the others."""
    calls = []

    def encode(features: dict[str, Tensor]) -> Tensor:
        calls.append(len(features["row"]))
        return given.table[features["row"]]

    loss_fn = make_loss(encode, "world", refresh_per_step=1)
    call(loss_fn, given, BATCHES, rank)
    assert calls == [2]  # a single row is encoded beside the next one


def check(rank: int, world_size: int, folder: Path) -> None:
    given = problem()
    check_differing_settings(rank, given)
    check_refresh_is_together(rank, given)
    check_values_equal_one_process(rank, given)


def test_settings_and_values_over_two_ranks(tmp_path: Path):
    run_ranks(check, 2, tmp_path)


@pytest.mark.parametrize(("num_samples", "steps"), [(1, 100), (0.5, 300)])
def test_gradients_over_two_ranks_are_unbiased(num_samples: float, steps: int, tmp_path: Path):
    run_ranks(partial(check_unbiased, num_samples, steps), 2, tmp_path)
