"""The settings and sizes that ranks exchange before a step, so that each rank knows the sizes of all messages."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache.cache.specs import spec_to_json
from negative_cache.distributed.collectives import Ranks
from negative_cache.sampling.config import RowSource, SamplingConfig, SamplingRequest


class RankSummary(NamedTuple):
    """The integers that one rank sends to all others."""

    batch: int
    num_positives: int
    num_new: int
    num_ids: int  # per document; 0 without ids
    num_in_batch: int
    needs_gradient: int  # whether its in-batch negatives have a gradient
    has_rows: int
    num_rows: int
    features: int  # a checksum
    query_dtype: int  # a checksum
    is_writing: int
    needs_mean: int
    takes_best: int
    is_replicated: int
    top_k: int  # -1 for all rows
    num_samples: int  # in millionths
    num_draws: int
    is_waiting: int
    is_shared: int
    num_best: int
    has_guide: int
    other_settings: int  # a checksum


NUM_INTEGERS = len(RankSummary._fields)

_MUST_AGREE = {
    "features": "the cached features (names, shapes, dtypes)",
    "query_dtype": "the dtype of the query embeddings",
    "is_writing": "training or evaluating",
    "needs_mean": "evaluating with or without gradients",
    "takes_best": "the retrieval function",
    "is_replicated": "`use_cross_replica`",
    "top_k": "`top_k`",
    "num_samples": "`num_samples`",
    "is_waiting": "whether cached documents count yet (load the same checkpoint on all ranks)",
    "is_shared": "`shared`",
    "num_draws": "the number of draws per query",
    "has_guide": "a guide",
    "other_settings": "settings such as `in_batch`, margins, `matryoshka_dims` or `refresh_per_step`",
    "num_best": "`return_topk`",
}


def summarize(
    config: SamplingConfig,
    cache: RowSource,
    request: SamplingRequest,
    *,
    is_writing: bool,
    needs_gradient: bool = False,
) -> list[int]:
    """Return the fields of `RankSummary` for this rank."""
    specs = {key: spec_to_json(spec) for key, spec in cache.specs.items()}
    summary = RankSummary(
        batch=len(request.queries),
        num_positives=0 if request.positive_ids is None else request.positive_ids.shape[1],
        num_new=num_new_ids(request),
        num_ids=0 if request.new_ids is None else request.new_ids[:1].numel(),
        num_in_batch=request.num_in_batch,
        needs_gradient=needs_gradient,
        has_rows=cache.has_rows(),
        num_rows=cache.num_rows,
        features=zlib.crc32(json.dumps(specs, sort_keys=True).encode()),
        query_dtype=zlib.crc32(str(request.queries.dtype).encode()),
        is_writing=is_writing,
        needs_mean=config.needs_mean,
        takes_best=config.takes_best,
        is_replicated=config.is_replicated,
        top_k=-1 if config.top_k is None else config.top_k,
        num_samples=round(1e6 * config.num_samples),
        num_draws=config.num_draws,
        is_waiting=config.is_waiting,
        is_shared=config.is_shared,
        num_best=config.num_best,
        has_guide=request.guide_queries is not None,
        other_settings=zlib.crc32(str((config.dims, config.num_steps, config.other_settings)).encode()),
    )
    return [int(number) for number in summary]


def num_new_ids(request: SamplingRequest) -> int:
    """The number of new ids that a rank sends; without ids, one unknown id (-1) per in-batch negative."""
    return request.num_in_batch if request.new_ids is None else len(request.new_ids)


class Handshake:
    """The summaries of all ranks.

    Args:
        ranks: The ranks.
        table: For each rank, the integers of `summarize`.

    Raises:
        ValueError: The ranks do not make the same call. The same error is raised on all ranks.

    Attributes:
        num_ids: Ids per document; 0 if no rank has ids.
    """

    def __init__(self, ranks: Ranks, table: Sequence[Sequence[int]]) -> None:
        self.ranks = ranks
        self.summaries = [RankSummary(*row) for row in table]
        first = self.summaries[0]
        for name, what in _MUST_AGREE.items():
            if len({getattr(summary, name) for summary in self.summaries}) > 1:
                raise ValueError(
                    f"The ranks differ in {what}. Every rank must make the same call with the same settings."
                )
        if len({summary.num_ids for summary in self.summaries if summary.num_ids}) > 1:
            raise ValueError("The ranks differ in the number of ids per document. Pad `document_ids` with -1.")
        self.batches = [summary.batch for summary in self.summaries]
        self.num_positives = [summary.num_positives for summary in self.summaries]
        self.num_new = [summary.num_new for summary in self.summaries]
        self.num_ids = max(summary.num_ids for summary in self.summaries)
        self.num_in_batch = [summary.num_in_batch for summary in self.summaries]
        self.num_rows = [summary.num_rows for summary in self.summaries]
        self.needs_gradient = any(summary.needs_gradient for summary in self.summaries)
        total = self.num_rows[0] if first.is_replicated else sum(self.num_rows)
        if first.top_k > total:
            raise ValueError(
                f"top_k is {first.top_k}; it must be from 1 to the {total} rows of the caches of all ranks."
            )

    def in_batch_part(self, values: Tensor) -> Tensor:
        """Select the in-batch negatives, the last ones of each rank, from `values [n]` of all ranks\' new documents."""
        parts = zip(torch.split(values, self.num_new), self.num_in_batch, strict=True)
        return torch.cat([part[len(part) - count :] for part, count in parts])

    @property
    def own_queries(self) -> slice:
        """The range of this rank's queries among the queries of all ranks."""
        start = sum(self.batches[: self.ranks.rank])
        return slice(start, start + self.batches[self.ranks.rank])
