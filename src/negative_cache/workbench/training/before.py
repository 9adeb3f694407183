"""The quality of the model before training, which is kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from negative_cache.workbench.data import RetrievalData, fingerprints
from negative_cache.workbench.evaluation import DEFAULT_MEASURES, OnProgress, evaluate, parse_measures
from negative_cache.workbench.files import digest_of, fingerprint_of_folder, kept_file, write_text
from negative_cache.workbench.training import samples
from negative_cache.workbench.training.record import versions_of

MAX_KEPT = 100  # files, those that were used last
SPLIT = "test"

_PACKAGES = ("torch", "sentence-transformers", "transformers", "tokenizers", "ir-measures")
_FORMAT = 2  # to be raised when an evaluation has other results or other contents

logger = logging.getLogger("negative_cache")


def quality_before(
    model: SentenceTransformer, folder: Path, data: RetrievalData, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """The quality of a model on the test split: that of an earlier call with the same model and data, or measured.

    Args:
        model: The model.
        folder: Folder where the model is saved.
        data: The dataset.
        on_progress: Called with (done, total) documents while the corpus is encoded.

    Returns:
        `before`, the metrics; `per_query`, see `Quality`; and `results`, see `samples.results_of`. All of it as
        JSON stores it.
    """
    path = kept_file("before", _parts(model, folder, data), ".json")
    if (kept := _read(path)) is not None:
        logger.warning(
            "The quality before training is that of an earlier run with the same model and data, from %s. Remove the "
            "file to measure it again.",
            path,
        )
        return kept
    quality = evaluate(model, data, (SPLIT,), on_progress=on_progress)[SPLIT]
    results = samples.results_of(data, SPLIT, quality.run)
    measured: dict[str, Any] = json.loads(
        json.dumps({"before": quality.metrics(), "per_query": quality.per_query, "results": results})
    )
    _keep(path, measured)
    return measured


def _parts(model: SentenceTransformer, folder: Path, data: RetrievalData) -> list[Any]:
    """All that the quality depends on."""
    device = model.device
    is_gpu = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if is_gpu else torch.backends.cpu.get_cpu_capability()
    return [
        _FORMAT,
        versions_of(_PACKAGES),
        (device.type, kind, torch.get_num_threads()),
        list(parse_measures(DEFAULT_MEASURES)),
        fingerprint_of_folder(folder),
        fingerprints.of_split(data, SPLIT),
    ]


def _read(path: Path | None) -> dict[str, Any] | None:
    """What is kept in a file; None if it does not exist, cannot be read or is damaged."""
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measured: dict[str, Any] = content["measured"]
        is_whole = content["digest"] == digest_of(json.dumps(measured))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if is_whole:
        with contextlib.suppress(OSError):
            path.touch()
    return measured if is_whole else None


def _keep(path: Path | None, measured: dict[str, Any]) -> None:
    """Write a file, and remove those that were not used for the longest time. Without effect if that is impossible."""
    if path is None:
        return
    content = {"digest": digest_of(json.dumps(measured)), "measured": measured}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content), suffix=f".{os.getpid()}.tmp")
        kept = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in kept[MAX_KEPT:]:
            old.unlink(missing_ok=True)
