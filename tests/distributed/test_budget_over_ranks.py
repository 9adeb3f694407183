"""Fewer documents to re-encode than queries, over ranks: how many there are, and when they begin to count."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from negative_cache import NegativeCacheLoss, checkpoint
from negative_cache.sampling.config import PAYS_ABOVE
from support import TableEncoder, run_ranks

DIM, NUM_DOCUMENTS = 6, 400
TABLE = normalize(torch.randn(NUM_DOCUMENTS, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
BATCHES = {2: ([4, 4], [3, 5], [1, 7]), 3: ([3, 3, 3], [4, 1, 2])}


class Listening(TableEncoder):
    """Keeps which documents it encodes, each once: one document alone is encoded twice."""

    def __init__(self) -> None:
        super().__init__(TABLE)
        self.calls: list[Tensor] = []

    def __call__(self, features: dict[str, Tensor]) -> Tensor:
        self.calls.append(features["row"].unique())
        return super().__call__(features)


def make_loss(scale: float, group: str | None = "world", **settings: Any) -> NegativeCacheLoss:
    return NegativeCacheLoss(Listening(), NUM_DOCUMENTS, scale, seed=1, process_group=group, **settings)


def step(loss_fn: NegativeCacheLoss, batches: list[int], number: int, rank: int) -> Tensor:
    """The loss of this rank's part of a step on new documents."""
    first = sum(batches) * number
    rows = first + torch.arange(sum(batches[:rank]), sum(batches[: rank + 1]))
    documents = TABLE[rows].clone().requires_grad_()
    loss: Tensor = loss_fn(queries_of(rows), documents, {"row": rows}, document_ids=rows)
    loss.backward()
    return loss.detach()


def queries_of(rows: Tensor) -> Tensor:
    return normalize(TABLE[rows] + 0.5 * TABLE[(rows + 7) % NUM_DOCUMENTS], dim=1).requires_grad_()


def encoded_of_all(loss_fn: NegativeCacheLoss) -> list[list[int]]:
    """What each rank encoded since the last call: numbers of documents."""
    calls = loss_fn.document_encoder.calls
    own = torch.cat([*calls, torch.empty(0, dtype=torch.int64)])
    calls.clear()
    sizes = loss_fn.ranks.sizes(len(own), torch.device("cpu"))
    (everything,) = loss_fn.ranks.gather([own], sizes)
    return [rows.tolist() for rows in torch.split(everything, [size for (size,) in sizes])]


def check_counts(rank: int, world_size: int, folder: Path) -> None:
    for batches in BATCHES[world_size]:
        queries = sum(batches)
        for num_samples in (0.01, 0.25, 0.5, 0.8, 1, 1.5):
            loss_fn = make_loss(2.0, num_samples=num_samples)
            step(loss_fn, batches, 0, rank)
            step(loss_fn, batches, 1, rank)
            for number in range(2, 6):
                encoded_of_all(loss_fn)
                step(loss_fn, batches, number, rank)
                found = encoded_of_all(loss_fn)
                together = [*chain(*found)]
                assert len(together) == max(world_size, round(num_samples * queries)), (batches, num_samples, found)
                assert len(set(together)) == len(together)  # each document once
                assert all(found)  # an encoder may wait for those of other ranks
                assert loss_fn.metrics()["documents_per_query"] == pytest.approx(len(together) / queries)
            if num_samples >= 1:  # in proportion to the queries
                assert all(
                    abs(len(part) - num_samples * batch) <= 1.5 for part, batch in zip(found, batches, strict=True)
                )


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_fraction_is_of_all_queries_and_every_rank_encodes(world_size: int, tmp_path: Path):
    run_ranks(check_counts, world_size, tmp_path)


def check_opening(rank: int, world_size: int, folder: Path) -> None:
    """The noise is that of all ranks; before it exceeds the limit, the loss is that of the batch of all ranks."""
    batches = BATCHES[world_size][1]
    queries, opened = sum(batches), None
    loss_fn, alone = make_loss(20.0), make_loss(20.0, group=None)
    for number in range(NUM_DOCUMENTS // queries):
        was_waiting = loss_fn.is_waiting
        value = step(loss_fn, batches, number, rank)
        dist.all_reduce(value)
        rows = queries * number + torch.arange(queries)
        in_batch = alone.in_batch_loss(queries_of(rows), TABLE[rows], document_ids=rows).detach()
        found, metrics = encoded_of_all(loss_fn), loss_fn.metrics()
        noise = torch.tensor([metrics.get("in_batch_noise", 0.0), float(loss_fn.is_waiting)], dtype=torch.float64)
        (of_all,) = loss_fn.ranks.gather([noise[None]], [[1]] * world_size)
        assert bool((of_all == of_all[0]).all())  # the same on all ranks
        if loss_fn.is_waiting:
            torch.testing.assert_close(value / world_size, in_batch)
            tried = [2] * world_size if number == 0 else [0] * world_size  # the first step tries the encoder
            assert [len(part) for part in found] == tried
            assert float(noise[0]) <= PAYS_ABOVE
            assert metrics["documents_per_query"] == metrics["cache_share"] == 0
        else:
            opened = number if opened is None else opened
            assert not was_waiting or float(noise[0]) > PAYS_ABOVE
            assert float(value / world_size) > float(in_batch)
            assert len([*chain(*found)]) == max(world_size, round(queries / 4))
            assert all(found)
    assert opened is not None
    assert 2 < opened < number
    check_state(loss_fn, rank, batches)


def check_state(loss_fn: NegativeCacheLoss, rank: int, batches: list[int]) -> None:
    """A checkpoint of all ranks, or of one, tells whether the cache counts; the ranks must agree."""
    for group in ("world", None):
        again = make_loss(20.0, group)
        assert again.is_waiting
        checkpoint.load_full_state_dict(again, checkpoint.full_state_dict(loss_fn))
        assert not again.is_waiting
    loss_fn.is_waiting = rank == 0
    with pytest.raises(ValueError, match="The ranks differ in whether cached documents count yet"):
        step(loss_fn, batches, 0, rank)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_cache_begins_to_count_on_all_ranks_at_once(world_size: int, tmp_path: Path):
    run_ranks(check_opening, world_size, tmp_path)


def check_caches_of_their_own(rank: int, world_size: int, folder: Path) -> None:
    """Every rank encodes in the same steps, also if only one of them has hard negatives."""
    loss_fn = make_loss(20.0 if rank else 0.01, group=None)
    for number in range(4):
        step(loss_fn, BATCHES[world_size][0], number, rank)
        assert not loss_fn.is_waiting
        assert len(loss_fn.document_encoder.calls) == number  # none in the first step, with an empty cache


def test_ranks_with_a_cache_each_do_not_wait(tmp_path: Path):
    run_ranks(check_caches_of_their_own, 2, tmp_path)
