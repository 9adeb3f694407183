"""The loss of a batch from its embeddings and what was drawn, and the numbers that tell how a run is doing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.cache.index import is_first_of_equal, is_in_row
from negative_cache.cache.rows import NO_ID
from negative_cache.distributed.handshake import Meeting
from negative_cache.distributed.many_ranks import withheld
from negative_cache.distributed.ranks import Ranks
from negative_cache.objective.batch import Batch
from negative_cache.sampling.choose import Serving
from negative_cache.sampling.one_process import Asked, Negatives

NEAR_DUPLICATE = 0.99  # cosine with the positive from which a drawn document counts as a copy of it
MAX_KEPT = 2**18  # products of a step that are kept until its numbers are read; more are worth some kernels more


class Fresh(NamedTuple):
    """Documents of the batch that are negatives of other queries, of all ranks.

    Attributes:
        embeddings: `[n, dim]`, with gradient.
        ids: int64 `[n]`, -1 for unknown.
        first_own: The column of the first query's positive, if the positives are among them; -1 if not.
        biases: `[n]`: what is added to their scores; None for nothing.
        guide: `[n, guide_dim]`: a guide's embeddings; None without a guide.
    """

    embeddings: Tensor
    ids: Tensor
    first_own: int
    biases: Tensor | None = None
    guide: Tensor | None = None


def gather_fresh(ranks: Ranks, meeting: Meeting | None, batch: Batch, asked: Asked, in_batch: bool) -> Fresh | None:
    """The documents of all ranks that are differentiated exactly as negatives; None where there are none. Collective.

    Args:
        ranks: The processes that share the cache.
        meeting: What they told each other; None for one process.
        batch: This rank's.
        asked: With the ids of all ranks.
        in_batch: Whether the batch's documents are among them.
    """
    own, count = batch.fresh(in_batch), asked.num_withheld
    guide = None if batch.guide_documents is None else batch.guide_documents[len(batch.guide_documents) - count :]
    log_q = None if batch.log_q is None else batch.log_q[len(batch.log_q) - count :]
    ids = None if asked.new_ids is None else asked.new_ids[len(asked.new_ids) - count :]
    first_own = 0
    if meeting is not None and asked.ids_of_all is not None:
        if not any(meeting.num_withheld):
            return None
        ids = withheld(meeting, asked.ids_of_all)
        extras = {"guide": guide, "log_q": log_q}
        given = {name: value for name, value in extras.items() if value is not None}
        sizes = [[number] * len(given) for number in meeting.num_withheld]
        all_given = dict(zip(given, ranks.gather(list(given.values()), sizes), strict=True)) if given else {}
        guide, log_q = all_given.get("guide"), all_given.get("log_q")
        own = batch.queries.new_empty(0, batch.queries.shape[1]) if own is None else own
        if meeting.needs_gradient and not own.requires_grad:  # all ranks take part in the backward pass, or none
            own = own.detach().requires_grad_()
        own = ranks.gather_with_gradient(own, meeting.num_withheld)
        first_own = sum(meeting.num_withheld[: ranks.rank])
    if own is None:
        return None
    if ids is None:
        ids = torch.full((len(own),), NO_ID, dtype=torch.int64, device=own.device)
    return Fresh(own, ids, first_own if in_batch else -1, None if log_q is None else -log_q, guide)


class Margins(NamedTuple):
    """From which similarity on a document is taken for a false negative, given that of the positive, p.

    Attributes:
        absolute: Above `p - absolute`; None for no such limit.
        relative: Above `p - relative * |p|`: 0.05 is 95 % of the positive (NV-Retriever); None for no such limit.
    """

    absolute: float | None = None
    relative: float | None = None

    def ceilings(self, similarities: Tensor) -> Tensor | None:
        """The highest similarity of a negative, from those of the positives `[batch]`; None without a limit."""
        limits = []
        if self.absolute is not None:
            limits.append(similarities - self.absolute)
        if self.relative is not None:
            limits.append(similarities - self.relative * similarities.abs())
        return torch.stack(limits).amin(dim=0) if limits else None


class Scores(NamedTuple):
    """Scores of a batch before anything is drawn.

    Attributes:
        positive: `[batch]`, with gradient.
        fresh: `[batch, n]`, with gradient, -inf where a document is no negative of the query; None for none.
        ceilings: `[batch]`: scores above which a row is taken for a false negative; None for no limit.
        guide_ceilings: `[batch]`: the same for a guide.
        num_fresh: How many fresh documents each query has beside its own.
        hidden: bool `[batch, n]`: which fresh documents do not count for a query; None for none.
        added: `[n]`: what the fresh scores have beside products; None for nothing.
    """

    positive: Tensor
    fresh: Tensor | None
    ceilings: Tensor | None
    guide_ceilings: Tensor | None
    num_fresh: int = 0
    hidden: Tensor | None = None
    added: Tensor | None = None

    @property
    def fresh_lse(self) -> Tensor:
        """`[batch]`: logsumexp of the fresh scores, without gradient; -inf where there are none."""
        if self.fresh is None:
            return torch.full_like(self.positive, -torch.inf).detach()
        return self.fresh.detach().logsumexp(dim=1)


def score_batch(
    batch: Batch, scale: Tensor | float, fresh: Fresh | None, margins: Margins, guide_margins: Margins
) -> Scores:
    """Score the queries against their positives and the fresh negatives.

    Args:
        batch: The queries and their positives, with gradient.
        scale: Factor of the dot products.
        fresh: Negatives to differentiate exactly; or None.
        margins: What makes a document too good to be a negative.
        guide_margins: The same for a guide's similarities.
    """
    queries, guide = batch.queries, batch.guide
    similarities = estimators.dot(queries, batch.documents)
    ceilings = margins.ceilings(similarities.detach())
    if ceilings is not None:
        ceilings = ceilings * (scale.detach() if isinstance(scale, Tensor) else scale)
    guide_ceilings = None if guide is None else guide_margins.ceilings(estimators.dot(*guide))
    scores, hidden, num_fresh = None, None, 0
    if fresh is not None and len(fresh.embeddings):
        scores = scale * _all_products(queries, fresh.embeddings)
        hidden = _hidden(len(queries), batch.positives, fresh)
        if ceilings is not None:
            hidden = hidden | (scores.detach() > ceilings[:, None])
        if guide is not None and guide_ceilings is not None and fresh.guide is not None:
            with torch.autocast(queries.device.type, enabled=False):
                hidden = hidden | (guide[0] @ fresh.guide.T > guide_ceilings[:, None])
        scores = scores if fresh.biases is None else scores + fresh.biases
        scores = scores.masked_fill(hidden, -torch.inf)
        num_fresh = len(fresh.embeddings) - (fresh.first_own >= 0)
    added = None if fresh is None else fresh.biases
    return Scores(scale * similarities, scores, ceilings, guide_ceilings, num_fresh, hidden, added)


def _all_products(queries: Tensor, documents: Tensor) -> Tensor:
    """Products of all pairs, `[batch, n]`, in at least float32."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(queries.dtype, documents.dtype))
    with torch.autocast(queries.device.type, enabled=False):
        return queries.to(dtype) @ documents.to(dtype).T


def _hidden(batch: int, positives: Tensor | None, fresh: Fresh) -> Tensor:
    """bool `[batch, n]`: which fresh documents do not count for a query: its positives, and repeated ones."""
    ids = fresh.ids
    is_known = ids >= 0
    is_first = is_first_of_equal(ids, is_known)
    hidden = (is_known & ~is_first).repeat(batch, 1)
    if positives is not None:
        hidden |= is_in_row(ids, positives) & is_known
    if fresh.first_own >= 0:
        hidden.diagonal(fresh.first_own).fill_(True)
    return hidden


def weigh_cache(
    num_filled: Tensor, num_rows: int, scores: Scores, warmup_fill: float, is_corrected: bool
) -> tuple[Tensor | float, Scores]:
    """What is added to the scores of all cached rows, and the scores of the batch with what is added to those.

    Args:
        num_filled: int64 `[]`: the filled rows of all ranks.
        num_rows: All rows of all ranks.
        scores: See `score_batch`.
        warmup_fill: Share of filled rows from which they count in full; 0 for always.
        is_corrected: Whether scores are `s - log q`: each negative is then one of n draws from q.
    """
    log_weight: Tensor | float = 0.0
    if warmup_fill:
        log_weight = (num_filled / (warmup_fill * num_rows)).clamp(max=1.0).log()
    if is_corrected:
        shift = -(num_filled + scores.num_fresh).clamp(min=1).log()
        log_weight = log_weight + shift
        if scores.fresh is not None:
            added = shift if scores.added is None else scores.added + shift
            scores = scores._replace(fresh=scores.fresh + shift, added=added)
    return log_weight, scores


class LossRecord(NamedTuple):
    """What the numbers about a loss are computed from, without gradient.

    Attributes:
        losses, positive, lse, fresh_lse: `[batch]`: the losses, the positives' scores, the logsumexp over the cache and
            over the batch's negatives.
    """

    losses: Tensor
    positive: Tensor
    lse: Tensor
    fresh_lse: Tensor

    def numbers(self) -> dict[str, Tensor]:
        return {
            "interpretable_loss": self.losses.mean(),
            "positive_probability": (-self.losses).exp().mean(),
            "cache_share": estimators.cache_share(self.positive, self.lse, self.fresh_lse).mean(),
        }


class DrawnRecord(NamedTuple):
    """What the encoded documents tell is computed from this, without gradient.

    Attributes:
        products: `[batch, n]`: the queries' products with the encoded documents.
        weights: `[batch, n]`: with which they count; None for the mean over each query's own.
        lse: `[batch]`: logsumexp over the cache.
        has_negatives: bool `[batch]`.
        scale: Factor of the products.
        documents: `[batch, dim]`: the positives.
        encoded: `[n, dim]`, or `[batch * n, dim]` where each query has its own.
        is_corrected: Whether scores are not products alone.
    """

    products: Tensor
    weights: Tensor | None
    lse: Tensor
    has_negatives: Tensor
    scale: Tensor | float
    documents: Tensor
    encoded: Tensor
    is_corrected: bool

    def numbers(self) -> dict[str, Tensor]:
        """Effective number of negatives, and the share of copies of positives."""
        normalize = torch.nn.functional.normalize
        cosines = _products(normalize(self.documents), normalize(self.encoded), self.weights is not None)
        numbers = {"near_duplicates": self._mean(cosines >= NEAR_DUPLICATE)}
        if not self.is_corrected:
            concentration = self._mean((self.scale * self.products - self.lse[:, None]).clamp(max=0.0).exp())
            numbers["effective_negatives"] = 1 / concentration.clamp(min=torch.finfo(concentration.dtype).tiny)
        return numbers

    def _mean(self, values: Tensor) -> Tensor:
        weights = 1 / self.products.shape[1] if self.weights is None else self.weights
        means = torch.where(self.has_negatives, (weights * values).sum(dim=1), 0)
        return means.sum() / self.has_negatives.sum().clamp(min=1)


class Computed(NamedTuple):
    """Numbers that were computed at once."""

    values: dict[str, Tensor]

    def numbers(self) -> dict[str, Tensor]:
        return self.values


class Outcome(NamedTuple):
    """The loss of a batch, and what numbers about it are computed from.

    Attributes:
        loss: `[batch]`, with gradient.
        records: Without gradient, on the device.
    """

    loss: Tensor
    records: list[LossRecord | DrawnRecord | Computed]


def compute_loss(
    batch: Batch,
    scale: Tensor | float,
    scores: Scores,
    fresh: Fresh | None,
    negatives: Negatives,
    encoded: Tensor,
    dims: Sequence[int] = (),
    log_weight: Tensor | float = 0.0,
) -> Outcome:
    """The loss from the new embeddings of what was drawn, and what numbers about it are computed from.

    Args:
        batch: The queries and their positives, with gradient.
        scale: Factor of the dot products.
        scores: See `score_batch`.
        fresh: The batch's negatives.
        negatives: What was drawn.
        encoded: `[n, dim]`, with gradient: what was drawn, encoded anew, in the order of `negatives.serving`.
        dims: Add the losses of embeddings that are cut to so many components.
        log_weight: Is added to the scores of all cached rows.
    """
    lse, positive = negatives.lse + log_weight, scores.positive
    records: list[LossRecord | DrawnRecord | Computed] = []
    if len(encoded):
        serving = negatives.serving[0] if negatives.serving else None
        products = _products(batch.queries, encoded, serving is not None)
        drawn = scale * _weigh(products, batch.queries, serving)
        records.append(_record_drawn(batch, scale, negatives, products.detach(), encoded.detach()))
    else:
        drawn = positive * 0
    loss = estimators.readable_loss(positive, drawn, lse, scores.fresh)
    records.append(LossRecord(loss.detach(), positive.detach(), lse, scores.fresh_lse))
    shorter = _truncated_losses(dims, batch, scale, scores, fresh, negatives, encoded, log_weight)
    return Outcome(sum(shorter, loss), records)


@torch.no_grad()
def _record_drawn(
    batch: Batch, scale: Tensor | float, negatives: Negatives, products: Tensor, encoded: Tensor
) -> DrawnRecord | Computed:
    """What the encoded documents tell. Embeddings are copied, as they may be views of more, or be changed in place."""
    is_small = products.numel() <= MAX_KEPT
    record = DrawnRecord(
        products,
        negatives.serving[0].weights if negatives.serving else None,
        negatives.lse,
        negatives.is_valid,
        scale.detach() if isinstance(scale, Tensor) else scale,
        batch.documents.detach().clone() if is_small else batch.documents.detach(),
        encoded.clone() if is_small else encoded,
        batch.log_q is not None,
    )
    return record if is_small else Computed(record.numbers())


def _truncated_losses(
    dims: Sequence[int],
    batch: Batch,
    scale: Tensor | float,
    scores: Scores,
    fresh: Fresh | None,
    negatives: Negatives,
    encoded: Tensor,
    log_weight: Tensor | float,
) -> list[Tensor]:
    """The losses `[batch]` of embeddings that are cut to each of `dims`; arguments as in `compute_loss`."""
    losses = []
    for number, dim in enumerate(dims):
        queries, documents = (estimators.truncate(side, dim) for side in (batch.queries, batch.documents))
        positive, others = scale * estimators.dot(queries, documents), None
        if fresh is not None and scores.fresh is not None and scores.hidden is not None:
            others = scale * _all_products(queries, estimators.truncate(fresh.embeddings, dim))
            others = others if scores.added is None else others + scores.added
            others = others.masked_fill(scores.hidden, -torch.inf)
        if len(encoded):
            products = _products(queries, estimators.truncate(encoded, dim), True)
            drawn = scale * _weigh(products, queries, negatives.serving[1 + number])
        else:
            drawn = positive * 0
        losses.append(estimators.readable_loss(positive, drawn, negatives.lse_of_dims[number] + log_weight, others))
    return losses


def _weigh(products: Tensor, queries: Tensor, serving: Serving | None) -> Tensor:
    """The weighted sum of products with the encoded documents, whose mean is the expectation: `[batch]`."""
    if serving is None:
        return products.mean(dim=1)
    return (serving.weights * products).sum(dim=1) + estimators.dot(queries, serving.correction)


def _products(queries: Tensor, documents: Tensor, is_shared: bool) -> Tensor:
    """Products with all documents, `[batch, n]`; or with each query's own ones, `[batch, n / batch]`."""
    if not is_shared:
        return estimators.dot(queries[:, None], documents.view(len(queries), -1, queries.shape[1]))
    return _all_products(queries, documents)
