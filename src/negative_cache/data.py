"""Retrieval datasets from files: corpus, queries and relevance judgements, and the rows that a trainer takes.

Requires the extra `train`.
"""

try:
    from negative_cache.workbench.data import DataError, DataOptions, RetrievalData, load_data
except ImportError as error:
    raise ImportError("negative_cache.data needs datasets and pyarrow: pip install 'negative-cache[train]'") from error

__all__ = ["DataError", "DataOptions", "RetrievalData", "load_data"]
