"""The small helpers of the contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

import negative_cache
from negative_cache import util
from negative_cache.util import approximate_top_k_with_indices, cross_replica_concat, gather_nd, tensor_update
from support import run_ranks

CONTRACT = {
    "negative_cache": ["CacheManager", "NegativeCache", "FixedLenFeature"],
    "losses": ["CacheClassificationLoss", "CacheLossReturn", "CacheLoss", "AbstractCacheClassificationLoss"],
    "handlers": ["CacheLossHandler"],
    "retrieval_fns": ["AbstractRetrievalFn", "MaxScoreRetrievalFn", "GumbelMaxRetrievalFn"],
    "filter_fns": ["CacheFilterFn", "IsInCacheFilterFn"],
    "util": ["approximate_top_k_with_indices", "cross_replica_concat", "gather_nd", "tensor_update"],
}


@pytest.mark.parametrize("module", CONTRACT)
def test_names_are_in_their_module_and_at_the_top(module: str) -> None:
    for name in CONTRACT[module]:
        assert getattr(getattr(negative_cache, module), name) is getattr(negative_cache, name)


@pytest.mark.parametrize(("n", "k"), [(12, 4), (13, 4), (11, 4), (7, 7), (5, 1), (131, 64)])
def test_top_k_is_the_best_of_each_group(n: int, k: int) -> None:
    scores = torch.randn(3, n)
    values, indices = approximate_top_k_with_indices(scores, k)
    groups = [torch.from_numpy(group) for group in np.array_split(np.arange(n), k)]
    expected = torch.stack([group[scores[:, group].argmax(dim=1)] for group in groups], dim=1)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, expected)
    assert torch.equal(values, scores.gather(1, expected))


def test_of_equal_scores_the_first_of_the_group_is_taken() -> None:
    values, indices = approximate_top_k_with_indices(torch.ones(2, 7), 3)
    assert indices.tolist() == [[0, 3, 5]] * 2
    assert values.tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize(("shape", "k"), [((2, 5), 0), ((2, 5), 6), ((5,), 2)])
def test_top_k_refuses_wrong_sizes(shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(ValueError, match=r"`(k|scores)`"):
        approximate_top_k_with_indices(torch.zeros(shape), k)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gather_nd_equals_plain_indexing(depth: int) -> None:
    params = torch.randn(4, 5, 6, requires_grad=True)
    indices = torch.stack([torch.randint(size, (7,)) for size in (4, 5, 6)[:depth]], dim=1)
    gathered = gather_nd(params, indices.to(torch.int32))
    expected = torch.stack([params[tuple(index)] for index in indices.tolist()])
    assert torch.equal(gathered, expected)
    gathered.sum().backward()
    assert params.grad is not None
    assert params.grad.sum() == expected.numel()


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_gather_nd_refuses_wrong_indices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`indices`"):
        gather_nd(torch.zeros(2, 2, 2), torch.zeros(shape, dtype=torch.int64))


def test_tensor_update_writes_in_place() -> None:
    tensor = torch.zeros(3, 2)
    assert tensor_update(tensor, torch.tensor([[2], [0]]), torch.tensor([[1, 2], [3, 4]])) is tensor
    assert tensor.tolist() == [[3, 4], [0, 0], [1, 2]]
    tensor_update(tensor, torch.tensor([[1, 1], [0, 0]]), torch.tensor([8.0, 9.0]))
    assert tensor.tolist() == [[9, 4], [0, 8], [1, 2]]


def test_tensor_update_pads_on_request() -> None:
    tensor = torch.full((3, 4), 5)
    tensor_update(tensor, torch.tensor([[1]]), torch.tensor([[1, 2]]), padding=True)
    assert tensor.tolist() == [[5] * 4, [1, 2, 0, 0], [5] * 4]
    tensor_update(tensor, torch.tensor([[0]]), torch.tensor([[1, 2]]), padding=True, padding_token=7)
    assert tensor[0].tolist() == [1, 2, 7, 7]
    deep = tensor_update(torch.zeros(2, 3, 2), torch.tensor([[1]]), torch.ones(1, 1, 2), padding=True)
    assert deep[1].tolist() == [[1, 1], [0, 0], [0, 0]]


def test_tensor_update_refuses_what_is_too_short_or_has_wrong_indices() -> None:
    with pytest.raises(RuntimeError):
        tensor_update(torch.zeros(3, 4), torch.tensor([[1]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="`indices`"):
        tensor_update(torch.zeros(3, 4), torch.tensor([1]), torch.ones(1, 4))


def test_concat_without_processes_is_the_tensor_without_gradient() -> None:
    tensor = torch.ones(2, requires_grad=True)
    result = cross_replica_concat(tensor)
    assert torch.equal(result, tensor)
    assert not result.requires_grad


def _concat(rank: int, world_size: int, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8):
        mine = (torch.arange(4).reshape(2, 2).T % 2 + 2 * rank).to(dtype)  # not contiguous
        both = torch.cat([(torch.arange(4).reshape(2, 2).T % 2 + 2 * r).to(dtype) for r in range(world_size)])
        assert torch.equal(util.cross_replica_concat(mine), both), dtype
    alone = [torch.distributed.new_group([r]) for r in range(world_size)][rank]
    assert util.cross_replica_concat(torch.tensor([rank]), group=alone).tolist() == [rank]


def test_concat_is_in_the_order_of_ranks(tmp_path: Path) -> None:
    run_ranks(_concat, 2, tmp_path)


def _fail_on_last_rank(rank: int, world_size: int, folder: Path) -> None:
    torch.distributed.barrier()  # or the other one fails first, for want of this one
    assert rank != world_size - 1, "meant to fail"


def test_a_failing_rank_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match="meant to fail"):
        run_ranks(_fail_on_last_rank, 2, tmp_path)
