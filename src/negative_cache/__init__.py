"""Train retrieval models against a large cache of negatives, at the cost of one extra encoding per query."""

from typing import TYPE_CHECKING

from negative_cache._lazy import lazy_attributes
from negative_cache.version import __version__

if TYPE_CHECKING:
    from negative_cache import filter_fns, handlers, losses, negative_cache, retrieval_fns, util
    from negative_cache.cache.specs import FixedLenFeature, QuantizedFeature, RaggedFeature, infer_specs
    from negative_cache.filter_fns import CacheFilterFn, IsInCacheFilterFn
    from negative_cache.handlers import CacheLossHandler, MultiCacheLossHandler
    from negative_cache.losses import (
        AbstractCacheClassificationLoss,
        CacheClassificationLoss,
        CacheLoss,
        CacheLossReturn,
        DistributedCacheClassificationLoss,
    )
    from negative_cache.memory import predict_bytes
    from negative_cache.metrics import tagged_metrics, write_metrics
    from negative_cache.negative_cache import CacheManager, NegativeCache
    from negative_cache.negative_cache_loss import NegativeCacheLoss
    from negative_cache.retrieval_fns import AbstractRetrievalFn, GumbelMaxRetrievalFn, MaxScoreRetrievalFn
    from negative_cache.util import (
        approximate_top_k_with_indices,
        cross_replica_concat,
        gather_nd,
        tensor_update,
    )

__all__ = [
    "AbstractCacheClassificationLoss",
    "AbstractRetrievalFn",
    "CacheClassificationLoss",
    "CacheFilterFn",
    "CacheLoss",
    "CacheLossHandler",
    "CacheLossReturn",
    "CacheManager",
    "DistributedCacheClassificationLoss",
    "FixedLenFeature",
    "GumbelMaxRetrievalFn",
    "IsInCacheFilterFn",
    "MaxScoreRetrievalFn",
    "MultiCacheLossHandler",
    "NegativeCache",
    "NegativeCacheLoss",
    "QuantizedFeature",
    "RaggedFeature",
    "__version__",
    "approximate_top_k_with_indices",
    "cross_replica_concat",
    "filter_fns",
    "gather_nd",
    "handlers",
    "infer_specs",
    "losses",
    "negative_cache",
    "predict_bytes",
    "retrieval_fns",
    "tagged_metrics",
    "tensor_update",
    "util",
    "write_metrics",
]

if not TYPE_CHECKING:  # a type checker would take every name for one of these
    __getattr__, __dir__ = lazy_attributes(
        __name__,
        {
            "cache.specs": ("FixedLenFeature", "QuantizedFeature", "RaggedFeature", "infer_specs"),
            "filter_fns": ("CacheFilterFn", "IsInCacheFilterFn"),
            "handlers": ("CacheLossHandler", "MultiCacheLossHandler"),
            "losses": (
                "AbstractCacheClassificationLoss",
                "CacheClassificationLoss",
                "CacheLoss",
                "CacheLossReturn",
                "DistributedCacheClassificationLoss",
            ),
            "memory": ("predict_bytes",),
            "metrics": ("tagged_metrics", "write_metrics"),
            "negative_cache": ("CacheManager", "NegativeCache"),
            "negative_cache_loss": ("NegativeCacheLoss",),
            "retrieval_fns": ("AbstractRetrievalFn", "GumbelMaxRetrievalFn", "MaxScoreRetrievalFn"),
            "util": ("approximate_top_k_with_indices", "cross_replica_concat", "gather_nd", "tensor_update"),
        },
    )
