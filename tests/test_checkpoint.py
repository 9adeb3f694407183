"""Checkpoints: bit for bit for the same layout, dealt out anew for another, refused if anything is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from negative_cache import CacheManager, FixedLenFeature, NegativeCacheLoss, RaggedFeature
from negative_cache.checkpoint import (
    CheckpointError,
    assign_rows,
    full_state_dict,
    load_checkpoint,
    load_full_state_dict,
    save_checkpoint,
)
from negative_cache.handlers import CacheLossHandler
from negative_cache.losses import CacheClassificationLoss
from support import assert_same_state, run_ranks, snapshot

DIM = 4


class Encoder(nn.Module):
    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(100, dim, generator=torch.Generator().manual_seed(0)))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return nn.functional.normalize(self.table[features["input_ids"]].sum(dim=1), dim=1)


def make_loss(cache_size: int = 20, dim: int = DIM, **settings) -> NegativeCacheLoss:
    return NegativeCacheLoss(
        Encoder(dim), cache_size, **{"num_samples": 1, "seed": 3, "learnable_scale": True, **settings}
    )


def step(loss_fn: NegativeCacheLoss, first: int, count: int = 4) -> Tensor:
    """Documents number first, first + 1, ...: each of as many tokens as it has units digits, at most 4."""
    ids = torch.arange(first, first + count)
    tokens = [torch.full((1 + int(i) % 4,), int(i) + 1) for i in ids]
    features = {"input_ids": nn.utils.rnn.pad_sequence(tokens, batch_first=True)}
    encoder = loss_fn.document_encoder
    loss: Tensor = loss_fn(encoder(features) * 0.9, encoder(features), features, document_ids=ids)
    return loss


def documents(loss_fn: NegativeCacheLoss) -> dict[int, tuple[list[int], list[float], int]]:
    """What the cache holds, by id."""
    cache = loss_fn.cache
    rows = cache.filled.nonzero().flatten()
    data = cache.data
    return {
        int(cache.document_ids[row]): (
            [token for token in data["input_ids"][row].tolist() if token],
            data["embedding"][row].tolist(),
            int(cache.written[row]),
        )
        for row in rows
    }


def trained(cache_size: int = 20, steps: int = 4, **settings) -> NegativeCacheLoss:
    loss_fn = make_loss(cache_size, **settings)
    for number in range(steps):
        step(loss_fn, 4 * number)
    return loss_fn


def test_the_same_layout_comes_back_bit_for_bit(tmp_path: Path):
    saved = trained()
    save_checkpoint(saved, tmp_path / "cache")
    loaded = make_loss()
    load_checkpoint(loaded, tmp_path / "cache")
    assert_same_state(snapshot(saved), snapshot(loaded))
    assert torch.equal(step(saved, 50), step(loaded, 50))
    assert_same_state(snapshot(saved), snapshot(loaded))


def test_a_number_of_documents_does_not_wait_whatever_the_saved_run_did(tmp_path: Path):
    saved = trained(steps=2, num_samples="auto")
    assert saved.is_waiting
    save_checkpoint(saved, tmp_path / "cache")
    numbered, automatic = make_loss(), make_loss(num_samples="auto")
    for loaded in (numbered, automatic):
        load_checkpoint(loaded, tmp_path / "cache")
        step(loaded, 50)
    assert not numbered.is_waiting
    assert automatic.is_waiting
    assert numbered.metrics()["documents_per_query"] > automatic.metrics()["documents_per_query"] == 0


def test_before_the_first_step(tmp_path: Path):
    save_checkpoint(make_loss(), tmp_path / "cache")
    loaded = make_loss()
    loaded.generator.manual_seed(99)
    load_checkpoint(loaded, tmp_path / "cache")
    assert torch.equal(loaded.generator.get_state(), make_loss().generator.get_state())
    with pytest.raises(CheckpointError, match="before the first step"):
        load_checkpoint(trained(), tmp_path / "cache")


def test_a_checkpoint_replaces_an_older_one_and_no_pickle_is_written(tmp_path: Path):
    loss_fn = trained()
    for _ in range(2):
        step(loss_fn, 30)
        save_checkpoint(loss_fn, tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("cache_size", [40, 20, 9])
def test_another_cache_size(tmp_path: Path, cache_size: int):
    saved = trained(steps=5)
    save_checkpoint(saved, tmp_path / "cache")
    loaded = make_loss(cache_size)
    load_checkpoint(loaded, tmp_path / "cache")
    before, after = documents(saved), documents(loaded)
    assert len(after) == min(cache_size, 20)
    assert all(before[key] == value for key, value in after.items())
    oldest_kept = min(written for *_, written in after.values())
    assert all(before[key][2] <= oldest_kept for key in before.keys() - after.keys())
    assert loaded.cache.num_rows == cache_size
    assert int(loaded.cache.step) == int(saved.cache.step)
    assert bool(step(loaded, 60).isfinite())


def test_deal_keeps_the_newest_and_mixes_ages():
    shards = [
        (torch.tensor([True, True, False]), torch.tensor([5, 1, 9])),
        (torch.tensor([True, True]), torch.tensor([4, 2])),
    ]
    assert assign_rows(shards, 3, 0, 1).tolist() == [[1, 1], [1, 0], [0, 0]]
    assert assign_rows(shards, 4, 0, 2).tolist() == [[1, 1], [0, 0]]
    assert assign_rows(shards, 4, 1, 2).tolist() == [[0, 1], [1, 0]]


def damage(folder: Path, kind: str) -> str:
    """Spoil a checkpoint; returns what the error must say."""
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    if kind == "missing file":
        file.unlink()
        return "is missing"
    if kind == "truncated":
        file.write_bytes(content[:-7])
        return "bytes; it was written with"
    if kind == "flipped bit":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        return "checksum differs"
    if kind == "header":
        file.write_bytes((10**15).to_bytes(8, "little") + content[8:])
        return "header cannot be read"
    if kind == "no json":
        (folder / "negative_cache.json").unlink()
        return "is not a checkpoint"
    if kind == "half json":
        path = folder / "negative_cache.json"
        path.write_text(path.read_text()[:60])
        return "is damaged"
    path = folder / "negative_cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7}))
    return "has the format 7"


@pytest.mark.parametrize(
    "kind", ["missing file", "truncated", "flipped bit", "header", "no json", "half json", "other format"]
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, kind: str):
    save_checkpoint(trained(), tmp_path / "cache")
    says = damage(tmp_path / "cache", kind)
    loaded = trained(steps=2)
    before = snapshot(loaded)
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(loaded, tmp_path / "cache")
    assert_same_state(before, snapshot(loaded))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dim": 6}, "feature 'embedding'"),
        ({"embedding_dtype": torch.float64}, "float32.*float64"),
        ({"specs": {"input_ids": RaggedFeature(torch.int32)}}, "feature 'input_ids'.*int64.*int32"),
    ],
)
@pytest.mark.parametrize("cache_size", [20, 30])
def test_another_cache_is_refused(tmp_path: Path, settings: dict, says: str, cache_size: int):
    save_checkpoint(trained(), tmp_path / "cache")
    loaded = trained(cache_size, steps=2, **settings)
    before = snapshot(loaded)
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(loaded, tmp_path / "cache")
    assert_same_state(before, snapshot(loaded))


def save_from_ranks(rank: int, world_size: int, folder: Path) -> None:
    loss_fn = make_loss(21, process_group="world")
    for number in range(3):
        step(loss_fn, 4 * (number * world_size + rank))
    save_checkpoint(loss_fn, folder / "cache")
    again = make_loss(21, process_group="world")
    load_checkpoint(again, folder / "cache")
    assert_same_state(snapshot(loss_fn), snapshot(again))
    full = full_state_dict(loss_fn)
    if rank == 0:
        torch.save(full, folder / "full.pt")
    mine = documents(loss_fn)
    # one process's state into shards, and back
    shared = make_loss(21, process_group="world")
    load_full_state_dict(shared, full)
    whole = make_loss(21)
    whole.load_state_dict(full_state_dict(shared))
    source = make_loss(21)
    source.load_state_dict(full)
    assert documents(whole) == documents(source)
    assert all(documents(source)[key] == value for key, value in mine.items())
    assert abs(len(documents(shared)) - len(documents(source)) / world_size) < 1
    step(shared, 70 + 4 * rank)
    dist.barrier()


def load_into_ranks(rank: int, world_size: int, folder: Path) -> None:
    source = make_loss(21)
    source.load_state_dict(torch.load(folder / "full.pt"))
    for cache_size in (21, 30, 10):
        loss_fn = make_loss(cache_size, process_group="world")
        load_checkpoint(loss_fn, folder / "cache")
        held = documents(loss_fn)
        everything = [None] * world_size
        dist.all_gather_object(everything, held)
        merged = {key: value for part in everything for key, value in part.items()}
        assert sum(map(len, everything)) == len(merged) == min(cache_size, len(documents(source)))
        assert max(map(len, everything)) - min(map(len, everything)) <= 1
        assert all(documents(source)[key] == value for key, value in merged.items())
        if rank == 0:
            (folder / f"ok-{world_size}-{cache_size}").touch()
        assert bool(step(loss_fn, 80 + 4 * rank, 3).isfinite())


def test_the_number_of_ranks_may_change(tmp_path: Path):
    run_ranks(save_from_ranks, 2, tmp_path)
    for world_size in (1, 3):
        (tmp_path / "store").unlink(missing_ok=True)
        run_ranks(load_into_ranks, world_size, tmp_path)
        assert (tmp_path / f"ok-{world_size}-10").exists()


@pytest.fixture
def handler() -> CacheLossHandler:
    specs = {"embedding": FixedLenFeature([8], torch.float32), "row": FixedLenFeature([], torch.int64)}
    manager = CacheManager(specs, 16)
    return CacheLossHandler(manager, CacheClassificationLoss("embedding", ["row"]), "embedding", ["row"])


@pytest.mark.parametrize("call", [save_checkpoint, load_checkpoint, full_state_dict, load_full_state_dict])
def test_checkpoints_of_a_handler_are_refused_with_advice(call: Callable, handler: CacheLossHandler, tmp_path: Path):
    argument = [] if call is full_state_dict else [tmp_path / "cache"]
    with pytest.raises(TypeError, match=r"`loss` is CacheLossHandler; .* with `torch\.save`"):
        call(handler, *argument)
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_a_handler_is_refused_with_advice(handler: CacheLossHandler):
    loss_fn = NegativeCacheLoss(nn.Linear(2, 8), 16)
    with pytest.raises(RuntimeError, match=r"that of a handler.* Begin with an empty cache"):
        loss_fn.load_state_dict(handler.state_dict())
    with pytest.raises(RuntimeError, match="Missing key") as raised:
        loss_fn.load_state_dict({})
    assert "handler" not in str(raised.value)
