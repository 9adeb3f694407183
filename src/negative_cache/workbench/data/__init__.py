"""Retrieval data: corpus, queries and relevance judgements, from files or from the installed Python packages.

Imports only `negative_cache.workbench.files` and packages that read files.
"""

from typing import TYPE_CHECKING

from negative_cache._lazy import lazy_attributes
from negative_cache.workbench.data.options import DataOptions

if TYPE_CHECKING:
    from negative_cache.workbench.data.loading import load_data, load_documents
    from negative_cache.workbench.data.retrieval_data import DataError, RetrievalData

__all__ = ["DataError", "DataOptions", "RetrievalData", "load_data", "load_documents"]

if not TYPE_CHECKING:  # the options of a command need `DataOptions` alone
    __getattr__, __dir__ = lazy_attributes(
        __name__, {"loading": ("load_data", "load_documents"), "retrieval_data": ("DataError", "RetrievalData")}
    )
