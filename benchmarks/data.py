"""`data`: time and peak memory of reading, describing, training on and evaluating a large dataset."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import child
from benchmarks.peak import OwnMemory, peak_bytes
from benchmarks.report import COLOURS, Report, Row, Table, style, verdict
from benchmarks.sizes import DATA_TARGET_MB, DataSizes, SizeSet
from benchmarks.timing import progress
from negative_cache.workbench.data import RetrievalData, load_data
from negative_cache.workbench.data.describing import describe

FORMS = {"BEIR folder": "beir", "pairs, JSON lines": "pairs.jsonl"}
QUERY_WORDS = 8
VOCABULARY = 30_000
TEXTS_PER_BLOCK = 10_000
COLUMNS = {
    "stage": "what is done",
    "form": "form of the data",
    "documents": "documents",
    "seconds": "s",
    "peak_mb": "peak memory of the process, MB",
    "own_mb": "without pages of files, MB",
    "target": "target",
    "met": "",
}


def run(sizes: SizeSet, device: torch.device) -> Report:
    """Measure each stage in its own process."""
    given = sizes.data
    target = DATA_TARGET_MB if sizes.is_judged else None
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress(f"Writing {given.documents:,} documents ...")
        write(folder, given)
        for stage, measure in STAGES.items():
            for form, file in FORMS.items():
                if stage in ("read", "describe") or form == "BEIR folder":  # the others are the same for all forms
                    progress(f"{stage}, {form} ...")
                    rows.append(_row(stage, form, child.run(measure, folder / file, given), given, target))
    note = (
        f"{given.words} words per document, a query for each, {given.test_queries:,} test queries, a static model. "
        f"train: {given.steps} steps, with the preparation of the data, the tokenizer and the model. Peak memory "
        "includes the libraries, and pages of the mapped files of texts, which the system can drop."
    )
    return Report([Table("data", "A large dataset", COLUMNS, rows, note)], partial(_plot, rows))


def write(folder: Path, sizes: DataSizes) -> None:
    """Write the same documents, each with a query, as a BEIR folder and as a file of pairs."""
    beir = folder / FORMS["BEIR folder"]
    (beir / "qrels").mkdir(parents=True)
    first_test = sizes.documents - sizes.test_queries
    with (
        (beir / "corpus.jsonl").open("w", encoding="utf-8") as corpus,
        (beir / "queries.jsonl").open("w", encoding="utf-8") as queries,
        (beir / "qrels/train.tsv").open("w", encoding="utf-8") as train,
        (beir / "qrels/test.tsv").open("w", encoding="utf-8") as test,
        (folder / FORMS["pairs, JSON lines"]).open("w", encoding="utf-8") as pairs,
    ):
        for number, (query, document) in enumerate(_texts(sizes)):
            corpus.write(json.dumps({"_id": f"d{number}", "text": document}) + "\n")
            queries.write(json.dumps({"_id": f"q{number}", "text": query}) + "\n")
            (train if number < first_test else test).write(f"q{number}\td{number}\t1\n")
            pairs.write(json.dumps({"query": query, "positive": document}) + "\n")


def _texts(sizes: DataSizes) -> Iterator[tuple[str, str]]:
    """Query and document: words of which a few are frequent and most are rare; the query is a part of the document."""
    chance = np.random.default_rng(0)
    names = np.array([f"word{number}" for number in range(VOCABULARY)])
    for start in range(0, sizes.documents, TEXTS_PER_BLOCK):
        number = min(TEXTS_PER_BLOCK, sizes.documents - start)
        drawn = (VOCABULARY * chance.random((number, sizes.words)) ** 3).astype(np.int64)
        for words in names[drawn].tolist():
            yield " ".join(words[:QUERY_WORDS]), " ".join(words)


def _measured(call: Callable[[], object]) -> dict[str, float | None]:
    """Seconds of a call, and the peak memory of this process during it, in all and without pages of files."""
    began = time.perf_counter()
    with OwnMemory() as own:
        peak = peak_bytes(call, torch.device("cpu"), base=0)
    return {"seconds": time.perf_counter() - began, "peak": peak, "own": own.peak}


def measure_reading(source: Path, sizes: DataSizes) -> dict[str, float | None]:
    return _measured(lambda: load_data(str(source)))


def measure_describing(source: Path, sizes: DataSizes) -> dict[str, float | None]:
    data = load_data(str(source))
    return _measured(lambda: describe(data))


def measure_training(source: Path, sizes: DataSizes) -> dict[str, float | None]:
    from negative_cache.workbench.training.config import RunConfig
    from negative_cache.workbench.training.driver import run as train

    data = load_data(str(source))
    data = replace(data, qrels={"train": data.qrels["train"]})  # nothing is evaluated
    config = RunConfig(
        data=str(source), model="static", loss="negative-cache", output=str(source.parent / "model"),
        max_steps=sizes.steps, save_steps=None,
    )  # fmt: skip
    return _measured(lambda: train(config, data))


def measure_evaluation(source: Path, sizes: DataSizes) -> dict[str, float | None]:
    from negative_cache.workbench.evaluation import evaluate
    from negative_cache.workbench.models import load_model

    data = load_data(str(source))
    model = load_model("static", _first_texts(data), seed=0)
    return _measured(lambda: evaluate(model, data, ("test",)))


def _first_texts(data: RetrievalData) -> list[str]:
    return [text for text, _ in zip(data.corpus.values(), range(TEXTS_PER_BLOCK), strict=False)]


STAGES: dict[str, child.Measurement] = {
    "read": measure_reading,
    "describe": measure_describing,
    "train": measure_training,
    "evaluate": measure_evaluation,
}


def _row(stage: str, form: str, found: dict[str, float | None], sizes: DataSizes, target: float | None) -> Row:
    peak, own = (None if found[name] is None else float(found[name] or 0) / 1e6 for name in ("peak", "own"))
    return {
        "stage": stage,
        "form": form,
        "documents": sizes.documents,
        "seconds": found["seconds"],
        "peak_mb": peak,
        "own_mb": own,
        "target": target,
        "met": verdict(peak, target),
    }


def _plot(rows: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    names = [f"{row['stage']}\n{row['form']}" for row in rows]
    axes.bar(range(len(rows)), [float(row["peak_mb"] or 0) for row in rows], color=COLOURS[0])
    for place, row in enumerate(rows):
        text = f"{float(row['seconds'] or 0):,.0f} s"
        axes.annotate(text, (place, float(row["peak_mb"] or 0)), (0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    style(axes, f"A dataset of {int(rows[0]['documents'] or 0):,} documents", "stage", "peak memory, MB")
    axes.grid(False, axis="x")
