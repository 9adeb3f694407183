"""Retrieval data: corpus, queries and relevance judgements, from files or from the installed Python packages.

Imports only `negative_cache.workbench.files` and packages that read files.
"""

from negative_cache.workbench.data.loading import load_data, load_documents
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import DataError, RetrievalData

__all__ = ["DataError", "DataOptions", "RetrievalData", "load_data", "load_documents"]
