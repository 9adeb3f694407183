"""What ranks tell each other before a step, so that each of them knows who will send what to whom."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import spec_to_json
from negative_cache.sampling.draw import is_max_score, is_softmax
from negative_cache.sampling.one_process import Asked, Rules


class Told(NamedTuple):
    """What one rank tells all others: integers alone."""

    batch: int
    num_positives: int
    num_new: int
    num_withheld: int
    needs_gradient: int  # whether its given negatives have a gradient
    has_rows: int
    num_rows: int
    features: int  # a checksum
    query_dtype: int  # a checksum
    is_writing: int
    is_max_score: int
    is_replicated: int
    top_k: int  # -1 for all rows
    num_samples: int
    num_candidates: int
    num_top: int
    settings: int  # a checksum
    limits: int  # which of ceilings and a guide are given, as bits


NUM_TOLD = len(Told._fields)

_MUST_AGREE = {
    "features": "the cached features (names, shapes, dtypes)",
    "query_dtype": "the dtype of the query embeddings",
    "is_writing": "training or evaluating",
    "is_max_score": "the retrieval function",
    "is_replicated": "`use_cross_replica`",
    "top_k": "`top_k`",
    "num_samples": "`num_samples`",
    "num_candidates": "`shared` and `num_candidates`",
    "limits": "margins or a guide",
    "settings": "settings such as `in_batch`, margins, `matryoshka_dims`, `warmup_fill` or `refresh_per_step`",
    "num_top": "`return_topk`",
}


def tell(
    rules: Rules, caches: Sequence[NegativeCache], asked: Asked, is_writing: bool, needs_gradient: bool = False
) -> list[int]:
    """What this rank tells: the fields of `Told`."""
    if not (is_softmax(rules.retrieval_fn) or is_max_score(rules.retrieval_fn)):
        raise ValueError(
            f"{type(rules.retrieval_fn).__name__} needs the scores of all rows of all ranks at once, which do not "
            "travel. Over several ranks use GumbelMaxRetrievalFn() or MaxScoreRetrievalFn()."
        )
    specs = [{key: spec_to_json(spec) for key, spec in cache.specs.items()} for cache in caches]
    told = Told(
        batch=len(asked.queries),
        num_positives=0 if asked.positives is None else asked.positives.shape[1],
        num_new=num_new(asked),
        num_withheld=asked.num_withheld,
        needs_gradient=needs_gradient,
        has_rows=any(cache.has_rows() for cache in caches),
        num_rows=sum(cache.num_rows for cache in caches),
        features=zlib.crc32(json.dumps(specs, sort_keys=True).encode()),
        query_dtype=zlib.crc32(str(asked.queries.dtype).encode()),
        is_writing=is_writing,
        is_max_score=is_max_score(rules.retrieval_fn),
        is_replicated=rules.is_replicated,
        top_k=-1 if rules.top_k is None else rules.top_k,
        num_samples=rules.num_samples,
        num_candidates=rules.num_candidates,
        settings=zlib.crc32(str((rules.dims, rules.settings)).encode()),
        limits=int(asked.has_ceilings) + 2 * (asked.guide_queries is not None),
        num_top=rules.num_top,
    )
    return [int(number) for number in told]


def num_new(asked: Asked) -> int:
    """How many ids of new documents travel; without ids only those of withheld ones, as unknown."""
    return asked.num_withheld if asked.new_ids is None else len(asked.new_ids)


class Meeting:
    """What all ranks told each other.

    Args:
        table: For each rank the integers of `tell`.

    Raises:
        ValueError: The ranks do not do the same thing; on all of them alike.
    """

    def __init__(self, table: Sequence[Sequence[int]]) -> None:
        self.told = [Told(*row) for row in table]
        for name, what in _MUST_AGREE.items():
            if len({getattr(told, name) for told in self.told}) > 1:
                raise ValueError(
                    f"The ranks differ in {what}. Every rank must make the same call with the same settings."
                )
        self.batches = [told.batch for told in self.told]
        self.num_positives = [told.num_positives for told in self.told]
        self.num_new = [told.num_new for told in self.told]
        self.num_withheld = [told.num_withheld for told in self.told]
        self.num_rows = [told.num_rows for told in self.told]
        self.needs_gradient = any(told.needs_gradient for told in self.told)
        total = self.num_rows[0] if self.told[0].is_replicated else sum(self.num_rows)
        if self.told[0].top_k > total:
            raise ValueError(
                f"top_k is {self.told[0].top_k}; it must be from 1 to the {total} rows of the caches of all ranks."
            )

    def queries_of(self, rank: int) -> slice:
        """The queries of a rank among those of all."""
        start = sum(self.batches[:rank])
        return slice(start, start + self.batches[rank])

    def weight(self, rank: int) -> float:
        """The factor that makes the average of the ranks' mean losses the mean over all queries."""
        return self.batches[rank] * len(self.batches) / sum(self.batches)
