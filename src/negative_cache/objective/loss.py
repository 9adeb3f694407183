"""Compute the loss, with its gradient, from the scores of a batch and the sampled documents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.cache.index import is_first_of_equal, is_in_row
from negative_cache.cache.specs import Specs
from negative_cache.cache.validation import Items, check_number, copied
from negative_cache.objective.batch import Batch
from negative_cache.objective.diagnostics import MAX_KEPT, Record, copy_numbers, document_numbers, loss_numbers
from negative_cache.sampling.config import DocumentWeights, Encoded, InBatch, Sample, SamplingRequest


class FalseNegativeLimits(NamedTuple):
    """Limits of similarity above which a document counts as a false negative; p is the positive's similarity.

    Attributes:
        absolute: The limit is `p - absolute`; None for no such limit.
        relative: The limit is `p - relative * |p|`: 0.05 means 95 % of p (NV-Retriever); None for no such limit.
        guide: The limit is `p - guide` for a guide's similarities, if they are given.
    """

    absolute: float | None = None
    relative: float | None = None
    guide: float = 0.0

    def checked(self) -> FalseNegativeLimits:
        """The limits as floats; TypeError or ValueError for limits that are no finite numbers or out of range."""
        absolute = None if self.absolute is None else check_number("absolute_margin", self.absolute)
        relative = None if self.relative is None else check_number("relative_margin", self.relative)
        if relative is not None and not 0 <= relative <= 1:
            raise ValueError(
                f"`relative_margin` is {self.relative}; it is a fraction of the positive's similarity, from 0 to 1: "
                "0.05 hides documents above 95 % of it."
            )
        return FalseNegativeLimits(absolute, relative, check_number("guide_margin", self.guide))

    def ceilings(self, similarities: Tensor) -> Tensor | None:
        """The highest similarity that a negative may have, given the positives' `[batch]`; None without a limit."""
        limits = []
        if self.absolute is not None:
            limits.append(similarities - self.absolute)
        if self.relative is not None:
            limits.append(similarities - self.relative * similarities.abs())
        return torch.stack(limits).amin(dim=0) if limits else None


class Scores(NamedTuple):
    """Scores of a batch before anything is sampled.

    Attributes:
        scale: Factor of the similarities; with gradient if it is learnable.
        positive: `[batch]`, with gradient.
        in_batch: `[batch, n]`, with gradient: scores of in-batch negatives, -inf where hidden; None for none.
        in_batch_lse: `[batch]`, without gradient: their logsumexp; -inf for none.
        hidden: bool `[batch, n]`: which in-batch negatives do not count for a query; None for none.
        num_in_batch: Number of in-batch negatives of each query, without its own document.
        ceilings: `[batch]`: scores above which a row counts as a false negative; None for no limit.
        guide_ceilings: `[batch]`: the same for a guide; None without a guide.
    """

    scale: Tensor | float
    positive: Tensor
    in_batch: Tensor | None
    in_batch_lse: Tensor
    hidden: Tensor | None = None
    num_in_batch: int = 0
    ceilings: Tensor | None = None
    guide_ceilings: Tensor | None = None

    def complete(self, request: SamplingRequest) -> SamplingRequest:
        """Add the scores that sampling needs to the request."""
        return request._replace(
            positive_scores=self.positive.detach(),
            in_batch_lse=self.in_batch_lse,
            ceilings=self.ceilings,
            guide_ceilings=self.guide_ceilings,
        )


def score_batch(batch: Batch, in_batch: InBatch, scale: Tensor | float, limits: FalseNegativeLimits) -> Scores:
    """Score the queries against their positives and the in-batch negatives.

    Args:
        batch: The queries and their positives, with gradient.
        in_batch: The in-batch negatives of all ranks, with gradient.
        scale: Factor of the dot products.
        limits: What counts as a false negative.
    """
    similarities = estimators.dot(batch.queries, batch.documents)
    positive = scale * similarities
    ceilings, guide_ceilings = limits.ceilings(similarities.detach()), None
    if ceilings is not None:
        ceilings = ceilings * (scale.detach() if isinstance(scale, Tensor) else scale)
    if batch.guide_queries is not None and batch.guide_documents is not None:
        guided = batch.guide_documents[: len(batch.queries)]
        guide_ceilings = estimators.dot(batch.guide_queries, guided) - limits.guide
    if not len(in_batch.embeddings):
        nothing = torch.full_like(positive, -torch.inf).detach()
        return Scores(scale, positive, None, nothing, ceilings=ceilings, guide_ceilings=guide_ceilings)
    scores = scale * estimators.products(batch.queries, in_batch.embeddings)
    hidden = _known_positives(batch, in_batch)
    if ceilings is not None:
        hidden = hidden | (scores.detach() > ceilings[:, None])
    if guide_ceilings is not None and batch.guide_queries is not None and in_batch.guide is not None:
        hidden = hidden | (estimators.products(batch.guide_queries, in_batch.guide) > guide_ceilings[:, None])
    scores = scores if in_batch.biases is None else scores + in_batch.biases
    scores = scores.masked_fill(hidden, -torch.inf)
    return Scores(
        scale=scale,
        positive=positive,
        in_batch=scores,
        in_batch_lse=scores.detach().logsumexp(dim=1),
        hidden=hidden,
        num_in_batch=len(in_batch.embeddings) - (in_batch.first_own >= 0),
        ceilings=ceilings,
        guide_ceilings=guide_ceilings,
    )


def _known_positives(batch: Batch, in_batch: InBatch) -> Tensor:
    """bool `[batch, n]`: in-batch negatives that do not count for a query: its positives, and repeated documents."""
    ids = in_batch.ids.view(len(in_batch.embeddings), -1)
    is_known = ids[:, 0] >= 0
    hidden = (is_known & ~is_first_of_equal(ids[:, 0], is_known)).repeat(len(batch.queries), 1)
    if batch.positive_ids is not None:
        is_positive = torch.zeros_like(hidden)
        for column in ids.T:
            is_positive |= is_in_row(column, batch.positive_ids) & (column >= 0)
        if ids.shape[1] > 1:  # a copy of a document may have other further ids
            is_copy = (ids[:, 0][:, None] == ids[:, 0]) & is_known
            is_positive |= (is_positive.float() @ is_copy.float()) > 0
        hidden |= is_positive
    if in_batch.first_own >= 0:
        hidden.diagonal(in_batch.first_own).fill_(True)
    return hidden


def cache_loss(
    batch: Batch, in_batch: InBatch, scores: Scores, sample: Sample, encoded: Encoded, dims: Sequence[int] = ()
) -> tuple[Tensor, list[Record]]:
    """Compute the loss of each query, and the records for the diagnostics of the step.

    The value is `-log softmax` of the positive among the in-batch negatives and all cached rows. The gradient equals
    the exact gradient in expectation over the sample.

    Args:
        batch: The queries and their positives, with gradient.
        in_batch: The in-batch negatives, with gradient.
        scores: See `score_batch`.
        sample: The sample from the cache.
        encoded: The re-encoded documents of the sample, with gradient.
        dims: Add the losses of embeddings truncated to each of these dimensions.

    Returns:
        `[batch]`, with gradient; and the records.
    """
    shift: Tensor | None = None
    records: list[Record] = []
    if batch.log_q is not None:  # scores are s - log q: each negative counts as one of n draws from q
        shift = -(sample.num_filled + scores.num_in_batch).clamp(min=1).log()
    weights, products = sample.weights[0] if sample.weights else None, None
    if sample.weights or len(encoded.documents):
        products = _products(batch.queries, encoded.documents, weights)
    if products is not None and len(encoded.documents):
        records.append(_record_documents(batch, scores, sample, encoded.documents, products.detach()))
    estimate = expected_product(batch.queries, products, weights, in_batch.embeddings)
    losses = _loss_of_view(scores, sample.lse, shift, estimate)
    lse, in_batch_lse = sample.lse, scores.in_batch_lse
    if shift is not None:
        lse, in_batch_lse = lse + shift, in_batch_lse + shift
    records.append(partial(loss_numbers, losses.detach(), scores.positive.detach(), lse, in_batch_lse))
    for number, dim in enumerate(dims):
        queries, documents, short_scores = _truncated(batch, in_batch, scores, dim)
        if len(encoded.documents):
            weights = sample.weights[1 + number]
            products = _products(queries, estimators.truncate(encoded.documents, dim), weights)
        estimate = expected_product(queries, products, weights, documents)
        losses = losses + _loss_of_view(short_scores, sample.lse_of_dims[number], shift, estimate)
    return losses, records


def _loss_of_view(scores: Scores, lse: Tensor, shift: Tensor | None, estimate: Tensor | None) -> Tensor:
    """Compute the loss `[batch]` from the scores of full or truncated embeddings.

    Args:
        scores: Scores of the positives and the in-batch negatives.
        lse: `[batch]`: logsumexp over the cache.
        shift: `[]`, added to the scores of all negatives; None for nothing.
        estimate: `[batch]`, with gradient: see `expected_product`.
    """
    in_batch, drawn = scores.in_batch, scores.positive * 0 if estimate is None else scores.scale * estimate
    if shift is not None:
        lse, in_batch = lse + shift, None if in_batch is None else in_batch + shift
    return estimators.readable_loss(scores.positive, drawn, lse, in_batch)


def _products(queries: Tensor, documents: Tensor, weights: DocumentWeights | None) -> Tensor:
    """Products with all documents, `[batch, n]`; without weights, with each query's own, `[batch, n / batch]`."""
    if weights is not None:
        return estimators.products(queries, documents)
    return estimators.dot(queries[:, None], documents.view(len(queries), -1, queries.shape[1]))


def expected_product(
    queries: Tensor, products: Tensor | None, weights: DocumentWeights | None, in_batch: Tensor
) -> Tensor | None:
    """The estimate of each query's expected product with a cached document, `[batch]`; None if nothing was sampled.

    Args:
        queries: `[batch, dim]`, with gradient.
        products: `[batch, n]`: products with the re-encoded documents; None if there are none.
        weights: Their weights; None for the mean over each query's own documents.
        in_batch: `[n, dim]`, with gradient: the in-batch negatives, which stand in for documents that are not
            re-encoded. Only their own gradients do: those of the queries come from the cached embeddings.
    """
    if products is None or weights is None:
        return None if products is None else products.mean(dim=1)
    estimate = (weights.weights * products).sum(dim=1) + estimators.dot(queries, weights.correction)
    if weights.missing_weight is None or not len(in_batch):
        return estimate
    stand_ins = estimators.stand_in_weights(weights.correction, weights.missing_weight, in_batch)
    return estimate + (stand_ins * estimators.products(queries.detach(), in_batch)).sum(dim=1)


def _truncated(batch: Batch, in_batch: InBatch, scores: Scores, dim: int) -> tuple[Tensor, Tensor, Scores]:
    """Truncated queries and in-batch negatives, `[..., full dim]`, and the scores of truncated embeddings."""
    queries, documents = estimators.truncate(batch.queries, dim), estimators.truncate(batch.documents, dim)
    positive, others = scores.scale * estimators.dot(queries, documents), None
    truncated = estimators.truncate(in_batch.embeddings, dim)
    if scores.hidden is not None:
        others = scores.scale * estimators.products(queries, truncated)
        others = others if in_batch.biases is None else others + in_batch.biases
        others = others.masked_fill(scores.hidden, -torch.inf)
    return queries, truncated, scores._replace(positive=positive, in_batch=others)


@torch.no_grad()
def _record_documents(batch: Batch, scores: Scores, sample: Sample, encoded: Tensor, products: Tensor) -> Record:
    """Record the values from which the diagnostics of re-encoded documents are computed.

    Embeddings are copied, because they may be views of larger tensors, or change in place later.
    """
    is_small = products.numel() <= MAX_KEPT
    record = partial(
        document_numbers,
        products=products,
        weights=sample.weights[0].weights if sample.weights else None,
        lse=sample.lse,
        scale=scores.scale.detach() if isinstance(scores.scale, Tensor) else scores.scale,
        documents=batch.documents.detach().clone() if is_small else batch.documents,
        encoded=encoded.detach().clone() if is_small else encoded,
        is_corrected=batch.log_q is not None,
    )
    return record if is_small else partial(dict, record())


def record_copies(documents: Items, sample: Sample, specs: Specs) -> Record:
    """Record the features by which re-encoded documents are found that are copies of a query's positive.

    Args:
        documents: Validated features of the batch's documents, the positives first. They have hashes.
        sample: The sample of one process.
        specs: Spec per feature; may have further keys.
    """
    return partial(
        copy_numbers,
        documents=copied(documents),  # they may change in place later
        encoded=sample.features,
        specs=specs,
        weights=sample.weights[0].weights if sample.weights else None,
        lse=sample.lse,
    )
