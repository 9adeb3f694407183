"""Retrieval datasets from files: corpus, queries and relevance judgements, and the rows that a trainer takes.

Requires the extra `train`.
"""

import re
from dataclasses import fields

try:
    from negative_cache.workbench.data import DataError, DataOptions, RetrievalData, loading
    from negative_cache.workbench.suggestions import NEEDS_PAIRS
except ImportError as error:
    raise ImportError("negative_cache.data needs datasets and pyarrow: pip install 'negative-cache[train]'") from error

__all__ = ["DataError", "DataOptions", "RetrievalData", "load_data"]


def load_data(source: str, options: DataOptions | None = None) -> RetrievalData:
    """Load a retrieval dataset.

    Args:
        source: `python-code`; a folder in the layout of BEIR, MS MARCO or the hub, with files of rows for each split,
            or saved by the datasets library; a file of rows; or `hf:NAME` or `hf:NAME:CONFIGURATION`, which the
            datasets library loads.
        options: How to read it; None for the defaults.

    Returns:
        The dataset. Its `notes` say how it was read, what was skipped and what is not used.

    Raises:
        DataError: The data cannot be used; the message names the file and the line, and the options that help, as on
            the command line and as fields of `DataOptions`.
    """
    try:
        return loading.load_data(source, options)
    except DataError as error:
        flags = set(re.findall(r"--([a-z-]+)", str(error).partition(NEEDS_PAIRS)[0]))
        if named := [field.name for field in fields(DataOptions) if field.name.replace("_", "-") in flags]:
            error.args = (f"{error} In Python: DataOptions({', '.join(f'{name}=...' for name in named)}).",)
        raise
