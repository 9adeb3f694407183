"""The gradient of the loss with respect to the table of token embeddings: its exact value, and errors of estimates."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.estimators_tried import Sample, Situation
from benchmarks.sizes import Case
from benchmarks.stages import NUMBER, SPECS, Corpus, Stage, encode
from benchmarks.timing import synchronize
from negative_cache import NegativeCacheLoss, estimators
from negative_cache.objective.loss import expected_product
from negative_cache.sampling.config import DocumentWeights

CHUNK = 2048  # documents encoded at once

Step = Callable[[], Tensor]
Tried = Callable[[Situation, torch.Generator], Sample]


class Batch(NamedTuple):
    """Pairs and a full cache at a stage of a training.

    Attributes:
        corpus: The texts.
        table: `[vocabulary, dim]`, with gradient.
        pairs: int64 `[batch]`: numbers of the pairs; each has a document of its own.
        rows: int64 `[n]`: numbers of the cached documents.
        cached: `[n, dim]`: their embeddings.
        scale: Factor of the dot products.
    """

    corpus: Corpus
    table: Tensor
    pairs: Tensor
    rows: Tensor
    cached: Tensor
    scale: float

    @property
    def positives(self) -> Tensor:
        """int64 `[batch, n]`: numbers of the documents that are not negatives of each query, its own first."""
        return self.corpus.positives[self.pairs]

    @property
    def documents(self) -> Tensor:
        """int64 `[batch]`: number of each pair's document."""
        return self.positives[:, 0]

    def encode(self) -> tuple[Tensor, Tensor]:
        """Embeddings of the queries and of their documents: `[batch, dim]`, with gradient."""
        queries = encode(self.table, self.corpus.queries, self.pairs)
        return queries, self.encode_documents(self.documents)

    def encode_documents(self, numbers: Tensor) -> Tensor:
        """`[n, dim]`, with gradient."""
        return encode(self.table, self.corpus.documents, numbers)


def make_batch(corpus: Corpus, stage: Stage, case: Case, seed: int) -> Batch:
    """Random pairs with different documents, and the rows that were written last."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(corpus.positives), generator=generator).to(corpus.positives.device)
    numbers, place = corpus.positives[order, 0], torch.arange(len(order), device=order.device)
    first = torch.full((int(numbers.max()) + 1,), len(order), device=order.device)
    first.scatter_reduce_(0, numbers, place, "amin")
    pairs = order[first[numbers] == place][: case.batch]
    batch = Batch(corpus, stage.table, pairs, stage.rows[: case.rows], stage.cached[: case.rows], case.scale)
    return batch if case.is_stale else batch._replace(cached=encode_all(batch))


@torch.no_grad()
def encode_all(batch: Batch) -> Tensor:
    """Re-encode all rows: `[n, dim]`."""
    return torch.cat([batch.encode_documents(part) for part in torch.split(batch.rows, CHUNK)])


class Objective:
    """The loss of a batch, computed from the scores of all rows.

    Args:
        batch: The pairs and the cache.
        in_batch: Whether the batch's documents are negatives of its other queries, differentiated exactly.

    Attributes:
        scores: `[batch]` each, without gradient: the arguments of `estimators.cache_share`.
        situation: The input of the estimators in `estimators_tried`.
    """

    def __init__(self, batch: Batch, in_batch: bool) -> None:
        self.batch, self.in_batch = batch, in_batch
        positives, own = batch.positives, batch.documents
        self._is_hidden_in_batch = (positives[:, :, None] == own).any(dim=1)
        hidden = (positives[:, :, None] == batch.rows).any(dim=1)
        if in_batch:
            hidden = hidden | torch.isin(batch.rows, own)
        with torch.no_grad():
            queries, documents = batch.encode()
            scores = (batch.scale * queries @ batch.cached.T).masked_fill(hidden, -torch.inf)
            self.lse = scores.logsumexp(dim=1)
            others = self._in_batch_scores(queries, documents)
            in_batch_lse = torch.full_like(self.lse, -torch.inf) if others is None else others.logsumexp(dim=1)
            self.scores = (self._positive_scores(queries, documents), self.lse, in_batch_lse)
            shares = estimators.cache_share(*self.scores)
        self.situation = Situation(scores.softmax(dim=1), shares, queries, batch.cached)

    def loss(self, queries: Tensor, documents: Tensor, drawn: Tensor) -> Tensor:
        """The mean loss; its gradient with respect to cached documents is that of the products `drawn [batch]`."""
        positive, others = self._positive_scores(queries, documents), self._in_batch_scores(queries, documents)
        return estimators.readable_loss(positive, self.batch.scale * drawn, self.lse, others).mean()

    def exact_gradient(self) -> Tensor:
        """The gradient with every row re-encoded and the softmax of the cached embeddings, as in all estimators."""
        batch, (probabilities, shares, _, _) = self.batch, self.situation
        expected = probabilities @ encode_all(batch)
        queries, documents = batch.encode()
        loss = self.loss(queries, documents, estimators.dot(queries, expected))
        (gradient,) = torch.autograd.grad(loss, batch.table, retain_graph=True)
        factors = batch.scale / len(batch.pairs) * shares[:, None] * probabilities
        of_embeddings = factors.T @ queries.detach()
        for numbers, part in zip(torch.split(batch.rows, CHUNK), torch.split(of_embeddings, CHUNK), strict=True):
            gradient += torch.autograd.grad(batch.encode_documents(numbers), batch.table, part)[0]
        return gradient

    def _positive_scores(self, queries: Tensor, documents: Tensor) -> Tensor:
        return self.batch.scale * estimators.dot(queries, documents)

    def _in_batch_scores(self, queries: Tensor, documents: Tensor) -> Tensor | None:
        if not self.in_batch:
            return None
        return (self.batch.scale * queries @ documents.T).masked_fill(self._is_hidden_in_batch, -torch.inf)


@dataclass
class Estimate:
    """An estimator that is applied to a batch.

    Attributes:
        step: Returns the loss.
        prepare: Called before each step, without being timed.
        count: Distinct cached documents that were encoded, summed over steps.
    """

    step: Step
    prepare: Callable[[], None]
    count: int = 0


def of_library(batch: Batch, seed: int, settings: Mapping[str, Any], num_candidates: int | None = None) -> Estimate:
    """`NegativeCacheLoss` on a cache that is the same in every step, and that counts in the loss."""
    places = torch.full((int(batch.rows.max()) + 1,), -1, device=batch.rows.device)
    places[batch.rows] = torch.arange(len(batch.rows), device=batch.rows.device)
    loss_fn = NegativeCacheLoss(
        lambda features: batch.cached[places[features[NUMBER]]],
        len(batch.rows),
        batch.scale,
        specs=SPECS,
        seed=seed,
        **settings,
    )
    if num_candidates is not None:
        loss_fn.num_candidates = num_candidates
    loss_fn.fill_from([{"document_features": {NUMBER: batch.rows}, "document_ids": batch.rows}])
    loss_fn.is_waiting = False  # of the automatic budget, the part with the cache is measured
    cache = loss_fn.cache
    assert cache is not None

    def encode_drawn(features: dict[str, Tensor]) -> Tensor:
        estimate.count += len(torch.unique(features[NUMBER]))
        return batch.encode_documents(features[NUMBER])

    def prepare() -> None:
        loss_fn.cache = copy.deepcopy(cache)

    def step() -> Tensor:
        queries, documents = batch.encode()
        numbers = batch.documents
        loss: Tensor = loss_fn(queries, documents, {NUMBER: numbers}, numbers, batch.positives)
        return loss

    loss_fn.document_encoder = encode_drawn
    estimate = Estimate(step, prepare)
    return estimate


def of_tried(objective: Objective, seed: int, function: Tried) -> Estimate:
    """An estimator of `estimators_tried`, with in-batch negatives if the objective has them."""
    batch, generator = objective.batch, torch.Generator().manual_seed(seed)

    def step() -> Tensor:
        queries, documents = batch.encode()
        sample = function(objective.situation, generator)
        estimate.count += len(torch.unique(sample.rows))
        products = queries @ batch.encode_documents(batch.rows[sample.rows]).T
        weights = DocumentWeights(sample.weights, sample.correction, sample.missing_weight)
        drawn = expected_product(queries, products, weights, documents)
        assert drawn is not None
        return objective.loss(queries, documents, drawn)

    estimate = Estimate(step, lambda: None)
    return estimate


class Errors(NamedTuple):
    """Errors of an estimator on a batch.

    Attributes:
        variance: Mean squared distance from the exact gradient, relative to the squared norm of that gradient.
        bias: Squared distance of the mean gradient from the exact one, relative to its expectation without bias: near 1
            for an unbiased estimator.
        documents: Cached documents encoded per step.
        step_ms: Milliseconds of each step, including the encoder and the backward pass.
    """

    variance: float
    bias: float
    documents: float
    step_ms: list[float]


def measure(estimate: Estimate, table: Tensor, exact: Tensor, repeats: int) -> Errors:
    """Measure steps that differ in their draws."""
    times, squares, total = [], 0.0, torch.zeros_like(exact)
    for _ in range(repeats):
        estimate.prepare()
        synchronize(table.device)
        started = time.perf_counter()
        (gradient,) = torch.autograd.grad(estimate.step(), table)
        synchronize(table.device)
        times.append(1000 * (time.perf_counter() - started))
        error = gradient.sub_(exact)
        squares += float(_square(error))
        total += error
    of_mean = float(_square(total)) / repeats**2
    spread = (squares - repeats * of_mean) / (repeats - 1)  # around the mean gradient
    bias = repeats * of_mean / spread if spread > 0 else float("nan")
    return Errors(squares / repeats / float(_square(exact)), bias, estimate.count / repeats, times)


def _square(values: Tensor) -> Tensor:
    return values.flatten().dot(values.flatten())
