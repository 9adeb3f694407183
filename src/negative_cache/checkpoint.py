"""Checkpoints of a cache: a folder of safetensors and JSON files, for any number of ranks and any cache size.

`torch.distributed.checkpoint` writes one file per rank. The folder is written under a temporary name and then renamed,
so a checkpoint is either complete or absent.
"""

from __future__ import annotations

import functools
import json
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from negative_cache.cache.rows import NegativeCache, state_of
from negative_cache.cache.specs import embedding_spec, is_loadable, spec_from_json, spec_to_json
from negative_cache.distributed import rank_seed, shard_sizes
from negative_cache.distributed.collectives import gather_rows
from negative_cache.negative_cache_loss import NegativeCacheLoss
from negative_cache.objective.batch import BIAS, EMBEDDING, GUIDE
from negative_cache.retrieval.randomness import new_generator

FORMAT = 1
_JSON = "negative_cache.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit the cache."""


def save_checkpoint(loss: NegativeCacheLoss, folder: str | Path) -> None:
    """Save the state of a loss (cache, generator, learnable scale) to a folder, which is replaced if it exists.

    With several ranks this is collective: each rank writes its own rows to a file system that all ranks share.

    Args:
        loss: The loss of this rank.
        folder: The folder to write.

    Raises:
        RuntimeError: A rank could not write. The error is raised on all ranks and names that rank.
        OSError: Writing failed, with one process.
        TypeError: `loss` is something else, such as a handler.
    """
    _check_loss(loss)
    ranks, folder = loss.ranks, Path(folder)
    beside = folder.with_name(folder.name + ".partial")

    def make() -> tuple[None, list[int]]:
        if ranks.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        return None, []

    def look() -> tuple[None, list[int]]:
        if not beside.is_dir():
            raise FileNotFoundError(
                f"{beside}, created by rank 0, does not exist on this rank: the ranks must share a file system."
            )
        return None, []

    def write() -> tuple[None, list[int]]:
        file = _write(loss, beside)
        return None, [file.stat().st_size, _crc32(file), 0 if loss.cache is None else loss.cache.num_rows]

    def finish() -> tuple[None, list[int]]:
        if ranks.rank == 0:
            record = _record(loss, table)
            (beside / _JSON).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            _replace(beside, folder)
        return None, []

    ranks.run_checked(loss.step_number, ranks.device, make, 0)
    ranks.run_checked(loss.step_number, ranks.device, look, 0)
    _, table = ranks.run_checked(loss.step_number, ranks.device, write, 3)
    ranks.run_checked(loss.step_number, ranks.device, finish, 0)  # no rank continues before the folder exists


def _record(loss: NegativeCacheLoss, table: Sequence[Sequence[int]]) -> dict[str, Any]:
    shards = [
        {"file": _file_name(rank), "bytes": size, "crc32": crc, "rows": rows}
        for rank, (size, crc, rows) in enumerate(table)
    ]
    record = {
        "format": FORMAT,
        "cache_size": loss.cache_size,
        "step": loss.step_number(),
        "specs": _specs(loss.cache),
        "shards": shards,
    }
    return {**record, "crc32": _checksum(record)}


def _checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({key: record[key] for key in record if key != "crc32"}, sort_keys=True).encode())


def _write(loss: NegativeCacheLoss, beside: Path) -> Path:
    """Write this rank's file."""
    ranks = loss.ranks
    prefix = _prefix(ranks.rank, ranks.size)
    state = {prefix + key: value.detach() for key, value in loss.state_dict(keep_vars=True).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # warns that only one process saves
        writer = _storage().HuggingFaceStorageWriter(str(beside), save_distributed=True)
        try:
            save(state, storage_writer=writer, process_group=loss.process_group, no_dist=ranks.size == 1)
        except CheckpointException as error:
            if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
                raise KeyboardInterrupt from error  # the saver wraps it like a disk error
            raise
    return beside / _file_name(ranks.rank)


def load_checkpoint(loss: NegativeCacheLoss, folder: str | Path) -> None:
    """Load a checkpoint onto the device of the loss's cache, or onto the CPU if it has no cache yet.

    With the same number of ranks and the same `cache_size`, every row is restored bit-exactly at its position.
    Otherwise the rows are redistributed: a larger cache has empty rows, a smaller one keeps the newest rows, and each
    rank gets rows of every age. Each rank reads the files itself; nothing is sent between ranks.

    Args:
        loss: A loss with the settings of the saved one; `cache_size` and the number of ranks may differ.
        folder: The folder that `save_checkpoint` wrote.

    Raises:
        CheckpointError: A file is missing, truncated or damaged; or features, dtypes or the embedding dimension
            differ; or only one of the two scales is learnable. The loss is left unchanged.
        TypeError: `loss` is something else, such as a handler.
    """
    _check_loss(loss)
    folder = Path(folder)
    if not folder.exists() and _old(folder).exists():
        folder = _old(folder)
    record = _check(folder)
    _check_specs(record["specs"], loss)
    ranks, shards = loss.ranks, record["shards"]
    rows = [shard["rows"] for shard in shards]
    if record["specs"] is None or rows == shard_sizes(loss.cache_size, ranks.size):
        _load(loss, _read(folder, ranks.rank % len(shards), len(shards)))
        return
    readers = [functools.partial(_read, folder, shard, len(shards)) for shard in range(len(shards))]
    _load(loss, _redistributed(record["specs"], record["step"], readers, rows, loss))


def _check_loss(loss: NegativeCacheLoss) -> None:
    """Raise TypeError if something else was given."""
    if not isinstance(loss, NegativeCacheLoss):
        raise TypeError(
            f"`loss` is {type(loss).__name__}; expected NegativeCacheLoss, such as the `cache_loss` of a "
            "NegativeCacheRankingLoss. Save the `state_dict` of anything else, such as a handler, with `torch.save`."
        )


def _load(loss: NegativeCacheLoss, state_dict: dict[str, Tensor]) -> None:
    try:
        loss.load_state_dict(state_dict)
    except ValueError as error:
        raise CheckpointError(f"{error} Create the loss with the settings of the one that was saved.") from error


def full_state_dict(loss: NegativeCacheLoss) -> dict[str, Tensor]:
    """Return the `state_dict` of a single process with all rows; collective, and as large as the whole cache.

    It contains the generator state of rank 0. With one process, it equals `loss.state_dict()`.
    """
    _check_loss(loss)
    ranks, cache = loss.ranks, loss.cache
    if ranks.size == 1 or cache is None:
        return dict(loss.state_dict())
    rows = cache.filled.nonzero().squeeze(1)
    items = gather_rows(ranks, cache.read_rows(rows, list(cache.specs)), cache.specs, cache.device)
    ids, written = ranks.gather(
        [cache.document_ids[rows], cache.written[rows]], [size * 2 for size in ranks.sizes(len(rows), cache.device)]
    )
    whole = NegativeCache.empty(cache.specs, loss.cache_size, cache.device, num_ids=cache.num_ids)
    everywhere = torch.arange(len(ids), device=cache.device)
    whole.write(everywhere, items, document_ids=ids)
    whole.written[everywhere] = written
    whole.step.copy_(cache.step)
    own = {key: value for key, value in loss.state_dict().items() if not key.startswith("cache.")}
    state = loss.get_extra_state().to(cache.device)
    own["_extra_state"] = ranks.gather([state], [[len(state)]] * ranks.size)[0][: len(state)].cpu()
    return {**{"cache." + key: value for key, value in whole.state_dict().items()}, **own}


def load_full_state_dict(loss: NegativeCacheLoss, state_dict: Mapping[str, Tensor]) -> None:
    """Load the `state_dict` of a single process. Each rank keeps its part of the rows; nothing is sent.

    Raises:
        CheckpointError: The features, dtypes or embedding dimension differ. The loss is left unchanged.
    """
    _check_loss(loss)
    if loss.ranks.size == 1 or "cache.filled" not in state_dict:
        _load(loss, dict(state_dict))
        return
    _load(loss, state_for_rank(loss, [state_dict]))


def state_for_rank(loss: NegativeCacheLoss, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the `state_dict` for this rank's loss, from those of all ranks of the saved loss.

    As in `load_checkpoint`, the number of ranks and `cache_size` may differ. Nothing is sent.

    Args:
        loss: A loss with the settings of the saved one.
        states: The saved `state_dict` of each rank.

    Raises:
        CheckpointError: The features, dtypes or embedding dimension differ.
    """
    if "cache.filled" not in states[0]:
        return dict(states[loss.ranks.rank % len(states)])
    saved = [state_of(state, "cache.") for state in states]
    rows = [one["num_rows"] for one in saved]
    _check_specs(saved[0]["specs"], loss)
    if rows == shard_sizes(loss.cache_size, loss.ranks.size):
        return dict(states[loss.ranks.rank])
    shards, step = [dict(state).copy for state in states], int(states[0]["cache.step"])
    return _redistributed(saved[0]["specs"], step, shards, rows, loss)


def _redistributed(
    specs: dict[str, Any],
    step: int,
    shards: Sequence[Callable[[], dict[str, Tensor]]],
    num_rows: Sequence[int],
    loss: NegativeCacheLoss,
) -> dict[str, Tensor]:
    """Return the state for this rank from the rows of all shards. Each shard is read when it is needed."""
    ranks = loss.ranks
    parsed = {key: spec_from_json(spec) for key, spec in specs.items()}
    fill_and_times = [
        (state["cache.filled"].cpu(), state["cache.written"].cpu()) for state in (read() for read in shards)
    ]
    kept = assign_rows(fill_and_times, loss.cache_size, ranks.rank, ranks.size)
    cache, own = NegativeCache.empty(parsed, 0), dict[str, Tensor]()
    for shard, read in enumerate(shards):
        state = read()
        num_ids = state["cache.document_ids"][:1].numel()
        if shard == 0:
            num_own = shard_sizes(loss.cache_size, ranks.size)[ranks.rank]
            cache = NegativeCache.empty(parsed, num_own, num_ids=num_ids)
        if shard == min(ranks.rank, len(shards) - 1):
            own = {key: value for key, value in state.items() if not key.startswith("cache.")}
        here = (kept[:, 0] == shard).nonzero().squeeze(1)
        if len(here):
            old = NegativeCache.empty(parsed, num_rows[shard], num_ids=num_ids)
            old.load_state_dict({k.removeprefix("cache."): v for k, v in state.items() if k.startswith("cache.")})
            rows = kept[here, 1]
            cache.write(here, old.read_rows(rows, list(parsed)), document_ids=old.document_ids[rows])
            cache.written[here] = old.written[rows]
    cache.step.fill_(step)
    if ranks.rank >= len(shards):  # a new rank has no saved generator
        generator = new_generator(rank_seed(loss.generator.initial_seed(), ranks.rank))
        first = generator.get_state()
        own["_extra_state"] = torch.cat([first, own["_extra_state"][len(first) :]])
    return {**{"cache." + key: value for key, value in cache.state_dict().items()}, **own}


def assign_rows(fill_and_times: list[tuple[Tensor, Tensor]], cache_size: int, rank: int, num_ranks: int) -> Tensor:
    """Assign saved rows to a rank when the number of ranks or rows changes.

    The newest rows are kept and assigned to the ranks in turn, so that every rank gets rows of every age.

    Args:
        fill_and_times: For each saved shard, which rows are filled, bool `[rows]`, and the step in which each row was
            written, int64 `[rows]`.
        cache_size: The new number of rows of all ranks together.
        rank: This rank.
        num_ranks: The new number of ranks.

    Returns:
        int64 `[n, 2]`: saved shard and row for the first n rows of the rank, oldest first.
    """
    shard = torch.cat(
        [torch.full((len(filled),), number, device="cpu") for number, (filled, _) in enumerate(fill_and_times)]
    )
    row = torch.cat([torch.arange(len(filled), device="cpu") for filled, _ in fill_and_times])
    filled, written = (torch.cat([pair[i] for pair in fill_and_times]) for i in range(2))
    rows = torch.stack([shard, row], dim=1)[filled]
    newest_first = written[filled].argsort(descending=True, stable=True)[:cache_size]
    return rows[newest_first[rank::num_ranks]].flip(0)


def _read(folder: Path, shard: int, num_shards: int) -> dict[str, Tensor]:
    """Read the state that one rank wrote."""
    reader, prefix = _storage().HuggingFaceStorageReader(str(folder)), _prefix(shard, num_shards)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(prefix)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        load(state, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _check(folder: Path) -> dict[str, Any]:
    """Read the record of the folder; raise if a file is missing, damaged, or not of the recorded size."""
    path = folder / _JSON
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint of a negative cache: it has no {_JSON}.")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise CheckpointError(f"{path} has the format {record['format']}; this version reads {FORMAT}.")
        if record["crc32"] != _checksum(record):
            raise CheckpointError(f"{path} is damaged: its checksum differs. Use an earlier checkpoint.")
        shards = [(folder / s["file"], int(s["bytes"]), int(s["crc32"])) for s in record["shards"]]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. Use an earlier checkpoint.") from error
    for file, size, crc in shards:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing. Use an earlier checkpoint.")
        if file.stat().st_size != size or _implied_size(file) != size:
            raise CheckpointError(
                f"{file} is truncated or damaged: it has {file.stat().st_size} bytes; it was written with {size}, "
                f"and its header {_says(_implied_size(file))}. Use an earlier checkpoint."
            )
        if _crc32(file) != crc:
            raise CheckpointError(f"{file} is damaged: its checksum differs. Use an earlier checkpoint.")
    return record


def _check_specs(saved: dict[str, Any] | None, loss: NegativeCacheLoss) -> None:
    if saved is None:
        if loss.cache is not None:
            raise CheckpointError("The checkpoint was written before the first step; this loss already has a cache.")
        return
    mine = _specs(loss.cache)
    if mine is None:  # before the first step
        mine = {key: spec_to_json(spec) for key, spec in (loss.specs or {}).items()}
        (dim,) = saved[EMBEDDING]["shape"] if loss.embedding_dim is None else [loss.embedding_dim]
        mine[EMBEDDING] = spec_to_json(embedding_spec(dim, loss.embedding_dtype))
        mine |= {key: saved[key] for key in (BIAS, GUIDE) if key in saved}  # set at the first step
        if loss.specs is None:
            mine = {**saved, EMBEDDING: mine[EMBEDDING]}
    for key in sorted({*saved, *mine}):
        first, second = saved.get(key), mine.get(key)
        if first is None or second is None or not is_loadable(first, second):
            raise CheckpointError(f"The checkpoint's feature {key!r} is {first}, this loss's is {second}.")


def _implied_size(file: Path) -> int:
    """The size that the header of a safetensors file implies; -1 if the header cannot be read."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            return -1
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError):
            return -1
    return 8 + length + max(ends, default=0)


def _says(implied_size: int) -> str:
    return "cannot be read" if implied_size < 0 else f"says {implied_size}"


def _crc32(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _specs(cache: NegativeCache | None) -> dict[str, Any] | None:
    return None if cache is None else {key: spec_to_json(spec) for key, spec in cache.specs.items()}


def _prefix(rank: int, num_ranks: int) -> str:
    return f"rank-{rank:05d}-of-{num_ranks:05d}."


def _file_name(rank: int) -> str:
    """The name that the storage writer gives to the file of a rank."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def _replace(beside: Path, folder: Path) -> None:
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    """The path of the previous checkpoint while a new one replaces it."""
    return folder.with_name(folder.name + ".old")


def _storage() -> Any:
    try:
        import safetensors  # noqa: F401
        import torch.distributed.checkpoint.hf_storage as storage
    except ImportError as error:
        raise ImportError(f"Checkpoints need safetensors ({error}): pip install 'negative-cache[train]'") from error
    return storage
