"""The input and the output of sampling in a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from negative_cache.cache.specs import FeatureSpec
from negative_cache.cache.update import RowUpdates
from negative_cache.cache.validation import RaggedRows, check_number
from negative_cache.retrieval import ScoreTransform

# The default budget, measured in docs/how-good-static-models.md: in-batch negatives alone until they represent the
# cache badly, then a quarter of a document per query, with weights for a gradient that is averaged over 32 steps.
AUTO_SAMPLES, AUTO_STEPS, PAYS_ABOVE = 0.25, 32, 4.0


class RowSource(Protocol):
    """The rows that sampling reads: a `NegativeCache`, or several that are searched as one."""

    @property
    def num_rows(self) -> int: ...
    @property
    def num_filled(self) -> Tensor: ...
    @property
    def filled(self) -> Tensor: ...
    @property
    def specs(self) -> Mapping[str, FeatureSpec]: ...
    def has_rows(self) -> bool: ...
    def stored(self, key: str) -> tuple[Tensor, Tensor | None]: ...
    def find(self, document_ids: Tensor) -> Tensor: ...
    def lengths(self, rows: Tensor, key: str) -> Tensor: ...
    def pads_left(self, key: str) -> Tensor: ...
    def note_side(self, key: str, pads_left: Tensor | bool) -> None: ...
    def read_rows(self, rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor | RaggedRows]: ...


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of sampling. All of them except the generator are equal on all ranks.

    Attributes:
        embedding_key: The feature that is scored.
        data_keys: The features that the document encoder takes.
        generator: The generator of this process.
        score_transform: Elementwise function of the dot products.
        takes_best: Take each query's best row instead of a draw.
        top_k: Restrict the softmax to the best row of each of top_k groups; None for all rows.
        num_samples: Documents to re-encode per query, a whole number if they are not shared; 0 to compute only the
            logsumexp.
        num_draws: Rows drawn per query; `num_samples` if documents are not shared.
        num_steps: Steps over which the gradient counts as averaged, see `estimators.choice_weights`.
        is_waiting: Whether cached documents count only if they pay, see `choose.is_worth_it`.
        is_shared: Whether all queries share the documents to re-encode, which are chosen from the draws of all queries;
            if False, each query uses its own draws.
        num_best: Number of best rows to return per query.
        bias_key: The feature that is added to the scores; None for no feature.
        guide_key: The feature with a guide's embeddings; None without a guide.
        dims: Truncated dimensions that have their own losses; only with shared documents.
        is_replicated: Whether every rank holds all rows; each rank then searches its part of them.
        needs_mean: Whether to compute each query's expected cached embedding, as the gradient of an evaluation needs.
        other_settings: Other settings that must be equal on all ranks.
    """

    embedding_key: str
    data_keys: Sequence[str]
    generator: torch.Generator
    score_transform: ScoreTransform | None = None
    takes_best: bool = False
    top_k: int | None = None
    num_samples: float = 1
    num_draws: int = 1
    num_steps: float = math.inf
    is_waiting: bool = False
    is_shared: bool = False
    num_best: int = 0
    bias_key: str | None = None
    guide_key: str | None = None
    dims: tuple[int, ...] = ()
    is_replicated: bool = False
    needs_mean: bool = False
    other_settings: tuple[Any, ...] = ()


class SamplingRequest(NamedTuple):
    """The queries to sample for.

    Attributes:
        queries: `[batch, dim]`, without gradient.
        positive_ids: int64 `[batch, n]`: ids of documents that are not negatives of a query, padded with -1; or None.
        new_ids: int64 `[n]`, or `[n, k]` for k ids per document: the documents that will be inserted, -1 for unknown;
            or None.
        num_in_batch: The last `num_in_batch` of `new_ids` are in-batch negatives, which no query may see in the cache.
        positive_scores: `[batch]`; required if documents are shared.
        in_batch_lse: `[batch]`: logsumexp over in-batch negatives, -inf for none; required if documents are shared.
        ceilings: `[batch]`: rows with a higher score are hidden from the query; None for no limit.
        guide_queries: `[batch, guide_dim]`; None without a guide.
        guide_ceilings: `[batch]`: rows with a larger product of guide embeddings are hidden; None without a guide.
    """

    queries: Tensor
    positive_ids: Tensor | None = None
    new_ids: Tensor | None = None
    num_in_batch: int = 0
    positive_scores: Tensor | None = None
    in_batch_lse: Tensor | None = None
    ceilings: Tensor | None = None
    guide_queries: Tensor | None = None
    guide_ceilings: Tensor | None = None


class InBatch(NamedTuple):
    """In-batch negatives: documents of the batch that are negatives of its queries, with exact gradients.

    Attributes:
        embeddings: `[n, dim]`, with gradient; `n` may be 0.
        ids: int64 `[n]`, or `[n, k]` for k ids per document; -1 for unknown.
        first_own: The column of the first query's positive, if the positives are among them; -1 if not.
        biases: `[n]`, added to their scores; None for nothing.
        guide: `[n, guide_dim]`: a guide's embeddings; None without a guide.
    """

    embeddings: Tensor
    ids: Tensor
    first_own: int = -1
    biases: Tensor | None = None
    guide: Tensor | None = None


class DocumentWeights(NamedTuple):
    """Weights with which re-encoded documents estimate each query's expectation over the cache.

    The estimate is `(weights * products).sum(1) + dot(queries, correction)`.

    Attributes:
        weights: `[batch, n]`: the weight of each document's product.
        correction: `[batch, dim]`: the weighted sum of the cached embeddings of the drawn rows, minus that of the rows
            that are re-encoded.
        missing_weight: `[batch]`: the same difference of the sums of weights; None if no documents stand in, see
            `estimators.stand_in_weights`.
    """

    weights: Tensor
    correction: Tensor
    missing_weight: Tensor | None = None


class Noise(NamedTuple):
    """The noise of a step's gradient with and without re-encoded documents, in the unit of `estimators.importance`.

    Attributes:
        batch: `[]`: see `estimators.batch_noise`.
        in_batch: `[]`: see `estimators.in_batch_noise`.
        sizes: `[n]`: the contribution of each drawn row, see `estimators.importance`.
        num_chosen: Documents that are chosen, on all ranks; 0 if cached documents do not count yet.
        num_steps: See `estimators.choice_error`.
    """

    batch: Tensor
    in_batch: Tensor
    sizes: Tensor
    num_chosen: int = 0
    num_steps: float = math.inf


@dataclass
class Sample:
    """Rows sampled for the queries of this process.

    Attributes:
        lse: `[batch]`: logsumexp of the scores of each query's negatives, -inf where it has none.
        num_filled: int64 `[]`: the number of filled rows of all ranks.
        cached: `[count, dim]`: cached embeddings of the documents to re-encode, in the dtype in which the cache takes
            embeddings; with several ranks and shared documents, `[0, dim]`.
        rows: int64 `[count]`: their rows; with several ranks `[0]`, because the rows may be on any rank.
        count: Number of documents that this process re-encodes; 0 if no query of any rank has a negative.
        documents_per_query: Re-encoded documents per query, of all ranks.
        noise: The noise of the step, if documents are shared and some query has a negative.
        features: Their features, `[count, ...]` each.
        is_update: bool `[count]`: whether the row gets the new embedding; None for all.
        weights: Weights of the re-encoded documents of all ranks for the queries of this process: for full embeddings,
            then for each of `SamplingConfig.dims`. Empty if documents are not shared: each query then takes the mean
            over `count / batch` documents of its own. In evaluation with gradients, weights of no documents, whose
            correction is the expected cached embedding.
        lse_of_dims: `[batch]` for each of `SamplingConfig.dims`: an estimate of `lse` for truncated embeddings.
        num_hidden: int64 `[batch]`: the number of rows that the ceilings hide; None without ceilings.
        document_rows: int64 `[n]`: the rows of this process's cache that hold the documents to insert, -1 for none;
            None without ids.
        new_items_mask: bool `[n]`: which of these documents this process inserts; None for all.
        best_features: For each query, the features `[k, ...]` of its best rows, best first; empty if not requested.
    """

    lse: Tensor
    num_filled: Tensor
    cached: Tensor
    rows: Tensor
    count: int = 0
    features: dict[str, Tensor] = field(default_factory=dict)
    is_update: Tensor | None = None
    weights: list[DocumentWeights] = field(default_factory=list)
    lse_of_dims: list[Tensor] = field(default_factory=list)
    num_hidden: Tensor | None = None
    documents_per_query: float = 0.0
    noise: Noise | None = None
    document_rows: Tensor | None = None
    new_items_mask: Tensor | None = None
    best_features: list[dict[str, Tensor]] = field(default_factory=list)

    def leave_cache_out(self) -> None:
        """Let the loss be that of the batch alone."""
        self.lse = torch.full_like(self.lse, -torch.inf)
        self.lse_of_dims = [self.lse for _ in self.lse_of_dims]


class Encoded(NamedTuple):
    """Re-encoded documents.

    Attributes:
        own: `[count, dim]`, with gradient: those that this process encoded.
        documents: `[n, dim]`, with gradient: those of all ranks if documents are shared, otherwise `own`.
        updates: New embeddings of rows of this process; None for none.
        reinserted: New embeddings of documents in other ranks' batches that have a row in this process; None for none.
    """

    own: Tensor
    documents: Tensor
    updates: RowUpdates | None = None
    reinserted: RowUpdates | None = None


def draws_per_query(num_samples: float, shared: bool) -> int:
    """Number of rows drawn per query: `num_samples`, or twice that, clamped to [8, 16], if documents are shared."""
    return math.ceil(max(8, min(16, 2 * num_samples), num_samples) if shared else num_samples)


def check_num_samples(num_samples: object, shared: bool) -> float | Literal["auto"]:
    """Validate `num_samples`.

    Raises:
        TypeError: It is neither a number nor "auto".
        ValueError: It is not positive, or a fraction without shared documents.
    """
    if isinstance(num_samples, str) and num_samples == "auto":
        return "auto"
    hint = ' Or "auto".'
    number = check_number("num_samples", num_samples, hint)
    if number <= 0:
        raise ValueError(f"`num_samples` is {number:g}; it must be above 0, such as 0.25.{hint}")
    if not shared and number != int(number):
        raise ValueError(
            f"`num_samples` is {number:g}; without shared documents, each query has its own: expected an integer of at "
            f"least 1.{hint}"
        )
    return int(number) if number == int(number) else number


def is_auto(num_samples: float | Literal["auto"], shared: bool, in_batch: bool) -> bool:
    """Whether the budget follows what the cache can give."""
    return num_samples == "auto" and shared and in_batch


def documents_per_query(num_samples: float | Literal["auto"], shared: bool, in_batch: bool) -> float:
    """Cached documents to re-encode per query, once the cache counts."""
    if num_samples == "auto":
        return AUTO_SAMPLES if is_auto(num_samples, shared, in_batch) else 1
    return num_samples
