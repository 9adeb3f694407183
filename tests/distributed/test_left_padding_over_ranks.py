"""All ranks pad on the left once the texts of one of them were padded there."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from last_token import LastToken, left_padded, step
from negative_cache import NegativeCacheLoss
from negative_cache.cache.specs import RaggedFeature
from negative_cache.cache.validation import RaggedRows
from negative_cache.checkpoint import full_state_dict, load_checkpoint, save_checkpoint
from negative_cache.distributed.packing import pack_rows, unpack_rows
from support import run_ranks


def new_loss() -> NegativeCacheLoss:
    return NegativeCacheLoss(LastToken(), 40, seed=0, num_samples=2, refresh_per_step=4, process_group="world")


def assert_rows_are_current(loss_fn: NegativeCacheLoss) -> None:
    assert loss_fn.cache is not None
    assert bool(loss_fn.cache.pads_left("input_ids"))
    rows = loss_fn.cache.filled.nonzero().squeeze(1)
    with torch.no_grad():
        expected = loss_fn.document_encoder(left_padded(loss_fn.cache.document_ids[rows].tolist()))
    torch.testing.assert_close(loss_fn.cache.embeddings("embedding")[rows], expected)


def train_and_save(rank: int, world_size: int, folder: Path) -> None:
    """Rank 1 has one text per batch, so none of its batches has padding."""
    loss_fn = new_loss()
    for number in range(8):
        own = range(8 * number, 8 * number + 4) if rank == 0 else [8 * number + 4]
        step(loss_fn, own)
        assert loss_fn.metrics()["staleness"] < 1e-10
    assert_rows_are_current(loss_fn)
    save_checkpoint(loss_fn, folder / "cache")
    whole = full_state_dict(loss_fn)
    assert bool(whole["cache.feature_input_ids.pads_left"])
    again = NegativeCacheLoss(LastToken(), 40, seed=0)
    again.load_state_dict(whole)
    assert_rows_are_current(again)
    dist.barrier()


def test_a_rank_without_padding_learns_the_side_from_the_others(tmp_path: Path):
    run_ranks(train_and_save, 2, tmp_path)
    alone = NegativeCacheLoss(LastToken(), 30, seed=0, num_samples=2)
    load_checkpoint(alone, tmp_path / "cache")
    step(alone, [100])  # no padding
    assert_rows_are_current(alone)


def test_packed_rows_keep_their_side():
    specs = {"tokens": RaggedFeature(torch.int32, default_value=9)}
    for is_left in (False, True):
        values = torch.tensor([[1, 2], [3, 9]], dtype=torch.int32)
        rows = RaggedRows(values, torch.tensor([2, 1]), torch.tensor(is_left))
        unpacked = unpack_rows(pack_rows({"tokens": rows}, {"tokens": 3}), specs, {"tokens": 3})["tokens"]
        assert isinstance(unpacked, RaggedRows)
        assert unpacked.values.tolist() == [[1, 2, 9], [3, 9, 9]]
        assert bool(unpacked.pads_left) == is_left
