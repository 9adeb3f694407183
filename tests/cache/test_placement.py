"""Document features in files and in page-locked memory: the same training as with features beside the embeddings."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from negative_cache import CacheManager, NegativeCache, NegativeCacheLoss
from negative_cache.cache import placement as transfer
from negative_cache.cache.columns import _Column
from negative_cache.cache.mapped_file import MappedFile
from negative_cache.cache.specs import FixedLenFeature, QuantizedFeature, RaggedFeature, RaggedRows, Specs
from negative_cache.checkpoint import load_checkpoint, save_checkpoint
from support import as_on_a_gpu, assert_same_state, run_ranks, snapshot

SPECS: Specs = {
    "tokens": RaggedFeature(torch.int64, max_length=6),
    "kind": FixedLenFeature([2], torch.int32),
    "weights": QuantizedFeature([3]),
}


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(40, 8)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        tokens = self.table(features["tokens"]) * (features["tokens"] > 0)[:, :, None]
        summed = tokens.sum(dim=1) + self.table(features["kind"].long()).sum(dim=1)
        return torch.nn.functional.normalize(summed * features["weights"].mean(dim=1, keepdim=True), dim=1)


def make_loss(device: str = "cpu", **options: Any) -> NegativeCacheLoss:
    return NegativeCacheLoss(Encoder().to(device), 32, specs=SPECS, seed=0, **options)


def batch(number: int, size: int = 6, device: str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    chance = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, 7, (size, 1), generator=chance)
    tokens = torch.randint(1, 40, (size, 6), generator=chance) * (torch.arange(6) < lengths)
    kinds = torch.randint(0, 40, (size, 2), generator=chance)
    features = {"tokens": tokens, "kind": kinds, "weights": torch.rand(size, 3, generator=chance) + 0.1}
    ids = torch.randint(0, 60, (size,), generator=chance)
    return {key: value.to(device) for key, value in features.items()}, ids.to(device)


def train(loss_fn: NegativeCacheLoss, steps: range) -> list[float]:
    encoder = loss_fn.document_encoder
    assert isinstance(encoder, Encoder)
    losses = []
    for number in steps:
        features, ids = batch(number, device=str(encoder.table.weight.device))
        documents = encoder(features)
        loss = loss_fn(documents.roll(1, 0), documents, features, document_ids=ids)
        encoder.zero_grad()
        loss.backward()
        with torch.no_grad():
            encoder.table.weight -= 0.1 * encoder.table.weight.grad
        losses.append(loss.item())
    return losses


def files_of(folder: Path) -> list[os.stat_result]:
    """This process's open files of a folder, whether they have a name or not."""
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [path.stat() for path in links if os.readlink(path).startswith(f"{folder}/")]


def column_in_file(cache: NegativeCache, key: str) -> Tensor:
    column = cache._columns[key]
    assert column._file is not None
    stored = column._buffers[column.in_file]
    assert stored is not None
    assert stored.data_ptr() == column._file.tensor.data_ptr()
    return column._file.tensor


def test_training_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    in_memory, in_file = make_loss(), make_loss(feature_folder=tmp_path)
    assert train(in_memory, range(20)) == train(in_file, range(20))
    assert_same_state(snapshot(in_memory), snapshot(in_file))
    assert in_file.cache is not None
    for key in SPECS:
        assert column_in_file(in_file.cache, key).count_nonzero() > 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("to_file", [True, False])
@pytest.mark.parametrize("starts_empty", [True, False])
def test_state_dict_loads_into_a_file_and_out_of_it(to_file: bool, starts_empty: bool, tmp_path: Path) -> None:
    options = [{"feature_folder": tmp_path}, {}]
    first, second = make_loss(**options[to_file]), make_loss(**options[not to_file])
    train(first, range(9))
    if not starts_empty:
        train(second, range(20, 29))
    state = snapshot(first)
    second.load_state_dict(state)
    second.document_encoder.load_state_dict(first.document_encoder.state_dict())
    assert_same_state(state, snapshot(second))
    assert train(first, range(9, 15)) == train(second, range(9, 15))
    assert_same_state(snapshot(first), snapshot(second))
    if to_file:
        column_in_file(second.cache, "tokens")
        column_in_file(second.cache, "kind")


def test_assigned_state_goes_into_the_file_too(tmp_path: Path) -> None:
    loss_fn = make_loss()
    train(loss_fn, range(4))
    cache = NegativeCache.empty(loss_fn.cache.specs, 32, scored_keys=["embedding"], feature_folder=tmp_path)
    cache.load_state_dict(loss_fn.cache.state_dict(), assign=True)
    for key in SPECS:
        column_in_file(cache, key)
    assert_same_state(snapshot(loss_fn.cache), snapshot(cache))


@pytest.mark.parametrize("cache_size", [32, 20])
def test_checkpoint(cache_size: int, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    loss_fn = make_loss(feature_folder=tmp_path / "scratch")
    train(loss_fn, range(9))
    save_checkpoint(loss_fn, tmp_path / "saved")
    loaded = [
        NegativeCacheLoss(Encoder(), cache_size, specs=SPECS, seed=0, **options)
        for options in ({}, {"feature_folder": tmp_path / "scratch"})
    ]
    for other in loaded:
        load_checkpoint(other, tmp_path / "saved")
    assert_same_state(snapshot(loaded[0]), snapshot(loaded[1]))
    column_in_file(loaded[1].cache, "tokens")
    if cache_size == 32:
        assert_same_state(snapshot(loss_fn), snapshot(loaded[1]))


def test_large_ragged_states_are_moved_in_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("negative_cache.cache.columns._ROWS_AT_ONCE", 5)
    monkeypatch.setattr("negative_cache.cache.mapped_file._MOST_RESIDENT", 1 << 16)
    test_state_dict_loads_into_a_file_and_out_of_it(True, True, tmp_path)
    test_training_is_the_same_bit_for_bit(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_files_are_sparse_without_a_name_and_freed(tmp_path: Path) -> None:
    specs = {"a": FixedLenFeature([512], torch.int64), "b": RaggedFeature(torch.int32, 512)}
    cache = NegativeCache.empty(specs, 1 << 20, feature_folder=tmp_path)
    assert os.listdir(tmp_path) == []
    assert sorted(file.st_size for file in files_of(tmp_path)) == [2 << 30, 4 << 30]
    assert sum(file.st_blocks for file in files_of(tmp_path)) * 512 < 1 << 16
    rows = torch.tensor([3, (1 << 20) - 1])
    items = {
        "a": torch.ones(2, 512, dtype=torch.int64),
        "b": RaggedRows(torch.tensor([[7, 8]] * 2, dtype=torch.int32), torch.tensor([2, 1])),
    }
    cache.write(rows, items)
    assert cache.read(rows, ["b"])["b"].tolist() == [[7, 8], [7, 0]]
    assert bool((cache.read(rows, ["a"])["a"] == 1).all())
    assert sum(file.st_blocks for file in files_of(tmp_path)) * 512 < 1 << 20
    del cache
    assert files_of(tmp_path) == []


@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), 9)"])
def test_nothing_is_left_when_the_process_has_ended(ending: str, tmp_path: Path) -> None:
    script = f"""
import os, sys, torch
from negative_cache import NegativeCache, FixedLenFeature
cache = NegativeCache.empty({{"a": FixedLenFeature([512], torch.int64)}}, 64, feature_folder=sys.argv[1])
cache.write(torch.arange(64), {{"a": torch.ones(64, 512, dtype=torch.int64)}})
{ending}
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert ended.returncode == (0 if ending == "pass" else -signal.SIGKILL)
    assert os.listdir(tmp_path) == []


def test_a_copy_has_a_file_of_its_own(tmp_path: Path) -> None:
    loss_fn = make_loss(feature_folder=tmp_path)
    train(loss_fn, range(4))
    cache, before = loss_fn.cache, snapshot(loss_fn.cache)
    other = copy.deepcopy(cache)
    assert_same_state(before, snapshot(other))
    features, _ = batch(99)
    manager = CacheManager(cache.specs, 32)
    updated = manager.update_cache(other, new_items={**features, "embedding": torch.ones(6, 8)})
    for key in SPECS:
        places = {column_in_file(each, key).data_ptr() for each in (cache, other, updated)}
        assert len(places) == 3
    assert_same_state(before, snapshot(other))
    assert_same_state(before, snapshot(cache))
    in_memory = CacheManager(cache.specs, 32).init_cache()
    in_memory.load_state_dict(before)
    in_memory = manager.update_cache(in_memory, new_items={**features, "embedding": torch.ones(6, 8)})
    assert_same_state(snapshot(in_memory), snapshot(updated))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_copy_is_as_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("negative_cache.cache.mapped_file._COPIED_AT_ONCE", 1 << 16)
    file = MappedFile(tmp_path, [1 << 12, 512], torch.int64)
    file.tensor[1000] = 5
    other = copy.deepcopy(file)
    assert torch.equal(file.tensor, other.tensor)
    assert all(stat.st_blocks * 512 <= 1 << 18 for stat in files_of(tmp_path))


def test_moving_the_cache_leaves_the_file_where_it_is(tmp_path: Path) -> None:
    specs = {"embedding": FixedLenFeature([4], torch.float32), **SPECS}
    cache = NegativeCache.empty(specs, 8, scored_keys=["embedding"], feature_folder=tmp_path).to("meta").half()
    assert cache.device.type == "meta"
    assert cache.embeddings("embedding").dtype == torch.float16
    for key in SPECS:
        assert column_in_file(cache, key).device.type == "cpu"


def test_features_without_values_and_scalars(tmp_path: Path) -> None:
    specs = {"none": FixedLenFeature([0], torch.int64), "flag": FixedLenFeature([], torch.bool)}
    cache = NegativeCache.empty(specs, 5, feature_folder=tmp_path)
    cache.write(torch.tensor([4, 1]), {"none": torch.zeros(2, 0), "flag": torch.tensor([True, True])})
    read = cache.read(torch.tensor([0, 1, 4]), ["none", "flag"])
    assert read["none"].shape == (3, 0)
    assert read["flag"].tolist() == [False, True, True]


def test_refused_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        make_loss(feature_folder=tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="no folder"):
        make_loss(feature_folder=tmp_path / "file")
    with pytest.raises(ValueError, match="`feature_device` is 'cuda'"):
        make_loss(feature_folder=tmp_path, feature_device="cuda")
    with pytest.raises(ValueError, match=r"'a' has no max_length.*RaggedFeature\(torch.int32, max_length=...\)"):
        NegativeCacheLoss(Encoder(), 8, specs={"a": RaggedFeature(torch.int32)}, feature_folder=tmp_path)
    with pytest.raises(OSError, match=r"may grow to 2251799.8 GB, but the disk has"):
        NegativeCache.empty({"a": FixedLenFeature([], torch.int16)}, 1 << 50, feature_folder=tmp_path)
    inferred = NegativeCacheLoss(lambda features: torch.ones(1, 2), 8, feature_folder=tmp_path)
    with pytest.raises(ValueError, match="'input_ids' has no max_length"):
        inferred(torch.ones(1, 2), torch.ones(1, 2), {"input_ids": torch.ones(1, 3, dtype=torch.int64)})


def two_ranks(rank: int, world_size: int, folder: Path) -> None:
    scratch = folder / "scratch"
    options: list[dict[str, Any]] = [{}, {"feature_folder": scratch}]
    results = []
    for option in options:
        loss_fn = make_loss(process_group="world", **option)
        losses = []
        for number in range(6):
            features, ids = batch(world_size * number + rank)
            with torch.no_grad():
                documents = loss_fn.document_encoder(features)
            losses.append(float(loss_fn(documents.roll(1, 0), documents, features, document_ids=ids)))
        results.append((losses, snapshot(loss_fn)))
    assert results[0][0] == results[1][0]
    assert_same_state(results[0][1], results[1][1])
    assert os.listdir(scratch) == []


def test_two_ranks_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    run_ranks(two_ranks, 2, tmp_path)


class Late(Tensor):
    """Page-locked memory as it is on an accelerator: what is copied without waiting is not there at once."""

    pending: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Late:
        if non_blocking:
            Late.pending.append((self, source))
            return self
        return super().copy_(source)


@pytest.fixture
def as_off_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns say that they are on another device than the rows, and copies between the two are staged."""

    def wait_for(device: torch.device) -> None:
        for target, source in Late.pending:
            Tensor.copy_(target, source)
        Late.pending.clear()

    def new_staging(like: Tensor) -> Tensor:
        garbage = torch.full(like.shape, 1, dtype=like.dtype)
        return garbage.as_subclass(Late)

    monkeypatch.setattr(transfer, "is_staged", lambda first, second: True)
    monkeypatch.setattr(transfer, "new_staging", new_staging)
    monkeypatch.setattr(transfer, "wait_for", wait_for)
    for kind in _Column.__subclasses__():
        monkeypatch.setattr(kind, "device", torch.device("cpu", 0))  # unequal to "cpu", and the same


def test_staged_copies_are_waited_for(as_off_the_accelerator: None) -> None:
    values = [torch.arange(5), torch.rand(3, 2), torch.tensor(False)]
    arrived = transfer.bring(values, torch.device("cpu"))
    assert all(isinstance(copied, Late) for copied in arrived)
    assert all(torch.equal(copied, value) for copied, value in zip(arrived, values, strict=True))


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_training_with_staged_copies(
    in_file: bool, waits: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    losses = [make_loss(use_lru=False), make_loss(use_lru=False, **({"feature_folder": tmp_path} if in_file else {}))]
    results = []
    for loss_fn in losses:
        if waits:
            results.append(train(loss_fn, range(12)))
        else:
            with as_on_a_gpu():
                results.append(train(loss_fn, range(12)))
        if len(results) == 1:
            request.getfixturevalue("as_off_the_accelerator")
    assert results[0] == results[1]
    assert_same_state(snapshot(losses[0]), snapshot(losses[1]))
    assert not Late.pending


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("option", ["feature_device", "feature_folder"])
def test_training_on_a_gpu(option: str, tmp_path: Path) -> None:
    value = {"feature_device": "cpu", "feature_folder": tmp_path}[option]
    losses = [make_loss("cuda"), make_loss("cuda", **{option: value})]
    results = [train(loss_fn, range(12)) for loss_fn in losses]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    first, second = (snapshot(loss_fn) for loss_fn in losses)
    for key in ("cache.filled", "cache.document_ids", "cache.feature_tokens.lengths", "cache.feature_kind.values"):
        assert torch.equal(first[key].cpu(), second[key].cpu())
    kinds = losses[1].cache._columns["kind"]
    assert kinds.device.type == "cpu"
    if option == "feature_device":
        assert kinds.values.is_pinned()
        assert copy.deepcopy(kinds).values.is_pinned()


def test_a_state_made_without_a_longest_length_loads_where_there_is_one(tmp_path: Path):
    """Token ids of a run in memory go on in a file, and the other way round; longer ones than fit are refused."""
    lengths = (5, 3)
    states = {}
    for name, length, options in (("memory", None, {}), ("file", 5, {"feature_folder": tmp_path})):
        specs = {"tokens": RaggedFeature(torch.int64, length)}
        loss_fn = NegativeCacheLoss(lambda x: torch.ones(len(x["tokens"]), 2), 8, specs=specs, seed=0, **options)
        tokens = [torch.arange(1, n + 1) for n in lengths]
        loss_fn(torch.ones(2, 2, requires_grad=True), torch.ones(2, 2), {"tokens": tokens})
        states[name] = loss_fn.state_dict()
    for name, length, options in (("file", None, {}), ("memory", 6, {"feature_folder": tmp_path}), ("memory", 5, {})):
        specs = {"tokens": RaggedFeature(torch.int64, length)}
        loss_fn = NegativeCacheLoss(lambda x: torch.ones(len(x["tokens"]), 2), 8, specs=specs, seed=1, **options)
        loss_fn.load_state_dict(states[name])
        assert loss_fn.cache.read(torch.arange(2), ["tokens"])["tokens"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]
    short = {"tokens": RaggedFeature(torch.int64, 4)}
    loss_fn = NegativeCacheLoss(lambda x: torch.ones(len(x["tokens"]), 2), 8, specs=short)
    with pytest.raises(ValueError, match="items of 5 values in the feature 'tokens', this one's max_length is 4"):
        loss_fn.load_state_dict(states["memory"])
