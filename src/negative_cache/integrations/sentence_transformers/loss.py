"""`NegativeCacheRankingLoss`: the negative cache as a loss of sentence-transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from negative_cache.cache.specs import NO_ID, FeatureSpec
from negative_cache.cache.validation import reads_without_sync, refuse_other_options
from negative_cache.integrations.sentence_transformers.anchors import (
    ANCHOR_IDS,
    ANCHOR_IDS_SPEC,
    NUM_ANCHORS,
    known_anchors,
    merge_anchors,
)
from negative_cache.integrations.sentence_transformers.batch import TextBatch
from negative_cache.integrations.sentence_transformers.corpus import Corpus, check_corpus_ids
from negative_cache.integrations.sentence_transformers.labels import (
    check_labels,
    check_labels_are_no_ratings,
    have_other_text,
)
from negative_cache.integrations.sentence_transformers.text import CachedTexts
from negative_cache.integrations.sentence_transformers.tokens import SPECS, TOKENS, hash_tokens
from negative_cache.integrations.sentence_transformers.wrappers import check_wrappers, matryoshka_dims, unwrap
from negative_cache.negative_cache_loss import NegativeCacheLoss

try:
    from sentence_transformers import SentenceTransformer, util
except ImportError as error:
    raise ImportError(
        "NegativeCacheRankingLoss needs sentence-transformers: pip install 'negative-cache[train]'"
    ) from error

logger = logging.getLogger(__name__)

_SPECS: dict[str, FeatureSpec] = {**SPECS, ANCHOR_IDS: ANCHOR_IDS_SPEC}
CHECK_EVERY = 100  # batches; where a check of labels synchronizes the device
_HIDDEN_IN_MODEL_CARD = ("feature_device", "process_group")


class NegativeCacheRankingLoss(nn.Module):
    """Cross-entropy of each anchor's positive against a cache of past documents; see `NegativeCacheLoss`.

    Use it in place of `MultipleNegativesRankingLoss` in `SentenceTransformerTrainer`. The dataset has the columns
    (anchor, positive) or (anchor, positive, negative, ...). Documents in the negative columns are negatives of every
    anchor in the batch, and are stored in the cache as well. Their number may differ from the number of anchors and
    from batch to batch; see `RaggedNegativesCollator`.

    A document is identified by a hash of its tokens: a document equal to an anchor's positive is never a negative of
    the anchor, and no document has two rows. An integer column `label` names documents in addition: its values are
    lists of integers of equal length, first the id of the positive, then those of further positives of the anchor,
    padded with -1. Single integers name only the positive, and add nothing to its hash. An id names one text. Single
    integers that contradict this, such as classes or grades, are ignored with a warning; lists raise an error.

    Documents are text: padded `input_ids` and `attention_mask` (any transformer), or the flat `input_ids` and `offsets`
    of `StaticEmbedding`. Prompts are part of the text. A `Router` encodes cached documents with the document route.

    Args:
        model: The model to train.
        cache_size: Number of cached documents.
        scale: Factor that multiplies the similarities, the inverse temperature.
        similarity_fct: `util.cos_sim` or `util.dot_score`.
        learnable_scale: Train the scale, starting from `scale`.
        num_samples: Number of cached documents to re-encode per anchor, such as 1 or 0.25; "auto" starts with none, and
            re-encodes a quarter of a document per anchor from the step on in which the negatives of the batch no longer
            represent the cache.
        in_batch: Whether the documents of the batch are negatives of the other anchors in the batch.
        shared: Whether a re-encoded document is used by all anchors; if False, each anchor uses its own `num_samples`.
        absolute_margin: Treat a document as a false negative if its similarity is above that of the positive minus this
            margin; None for no limit.
        relative_margin: The same with this fraction of the positive's similarity as the margin: 0.05 means above 95 %.
        guide: Model that detects false negatives: a document is not a negative if the guide finds it more similar to
            the anchor than the positive. The guide encodes the texts of each batch; the cache stores its embeddings.
        guide_margin: Subtracted from the guide's similarity of anchor and positive before the comparison.
        symmetric: Also compare each positive with its anchor and with a second cache of past anchors. Known anchors of
            the positive are not negatives; the document cache stores the last four of each document. The loss is the
            mean of both directions.
        matryoshka_dims: Add the losses of embeddings truncated to these dimensions.
        refresh_per_step: Number of cached documents to re-encode per step without gradient, in turn.
        use_lru: Replace the least recently used documents; if False, those stored first.
        embedding_dtype: dtype in which embeddings are stored.
        feature_device: Device that stores the tokens of cached documents, such as "cpu"; None for that of the model.
        seed: Seed of the sampling; None draws one from torch's global generator.
        gather_across_devices: Share the cache among all ranks: each rank stores `cache_size / ranks` documents, and the
            cached documents and in-batch negatives of all ranks are negatives of every anchor.

    Raises:
        ValueError: `similarity_fct` is not one of these functions, or an option is out of range.
        TypeError: `model` or `guide` is something else, such as a name, or an option has the wrong type.
    """

    # With `uses_gradient_cache`, MatryoshkaLoss does not repeat the forward pass per dimension. It replaces
    # `calculate_loss` with an object that holds the dimensions; see `matryoshka_dims`. AdaptiveLayerLoss warns.
    uses_gradient_cache = True
    calculate_loss: Any = None

    @refuse_other_options
    def __init__(
        self,
        model: SentenceTransformer,
        cache_size: int = 131_072,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        *,
        learnable_scale: bool = False,
        num_samples: float | Literal["auto"] = "auto",
        in_batch: bool = True,
        shared: bool = True,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        guide: SentenceTransformer | None = None,
        guide_margin: float = 0.0,
        symmetric: bool = False,
        matryoshka_dims: Sequence[int] = (),
        refresh_per_step: int = 0,
        use_lru: bool = True,
        embedding_dtype: torch.dtype = torch.float32,
        feature_device: torch.device | str | None = None,
        seed: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        _check_similarity(similarity_fct)
        if not isinstance(unwrap(model), SentenceTransformer):
            raise TypeError(
                f"`model` is {type(model).__name__}; expected a SentenceTransformer, such as "
                "SentenceTransformer(name). For another module, use NegativeCacheLoss."
            )
        if guide is not None and not isinstance(guide, nn.Module):
            raise TypeError(
                f"`guide` is {guide!r}; expected a SentenceTransformer, such as SentenceTransformer(name), or None."
            )
        self.model = model
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        # In a tuple, it is not a submodule and not trained.
        self._guide: tuple[SentenceTransformer | None] = (guide,)
        self._anchors = CachedTexts("anchors", self._unwrapped_model, self.embed)
        self._documents = CachedTexts("documents", self._unwrapped_model, self.embed)
        self._uses_labels = True
        self._has_checked_labels = False
        self._num_unchecked = 0  # batches of labels since the last check
        self._num_contradictions: Tensor | int = 0  # labels with another text among them
        self._options: dict[str, Any] = {
            "cache_size": cache_size,
            "scale": scale,
            "learnable_scale": learnable_scale,
            "num_samples": num_samples,
            "in_batch": in_batch,
            "shared": shared,
            "absolute_margin": absolute_margin,
            "relative_margin": relative_margin,
            "guide_margin": guide_margin,
            "matryoshka_dims": matryoshka_dims,
            "refresh_per_step": refresh_per_step,
            "use_lru": use_lru,
            "embedding_dtype": embedding_dtype,
            "feature_device": feature_device,
            "process_group": "world" if gather_across_devices else None,
        }
        self.cache_loss = self._make_loss(self._documents, seed)
        self._options["matryoshka_dims"] = self.cache_loss.matryoshka_dims
        self.query_cache_loss: NegativeCacheLoss | None = None
        if symmetric:
            self.query_cache_loss = self._make_loss(self._anchors, None if seed is None else seed + 1)
            self.query_cache_loss.log_scale = self.cache_loss.log_scale  # both directions share it

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Compute the mean loss of a batch against the cache, and update the cache.

        In eval mode, or with gradients disabled, compute the loss against the batch alone, and leave the cache as it
        is. Its values can be compared from one evaluation to the next, and with those of in-batch losses.

        Args:
            sentence_features: Model inputs of the anchors, the positives, and any columns of negatives.
            labels: int `[batch]`, ids of the positives; or `[batch, n]`, each followed by ids of further positives,
                padded with -1; or None. Further rows are labels of the negatives, column by column: int
                `[batch + m, n]`.

        Returns:
            Scalar, with gradient to the model and to a learnable scale.

        Raises:
            ValueError: Fewer than two columns, inputs that are not text, labels that are not ids, or non-finite
                embeddings. The cache is unchanged. On a GPU, labels are checked in the first step and in every 100th.
        """
        columns = list(sentence_features)
        _check_columns(columns)
        check_wrappers(self.model, columns)
        is_training = self.training and torch.is_grad_enabled()  # in evaluation, the trainer disables only gradients
        batch = self._read_on_all_ranks(columns, labels, is_training)  # before the model runs, which may change inputs
        embeddings = [self.embed(column) for column in columns]
        guide = self._guide_embeddings(batch.anchors, batch.documents)
        compute = self._compute if is_training else _in_batch_loss
        loss = compute(self.cache_loss, batch.compare_with_documents(embeddings, *guide))
        if self.query_cache_loss is None:
            return loss
        if self.query_cache_loss.log_scale is not self.cache_loss.log_scale:  # `to_empty` replaces both
            self.query_cache_loss.log_scale = self.cache_loss.log_scale
        return (loss + compute(self.query_cache_loss, batch.compare_with_anchors(embeddings, *guide))) / 2

    def fill_from(
        self,
        documents: Sequence[str],
        ids: Sequence[int | str] | None = None,
        batch_size: int = 256,
        show_progress_bar: bool = True,
        *,
        prompt: str | None = None,
        task: str | None = None,
    ) -> None:
        """Encode a corpus into the cache before training. Training then updates the row of each document.

        Args:
            documents: Texts, the same on all ranks; each rank stores a part of them.
            ids: Ids of the documents, as in the `label` column; None if there is no such column. One document is stored
                per distinct text.
            batch_size: Number of documents to encode at once.
            show_progress_bar: Whether to show a progress bar.
            prompt: The prompt that `prompts` in the training arguments assigns to the column of documents.
            task: The route that `router_mapping` in the training arguments assigns to that column.

        Raises:
            ValueError: There are more documents than rows (earlier batches remain stored), `ids` and `documents` have
                different lengths, or an id has two texts.
        """
        if isinstance(documents, str):
            raise TypeError("`documents` is a str; expected a list of texts, such as [text].")
        if ids is not None:
            check_corpus_ids(ids, documents)
        model, was_training = self._unwrapped_model(), self.model.training
        corpus = Corpus(
            documents, ids, self._documents, model=model, batch_size=batch_size, prompt=prompt, task=task,
            shows_progress=show_progress_bar,
        )  # fmt: skip
        self.model.eval()
        try:
            self.cache_loss.fill_from(self._corpus_batches(corpus))
        finally:
            self.model.train(was_training)

    def metrics(self) -> dict[str, float]:
        """See `NegativeCacheLoss.metrics`. Metrics of the cache of anchors have the prefix `query_`."""
        metrics = self.cache_loss.metrics()
        if self.query_cache_loss is not None:
            metrics |= {f"query_{name}": value for name, value in self.query_cache_loss.metrics().items()}
        return metrics

    def embed(self, features: dict[str, Any]) -> Tensor:
        """Encode model inputs: embeddings `[n, dim]`, in float32 and normalized for `util.cos_sim`."""
        outputs = self.model(features)
        if "sentence_embedding" not in outputs:
            raise ValueError(
                f"The model returned {sorted(outputs)}, without 'sentence_embedding'. Add a pooling to its modules, "
                "such as Pooling(transformer.get_embedding_dimension()). Multi-vector models are not supported."
            )
        embeddings: Tensor = outputs["sentence_embedding"]
        if self.similarity_fct is util.dot_score:
            return embeddings
        return nn.functional.normalize(embeddings.float(), dim=-1)

    def _make_loss(self, texts: CachedTexts, seed: int | None) -> NegativeCacheLoss:
        loss = NegativeCacheLoss(texts.embed, seed=seed, **self._options)
        loss.embedding_dim = _embedding_dim(self.model)
        loss.averages_scale = not self.gather_across_devices  # the trainer's DDP averages gradients only of the model
        return loss

    def _unwrapped_model(self) -> Any:
        return unwrap(self.model)

    def _read_on_all_ranks(
        self, columns: Sequence[dict[str, Any]], labels: Tensor | None, is_training: bool
    ) -> TextBatch:
        """See `_read`. In training with a shared cache, an error on one rank is raised on all."""
        if not is_training or self.cache_loss.process_group is None:
            return self._read(columns, labels, is_training)
        device = next(value.device for value in columns[1].values() if isinstance(value, Tensor))
        batch, _ = self.cache_loss.ranks.run_checked(
            self.cache_loss.step_number, device, lambda: (self._read(columns, labels, is_training), []), 0
        )
        return batch

    def _read(self, columns: Sequence[dict[str, Any]], labels: Tensor | None, is_training: bool) -> TextBatch:
        """Convert the model inputs of a batch to cached features, and identify its texts."""
        is_symmetric = self.query_cache_loss is not None
        needs_anchors = is_symmetric or self._guide[0] is not None
        anchors = self._anchors.from_inputs(columns[0], is_symmetric and is_training) if needs_anchors else {}
        documents = [self._documents.from_inputs(column, is_cached=is_training) for column in columns[1:]]
        hashes = [hash_tokens(document[TOKENS]) for document in documents]
        document_ids, positive_ids = hashes, None
        num_ids = 1 if self.cache_loss.cache is None else self.cache_loss.cache.num_ids
        sizes = [len(column) for column in hashes]
        own_labels = [torch.full_like(column, NO_ID) for column in hashes]
        if labels is not None and labels.numel():
            labels = self._checked_labels(labels, hashes, documents, is_training)
            is_fixed = is_training and self.cache_loss.cache is not None  # the number of ids per document
            own_labels, num_ids = list(torch.split(labels[:, 0], sizes)), num_ids if is_fixed else 2
            if labels.shape[1] > 1:
                positive_ids = labels[: sizes[0], 1:]
        if num_ids > 1:
            document_ids = [torch.stack(both, dim=1) for both in zip(hashes, own_labels, strict=True)]
        if not is_symmetric:
            return TextBatch(anchors, documents, document_ids, positive_ids, anchor_ids=None)
        known = [known_anchors(self.cache_loss.cache, column_hashes) for column_hashes in hashes]
        anchor_ids = merge_anchors(hashes[0], hash_tokens(anchors[TOKENS]), known[0])
        known[0] = anchor_ids[:, :NUM_ANCHORS]
        documents = [document | {ANCHOR_IDS: stored} for document, stored in zip(documents, known, strict=True)]
        return TextBatch(anchors, documents, document_ids, positive_ids, anchor_ids)

    def _checked_labels(
        self, labels: Tensor, of_columns: list[Tensor], documents: list[dict[str, Tensor]], is_training: bool
    ) -> Tensor:
        """Validate labels.

        Args:
            labels: See `forward`.
            of_columns: For each column of documents, their hashes.
            documents: For each column of documents, their features.
            is_training: Whether the batch will be cached.

        Returns:
            int64 `[batch + m, n]`, -1 for documents without a label; all -1 if they turn out not to be ids of
            documents.
        """
        hashes, count = torch.cat(of_columns), len(of_columns[0])
        is_first = is_training and (self.cache_loss.cache is None or not self._has_checked_labels)
        check_labels(labels, count, len(hashes), reads_values=is_first or reads_without_sync(labels))
        is_list = labels.dim() == 2 and labels.shape[1] > 1
        labels = labels.to(hashes.device, torch.int64).view(len(labels), -1)
        labels = nn.functional.pad(labels, (0, 0, 0, len(hashes) - len(labels)), value=NO_ID)
        own, cache = labels[:, 0].contiguous(), self.cache_loss.cache
        if not is_training:  # evaluation may have labels of its own, which tell nothing about those of training
            is_bad = have_other_text(own, hashes, None)
            return torch.where(is_bad.any(), NO_ID, labels)
        if cache is None:  # the first step, also of a further run with the same loss
            self._uses_labels, self._has_checked_labels = True, False
            self._num_contradictions, self._num_unchecked = 0, 0
        elif is_list and cache.num_ids == 1:
            raise ValueError(
                "`labels` name further positives, but the documents in the cache have no labels. Pass their ids to "
                "`fill_from`, or give every dataset of this loss a label column."
            )
        if not self._uses_labels and not is_list:
            return torch.full_like(labels, NO_ID)
        is_bad = have_other_text(own, hashes, cache)
        if reads_without_sync(hashes) or not self._has_checked_labels:
            if not self._has_checked_labels and count >= 3:
                check_labels_are_no_ratings(labels[:count], hashes[:count])
                self._has_checked_labels = True
            if bool(is_bad.any()):
                at = int(is_bad.to(torch.uint8).argmax())
                text = [string for column in documents for string in self._documents.to_strings(column)][at]
                self._reject_labels(f"the label of {text[:60]!r} names another text, too", is_list)
        else:
            self._num_contradictions += is_bad.sum()
            self._num_unchecked += 1
            if self._num_unchecked == CHECK_EVERY:
                count, self._num_contradictions, self._num_unchecked = int(self._num_contradictions), 0, 0
                if count:
                    self._reject_labels(f"{count} of the latest labels had another text before", is_list)
        return labels if self._uses_labels or is_list else torch.full_like(labels, NO_ID)

    def _reject_labels(self, what: str, is_list: bool) -> None:
        """Raise for labels that are lists; otherwise ignore labels from now on, with a warning."""
        meaning = f"The `label` column does not hold ids of documents: {what}. A document id names one text."
        if is_list:
            raise ValueError(
                f"{meaning} Give each text an id of its own. If prompts or truncation changed since the labels were "
                "cached, start with a new loss."
            )
        self._uses_labels = False
        logger.warning(
            "%s Labels are ignored from now on, and documents are identified by their tokens alone. If the column "
            "means something else, such as a class or a grade, remove it or rename it.",
            meaning,
        )

    def _guide_embeddings(
        self, anchors: dict[str, Tensor], documents: Sequence[dict[str, Tensor]]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The guide's embeddings of the anchors, if there are any, and of the documents; None without a guide."""
        (guide,) = self._guide
        if guide is None:
            return None, None
        strings = [string for column in documents for string in self._documents.to_strings(column)]
        encoded = _encode(guide, strings, documents[0][TOKENS].device)
        return _encode(guide, self._anchors.to_strings(anchors), encoded.device) if anchors else None, encoded

    def _compute(self, cache_loss: NegativeCacheLoss, arguments: dict[str, Any]) -> Tensor:
        """The loss of one cache, with the specs and dimensions of this batch."""
        dim = arguments["query_embeddings"].shape[1]
        cache_loss.matryoshka_dims = matryoshka_dims(self.calculate_loss, dim) or self._options["matryoshka_dims"]
        cache_loss.specs = {key: _SPECS[key] for key in arguments["document_features"]}
        loss: Tensor = cache_loss(**arguments)
        return loss

    def _corpus_batches(self, corpus: Corpus) -> Iterator[dict[str, Any]]:
        """Yield the batches of a corpus for `NegativeCacheLoss.fill_from`."""
        for features, ids in corpus.batches(self.cache_loss.ranks):
            _, guide_documents = self._guide_embeddings({}, [features])
            batch: dict[str, Any] = {"document_ids": ids, "document_features": features}
            if guide_documents is not None:
                batch["guide_documents"] = guide_documents
            if self.query_cache_loss is not None:
                features[ANCHOR_IDS] = known_anchors(None, ids)
            self.cache_loss.specs = {key: _SPECS[key] for key in features}
            cache = self.cache_loss.cache
            if ids.dim() == 1 and cache is not None and cache.num_ids > 1:
                batch["document_ids"] = torch.stack([ids, torch.full_like(ids, NO_ID)], dim=1)
            elif ids.dim() > 1 and cache is not None and cache.num_ids == 1:
                raise ValueError(
                    "`ids` were given, but the documents in the cache have none. Pass ids in every call of "
                    "`fill_from`, or in none."
                )
            yield batch

    @property
    def scale(self) -> float:
        """The factor of the similarities; synchronizes the device if it is learnable."""
        scale = self.cache_loss.scale
        return scale.item() if isinstance(scale, Tensor) else scale

    @property
    def temperature(self) -> float:
        """`1 / scale`."""
        return 1.0 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        """The options that the model card shows."""
        (guide,) = self._guide
        return {
            **{name: value for name, value in self._options.items() if name not in _HIDDEN_IN_MODEL_CARD},
            "scale": self.scale,
            "similarity_fct": self.similarity_fct.__name__,
            "embedding_dtype": str(self.cache_loss.embedding_dtype),
            "guide": None if guide is None else guide.model_card_data.base_model or "a model",
            "symmetric": self.query_cache_loss is not None,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper."""
        return """
@inproceedings{lindgren2021efficient,
    title={Efficient Training of Retrieval Models using Negative Cache},
    author={Lindgren, Erik and Reddi, Sashank and Guo, Ruiqi and Kumar, Sanjiv},
    booktitle={Advances in Neural Information Processing Systems},
    year={2021}
}
"""


def _check_similarity(similarity_fct: Any) -> None:
    if similarity_fct not in (util.cos_sim, util.dot_score):
        raise ValueError(
            f"`similarity_fct` is {similarity_fct!r}; the cache can only search by inner product: "
            "use util.cos_sim or util.dot_score."
        )


def _in_batch_loss(cache_loss: NegativeCacheLoss, arguments: dict[str, Any]) -> Tensor:
    """The loss against the batch alone."""
    return cache_loss.in_batch_loss(**{key: value for key, value in arguments.items() if "features" not in key})


def _check_columns(columns: Sequence[dict[str, Any]]) -> None:
    if len(columns) < 2:
        raise ValueError(
            f"The dataset has {len(columns)} text column(s); expected anchor, positive and any negatives, in this "
            "order. datasets.Dataset.select_columns sets the order."
        )


def _encode(guide: SentenceTransformer, strings: list[str], device: torch.device) -> Tensor:
    """Normalized float32 embeddings `[n, guide_dim]` of texts."""
    was_training = guide.training  # `encode` ends training mode; the guide may share modules with the model
    embeddings = guide.encode(strings, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
    if was_training:
        guide.train()
    # Clone, because `encode` returns an inference tensor, which autograd cannot save.
    cloned: Tensor = embeddings.to(device).float().clone()
    return cloned


def _embedding_dim(model: Any) -> int | None:
    """Dimensions of the model's embeddings; None if they are unknown, as in training with `truncate_dim`."""
    if getattr(model, "truncate_dim", None) is not None:
        return None  # shortens what `encode` returns and the dimension that the model states, but not what is trained
    for name in ("get_embedding_dimension", "get_sentence_embedding_dimension"):
        if hasattr(model, name):
            return getattr(model, name)()
    return None
