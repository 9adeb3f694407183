"""Documents without ids: they are identified by a hash of their features."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from negative_cache import NegativeCacheLoss
from support import as_on_a_gpu, run_ranks

PAD = 1
TEXTS = [[5, 7, 9], [5, 7], [7, 5, 9, 4], [5, 7, 9, 9, 3], [8]]


class Tower(nn.Module):
    """The mean of the tokens' embeddings, normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        mask = features["attention_mask"][:, :, None]
        return normalize((self.table[features["input_ids"].long()] * mask).sum(dim=1), dim=-1)


def tokenized(texts: list[list[int]], width: int, side: str = "right") -> dict[str, Tensor]:
    """With a padding id that is not 0."""
    ids, mask = [], []
    for text in texts:
        n = width - len(text)
        ids.append([PAD] * n + text if side == "left" else text + [PAD] * n)
        mask.append([0] * n + [1] * len(text) if side == "left" else [1] * len(text) + [0] * n)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def run(count: int = 4, with_ids: bool = False, **changes: Any) -> tuple[NegativeCacheLoss, list[float]]:
    """Steps with the same texts, each padded to another width; their values, and that of an evaluation."""
    torch.manual_seed(0)
    tower = Tower()
    loss_fn = NegativeCacheLoss(tower, 32, num_samples=1, seed=0)
    values = []
    ids = torch.arange(len(TEXTS)) if with_ids else None
    for step in range(count):
        features = tokenized(TEXTS, 5 + step)
        loss = loss_fn(tower(tokenized([text[:1] for text in TEXTS], 1)), tower(features), features, ids, **changes)
        loss.backward()
        values.append(loss.item())
    loss_fn.eval()
    features = tokenized(TEXTS, 6)
    values.append(loss_fn(tower(tokenized([text[:1] for text in TEXTS], 1)), tower(features), features, ids).item())
    return loss_fn, values


@pytest.mark.parametrize("on_gpu", [False, True])
def test_hashes_do_what_right_ids_do(on_gpu: bool, caplog: pytest.LogCaptureFixture):
    """Own documents are no negatives over several epochs, and each has one row; the value is that with ids."""
    with caplog.at_level(logging.INFO, logger="negative_cache"):
        if on_gpu:
            with as_on_a_gpu():
                loss_fn, values = run()
        else:
            loss_fn, values = run()
    assert values == run(with_ids=True)[1]
    assert int(loss_fn.cache.num_filled) == len(TEXTS)
    said = [record.getMessage() for record in caplog.records if "hash" in record.getMessage()]
    assert said == ["`document_ids` are not given: documents are identified by a hash of input_ids, attention_mask."]


def test_padding_on_the_left_is_the_same_text():
    tower = Tower()
    loss_fn = NegativeCacheLoss(tower, 32, num_samples=1, seed=0)
    for side in ("left", "left"):
        for width in (5, 8):
            features = tokenized(TEXTS, width, side)
            loss_fn(tower(features), tower(features), features).backward()
    assert int(loss_fn.cache.num_filled) == len(TEXTS)


def test_a_document_that_occurs_twice_in_a_batch_is_no_negative_of_itself():
    tower = Tower()
    loss_fn = NegativeCacheLoss(tower, 32, seed=0)
    features = tokenized([TEXTS[0], TEXTS[0]], 4)
    assert loss_fn(tower(features), tower(features), features).item() == 0.0


def test_given_negatives_are_hashed_too():
    tower = Tower()
    loss_fn = NegativeCacheLoss(tower, 32, seed=0)
    features, negatives = tokenized(TEXTS[:1], 4), tokenized([TEXTS[0], TEXTS[1]], 6)
    loss = loss_fn(
        tower(features), tower(features), features, negative_embeddings=tower(negatives), negative_features=negatives
    )
    query, documents = tower(features), tower(tokenized(TEXTS[:2], 4))
    torch.testing.assert_close(loss, -(20 * query @ documents.T).log_softmax(dim=1)[0, 0])
    assert int(loss_fn.cache.num_filled) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"document_ids": torch.full((5,), -1)},
        {"log_q": torch.full((5,), -2.0)},
        {"positive_ids": torch.full((5, 1), 7)},
    ],
    ids=["unknown ids", "corrections", "ids of positives"],
)
def test_other_identities_are_left_as_they_are(given: dict[str, Tensor]):
    """Unknown ids say that documents are not identified; `log_q` needs each occurrence; ids have a meaning already."""
    tower = Tower()
    loss_fn = NegativeCacheLoss(tower, 32, num_samples=1, seed=0)
    features = tokenized(TEXTS, 5)
    for _ in range(2):
        loss_fn(tower(features), tower(features), features, **given).backward()
    assert int(loss_fn.cache.num_filled) == 2 * len(TEXTS)
    assert loss_fn.cache.document_ids.max() == -1


def test_floats_are_not_hashed_which_one_warning_says(caplog: pytest.LogCaptureFixture):
    layer = nn.Linear(4, 8)
    loss_fn = NegativeCacheLoss(lambda f: normalize(layer(f["image"]), dim=-1), 32, num_samples=1, seed=0)
    images = torch.randn(6, 4)
    for _ in range(3):
        embeddings = normalize(layer(images), dim=-1)
        loss_fn(embeddings, embeddings, {"image": images}).backward()
    assert int(loss_fn.cache.num_filled) == 18
    (record,) = caplog.records
    assert "no hash of the features `image`" in record.getMessage()


def train_on_ranks(rank: int, world_size: int, folder: Any) -> None:
    """Each rank sees each text once; texts are padded differently on each rank."""
    tower = Tower()
    loss_fn = NegativeCacheLoss(tower, 32, num_samples=1, seed=0, process_group="world")
    for step in range(3):
        texts = TEXTS[:4][2 * ((rank + step) % 2) :][:2]
        features = tokenized(texts, 5 + rank)
        loss_fn(tower(features), tower(features), features).backward()
    filled = torch.tensor(int(loss_fn.cache.num_filled))
    torch.distributed.all_reduce(filled)
    assert int(filled) == 4


def test_ranks_know_the_documents_of_each_other_by_their_hashes(tmp_path: Any):
    run_ranks(train_on_ranks, 2, tmp_path)
