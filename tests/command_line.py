"""The command line in tests, and a small data set for it."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from negative_cache.workbench.cli import app

NOUNS = ["apple", "river", "engine", "violin", "castle", "planet", "garden", "rocket", "mirror", "candle"]
VERBS = ["paints", "breaks", "finds", "sells", "moves", "holds", "cleans", "hides"]
DOCUMENTS = {
    f"d{i}": f"the {n} that someone {v} every {i} days" for i, (n, v) in enumerate((n, v) for n in NOUNS for v in VERBS)
}


def invoke(*args: object, **environment: str) -> Result:
    """Call a command in this process, whose loggers keep their level."""
    logger = logging.getLogger("negative_cache")
    level = logger.level
    try:
        return CliRunner().invoke(app, [str(arg) for arg in args], env=environment)
    finally:
        logger.setLevel(level)


def write_beir(folder: Path, compress: bool = False) -> Path:
    """80 documents, each with a query of four of its words: 60 for training, 10 for each of the other splits."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": key, "title": "A title", "text": text} for key, text in DOCUMENTS.items()]
    queries = [{"id": f"q{key}", "text": " ".join(text.split()[1:5])} for key, text in DOCUMENTS.items()]
    for name, rows in (("corpus.jsonl", documents), ("queries.jsonl", queries)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    keys = list(DOCUMENTS)
    for split, part in {"train": keys[:60], "dev": keys[60:70], "test": keys[70:]}.items():
        rows = ["query-id\tcorpus-id\tscore", *(f"q{key}\t{key}\t1" for key in part)]
        if split == "train":
            rows += [f"q{part[0]}\t{part[1]}\t1", f"q{part[2]}\t{part[3]}\t0"]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder
