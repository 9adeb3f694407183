"""The loss that a configuration names."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.workbench.training import processes
from negative_cache.workbench.training.config import RunConfig
from negative_cache.workbench.training.memory_bank import MemoryBankLoss

GRADCACHE_MINI_BATCH = 32


def make_loss(config: RunConfig, model: SentenceTransformer) -> Any:
    """The loss of a configuration.

    For a static model, `gradcache` is the in-batch loss of the large batch: static embeddings need no gradient cache.
    """
    has_ranks = processes.count() > 1
    if config.loss == "memory-bank":
        return MemoryBankLoss(model, config.cache_size, config.scale)
    if config.loss == "in-batch" or (config.loss == "gradcache" and isinstance(model[0], StaticEmbedding)):
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
