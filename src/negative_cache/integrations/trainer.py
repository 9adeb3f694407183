"""`SentenceTransformerTrainer` with the cache in its checkpoints and logs."""

from __future__ import annotations

from sentence_transformers import SentenceTransformerTrainer

from negative_cache.integrations.hugging_face import NegativeCacheTrainerMixin, last_complete_checkpoint
from negative_cache.metrics import cache_losses

__all__ = ["NegativeCacheTrainer", "NegativeCacheTrainerMixin", "cache_losses", "last_complete_checkpoint"]


class NegativeCacheTrainer(NegativeCacheTrainerMixin, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` with the cache in its checkpoints and logs; see `NegativeCacheTrainerMixin`."""
