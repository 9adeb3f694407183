"""`NegativeCacheRankingLoss`: the negative cache as a loss of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from negative_cache.distributed import Ranks, world
from negative_cache.features import RaggedFeature
from negative_cache.modules import NegativeCacheLoss

try:
    from sentence_transformers import SentenceTransformer, util
except ImportError as error:
    raise ImportError(
        "NegativeCacheRankingLoss needs sentence-transformers: pip install 'negative-cache[train]'"
    ) from error

# In the cache a token is its id + 1, so that 0 is padding whatever the tokenizer pads with.
_TOKENS, _TYPES = "tokens", "token_type_ids"
_SPECS = {_TOKENS: RaggedFeature(torch.int32), _TYPES: RaggedFeature(torch.uint8)}
_PADDED_KEYS = {"input_ids", "attention_mask", "token_type_ids"}
_FLAT_KEYS = {"input_ids", "offsets"}


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
        num_samples: Cached documents drawn and encoded per anchor.
        use_lru: Replace the least recently used documents; if False, the first that came.
        embedding_dtype: Stored dtype of embeddings.
        feature_device: Where the tokens of cached documents are kept; None for the model's device.
        feature_folder: Folder in which they are kept, in files without a name; the model must have a max_seq_length.
        seed: Seed of the draws; None takes one from torch's global generator.
        gather_across_devices: Share the cache among all ranks: each holds `cache_size / ranks` documents, every
            anchor sees all of them, and given negatives serve the anchors of all ranks.
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
        self._pad_token_id = getattr(getattr(model, "tokenizer", None), "pad_token_id", None) or 0
        self._is_flat = False
        max_length = None if feature_folder is None else _max_length(model)
        self._specs = {key: spec._replace(max_length=max_length) for key, spec in _SPECS.items()}
        self._constants: dict[str, Any] = {}  # what a feature dict holds beside token tensors, the same for all texts
        self.cache_loss = NegativeCacheLoss(
            self._encode_cached,
            cache_size,
            scale,
            learnable_scale=learnable_scale,
            top_k=top_k,
            num_samples=num_samples,
            use_lru=use_lru,
            embedding_dtype=embedding_dtype,
            feature_device=feature_device,
            feature_folder=feature_folder,
            seed=seed,
            process_group="world" if gather_across_devices else None,
        )
        self.cache_loss.embedding_dim = _dimension(model)
        self.gather_across_devices = gather_across_devices
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
        documents = [_tokens(column) for column in columns[1:]]
        self._constants = {k: v for k, v in columns[1].items() if not isinstance(v, Tensor)}
        embeddings = [self._embed(column) for column in columns]
        hashes = [_hash(document[_TOKENS]) for document in documents]
        self.cache_loss.specs = {key: self._specs[key] for key in documents[0]}
        self._is_flat = "offsets" in columns[1]
        ids, positives = _ids(labels, hashes[0])
        negatives: dict[str, Any] = {}
        if len(columns) > 2:
            negatives = {
                "negative_embeddings": torch.cat(embeddings[2:]),
                "negative_features": {key: _stack([d[key] for d in documents[1:]]) for key in documents[0]},
                "negative_ids": torch.cat(hashes[1:]),
            }
        loss: Tensor = self.cache_loss(
            embeddings[0], embeddings[1], documents[0], document_ids=ids, positive_ids=positives, **negatives
        )
        return loss

    def metrics(self) -> dict[str, float]:
        """See `NegativeCacheLoss.metrics`."""
        return self.cache_loss.metrics()

    def _embed(self, features: dict[str, Any]) -> Tensor:
        embeddings: Tensor = self.model(features)["sentence_embedding"]
        if self.similarity_fct is util.dot_score:
            return embeddings
        return nn.functional.normalize(embeddings.float(), dim=-1)

    def _encode_cached(self, cached: dict[str, Tensor]) -> Tensor:
        tokens = cached[_TOKENS].to(torch.int64)
        is_token = tokens > 0
        if self._is_flat:
            lengths = is_token.sum(dim=1)
            return self._embed({"input_ids": tokens[is_token] - 1, "offsets": lengths.cumsum(0) - lengths})
        features: dict[str, Any] = {
            "input_ids": torch.where(is_token, tokens - 1, self._pad_token_id),
            "attention_mask": is_token.to(torch.int64),
            **self._constants,
        }
        if _TYPES in cached:
            features[_TYPES] = cached[_TYPES].to(torch.int64)
        return self._embed(features)

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
            "learnable_scale": self.cache_loss.log_scale is not None,
            "similarity_fct": self.similarity_fct.__name__,
            "top_k": self.cache_loss.top_k,
            "num_samples": self.cache_loss.num_samples,
            "use_lru": self.cache_loss.use_lru,
            "embedding_dtype": str(self.cache_loss.embedding_dtype),
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


def _tokens(features: dict[str, Any]) -> dict[str, Tensor]:
    """What the cache keeps of a column of texts: `tokens [batch, width]` and, if given, `token_type_ids`."""
    tensors = {key: value for key, value in features.items() if isinstance(value, Tensor)}
    if set(tensors) == _FLAT_KEYS:
        return {_TOKENS: _pad_flat(tensors["input_ids"] + 1, tensors["offsets"])}
    if not {"input_ids", "attention_mask"} <= set(tensors) <= _PADDED_KEYS or tensors["input_ids"].dim() != 2:
        raise ValueError(
            f"The model's inputs are {sorted(tensors)}; the cache keeps text given as padded input_ids and "
            "attention_mask, or as StaticEmbedding's input_ids and offsets. Images, audio and flattened "
            "flash-attention batches cannot be cached; for the latter turn flattening off."
        )
    is_token = tensors["attention_mask"].bool()
    kept = {_TOKENS: torch.where(is_token, tensors["input_ids"] + 1, 0)}
    if _TYPES in tensors:
        kept[_TYPES] = tensors[_TYPES]
    return kept


def _pad_flat(values: Tensor, offsets: Tensor) -> Tensor:
    """Sequences that lie one behind the other, as rows filled up with 0."""
    lengths = torch.diff(offsets, append=offsets.new_tensor([len(values)]))
    width = int(lengths.max()) if len(lengths) else 0
    inside = torch.arange(width, device=values.device) < lengths[:, None]
    padded = values.new_zeros(inside.shape)
    padded[inside] = values
    return padded


def _stack(parts: list[Tensor]) -> Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def _hash(tokens: Tensor) -> Tensor:
    """A 62-bit hash of each row's tokens, whatever its padding: int64 `[batch]`.

    Sum over the tokens of mix(token) * mix(position), mixed once more; integer arithmetic wraps around.
    """
    is_token = tokens > 0
    positions = is_token.to(torch.int64).cumsum(dim=1)
    terms = _mix(tokens.to(torch.int64)) * (_mix(positions + (1 << 40)) | 1)
    return _mix(torch.where(is_token, terms, 0).sum(dim=1)) & ((1 << 62) - 1)


def _mix(values: Tensor) -> Tensor:
    values = (values ^ (values >> 31)) * 0x7FB5D329728EA185
    values = (values ^ (values >> 27)) * -0x7E25210B43D22BB3
    return values ^ (values >> 33)


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
