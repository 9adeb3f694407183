"""`RetrievalData`: the corpus, queries and relevance judgements of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SPLITS = ("train", "dev", "test")
NO_DOCUMENT = -1


class DataError(ValueError):
    """Data that cannot be used. The message names the file and the line, if there is one."""


@dataclass(frozen=True)
class RetrievalData:
    """A retrieval dataset.

    Attributes:
        name: Its name in messages and tables.
        corpus: Document id -> text.
        queries: Query id -> text, of all splits.
        qrels: Split -> query id -> ids of the relevant documents, in the order of the file.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, list[str]]]

    def judged(self, split: str) -> dict[str, list[str]]:
        """Judgements of a split, or of all splits together for "all".

        Raises:
            DataError: The split has no judgements.
        """
        if split == "all":
            together: dict[str, list[str]] = {}
            for qrels in self.qrels.values():
                for query, documents in qrels.items():
                    together[query] = list(dict.fromkeys([*together.get(query, []), *documents]))
            return together
        if not self.qrels.get(split):
            available = [name for name, qrels in self.qrels.items() if qrels]
            raise DataError(
                f"{self.name} has no queries in the split {split!r}; it has {available}. A file of pairs is split "
                "by document, 85 : 5 : 10, and needs about 50 documents. A BEIR folder needs a file for the split in "
                "qrels. train and compare measure on the test split; evaluate has the option --split."
            )
        return self.qrels[split]

    def training_columns(self) -> dict[str, list[Any]]:
        """Columns anchor, positive and label, with one row per judged pair of the training split.

        A label lists the positions in the corpus of all relevant documents of the query, the positive of the row
        first, padded with -1.
        """
        positions = {document: position for position, document in enumerate(self.corpus)}
        columns: dict[str, list[Any]] = {"anchor": [], "positive": [], "label": []}
        for query, documents in self.judged("train").items():
            for document in documents:
                others = [positions[other] for other in documents if other != document]
                columns["anchor"].append(self.queries[query])
                columns["positive"].append(self.corpus[document])
                columns["label"].append([positions[document], *others])
        columns["label"] = padded(columns["label"])
        return columns


def padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Pad rows with -1 to the same length."""
    width = max(map(len, rows))
    return [[*row, *[NO_DOCUMENT] * (width - len(row))] for row in rows]
