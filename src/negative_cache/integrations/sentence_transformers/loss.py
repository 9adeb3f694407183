"""`NegativeCacheRankingLoss`: the negative cache as a loss of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from negative_cache.distributed.ranks import Ranks, world
from negative_cache.integrations.sentence_transformers.corpus import Corpus
from negative_cache.integrations.sentence_transformers.positives import (
    ANCHORS,
    ANCHORS_SPEC,
    NUM_ANCHORS,
    anchors_of,
    known_anchors,
)
from negative_cache.integrations.sentence_transformers.text import TextSide, check_wrappers, matryoshka_dims, unwrap
from negative_cache.integrations.sentence_transformers.tokens import SPECS, TOKENS, hash_tokens, stack
from negative_cache.negative_cache_loss import NegativeCacheLoss

try:
    from sentence_transformers import SentenceTransformer, util
except ImportError as error:
    raise ImportError(
        "NegativeCacheRankingLoss needs sentence-transformers: pip install 'negative-cache[train]'"
    ) from error


class NegativeCacheRankingLoss(nn.Module):
    """Each anchor's positive against a cache of past documents; see `NegativeCacheLoss`.

    Use it with `SentenceTransformerTrainer` like `MultipleNegativesRankingLoss`, on columns (anchor, positive) or
    (anchor, positive, negative, ...). Further columns are negatives of the whole batch, and enter the cache too.
    Documents are known by a hash of their tokens: a document equal to the anchor's positive is never its
    negative, and no document has two rows. An integer column `label` names the document of the positive
    instead; a column of lists of integers, all of one length, names further positives of the anchor behind
    it, filled up with -1.

    Documents are text: padded `input_ids` and `attention_mask` (any transformer), or the flat `input_ids` and
    `offsets` of `StaticEmbedding`. Prompts are part of the text; a `Router` takes documents by their own route.

    Args:
        model: The model to train.
        cache_size: Number of cached documents.
        scale: Factor of the similarities, the inverse temperature.
        similarity_fct: `util.cos_sim` or `util.dot_score`.
        learnable_scale: Train the scale, starting from `scale`.
        top_k: Restrict the softmax to the best document of each of top_k groups of rows.
        num_samples: Cached documents encoded per anchor.
        in_batch: Whether the batch's documents are negatives of its other anchors.
        shared: Whether an encoded document serves all anchors; if not, each has `num_samples` of its own.
        num_candidates: Cached documents drawn per anchor, from which those to encode are chosen.
        absolute_margin, relative_margin: From which similarity on a document is taken for a false negative.
        guide: Another model: what is to it more similar to the anchor than the positive is no negative. It encodes the
            texts of each batch; the cache keeps its embeddings.
        guide_margin: How much less similar, to the guide, a negative has to be.
        symmetric: Also each positive's anchor against a second cache, of past anchors, but for those that it came with
            (of which its row in the cache of documents keeps four); the loss is the mean of both.
        matryoshka_dims: Add the losses of embeddings that are cut to so many components.
        warmup_fill: Share of filled rows from which cached documents count in full.
        refresh_per_step: Cached documents encoded anew in each step, without gradient, in turn.
        use_lru: Replace the least recently used documents; if False, the first that came.
        embedding_dtype: Stored dtype of embeddings.
        feature_device: Where the tokens of cached documents are kept; None for the model's device.
        feature_folder: Folder in which they are kept, in files without a name; the model must have a max_seq_length.
        seed: Seed of the draws; None takes one from torch's global generator.
        gather_across_devices: Share the cache among all ranks: each holds `cache_size / ranks` documents, every
            anchor sees all of them, and the batches' documents serve the anchors of all ranks.
    """

    # By this MatryoshkaLoss knows that it must not repeat the forward passes, and tells its dimensions by wrapping
    # `calculate_loss` instead; and AdaptiveLayerLoss that it cannot be around this loss.
    uses_gradient_cache = True
    calculate_loss: Any = None

    def __init__(
        self,
        model: SentenceTransformer,
        cache_size: int = 131_072,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        *,
        learnable_scale: bool = False,
        top_k: int | None = None,
        num_samples: int = 1,
        in_batch: bool = True,
        shared: bool = True,
        num_candidates: int | None = None,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        guide: SentenceTransformer | None = None,
        guide_margin: float = 0.0,
        symmetric: bool = False,
        matryoshka_dims: Sequence[int] = (),
        warmup_fill: float = 0.0,
        refresh_per_step: int = 0,
        use_lru: bool = True,
        embedding_dtype: torch.dtype = torch.float32,
        feature_device: torch.device | str | None = None,
        feature_folder: str | Path | None = None,
        seed: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        if similarity_fct not in (util.cos_sim, util.dot_score):
            raise ValueError(
                f"`similarity_fct` is {similarity_fct!r}; the cache can only search by inner product: "
                "use util.cos_sim or util.dot_score."
            )
        self.model = model
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self._guide = (guide,)  # in a tuple it is no submodule, and is not trained
        self._max_length = None if feature_folder is None else _max_length(model)
        self._settings: dict[str, Any] = {
            "learnable_scale": learnable_scale,
            "top_k": top_k,
            "num_samples": num_samples,
            "in_batch": in_batch,
            "shared": shared,
            "num_candidates": num_candidates,
            "absolute_margin": absolute_margin,
            "relative_margin": relative_margin,
            "guide_margin": guide_margin,
            "matryoshka_dims": tuple(matryoshka_dims),
            "warmup_fill": warmup_fill,
            "refresh_per_step": refresh_per_step,
            "use_lru": use_lru,
            "embedding_dtype": embedding_dtype,
        }
        places: dict[str, Any] = {
            "feature_device": feature_device,
            "feature_folder": feature_folder,
            "process_group": "world" if gather_across_devices else None,
        }
        self._sides = (self._side("anchors"), self._side("documents"))
        self._has_checked_labels = False
        self.cache_loss = NegativeCacheLoss(
            self._sides[1].encode, cache_size, scale, seed=seed, **self._settings, **places
        )
        self.query_cache_loss: NegativeCacheLoss | None = None
        if symmetric:
            seed = None if seed is None else seed + 1
            self.query_cache_loss = NegativeCacheLoss(
                self._sides[0].encode, cache_size, scale, seed=seed, **self._settings, **places
            )
            self.query_cache_loss.log_scale = self.cache_loss.log_scale  # one scale
        for loss in self._losses():
            loss.embedding_dim = _dimension(model)
        if self.cache_loss.log_scale is not None and not gather_across_devices:
            self.cache_loss.log_scale.register_hook(_average_over_ranks)  # type: ignore[no-untyped-call]

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The mean loss of a batch; in training it also updates the cache.

        Args:
            sentence_features: Model inputs of the anchors, the positives, and of any columns of negatives.
            labels: int `[batch]`, ids of the positives, or `[batch, n]` with further positives behind; or None.

        Returns:
            Scalar.

        Raises:
            ValueError: Fewer than two columns, inputs that are not text, ids that are not integers, values
                that are not finite.
        """
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(
                f"The dataset has {len(columns)} text column(s); expected anchor, positive and any negatives, in this "
                "order: datasets.Dataset.select_columns puts them in it."
            )
        check_wrappers(self.model, columns)
        # Modules may change the dicts in place, so the tokens are taken first.
        is_symmetric = self.query_cache_loss is not None
        anchors = self._sides[0].take(columns[0], is_symmetric and self.training) if self._needs_anchors else {}
        documents = [self._sides[1].take(column, self.training) for column in columns[1:]]
        embeddings = [self.embed(column) for column in columns]
        guide = self._ask_guide(anchors, documents)
        hashes = [hash_tokens(document[TOKENS]) for document in documents]
        ids, positives = _ids(labels, hashes[0])
        self._check_labels(labels, hashes[0])
        for loss in self._losses():
            loss.matryoshka_dims = self._matryoshka_dims(embeddings[0].shape[1])
        known = None if not is_symmetric else self._keep_anchors(anchors, documents, [ids, *hashes[1:]])
        negatives: dict[str, Any] = {}
        if len(columns) > 2:
            negatives = {
                "negative_embeddings": torch.cat(embeddings[2:]),
                "negative_features": {key: stack([d[key] for d in documents[1:]]) for key in documents[0]},
                "negative_ids": torch.cat(hashes[1:]),
            }
        self.cache_loss.specs = self._specs_of(documents[0])
        there: Tensor = self.cache_loss(*embeddings[:2], documents[0], ids, positives, **negatives, **_guided(*guide))
        if self.query_cache_loss is None or known is None:
            return there
        self.query_cache_loss.specs = self._specs_of(anchors)
        swapped = _guided(*(side[: len(ids)] for side in reversed(guide)))
        back: Tensor = self.query_cache_loss(*embeddings[1::-1], anchors, known[:, 0], known[:, 1:], **swapped)
        return (there + back) / 2

    def fill_from(
        self,
        documents: Sequence[str],
        ids: Sequence[int] | None = None,
        batch_size: int = 256,
        show_progress_bar: bool = True,
        *,
        prompt: str | None = None,
        task: str | None = None,
    ) -> None:
        """Encode a corpus into the cache before training. Training then writes documents into their own rows.

        Args:
            documents: Texts; on several ranks all of them on each, of which each rank keeps its part.
            ids: Their ids, as the `label` column names them; None if there is none. Of equal ids, or without ids of
                equal texts, one document is kept.
            batch_size: Texts that are encoded at once.
            show_progress_bar: Whether to show one.
            prompt: The prompt that `prompts` of the training arguments gives to the column of documents.
            task: The route that `router_mapping` of the training arguments gives to it.

        Raises:
            ValueError: More documents than rows, or another number of ids.
        """
        if ids is not None and len(ids) != len(documents):
            raise ValueError(f"`ids` has {len(ids)} ids for {len(documents)} documents; expected one for each.")
        was_training, model = self.model.training, unwrap(self.model)
        corpus = Corpus(documents, ids, self._sides[1], model, batch_size, prompt, task, show_progress_bar)

        def batches() -> Iterable[dict[str, Any]]:
            for features, named in corpus.batches(self.cache_loss.ranks):
                guide = self._ask_guide(None, [features])
                if self.query_cache_loss is not None:
                    features[ANCHORS] = known_anchors(None, named)
                self.cache_loss.specs = self._specs_of(features)
                yield {"document_features": features, "document_ids": named, **_guided(*guide)}

        self.model.eval()
        try:
            self.cache_loss.fill_from(batches())
        finally:
            self.model.train(was_training)

    def metrics(self) -> dict[str, float]:
        """See `NegativeCacheLoss.metrics`; those of the cache of anchors begin with `query_`."""
        numbers = self.cache_loss.metrics()
        if self.query_cache_loss is not None:
            numbers |= {f"query_{name}": value for name, value in self.query_cache_loss.metrics().items()}
        return numbers

    def embed(self, features: dict[str, Any]) -> Tensor:
        """Embeddings `[n, dim]` of model inputs, of unit length if similarities are cosines."""
        embeddings: Tensor = self.model(features)["sentence_embedding"]
        if self.similarity_fct is util.dot_score:
            return embeddings
        return nn.functional.normalize(embeddings.float(), dim=-1)

    def _losses(self) -> list[NegativeCacheLoss]:
        return [loss for loss in (self.cache_loss, self.query_cache_loss) if loss is not None]

    @property
    def _needs_anchors(self) -> bool:
        """Whether the anchors' tokens are needed."""
        return self.query_cache_loss is not None or self._guide[0] is not None

    def _side(self, texts: str) -> TextSide:
        return TextSide(texts, lambda: self.model, self.embed)

    def _specs_of(self, features: dict[str, Tensor]) -> dict[str, Any]:
        specs = {key: SPECS[key]._replace(max_length=self._max_length) for key in features if key in SPECS}
        return specs | ({ANCHORS: ANCHORS_SPEC} if ANCHORS in features else {})

    def _ask_guide(self, anchors: dict[str, Tensor] | None, documents: list[dict[str, Tensor]]) -> list[Tensor]:
        """The guide's embeddings of anchors, if there are any, and of documents; nothing without a guide."""
        (guide,) = self._guide
        if guide is None:
            return []
        columns = [*([] if anchors is None else [(self._sides[0], [anchors])]), (self._sides[1], documents)]
        device = documents[0][TOKENS].device
        settings = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
        texts = [[text for column in part for text in side.decode(column)] for side, part in columns]
        return [guide.encode(part, **settings).to(device).float().clone() for part in texts]

    def _keep_anchors(
        self, anchors: dict[str, Tensor], documents: list[dict[str, Tensor]], ids: list[Tensor]
    ) -> Tensor:
        """Put into the documents which anchors they came with; return those of the positives, `[batch, n]`."""
        own, cache = hash_tokens(anchors[TOKENS]), self.cache_loss.cache
        for document, names in zip(documents, ids, strict=True):
            document[ANCHORS] = known_anchors(cache, names)
        known = anchors_of(ids[0], own, documents[0][ANCHORS])
        documents[0][ANCHORS] = known[:, :NUM_ANCHORS]
        return known

    def _matryoshka_dims(self, dim: int) -> tuple[int, ...]:
        return matryoshka_dims(self.calculate_loss, dim) or self._settings["matryoshka_dims"]

    def _check_labels(self, labels: Tensor | None, hashes: Tensor) -> None:
        """Raise where labels are no ids, as far as the first batch tells."""
        if self._has_checked_labels or labels is None or len(hashes) < 3:
            return
        self._has_checked_labels = True
        if int(labels.max()) <= 1 and len(torch.unique(hashes)) > len(torch.unique(labels[labels >= 0])):
            raise ValueError(
                "The labels of different positives are 0 and 1 alone, as if they told good pairs from bad ones; they "
                "must be the ids of documents. Keep the pairs that are good and remove the label column, or mine "
                "negatives as columns (anchor, positive, negative, ...): mine_hard_negatives(output_format='n-tuple')."
            )

    @property
    def scale(self) -> float:
        """The factor of the similarities."""
        scale = self.cache_loss.scale
        return scale.item() if isinstance(scale, Tensor) else scale

    @property
    def temperature(self) -> float:
        """`1 / scale`."""
        return 1.0 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card shows."""
        return {
            "cache_size": self.cache_loss.cache_size,
            "scale": self.scale,
            "similarity_fct": self.similarity_fct.__name__,
            **self._settings,
            "num_candidates": self.cache_loss.num_candidates,
            "embedding_dtype": str(self.cache_loss.embedding_dtype),
            "guide": None if self._guide[0] is None else self._guide[0].model_card_data.base_model or "a model",
            "symmetric": self.query_cache_loss is not None,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the method's paper."""
        return """
@inproceedings{lindgren2021efficient,
    title={Efficient Training of Retrieval Models using Negative Cache},
    author={Lindgren, Erik and Reddi, Sashank and Guo, Ruiqi and Kumar, Sanjiv},
    booktitle={Advances in Neural Information Processing Systems},
    year={2021}
}
"""


def _guided(*guide: Tensor) -> dict[str, Tensor]:
    """A guide's embeddings of queries, if there are any, and of documents, as `NegativeCacheLoss` takes them."""
    names = ("guide_queries", "guide_documents")[2 - len(guide) :]
    return dict(zip(names, guide, strict=True))


def _dimension(model: Any) -> int | None:
    """Dimensions of the model's embeddings; None if it does not say."""
    for name in ("get_embedding_dimension", "get_sentence_embedding_dimension"):
        if hasattr(model, name):
            return getattr(model, name)()
    return None


def _max_length(model: Any) -> int:
    """The most tokens that the model takes of a text; raise where it has no limit, or one that nothing can hold."""
    longest = getattr(model, "max_seq_length", None)
    if longest is None or longest > 1 << 20:
        raise ValueError(
            f"`feature_folder` needs a fixed length per document, but the model's max_seq_length is {longest}. "
            "Set it, or leave `feature_folder` out."
        )
    return int(longest)


def _average_over_ranks(gradient: Tensor) -> Tensor:
    """The mean of all ranks' gradients: the trainer wraps the model for that, but not the loss."""
    ranks = Ranks(world())
    return ranks.sum(gradient) / ranks.size


def _ids(labels: Tensor | None, hashes: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ids of the positives `[batch]`, and further documents that are no negatives `[batch, n]`."""
    if labels is None or labels.numel() == 0:
        return hashes, None
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` is {labels.dtype}; the label column must hold integer document ids. Remove the column, "
            "or rename it, if it means something else."
        )
    if labels.dim() not in (1, 2) or len(labels) != len(hashes):
        raise ValueError(f"`labels` has shape {list(labels.shape)}; expected [{len(hashes)}] or [{len(hashes)}, n].")
    labels = labels.to(hashes.device, torch.int64)
    if labels.dim() == 1:
        return labels, hashes[:, None]
    return labels[:, 0], torch.cat([labels[:, 1:], hashes[:, None]], dim=1)
