"""`RaggedNegativesCollator`: batches of rows that have any number of negatives each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor

from negative_cache.cache.specs import NO_ID
from negative_cache.integrations.sentence_transformers.columns import LABEL_SUFFIX, check_row, text_columns
from negative_cache.integrations.sentence_transformers.labels import number_of


class RaggedNegativesCollator(SentenceTransformerDataCollator):
    """A data collator for rows with any number of negatives each, also none.

    A column after the anchor and the positive whose values are lists of texts, such as `negative`, is one column of
    model inputs with all negatives of the batch, each text once. A batch without negatives does not have the column.
    A text that is the positive of a row of the batch, or whose id is among the ids in the `label` column of the batch,
    is no negative. `NegativeCacheRankingLoss` and the losses of sentence-transformers whose negatives are those of the
    whole batch, such as `MultipleNegativesRankingLoss`, take such a column.

    The ids of the negatives may be in a column of lists of integers, named like that of the texts with `_label` at the
    end. They need a `label` column. Then `label` has a further row for each negative: int64 `[batch + m, n]`.

    Lists in the `label` column may have different lengths: they are padded with -1. Labels, also those of negatives,
    may be texts, such as "doc_17": a hash of 62 bits takes their place, the same in all processes. Other batches are
    those of `SentenceTransformerDataCollator`. `NegativeCacheTrainer` uses this collator unless it is given another
    one. For `SentenceTransformerTrainer`, pass `data_collator=RaggedNegativesCollator(model.preprocess)`, with the
    `prompts` and the `router_mapping` of the training arguments, if there are any.

    Args:
        *args: See `SentenceTransformerDataCollator`, as for `**kwargs`.
        varies_by_rank: Whether the ranks of a distributed run may have different numbers of negatives.
            `NegativeCacheRankingLoss` allows it, the losses of sentence-transformers do not. `NegativeCacheTrainer`
            sets it.

    Raises:
        ValueError: A text is missing or empty, or a column has something else; a batch has several columns of lists of
            texts; lists of ids and of texts have different lengths; there are several ranks and `varies_by_rank` is
            False.
        TypeError: A negative in a list is not a text, or is empty.
    """

    def __init__(self, *args: Any, varies_by_rank: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.varies_by_rank = varies_by_rank

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of the dataset to a batch of model inputs."""
        if not features:
            return {}
        label = next((name for name in self.valid_label_columns if name in features[0]), None)
        texts = text_columns(list(features[0]), self.valid_label_columns)
        columns_of_ids = {name + LABEL_SUFFIX for name in texts}
        names = [name for name in texts[2:] if name not in columns_of_ids and _are_lists_of_texts(features, name)]
        if label is not None:
            features = _with_numbers(features, label)
        others = [name for name in texts if name not in names and name.removesuffix(LABEL_SUFFIX) not in names]
        for row in features:
            check_row(row, others)
        if not names:
            return super().__call__(features)
        name = self._only(names)
        ids = name + LABEL_SUFFIX if name + LABEL_SUFFIX in texts else None
        pairs = [{key: value for key, value in row.items() if key not in (name, ids)} for row in features]
        batch: dict[str, Any] = super().__call__(pairs)
        known = batch.get("label")
        negatives = _negatives(features, name, ids, {row[texts[1]] for row in features}, known)
        if not negatives and _num_ranks() > 1:  # all ranks encode the column, and the loss counts a document once
            negatives = {features[0][texts[1]]: NO_ID if known is None else int(known.flatten()[0])}
        if negatives:
            extra = {key: features[0][key] for key in ("dataset_name",) if key in features[0]}
            batch |= super().__call__([{**extra, name: text} for text in negatives])
            if ids is not None and known is not None:
                batch["label"] = _appended(known, list(negatives.values()))
        return batch

    def maybe_warn_about_column_order(self, column_names: list[str]) -> None:
        """Warn of unusual orders of columns; see `SentenceTransformerDataCollator`."""
        if len(column_names) > 1:  # the column of negatives is collated alone
            super().maybe_warn_about_column_order(column_names)

    def _only(self, names: Sequence[str]) -> str:
        if len(names) > 1:
            raise ValueError(
                f"The columns {', '.join(names)} have lists of texts; expected one column of negatives. Put all "
                "negatives of a row into one list."
            )
        if _num_ranks() > 1 and not self.varies_by_rank:
            raise ValueError(
                f"The column {names[0]!r} has lists of negatives, whose number differs between the "
                f"{_num_ranks()} ranks, but the losses of sentence-transformers need equal numbers on all ranks. Train "
                "with NegativeCacheRankingLoss in NegativeCacheTrainer, or in one process, or use columns with one "
                "text each."
            )
        return names[0]


def _are_lists_of_texts(features: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether the values of a column are lists of texts; None stands for an empty list, and for a missing text."""
    values = [[] if row[name] is None else row[name] for row in features]
    return all(isinstance(value, list) and all(isinstance(text, str | None) for text in value) for value in values)


def _negatives(
    features: Sequence[dict[str, Any]], name: str, ids: str | None, positives: set[str], labels: Tensor | None
) -> dict[str, int]:
    """Texts of the negatives of a batch -> ids, or -1; without texts or ids that are positives of any of its rows."""
    known = set() if labels is None or ids is None else set(labels.flatten().tolist()) - {NO_ID}
    found: dict[str, int] = {}
    for row in features:
        texts = row[name] or []
        numbers = [NO_ID] * len(texts) if ids is None else [number_of(each) for each in row[ids] or []]
        if len(numbers) != len(texts):
            raise ValueError(
                f"A row has {len(texts)} texts in the column {name!r} and {len(numbers)} ids in {ids!r}; expected one "
                "id per text, -1 for unknown."
            )
        for text, number in zip(texts, numbers, strict=True):
            if not isinstance(text, str) or not text:
                raise TypeError(f"The column {name!r} has the value {text!r} in a list; expected texts. Remove it.")
            if text not in positives and number not in known:
                found.setdefault(text, number)
    return found


def _with_numbers(features: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows with integers in the label column; lists have equal lengths, padded with -1."""
    if not any(isinstance(row[name], list) for row in features):
        return [{**row, name: number_of(row[name])} for row in features]
    lists = [[number_of(label) for label in row[name] or []] for row in features]
    width = max(map(len, lists))
    return [
        {**row, name: [*labels, *[NO_ID] * (width - len(labels))]} for row, labels in zip(features, lists, strict=True)
    ]


def _appended(labels: Tensor, others: list[int]) -> Tensor:
    rows = labels.view(len(labels), -1)
    added = rows.new_full((len(others), rows.shape[1]), NO_ID)
    added[:, 0] = rows.new_tensor(others)
    return torch.cat([rows, added])


def _num_ranks() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))  # in a worker process of a data loader
