"""Documents with several ids: they are found by each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from negative_cache import NegativeCacheLoss, checkpoint
from support import as_on_a_gpu, run_ranks

DIM, SIZE = 6, 12
TABLE = normalize(torch.randn(40, DIM, generator=torch.Generator().manual_seed(1)), dim=1)


def encode(features: dict[str, Tensor]) -> Tensor:
    return TABLE[features["number"]]


def make_loss(**settings) -> NegativeCacheLoss:
    return NegativeCacheLoss(encode, SIZE, num_samples=1, seed=0, **settings)


def step(loss_fn: NegativeCacheLoss, numbers: list[int], ids: list[list[int]], **arguments) -> float:
    """The value of a step on documents; the queries depend only on their count."""
    features = {"number": torch.tensor(numbers)}
    queries = normalize(torch.randn(len(numbers), DIM, generator=torch.Generator().manual_seed(2)), dim=1)
    given = torch.tensor(ids)
    return float(loss_fn(queries, encode(features), features, document_ids=given, **arguments))


@pytest.mark.parametrize("is_gpu", [False, True])
def test_a_document_is_found_by_each_of_its_ids(is_gpu: bool):
    """The table of ids is kept up to date in steps with and without reading values."""
    loss_fn, generator = make_loss(), torch.Generator().manual_seed(0)
    for _ in range(30):
        numbers = torch.randperm(30, generator=generator)[:4].tolist()
        if is_gpu:
            with as_on_a_gpu():
                step(loss_fn, numbers, [[100 + number, 200 + number] for number in numbers])
        else:
            step(loss_fn, numbers, [[100 + number, 200 + number] for number in numbers])
        cache = loss_fn.cache
        assert cache.document_ids.shape == (SIZE, 2)
        for wanted in (100, 200):
            rows = cache.find(torch.arange(wanted, wanted + 30))
            for number, row in enumerate(rows.tolist()):
                stored = cache.document_ids[:, 0].tolist()
                assert (row >= 0) == (100 + number in stored)
                assert row < 0 or stored[row] == 100 + number
    loaded = make_loss()
    loaded.load_state_dict(loss_fn.state_dict())
    assert torch.equal(loaded.cache.find(torch.arange(200, 230)), rows)


def test_positives_are_recognized_by_any_id():
    """A document in the cache, in the batch or among the given negatives counts only where no id is a positive's."""
    same = {"number": torch.tensor([5])}
    for ids, is_hidden in (([7, 1], True), ([8, 1], True), ([7, 2], True), ([8, 2], False), ([8, -1], False)):
        loss_fn = make_loss()
        step(loss_fn, [5], [ids])
        assert (step(loss_fn, [0], [[7, 1]]) == 0.0) == is_hidden, ids  # from the cache; 5 takes the ids of its row
        given = {"negative_embeddings": encode(same), "negative_features": same, "negative_ids": torch.tensor([ids])}
        assert (step(make_loss(), [0], [[7, 1]], **given) == 0.0) == is_hidden, ids
    further = torch.tensor([[2, -1]])
    assert (
        step(make_loss(), [0], [[7, 1]], positive_ids=further, **{**given, "negative_ids": torch.tensor([[8, 2]])}) == 0
    )


def test_the_first_id_identifies_a_document():
    """Another document with the same second id has a row of its own."""
    loss_fn = make_loss()
    step(loss_fn, [0, 1], [[1, 100], [3, 101]])
    step(loss_fn, [2, 3], [[2, 100], [4, 102]])
    assert sorted(loss_fn.cache.document_ids[:4].tolist()) == [[1, 100], [2, 100], [3, 101], [4, 102]]
    queries = normalize(torch.randn(2, DIM), dim=1)
    copies = encode({"number": torch.tensor([5, 5])})
    hidden = loss_fn.in_batch_loss(
        queries[:1], copies[:1], document_ids=torch.tensor([[9, 8]]), positive_ids=torch.tensor([[100]]),
        negative_embeddings=copies, negative_ids=torch.tensor([[1, 101], [1, 100]]),
    )  # fmt: skip
    assert float(hidden) == 0.0  # both are copies of document 1, one of which is known as a positive
    assert step(make_loss(), [0, 1], [[1], [2]]) == step(make_loss(), [0, 1], [1, 2])  # one id per document


def test_an_unknown_id_replaces_no_id():
    loss_fn = make_loss()
    step(loss_fn, [0, 1], [[10, 20], [11, 21]])
    step(loss_fn, [1, 2], [[11, -1], [12, 22]])
    assert loss_fn.cache.document_ids[:4].tolist() == [[10, 20], [11, 21], [12, 22], [-1, -1]]
    step(loss_fn, [1], [[11, 31]])
    assert loss_fn.cache.document_ids[1].tolist() == [11, 31]


def test_the_number_of_ids_is_that_of_the_first_step():
    loss_fn = make_loss()
    step(loss_fn, [0, 1], [[10, 20], [11, 21]])
    with pytest.raises(ValueError, match="has 1 ids per document, the cache has 2"):
        step(loss_fn, [0, 1], [10, 11])
    features = {"number": torch.tensor([3])}
    given = {"negative_embeddings": encode(features), "negative_features": features}
    with pytest.raises(ValueError, match=r"`negative_ids` \[1\]; expected the same number of ids per document"):
        step(loss_fn, [0], [[10, 20]], **given, negative_ids=torch.tensor([5]))
    batch = {"document_features": {"number": torch.arange(5)}, "document_ids": torch.arange(10).view(5, 2)}
    assert make_loss().fill_from([batch]) == 5


def check_ranks(rank: int, world_size: int, folder: Path) -> None:
    """Two ranks share the documents; a second step finds those of the other rank by their second id."""
    loss_fn = make_loss(process_group="world")
    numbers = [[0, 1, 2], [3, 4, 5]][rank]
    step(loss_fn, numbers, [[100 + number, 200 + number] for number in numbers])
    other = [[3, 4, 5], [0, 1, 2]][rank]
    # every document is a positive of every query, by the second id alone
    hidden = torch.arange(200, 206).expand(3, -1)
    assert step(loss_fn, other, [[100 + number, 200 + number] for number in other], positive_ids=hidden) == 0.0
    (filled,) = loss_fn.ranks.gather([loss_fn.cache.filled.sum()[None]], [[1]] * 2)
    assert int(filled.sum()) == 6  # the same rows
    assert step(loss_fn, other, [[number + 500, -1] for number in other]) > 0.0  # documents without second id
    step(loss_fn, numbers, [[number + 500, 900 + number] for number in numbers])  # on the rank that has no row of them
    ids = loss_fn.ranks.gather([loss_fn.cache.document_ids], [[SIZE // 2]] * 2)[0]
    assert sorted(ids[ids[:, 0] >= 500].tolist()) == [[500 + number, 900 + number] for number in range(6)]
    loss_fn = make_loss(process_group="world")
    step(loss_fn, numbers, [[100 + number, 200 + number] for number in numbers])
    checkpoint.save_checkpoint(loss_fn, folder / "cache")
    whole = checkpoint.full_state_dict(loss_fn)
    assert whole["cache.document_ids"].shape == (SIZE, 2)
    alone = NegativeCacheLoss(encode, SIZE, num_samples=1, seed=0)
    checkpoint.load_checkpoint(alone, folder / "cache")
    assert sorted(alone.cache.document_ids[alone.cache.filled][:, 1].tolist()) == list(range(200, 206))
    fresh = make_loss(process_group="world")
    with pytest.raises(ValueError, match="number of ids per document"):
        step(fresh, numbers, [[number, number] for number in numbers] if rank else numbers)


def test_ranks_find_documents_by_each_id(tmp_path: Path):
    run_ranks(check_ranks, 2, tmp_path)
