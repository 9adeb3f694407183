"""`fill_from`: a corpus in the cache before training, each document in one row."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from support import ANCHORS, HARD, POSITIVES, columns, run_ranks
from text_models import PAIRS, cached_texts, encode, make_static, make_tiny, train


@pytest.mark.parametrize("kind", ["tiny", "static"])
def test_a_corpus_fills_the_cache_and_steps_write_into_its_rows(kind: str, capsys: pytest.CaptureFixture[str]):
    model = make_tiny() if kind == "tiny" else make_static()
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
    model.train()
    loss.fill_from([*POSITIVES, *HARD], ids=range(100, 124), batch_size=5)
    assert model.training
    assert "Filling the cache" in capsys.readouterr().err
    cache = loss.cache_loss.cache
    assert cache.document_ids[:24, 1].tolist() == list(range(100, 124))
    expected = encode(model, [*POSITIVES, *HARD])
    torch.testing.assert_close(cache.data["embedding"][:24], expected, rtol=1e-4, atol=1e-5)
    loss(columns(model, ANCHORS[:4], POSITIVES[:4]), torch.arange(100, 104))
    assert int(cache.num_filled) == 24
    assert cache.age[:4].tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="do not fit"):
        loss.fill_from(ANCHORS, show_progress_bar=False)


def test_without_ids_a_document_is_identified_by_its_tokens():
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
    loss.fill_from(POSITIVES, show_progress_bar=False)
    loss(columns(model, ANCHORS[:4], POSITIVES[:4]), None)
    assert int(loss.cache_loss.cache.num_filled) == 12


def test_equal_texts_have_one_row_and_an_id_names_one_text():
    loss = NegativeCacheRankingLoss(make_static(), 12)
    loss.fill_from([*POSITIVES[:3], POSITIVES[0]], ids=[5, 6, 7, 8], show_progress_bar=False)
    assert loss.cache_loss.cache.document_ids[:4, 1].tolist() == [5, 6, 7, -1]
    assert cached_texts(loss) == sorted(POSITIVES[:3])
    with pytest.raises(ValueError, match="the id 5 for two texts"):
        loss.fill_from([*POSITIVES[:3], HARD[0]], ids=[5, 6, 7, 5], show_progress_bar=False)
    with pytest.raises(ValueError, match="1 ids for 12 documents"):
        loss.fill_from(POSITIVES, ids=[5], show_progress_bar=False)


def check_ranks(rank: int, world_size: int, folder: Path) -> None:
    """A corpus with equal texts, a guide and both directions, within DDP."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost"
    )
    model = make_static()
    options = {"guide": make_static(dim=16, seed=1), "symmetric": True, "gather_across_devices": True}
    loss = NegativeCacheRankingLoss(model, 64, num_samples=1, seed=0, **options)
    loss.fill_from([*HARD[:5], HARD[0], HARD[1].upper(), *HARD[2:]], batch_size=4, show_progress_bar=False)
    cache = loss.cache_loss.cache
    (ids,) = loss.cache_loss.ranks.gather([cache.document_ids[cache.filled]], [[6], [6]])
    assert len(set(ids.tolist())) == 12
    trainer = train(model, loss, PAIRS, folder / "run", steps=4, per_device_train_batch_size=2)
    assert type(loss.model).__name__ == "DistributedDataParallel"
    assert rank or all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_on_several_ranks_equal_texts_have_one_row_and_the_corpus_is_trained_with(tmp_path: Path):
    run_ranks(check_ranks, 2, tmp_path)
