"""Whether a model was trained with given data, by the records of runs in the folders of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from negative_cache.workbench.data import RetrievalData, fingerprints
from negative_cache.workbench.training.record import RECORD, read_json


def configuration_of_run_with(model: str, source: str, data: RetrievalData | None = None) -> dict[str, Any] | None:
    """The configuration of the run that trained a model with a dataset; None if no record says that there was one.

    The records are that in the folder of the model, that in the folder of the model that its run started from, and so
    on. A record names the dataset if it has its fingerprint or its path.

    Args:
        model: Name or path of the model.
        source: Name or path of the dataset, see `load_data`.
        data: The dataset; None to know it by its path alone.

    Raises:
        RunError: A record is damaged.
    """
    seen: set[Path] = set()
    path, fingerprint = Path(model), ""
    while (path / RECORD).is_file() and path.resolve() not in seen:
        seen.add(path.resolve())
        record = read_json(path / RECORD)
        configuration = record.get("configuration")
        if not isinstance(configuration, dict) or not {"data", "model"} <= configuration.keys():
            break  # a file of another program
        if _is_same(configuration["data"], source):
            return configuration
        if data is not None:
            fingerprint = fingerprint or fingerprints.of_data(data)
            if record.get("data_fingerprint") == fingerprint:
                return configuration
        path = Path(configuration["model"])
    return None


def _is_same(first: str, second: str) -> bool:
    """Whether two names of data are equal, or paths of the same file or folder."""
    if first == second:
        return True
    return Path(first).exists() and Path(second).exists() and Path(first).samefile(second)
