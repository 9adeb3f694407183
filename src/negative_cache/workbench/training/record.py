"""The record of a run: the content of `run.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from negative_cache.version import __version__
from negative_cache.workbench.files import write_json
from negative_cache.workbench.suggestions import unfinished_folder
from negative_cache.workbench.training.config import RunError

RECORD = "run.json"

Metrics = dict[str, Any]
"""Means by the name of the measure, such as "MRR@10", with num_queries and num_documents."""


def check_output_folder(output: str, resume: bool) -> None:
    """Raise RunError if a run cannot be written to a folder: it has files, and no run that is to be resumed."""
    folder = Path(output)
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty and not (resume and (folder / RECORD).is_file()):
        raise RunError(f"The output folder {output!r} exists and is not empty. Choose another --output.")
    if (folder := unfinished_folder(output)).exists() and not resume:
        raise RunError(
            f"{str(folder)!r} has an unfinished run. If it does not run any more, continue it with --resume, or remove "
            "the folder."
        )


def measures_of(metrics: Metrics) -> list[str]:
    """The names of the measures in metrics."""
    return [name for name in metrics if name not in ("num_queries", "num_documents")]


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Versions of this package, which need not be installed, and of others."""
    return {"negative-cache": __version__, **{name: version(name) for name in packages}}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is known about a finished run.

    Attributes:
        configuration: Fields of `RunConfig`, with the learning rate that was used.
        versions: Versions of Python and of the main packages.
        device: Device of the model.
        threads: CPU threads of torch.
        ranks: Number of processes.
        steps: Optimizer steps.
        best_step: Step of the weights that were kept as the best on the dev split; None if they are the last ones.
        resumed_from_step: Step of the checkpoint that the run was last resumed from; 0 if there was none.
        training_pairs: Judged pairs of the training split.
        seconds: Training time, with mining, without evaluation.
        documents_encoded: Documents that rank 0 encoded in training, counted each time, with those that a guide encoded
            and the documents and queries that were encoded in mining.
        peak_memory_bytes: Peak memory at the end of training.
        before: Metrics on the test split before training; None if not measured, or without a test split.
        after: Metrics on the test split after training; None if not measured, without a test split, or if training
            failed.
        dev: Metrics on the dev split after training; None if not measured.
        curve: Quality during training: step, seconds, documents_encoded, and test (metrics on that split).
        failed: Reason why training failed; None if it did not.
        data_fingerprint: Fingerprint of the data, see `fingerprints.of_data`.
        data_notes: What of the data was skipped or not used, see `RetrievalData`.
        mining: For each round of mining: step, seconds, texts_encoded and pairs_with_fewer, see `Mined`.
        history: Logs of the trainer.
    """

    configuration: dict[str, Any]
    versions: dict[str, str]
    device: str
    threads: int
    ranks: int
    steps: int
    best_step: int | None = None
    resumed_from_step: int
    training_pairs: int
    seconds: float
    documents_encoded: int
    peak_memory_bytes: int
    before: Metrics | None = None
    after: Metrics | None = None
    dev: Metrics | None = None
    curve: list[dict[str, Any]]
    failed: str | None = None
    data_fingerprint: str
    data_notes: list[str] = field(default_factory=list)
    mining: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]]

    @property
    def cache_waited(self) -> bool:
        """Whether the cache counted in no step that was logged, so that the run trained as in-batch does."""
        shares = [value for row in self.history for key, value in row.items() if key.endswith("cache_share")]
        return bool(shares) and not any(shares)

    def write(self, folder: Path) -> None:
        """Write `run.json`."""
        write_json(folder / RECORD, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read `run.json`.

        Raises:
            RunError: The file is damaged or is not the record of a run.
        """
        content = read_json(folder / RECORD)
        expected = {entry.name for entry in fields(cls)}
        if set(content) != expected:
            raise RunError(
                f"{folder / RECORD} is not the record of a run: expected the keys {', '.join(sorted(expected))}, got "
                f"{', '.join(sorted(content))}. Give a folder that this version of train or compare wrote."
            )
        return cls(**content)


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; raises RunError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: expected an object, got {type(content).__name__}.")
    return content
