"""The negative cache as a loss of sentence-transformers: texts as the cache keeps them, and `NegativeCacheRankingLoss`.

May import `negative_cache` and sentence-transformers.
"""

from negative_cache.integrations.sentence_transformers.loss import NegativeCacheRankingLoss

__all__ = ["NegativeCacheRankingLoss"]
