"""Re-encode cached documents: sampled documents with gradient, and further rows in turn without gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import Features, check_feature
from negative_cache.cache.validation import Items, RaggedRows, check_finite, check_ids, padded, to_device
from negative_cache.sampling.config import RowSource

DocumentEncoder = Callable[[dict[str, Tensor]], Tensor]


def read_features(cache: RowSource, rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
    """Read features of `rows [n]`, `[n, ...]` each, on the device of `rows`; ragged ones padded to the longest row."""
    items = cache.read_rows(rows, keys)
    for key, value in items.items():
        if (value.values if isinstance(value, RaggedRows) else value).device != rows.device:
            items[key] = to_device(value, rows.device)
    return padded(items)


def encode(
    document_encoder: DocumentEncoder,
    features: dict[str, Tensor],
    shape: tuple[int, int],
    stored_dtype: torch.dtype,
    needs_gradient: bool = False,
    batch: int = 1,
) -> Tensor:
    """Run the document encoder and check its output. A document alone is encoded twice if the encoder takes batches.

    Args:
        document_encoder: Features -> embeddings.
        features: `[count, ...]` each.
        shape: The expected `(count, dim)`.
        stored_dtype: The dtype in which the cache stores embeddings; the output must be finite in it.
        needs_gradient: Whether to raise for embeddings without gradient; ignored with gradients disabled.
        batch: Documents that the encoder took at once in this step; it may be unable to take fewer than two.

    Returns:
        `[count, dim]`, with gradient.

    Raises:
        TypeError: The encoder returned no tensor.
        ValueError: Wrong shape, a missing gradient, or values that are not finite (checked only on the CPU).
    """
    if shape[0] == 1 < batch:
        embeddings = _check_shape(document_encoder(twice(features)), (2, shape[1]))[:1]
    else:
        embeddings = _check_shape(document_encoder(features), shape)
    if needs_gradient and torch.is_grad_enabled() and not embeddings.requires_grad:
        raise ValueError(
            "The document encoder returned embeddings without gradient, but those of the batch's documents have one. "
            "Encode them like the batch's documents, without no_grad or detach."
        )
    stored = embeddings.detach().to(stored_dtype)
    check_finite(f"The document encoder's output, stored as {stored_dtype},", stored, is_embedding=True)
    return embeddings


def try_encoder(document_encoder: DocumentEncoder, items: Items, rows: Tensor, needs_gradient: bool) -> Tensor:
    """Encode up to two documents of a batch, to find a wrong encoder before the first draw.

    Random numbers of the CPU and of CUDA devices are left as they are. A layer with state, such as BatchNorm, sees
    these documents once more.

    Args:
        document_encoder: Features -> embeddings.
        items: Validated features of the batch's documents.
        rows: `[n, dim]`: stored embeddings, whose device, dtype and dim the output must have.
        needs_gradient: See `encode`.

    Returns:
        `[count, dim]`; count is 0 if there are no features.

    Raises:
        TypeError, ValueError: See `encode`. From Python 3.11 on, any error of the encoder has a note on its input.
    """
    features = padded({key: to_device(value, rows.device) for key, value in items.items()})
    features = {key: value[:2] for key, value in features.items()}
    count = max(map(len, features.values()), default=0)
    if not count:
        return rows[:0]
    try:
        with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
            return encode(document_encoder, features, (count, rows.shape[1]), rows.dtype, needs_gradient, batch=2)
    except Exception as error:
        if hasattr(error, "add_note"):
            names = ", ".join(f"{key!r} {list(value.shape)}" for key, value in features.items())
            error.add_note(
                f"The first step tries `document_encoder` with a dict of features of two documents: {names}."
            )
        raise


def twice(features: Features) -> dict[str, Any]:
    """The features of each document twice. BatchNorm in training mode cannot encode a single document."""
    return {
        key: torch.cat([value, value]) if isinstance(value, Tensor) else [*value, *value]
        for key, value in features.items()
    }


def _check_shape(embeddings: object, shape: tuple[int, int]) -> Tensor:
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"The document encoder returned {type(embeddings).__name__}; expected a tensor {list(shape)}.")
    if embeddings.shape != shape:
        raise ValueError(f"The document encoder returned shape {list(embeddings.shape)}; expected {list(shape)}.")
    return embeddings


@torch.no_grad()
def refresh(
    cache: NegativeCache, embedding_key: str, data_keys: Sequence[str], encoder: DocumentEncoder, count: int
) -> None:
    """Re-encode the next `count` filled rows: each row once in `num_filled / count` steps. Ages do not change.

    Rows that are not finite are skipped and counted. They do not raise, because the step is already written.
    """
    # If no row is filled, row 0 is encoded but not written: a wrapped encoder, such as DDP, must run on all ranks.
    # A single row is encoded together with the next one: BatchNorm in training mode cannot encode a single document.
    places = torch.arange(max(count, 2), device=cache.device) + cache.step * count
    rows = places % cache.num_filled.clamp(min=1)
    shape = (len(rows), cache.stored(embedding_key)[0].shape[1])
    embeddings = _check_shape(encoder(read_features(cache, rows, data_keys)), shape)
    rows, embeddings = rows[:count], embeddings[:count]
    stored = embeddings.to(cache.specs[embedding_key].dtype)
    is_finite, is_filled = stored.isfinite().all(dim=1), cache.filled[rows]
    cache.num_rejected += (is_filled & ~is_finite).sum()
    cache.write(rows, {embedding_key: stored}, is_filled & is_finite, resets_age=False)


def encode_for_filling(document_encoder: DocumentEncoder, batch: Mapping[str, Any]) -> Tensor:
    """Check that a batch of documents has features and ids, and encode it.

    Returns:
        `[n, dim]`.

    Raises:
        ValueError: Missing keys, unknown ids, or embeddings of a wrong shape or that are not finite.
        TypeError: Features or ids that are no tensors, or an encoder that returns no tensor.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A batch is {type(batch).__name__}; expected a dict with `document_features` and `document_ids`, as in a "
            "training step."
        )
    missing = {"document_features", "document_ids"} - set(batch)
    if missing:
        raise ValueError(f"A batch has the keys {sorted(batch)}; it must also have {sorted(missing)}.")
    features, ids = batch["document_features"], batch["document_ids"]
    if not isinstance(features, Mapping):
        raise TypeError(f"`document_features` is {type(features).__name__}; expected a dict of feature name -> values.")
    for key, value in features.items():
        check_feature(f"document_features[{key!r}]", value)
    check_ids("document_ids", ids, tuple(getattr(ids, "shape", ())))
    ids = ids[:, 0] if ids.dim() > 1 else ids
    if ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"`document_ids` has the value {int(ids.min())}; every document needs an id of 0 or more.")
    is_single = {len(value) for value in features.values()} == {1}
    embeddings = document_encoder(twice(features) if is_single else dict(features))
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2:
        got = f"shape {list(embeddings.shape)}" if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise TypeError(f"The document encoder returned {got}; expected a tensor [{ids.numel()}, dim].")
    embeddings = embeddings[:1] if is_single else embeddings
    check_finite("The document encoder's output", embeddings, is_embedding=True)
    return embeddings


def check_room(cache: NegativeCache, document_ids: Tensor) -> None:
    """Raise unless all documents, `[n]` or `[n, k]`, can be inserted without replacing other documents."""
    document_ids = document_ids if document_ids.dim() == 1 else document_ids[:, 0]
    room = cache.num_rows - int(cache.num_filled)
    num_new = int((cache.find(torch.unique(document_ids).to(cache.device, torch.int64)) < 0).sum())
    if num_new > room:
        raise ValueError(
            f"The documents do not fit: the cache has {cache.num_rows} rows on this rank, of which {room} are free; "
            f"the batch has {num_new} new documents. Use a larger cache_size, or fewer documents."
        )
