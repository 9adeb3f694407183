"""The loss that a configuration names."""

from __future__ import annotations

import copy
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import PreTrainedTokenizerBase

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.workbench.models import load_trained
from negative_cache.workbench.training import processes
from negative_cache.workbench.training.config import GUIDED, RunConfig, not_for_static
from negative_cache.workbench.training.memory_bank import MemoryBankLoss

GRADCACHE_MINI_BATCH = 32


def make_loss(config: RunConfig, model: SentenceTransformer) -> Any:
    """The loss of a configuration and of a model that is not trained yet.

    For a static model, `gradcache` is the in-batch loss of the large batch: static embeddings need no gradient cache.

    Raises:
        RunError: The loss does not take the model, or its guide.
    """
    has_ranks = processes.count() > 1
    if config.loss in GUIDED:
        return _guided_loss(config, model, has_ranks)
    if config.loss == "memory-bank":
        return MemoryBankLoss(model, config.cache_size, config.scale)
    if config.loss in ("in-batch", "mined") or (config.loss == "gradcache" and isinstance(model[0], StaticEmbedding)):
        return MultipleNegativesRankingLoss(model, scale=config.scale, gather_across_devices=has_ranks)
    if config.loss == "gradcache":
        return CachedMultipleNegativesRankingLoss(
            model, scale=config.scale, mini_batch_size=GRADCACHE_MINI_BATCH, gather_across_devices=has_ranks
        )
    return NegativeCacheRankingLoss(
        model,
        cache_size=config.cache_size,
        scale=config.scale,
        num_samples=config.num_samples,
        in_batch=config.in_batch,
        shared=config.shared,
        absolute_margin=config.absolute_margin,
        relative_margin=config.relative_margin,
        symmetric=config.symmetric,
        refresh_per_step=config.refresh_per_step,
        use_lru=config.use_lru,
        embedding_dtype=getattr(torch, config.embedding_dtype),
        seed=config.seed,
        gather_across_devices=has_ranks,
    )


def load_guide(config: RunConfig, model: SentenceTransformer) -> SentenceTransformer:
    """The frozen guide of a model that is not trained yet.

    Raises:
        ModelError: The guide cannot be loaded.
        RunError: The model or the guide has no tokenizer of transformers, which the losses need.
    """
    guide = copy.deepcopy(model) if config.guide is None else load_trained(config.guide)
    for name, used in ((config.model, model), (config.guide or config.model, guide)):
        if not isinstance(used.tokenizer, PreTrainedTokenizerBase):
            raise not_for_static(config, name)
    guide.requires_grad_(False)
    return guide.eval()


def _guided_loss(config: RunConfig, model: SentenceTransformer, has_ranks: bool) -> Any:
    guide = load_guide(config, model)
    options: dict[str, Any] = {"temperature": 1 / config.scale, "gather_across_devices": has_ranks}
    if config.absolute_margin is not None:
        options |= {"margin_strategy": "absolute", "margin": config.absolute_margin}
    if config.relative_margin is not None:
        options |= {"margin_strategy": "relative", "margin": config.relative_margin}
    if config.loss == "gist":
        return GISTEmbedLoss(model, guide, **options)
    return CachedGISTEmbedLoss(model, guide, mini_batch_size=GRADCACHE_MINI_BATCH, **options)
