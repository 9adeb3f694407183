"""Encoding of queries and documents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor

from negative_cache.workbench.evaluation.defaults import BATCH_SIZE, STATIC_BATCH_SIZE
from negative_cache.workbench.evaluation.encoding_options import EncodingError, EncodingOptions
from negative_cache.workbench.models import set_max_seq_length

TEXTS_PER_CALL = 1024  # of the model's `encode`, on each device; progress is reported after each call

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""


class Encoder:
    """Encodes with a model. Make one with `encoding`.

    Args:
        model: The model.
        options: How to encode.
        pool: Processes of the model, one per device; None for this process alone.
    """

    def __init__(self, model: SentenceTransformer, options: EncodingOptions, pool: dict[str, Any] | None) -> None:
        self._model = model
        self._options = options
        self._pool = pool
        self._device = torch.device(options.devices[0]) if options.devices else model.device

    def queries(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of queries: at least float32, `[n, dim]`."""
        return self._encode(self._model.encode_query, list(texts), self._options.query_prompt)

    def documents(self, texts: Sequence[str], on_progress: Callable[[int], None]) -> Tensor:
        """Embeddings of documents: at least float32, `[n, dim]`. `on_progress` is called with the number encoded."""
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))  # similar lengths need little padding
        step = TEXTS_PER_CALL * max(1, len(self._options.devices))
        parts = []
        for start in range(0, len(order), step):
            chosen = [texts[at] for at in order[start : start + step]]
            parts.append(self._encode(self._model.encode_document, chosen, self._options.document_prompt))
            on_progress(start + len(chosen))
        in_order = torch.cat(parts)
        embeddings = torch.empty_like(in_order)
        embeddings[torch.tensor(order, device=in_order.device)] = in_order
        return embeddings

    def _encode(self, encode: Callable[..., Tensor], texts: list[str], prompt: str | None) -> Tensor:
        embeddings = encode(
            texts,
            prompt=prompt,
            truncate_dim=self._options.truncate_dim,
            pool=self._pool,
            **encoding_arguments(self._model, self._options.batch_size),
        )
        if embeddings.dtype in (torch.float16, torch.bfloat16):  # similarities would have many ties
            embeddings = embeddings.float()
        return embeddings.to(self._device)


@contextlib.contextmanager
def encoding(model: SentenceTransformer, options: EncodingOptions) -> Iterator[Encoder]:
    """Yield an encoder. This gives the model the device, the dtype and the limit of tokens of the options.

    Raises:
        EncodingError: The model has fewer dimensions than `truncate_dim`.
        ModelError: The model is static, or `max_seq_length` exceeds the number of its positions.
    """
    dim = model.get_embedding_dimension()
    if options.truncate_dim is not None and dim is not None and options.truncate_dim > dim:
        raise EncodingError(
            f"--truncate-dim is {options.truncate_dim}; the embeddings have {dim} dimensions. Use at most that."
        )
    if options.max_seq_length is not None:
        set_max_seq_length(model, options.max_seq_length)
    if options.dtype is not None:
        model.to(getattr(torch, options.dtype))
    if len(options.devices) < 2:
        if options.devices:
            model.to(options.devices[0])
        yield Encoder(model, options, None)
        return
    pool = model.start_multi_process_pool(options.devices)
    try:
        yield Encoder(model, options, pool)
    finally:
        model.stop_multi_process_pool(pool)


def encoding_arguments(model: SentenceTransformer, batch_size: int | None = None) -> dict[str, Any]:
    """Arguments of the model's `encode` methods."""
    is_static = isinstance(model[0], StaticEmbedding)
    batch_size = batch_size or (STATIC_BATCH_SIZE if is_static else BATCH_SIZE)
    return {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
