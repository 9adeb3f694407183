"""Advice on settings and inputs that are valid but probably mistakes; each is logged once."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from negative_cache.cache.hashing import features_without_hash, hash_items
from negative_cache.cache.validation import Items, reads_without_sync
from negative_cache.objective.batch import Batch
from negative_cache.sampling.encode import DocumentEncoder

# Above this scale, the loss of embeddings that are no unit vectors saturates or vanishes. The product of the mean norms
# of queries and documents, 1 for unit vectors, may differ by this factor.
LARGE_SCALE, FACTOR = 5.0, 2.0
OTHER_FACTOR = 4.0  # the same for the mean norms of documents from the encoder and from the batch
UNIT = 0.01  # the largest deviation of the norm of a normalized embedding, also in half precision
SIMILAR = 0.3  # two embeddings of a document from the same weights have a larger cosine, even with dropout of 0.5
MANY_SHARED = 0.25  # of the documents of a batch: more of them share an id with different documents only by mistake
WIDE_MARGIN = 0.5  # a relative margin above it hides all but documents with half the similarity of the positive

logger = logging.getLogger("negative_cache")


def advise_on_settings(scale: float, relative_margin: float | None) -> None:
    """Warn of a scale that looks like a temperature, and of a margin that looks like what remains of the similarity."""
    if scale < 1:
        logger.warning(
            "`scale` is %g. It multiplies the similarities; a temperature divides them. If %g is a temperature, set "
            "scale=%g.",
            scale,
            scale,
            1 / scale,
        )
    if relative_margin is not None and relative_margin > WIDE_MARGIN:
        rest = 1 - relative_margin
        logger.warning(
            "`relative_margin` is %g: documents above %.0f %% of the positive's similarity are hidden, among them most "
            "hard negatives. To hide those above %.0f %%, set relative_margin=%.3g.",
            relative_margin,
            100 * rest,
            100 * relative_margin,
            rest,
        )


class Advice:
    """Warnings about the inputs of the first steps.

    Values that the host cannot read without synchronizing the device are kept until `catch_up`.

    Attributes:
        is_pending: Whether there is something left to look at: True until a step has re-encoded documents.
        has_seen_ids: Whether the ids of two batches were looked at.
    """

    def __init__(self) -> None:
        self.is_pending = True
        self._has_seen_a_batch = False
        self._has_warned_of_detached = False
        self._has_described_ids = False
        self.has_seen_ids = False
        self._first_ids: tuple[Tensor, Tensor] | None = None  # of the first batch, with hashes of its features
        self._deferred: list[Callable[[], None]] = []

    def look_at(self, batch: Batch, encoded: Tensor, encoder: DocumentEncoder, scale: float) -> None:
        """Warn of mistakes in a training step.

        Args:
            batch: The batch.
            encoded: `[n, dim]`, with gradient: the documents that the step re-encoded.
            encoder: The document encoder.
            scale: The initial scale.
        """
        if torch.compiler.is_compiling():
            return
        documents = batch.documents
        if not self._has_seen_a_batch and scale > LARGE_SCALE:
            self._when_known(partial(_warn_of_norms, scale), [_norms(batch.queries), _norms(documents)])
        if len(encoded):
            self._when_known(_warn_of_other_norms, [_norms(documents), _norms(encoded)])
        is_detached = batch.queries.requires_grad and not documents.requires_grad
        if is_detached and not self._has_warned_of_detached and (encoded.requires_grad or _is_trained(encoder)):
            self._has_warned_of_detached = True
            trains = "only re-encoded negatives train it" if encoded.requires_grad else "no document trains it"
            logger.warning(
                "`document_embeddings` have no gradient, but the parameters of the document encoder require one: %s. "
                "Encode documents without detach or no_grad, or freeze the encoder with requires_grad_(False).",
                trains if len(encoded) else "the documents of the batch do not train it",
            )
        self._has_seen_a_batch, self.is_pending = True, not len(encoded)

    def look_at_trial(self, given: Tensor, tried: Tensor) -> None:
        """Warn if the document encoder gives documents of the batch embeddings that have nothing to do with theirs.

        Args:
            given: `[n, dim]`: their embeddings in the batch.
            tried: `[n, dim]`: those of the encoder, with the same weights.
        """
        if len(tried) and not torch.compiler.is_compiling():
            self._when_known(_warn_of_other_embeddings, [_cosines(given, tried).mean()])

    def look_at_updates(self, cached: Tensor, encoded: Tensor, is_new: Tensor) -> None:
        """The same for the first documents that a step re-encodes, as far as the step before has stored them.

        Args:
            cached: `[n, dim]`: their cached embeddings.
            encoded: `[n, dim]`: those of the encoder, whose weights may have changed by one step.
            is_new: bool `[n]`: whether the step before has stored them.
        """
        if not torch.compiler.is_compiling():
            total = torch.where(is_new, _cosines(cached, encoded), 0).sum()
            self._when_known(_warn_of_other_embeddings, [total / is_new.sum()])  # NaN, without a warning, if none is

    def look_at_ids(self, ids: Tensor, features: Items) -> None:
        """Warn if documents of the first batch share an id, or if the second batch has its ids, but other documents.

        Args:
            ids: int64 `[n]` or `[n, k]`, given by the caller.
            features: Validated features of the documents.
        """
        if torch.compiler.is_compiling() or features_without_hash(features):
            self.has_seen_ids = True
            return
        hashes = hash_items(features, ids.device)
        if self._first_ids is None:
            self._first_ids = ids, hashes
            first = ids.view(len(ids), -1)[:, 0]
            is_shared = (first[:, None] == first) & (first >= 0) & (hashes[:, None] != hashes)
            self._when_known(_warn_of_shared_ids, [is_shared.any(dim=1).float().mean()])
            return
        (first_ids, first_hashes), self._first_ids, self.has_seen_ids = self._first_ids, None, True
        if ids.shape == first_ids.shape and len(ids) > 1:
            is_same, is_other = (ids == first_ids) & (ids >= 0), hashes != first_hashes
            self._when_known(_warn_of_places, [is_same.all() & is_other.all()])

    def describe_ids(self, names: Sequence[str], without_hash: Sequence[str]) -> None:
        """Say how documents are identified that have no ids.

        Args:
            names: The features of a document.
            without_hash: Those for which there is no hash.
        """
        if self._has_described_ids or torch.compiler.is_compiling():
            return
        self._has_described_ids = True
        if not without_hash:
            logger.info("`document_ids` are not given: documents are identified by a hash of %s.", ", ".join(names))
            return
        logger.warning(
            "Documents have no ids, and there is no hash of the features `%s`, which are floats or have many values. A "
            "document that occurs again is then a negative of its own query; `near_duplicates` shows this only if the "
            "encoder has no dropout. Pass document_ids, unless each document occurs once.",
            "`, `".join(without_hash),
        )

    def catch_up(self) -> None:
        """Look at the values that were kept; synchronizes the device if there are any."""
        deferred, self._deferred = self._deferred, []
        for check in deferred:
            check()

    def _when_known(self, warn: Callable[[list[Any]], None], values: list[Tensor]) -> None:
        self._deferred.append(lambda: warn([value.tolist() for value in values]))
        if all(reads_without_sync(value) for value in values):
            self.catch_up()


def _warn_of_places(found: list[Any]) -> None:
    (is_place_in_batch,) = found
    if is_place_in_batch:
        logger.warning(
            "The first two batches have the same ids and other documents: each batch replaces the cached documents of "
            "the batch before. An id names one document in the whole run, and not a place in the batch. Without "
            "document_ids, documents with integer features are identified by a hash of them."
        )


def _warn_of_shared_ids(found: list[Any]) -> None:
    (share,) = found
    if share > MANY_SHARED:
        logger.warning(
            "%.0f %% of the documents of the first batch have the id of another document, with other features. An id "
            "names one document, which has one row of the cache: the label of a class is no id. Without document_ids, "
            "documents with integer features are identified by a hash of them.",
            100 * share,
        )


def _norms(embeddings: Tensor) -> Tensor:
    """The smallest, the mean and the largest norm of `embeddings [n, dim]`: float32 `[3]`."""
    norms = embeddings.detach().float().norm(dim=1)
    return torch.stack([norms.amin(), norms.mean(), norms.amax()])


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    """The cosine similarity of each pair of rows of `[n, dim]`: float32 `[n]`."""
    return torch.nn.functional.cosine_similarity(first.detach().float(), second.detach().float(), dim=1)


def _warn_of_norms(scale: float, norms: list[list[float]]) -> None:
    (_, queries, _), (_, documents, _) = norms
    product = queries * documents
    if product > FACTOR or product < 1 / FACTOR:
        logger.warning(
            "Embeddings are not normalized: the mean norm is %.3g for queries and %.3g for documents, and scale=%g "
            "assumes 1. Normalize them, in `document_encoder` too, or set another scale, such as %.2g.",
            queries,
            documents,
            scale,
            scale / max(product, 1e-30),
        )


def _warn_of_other_norms(norms: list[list[float]]) -> None:
    (lowest, given, highest), (_, encoded, _) = norms
    is_unit = abs(lowest - 1) < UNIT and abs(highest - 1) < UNIT
    is_other = (
        abs(encoded - 1) > 5 * UNIT if is_unit else not 1 / OTHER_FACTOR < encoded / max(given, 1e-30) < OTHER_FACTOR
    )
    if is_other:
        logger.warning(
            "`document_encoder` returned embeddings with a mean norm of %.3g; that of `document_embeddings` is %.3g. "
            "Encode both in the same way. Is one of them normalized and the other not?",
            encoded,
            given,
        )


def _warn_of_other_embeddings(found: list[Any]) -> None:
    (cosine,) = found
    if cosine < SIMILAR:
        logger.warning(
            "`document_encoder` computes other embeddings than those in `document_embeddings`: the mean cosine "
            "similarity of the two is %.2f. Use the same encoder for both, and pass as `document_features` its inputs "
            "for the same documents, in the same order. If you do, the last step changed it too much: lower the "
            "learning rate.",
            cosine,
        )


def _is_trained(encoder: DocumentEncoder) -> bool:
    """Whether the encoder is, belongs to or names a module with parameters that are trained; False if unknown."""
    modules = [getattr(encoder, "__self__", encoder)]
    with contextlib.suppress(TypeError, ValueError):  # no function, or a variable without value
        names = inspect.getclosurevars(encoder)
        modules += [*names.nonlocals.values(), *names.globals.values()]
    return any(
        parameter.requires_grad
        for module in modules
        if isinstance(module, nn.Module)
        for parameter in module.parameters()
    )
