"""The negative cache as a loss of sentence-transformers.

`NegativeCacheRankingLoss` converts texts to cached features and trains a `SentenceTransformer`.
`RaggedNegativesCollator` makes batches of rows that have any number of negatives each.
The folder may import `negative_cache` without `workbench`, and sentence-transformers.
"""

from negative_cache.integrations.sentence_transformers.collator import RaggedNegativesCollator
from negative_cache.integrations.sentence_transformers.loss import NegativeCacheRankingLoss

__all__ = ["NegativeCacheRankingLoss", "RaggedNegativesCollator"]
