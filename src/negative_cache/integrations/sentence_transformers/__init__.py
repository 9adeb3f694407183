"""The negative cache as a loss of sentence-transformers.

`NegativeCacheRankingLoss` converts texts to cached features and trains a `SentenceTransformer`.
The folder may import `negative_cache` without `workbench`, and sentence-transformers.
"""

from negative_cache.integrations.sentence_transformers.loss import NegativeCacheRankingLoss

__all__ = ["NegativeCacheRankingLoss"]
