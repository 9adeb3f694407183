"""`NegativeCacheRankingLoss`: the negative cache as a loss of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from negative_cache.distributed import Ranks, world
from negative_cache.modules import NegativeCacheLoss
from negative_cache.tokens import SPECS, TOKENS, TYPES, hash_tokens, stack, take_tokens

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

    Text only: padded `input_ids` and `attention_mask` (any transformer), or the flat `input_ids` and `offsets` of
    `StaticEmbedding`.

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
        symmetric: Also each positive's anchor against a second cache, of past anchors (one per document, the latest);
            the loss is the mean of both.
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
        self._sides = (_Side(self), _Side(self))  # anchors, documents
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
                f"The dataset has {len(columns)} text column(s); expected anchor, positive and any negatives."
            )
        # Modules may change the dicts in place, so the tokens are taken first.
        anchors, *documents = [
            self._sides[min(number, 1)].take(column, needs_tokens=number > 0 or self._needs_anchors)
            for number, column in enumerate(columns)
        ]
        embeddings = [self.embed(column) for column in columns]
        hashes = [hash_tokens(document[TOKENS]) for document in documents]
        ids, positives = _ids(labels, hashes[0])
        negatives: dict[str, Any] = {}
        if len(columns) > 2:
            negatives = {
                "negative_embeddings": torch.cat(embeddings[2:]),
                "negative_features": {key: stack([d[key] for d in documents[1:]]) for key in documents[0]},
                "negative_ids": torch.cat(hashes[1:]),
            }
        self.cache_loss.specs = self._specs_of(documents[0])
        known = {"document_ids": ids, "positive_ids": positives}
        guided = self._ask_guide(anchors, documents)
        loss: Tensor = self.cache_loss(embeddings[0], embeddings[1], documents[0], **known, **negatives, **guided)
        if self.query_cache_loss is None:
            return loss
        self.query_cache_loss.specs = self._specs_of(anchors)
        swapped = self._ask_guide(documents[0], [anchors])
        back: Tensor = self.query_cache_loss(embeddings[1], embeddings[0], anchors, **known, **swapped)
        return (loss + back) / 2

    def fill_from(
        self,
        documents: Sequence[str],
        ids: Sequence[int] | None = None,
        batch_size: int = 256,
        show_progress_bar: bool = True,
    ) -> None:
        """Encode a corpus into the cache before training. Training then writes documents into their own rows.

        Args:
            documents: Texts; on several ranks all of them on each, of which each rank keeps its part.
            ids: Their ids, as the `label` column names them; None if there is none.
            batch_size: Texts that are encoded at once.
            show_progress_bar: Whether to show one.

        Raises:
            ValueError: More documents than rows.
        """
        from tqdm.auto import tqdm

        ranks, was_training = self.cache_loss.ranks, self.model.training
        own = range(ranks.rank, len(documents), ranks.size)
        preprocess = getattr(self.model, "preprocess", None) or self.model.tokenize
        self.model.eval()

        def batches() -> Iterable[dict[str, Any]]:
            for start in tqdm(range(0, len(own), batch_size), desc="Filling the cache", disable=not show_progress_bar):
                part = own[start : start + batch_size]
                inputs = util.batch_to_device(preprocess([documents[at] for at in part]), self.model.device)
                features = self._sides[1].take(inputs)
                self.cache_loss.specs = self._specs_of(features)
                hashes = hash_tokens(features[TOKENS])
                named = hashes if ids is None else torch.tensor([ids[at] for at in part], device=hashes.device)
                yield {"document_features": features, "document_ids": named, **self._ask_guide(None, [features])}

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

    def _specs_of(self, features: dict[str, Tensor]) -> dict[str, Any]:
        return {key: SPECS[key]._replace(max_length=self._max_length) for key in features}

    def _ask_guide(self, anchors: dict[str, Tensor] | None, documents: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The guide's embeddings, as `NegativeCacheLoss` takes them; nothing without a guide."""
        (guide,) = self._guide
        if guide is None:
            return {}

        def encode(texts: list[str]) -> Tensor:
            embedded = guide.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
            return embedded.to(self.model.device).float().clone()

        texts = [text for column in documents for text in self._texts_of(column)]
        asked = {"guide_documents": encode(texts)}
        if anchors is not None:
            asked["guide_queries"] = encode(self._texts_of(anchors))
        return asked

    def _texts_of(self, cached: dict[str, Tensor]) -> list[str]:
        tokens = [[token - 1 for token in row if token] for row in cached[TOKENS].tolist()]
        tokenizer = self.model.tokenizer
        decode = getattr(tokenizer, "batch_decode", None) or tokenizer.decode_batch
        texts: list[str] = decode(tokens, skip_special_tokens=True)
        return texts

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


class _Side:
    """The texts of one side: a batch's model inputs as the cache keeps them, cached ones as the model takes them."""

    def __init__(self, loss: NegativeCacheRankingLoss) -> None:
        self._loss = (loss,)
        self._pad_token_id = getattr(getattr(loss.model, "tokenizer", None), "pad_token_id", None) or 0
        self._is_flat = False
        self._constants: dict[str, Any] = {}  # what a feature dict holds beside token tensors, the same for all texts

    def take(self, column: dict[str, Any], needs_tokens: bool = True) -> dict[str, Tensor]:
        """What the cache keeps of a column of texts."""
        if not needs_tokens:
            return {}
        self._constants = {key: value for key, value in column.items() if not isinstance(value, Tensor)}
        self._is_flat = "offsets" in column
        return take_tokens(column)

    def encode(self, cached: dict[str, Tensor]) -> Tensor:
        """Embeddings of cached texts, with gradient."""
        (loss,) = self._loss
        tokens = cached[TOKENS].to(torch.int64)
        is_token = tokens > 0
        if self._is_flat:
            lengths = is_token.sum(dim=1)
            return loss.embed({"input_ids": tokens[is_token] - 1, "offsets": lengths.cumsum(0) - lengths})
        features: dict[str, Any] = {
            "input_ids": torch.where(is_token, tokens - 1, self._pad_token_id),
            "attention_mask": is_token.to(torch.int64),
            **self._constants,
        }
        if TYPES in cached:
            features[TYPES] = cached[TYPES].to(torch.int64)
        return loss.embed(features)


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
