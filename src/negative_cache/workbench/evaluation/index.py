"""The embeddings of a corpus, which are kept in the user's cache folder for later searches."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from negative_cache.workbench.data import fingerprints
from negative_cache.workbench.data.texts import Texts
from negative_cache.workbench.evaluation.encoding_options import EncodingOptions
from negative_cache.workbench.files import fingerprint_of_folder, kept_file, replacing

MAX_BYTES = 10 * 10**9  # of all files, of which those that were used last are kept

_PACKAGES = ("torch", "sentence-transformers", "transformers", "tokenizers")
_FORMAT = 1  # to be raised when a file of the same name has other contents


class Index:
    """The embeddings of a corpus in a file, which is read memory-mapped. Make one with `index_of`.

    Args:
        path: The file, which may not exist.
        count: Number of documents.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self._count = count
        self._embeddings = self._open()

    @property
    def is_kept(self) -> bool:
        """Whether the file has the embeddings."""
        return self._embeddings is not None

    @property
    def num_bytes(self) -> int:
        """The size of the embeddings that are kept."""
        return 0 if self._embeddings is None else self._embeddings.nbytes

    def read(self, size: int) -> Iterator[Tensor]:
        """The embeddings that are kept, in chunks of at most `size` documents: `[n, dim]`, on the CPU."""
        if self._embeddings is None:
            raise ValueError(f"{self.path} has no embeddings.")
        for start in range(0, self._count, size):
            yield torch.from_numpy(np.array(self._embeddings[start : start + size]))

    def keep(self, chunks: Iterator[Tensor]) -> None:
        """Write the embeddings, chunk by chunk, and remove those that were not used for the longest time.

        Args:
            chunks: The embeddings `[n, dim]` of all documents in their order.

        Raises:
            OSError: The file cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path, suffix=f".{os.getpid()}.tmp") as temporary, temporary.open("wb") as file:
            for number, chunk in enumerate(chunks):
                part = chunk.cpu().numpy()
                if not number:
                    header = {"descr": part.dtype.str, "fortran_order": False, "shape": (self._count, part.shape[1])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(part.tobytes())
        self._embeddings = self._open()
        self._remove_others()

    def _open(self) -> np.ndarray | None:
        """The embeddings; None if the file does not exist, cannot be read or is damaged."""
        try:
            embeddings: np.ndarray = np.load(self.path, mmap_mode="r")
        except (OSError, EOFError, ValueError):
            return None
        if embeddings.ndim != 2 or len(embeddings) != self._count:
            return None
        with contextlib.suppress(OSError):
            self.path.touch()
        return embeddings

    def _remove_others(self) -> None:
        """Remove the files that were not used for the longest time, so that the rest is small enough."""
        with contextlib.suppress(OSError):
            found = [(file, file.stat()) for file in self.path.parent.iterdir()]
            total = 0
            for file, about in sorted(found, key=lambda each: -each[1].st_mtime):
                total += about.st_size
                if total > MAX_BYTES and file != self.path:
                    file.unlink(missing_ok=True)


def index_of(model: SentenceTransformer, corpus: Texts, options: EncodingOptions) -> Index | None:
    """The index of a corpus for a model; None if it would be too large, or if the user has no home folder.

    Args:
        model: The model, before it has encoded anything: its tokenizer is saved with the padding of the last call.
        corpus: The documents.
        options: How they are encoded.
    """
    dim = options.truncate_dim or model.get_embedding_dimension() or 0
    if 4 * dim * len(corpus) > MAX_BYTES:
        return None
    devices = [torch.device(name) for name in options.devices] or [model.device]
    parts = [
        _FORMAT,
        {name: version(name) for name in _PACKAGES},
        sorted({torch.cuda.get_device_name(device) if device.type == "cuda" else device.type for device in devices}),
        [options.document_prompt, options.max_seq_length, options.truncate_dim, options.dtype],
        _fingerprint(model),
        fingerprints.of_sequence(corpus.values()),
    ]
    path = kept_file("index", parts, ".npy")
    return None if path is None else Index(path, len(corpus))


def _fingerprint(model: SentenceTransformer) -> str:
    """A fingerprint of all that a model is saved with: weights, tokenizer, prompts, limits."""
    with tempfile.TemporaryDirectory(prefix="negative-cache-") as folder:
        model.save_pretrained(folder, create_model_card=False)
        return fingerprint_of_folder(Path(folder))
