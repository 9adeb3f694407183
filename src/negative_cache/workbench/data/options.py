"""`DataOptions`: how a dataset is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class DataOptions:
    """How a dataset is read, in addition to its name or path.

    Attributes:
        corpus: File or folder of documents that the rows refer to by id; None if the rows have their texts.
        dev: File or dataset of the dev split; None for the data's own.
        test: File or dataset of the test split; None for the data's own.
        query_column: Column of the queries; None for the usual names.
        positive_column: Column of the relevant documents; None for the usual names.
        negative_column: Column of the negatives; None for the usual names.
        label_column: Column of the relevance of the document of a row, 0 or a grade; None for the usual names.
        negatives: "all", "ignore", or the largest number of negatives of a query that are used, the first of the file.
        max_train_pairs: Use this number of training pairs; None for all.
        eval_documents: Search this number of documents in evaluations: the judged ones of the split, and a sample of
            the others. None for all documents.
        encoding: Encoding of text files; None for UTF-8, or what is detected if a file is not UTF-8.
        strict: Raise an error for an empty or missing text, instead of skipping and counting it.
        ignore_identical_ids: Whether a document with the id of a query is neither a result nor a negative of it.
    """

    corpus: str | None = None
    dev: str | None = None
    test: str | None = None
    query_column: str | None = None
    positive_column: str | None = None
    negative_column: str | None = None
    label_column: str | None = None
    negatives: str = "all"
    max_train_pairs: int | None = None
    eval_documents: int | None = None
    encoding: str | None = None
    strict: bool = False
    ignore_identical_ids: bool = False

    def sources(self) -> tuple[str | None, ...]:
        """Further files and datasets that are read: the corpus and the splits."""
        return self.corpus, self.dev, self.test

    def columns(self) -> list[str]:
        """The columns that are given."""
        given = (self.query_column, self.positive_column, self.negative_column, self.label_column)
        return [name for name in given if name is not None]

    def arguments(self, names: Iterable[str] | None = None) -> list[str]:
        """The command-line arguments that give these options, without those of defaults.

        Args:
            names: The options to give; None for all.
        """
        words = []
        for option in fields(self):
            value, flag = getattr(self, option.name), f"--{option.name.replace('_', '-')}"
            if value != option.default and (names is None or option.name in names):
                words += [flag] if value is True else [flag, str(value)]
        return words
