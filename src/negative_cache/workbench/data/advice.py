"""`advice`: what in the description of a dataset makes training or its measurement worse, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from negative_cache.workbench.counting import counted, counted_queries, percent

if TYPE_CHECKING:
    from negative_cache.workbench.data.retrieval_data import RetrievalData

TOO_FEW_PAIRS, FEW_QUERIES = 300, 500
MANY = 0.01  # of documents or queries
MANY_LONG = MANY_ALIKE = 0.1
_SHOWN = 80  # characters of a text
FEWEST = 5  # queries with the same positive, from which that is no chance


def advice(found: Mapping[str, Any]) -> list[str]:
    """Warnings, one line each, about a dataset that `describe` has described."""
    return [*_about_splits(found), *_about_overlap(found), *_about_texts(found), *_about_positives(found)]


def on_too_few_pairs(number: int) -> str:
    """What to say of fewer training pairs than `TOO_FEW_PAIRS`."""
    return (
        f"only {counted(number, 'training pair')}: a gain is not to be expected below some hundred, and was measured "
        "from 4,000. Collect more, and begin with a pretrained model."
    )


def on_shared_positive(split: str, number: int, num_queries: int, text: str) -> str:
    """What to say of a positive, with its text, that a large part of the queries of a split have."""
    effect = "" if split == "train" else f" Metrics of {split} depend on it."
    return (
        f"{percent(number / num_queries)} of the {split} queries, {number:,}, have the same positive: "
        f"{text[:_SHOWN]!r}. Check that it is an answer to them, and not a placeholder.{effect}"
    )


def _is_shared(number: int, num_queries: int) -> bool:
    """Whether so many of the queries have the same positive that it is worth a warning."""
    return number >= max(FEWEST, MANY_ALIKE * num_queries)


def shared_positives(data: RetrievalData, splits: Iterable[str]) -> list[str]:
    """A warning for each of some splits in which a large part of the queries have the same positive."""
    lines = []
    for split in splits:
        judged = data.judged(split)
        uses = Counter(document for documents in judged.values() for document in documents)
        for document, number in uses.most_common(1):
            if _is_shared(number, len(judged)):
                text = data.elsewhere.get(split, data).corpus[document]
                lines.append(f"Warning: {on_shared_positive(split, number, len(judged), text)}")
    return lines


def _about_splits(found: Mapping[str, Any]) -> Iterator[str]:
    splits = found["splits"]
    if "train" not in splits:
        yield "no train split: the data can be evaluated on, but not trained on."
    elif (number := splits["train"]["positives"]) < TOO_FEW_PAIRS:
        yield on_too_few_pairs(number)
    if "test" not in splits:
        yield "no test split: the result of training is not measured. Give one with --test."
    elif (number := splits["test"]["queries"]) < FEW_QUERIES:
        difference = splits["test"]["detectable_difference"]
        yield (
            f"only {counted_queries(number, 'test')}: a difference in MRR@10 under about "
            f"{difference:.2f} may be chance. Use more test queries, or compare several seeds."
        )


def _about_overlap(found: Mapping[str, Any]) -> Iterator[str]:
    """Of train with any other split, and of dev with test. Others, such as dev.small and dev, may overlap."""
    for overlap in found["overlap"]:
        first, second = overlap["first"], overlap["second"]
        share = overlap["queries"] / found["splits"][second]["queries"]
        alike = (overlap["alike"] or 0) / found["splits"][second]["positives"]
        if share >= MANY and first == "train":
            yield (
                f"{percent(share)} of the {second} queries are train queries, too: metrics of {second} are too high. "
                "Remove these queries from train."
            )
        if alike >= MANY_ALIKE and (first, second) == ("train", "test"):
            yield (
                f"{percent(alike)} of the test positives resemble a train positive: metrics of test may be higher than "
                "on new documents. If they are versions of one text, keep them in one split: give --dev and --test."
            )
        if share >= MANY and (first, second) == ("dev", "test"):
            yield (
                f"{percent(share)} of the test queries are dev queries, too: metrics of test are too high if a "
                "learning rate or a model is chosen on dev, as by compare. Use other queries for dev."
            )


def _about_texts(found: Mapping[str, Any]) -> Iterator[str]:
    copies, num_documents, num_queries = found["duplicates"], found["documents"], found["queries"]
    if num_documents and (share := copies["documents"] / num_documents) >= MANY:
        yield (
            f"{percent(share)} of the documents are equal to an earlier one: evaluation counts the copy of a relevant "
            "document as a wrong result. Remove the copies."
        )
    if num_queries and (share := copies["queries"] / num_queries) >= MANY:
        yield (
            f"{percent(share)} of the queries are equal to an earlier one, with another id: the positives of one are "
            "negatives of the other. Give equal queries one id."
        )
    near = found["near_duplicates"]
    if near["sample"] and (share := near["documents"] / near["sample"]) >= MANY_ALIKE:
        yield (
            f"{percent(share)} of {near['sample']:,} examined documents resemble another one. Remove copies: they are "
            "false negatives. Keep those that answer other queries: they are the hard ones. To find out whether hiding "
            "them helps, add negative-cache:relative_margin=0.05 to the --losses of compare."
        )
    lengths = found["lengths"]
    num_pairs = sum(split["positives"] for split in found["splits"].values())
    if num_pairs and (share := lengths["positives_over_limit"] / num_pairs) >= MANY_LONG:
        yield (
            f"{percent(share)} of the positives are longer than {lengths['limit']:,} {lengths['unit']}, where models "
            "cut them. If their beginning does not say what they are about, split them into passages, or use a model "
            "that reads longer texts."
        )


def _about_positives(found: Mapping[str, Any]) -> Iterator[str]:
    for name, split in found["splits"].items():
        number = split["queries_of_most_frequent_positive"]
        if number == split["queries"] >= FEWEST:
            what = "there is nothing to learn" if name == "train" else "it measures the rank of one document"
            yield f"every {name} query has the same positive: {what}. Check the columns."
        elif _is_shared(number, split["queries"]):
            yield on_shared_positive(name, number, split["queries"], split["most_frequent_positive"])
        if (share := split["positives_equal_to_query"] / split["positives"]) >= MANY:
            yield f"{percent(share)} of the {name} pairs have equal texts. Check the columns, or remove these pairs."
    share = found["queries_equal_to_document"] / found["queries"] if found["queries"] else 0
    if share >= MANY and not found["ignores_identical_ids"]:
        yield (
            f"{percent(share)} of the queries are documents, too, and each finds itself. "
            + (
                "If equal ids mean equal texts, use --ignore-identical-ids."
                if found["identical_ids"]
                else "Remove them from the corpus."
            )
        )
