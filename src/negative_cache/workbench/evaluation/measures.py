"""Measures of search results against relevance judgements, by ir_measures and pytrec_eval."""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

import ir_measures
import numpy as np
from ir_measures.measures import MeanAgg, registry

Run = dict[str, dict[str, float]]
"""Search results: query id -> document id -> score."""

Qrels = Mapping[str, Mapping[str, float]]
"""Relevance judgements: query id -> document id -> grade. A document with a grade above 0 is relevant."""

MIN_DEPTH = 100  # results per query
DEPTH_WITHOUT_CUTOFF = 1000

_EXAMPLES = "nDCG@10, MRR@10, R@100, AP@100, AP, P@5, Success@5 or P(rel=2)@5"
_NEEDS_INTEGER_IDS = "gdeval"  # a provider of ir_measures
_NAMES = {"RR": "MRR"}  # ir_measures' name -> the usual one
_MAX_DECIMALS = 6
_MAX_GRADE = 10**7  # pytrec_eval counts the documents of each grade up to the highest


class MeasureError(ValueError):
    """A measure that is unknown, or judgements that it does not support."""


def parse_measures(text: str) -> dict[str, Any]:
    """Measures by name, such as "nDCG@10 R@1000 MRR@10 AP P@5", separated by spaces or commas.

    Names are those of ir_measures in upper or lower case; MRR and RR, MAP and AP, Recall and R, Precision and P are the
    same.

    Returns:
        Name -> measure of ir_measures, in the order of the text. A name is written as in nDCG@10, MRR@10, AP, R@100,
        P@5.

    Raises:
        MeasureError: A measure is unknown, lacks a cut-off or has an invalid one, or needs a package that is missing.
    """
    words = re.split(r"[\s,]+(?![^()]*\))", text.strip(" \t\n,"))  # not at spaces in parentheses
    if not words[0]:
        raise MeasureError(f"No measure is given. Give one or several, such as {_EXAMPLES}.")
    measures = [_parse(word) for word in words]
    return {_name_of(measure): measure for measure in measures}


def depth_of(measures: Mapping[str, Any]) -> int:
    """Number of results per query that the measures need.

    This is the largest cut-off, at least 100, and 1000 or more if a measure has no cut-off.
    """
    return max(MIN_DEPTH, *(measure.params.get("cutoff", DEPTH_WITHOUT_CUTOFF) for measure in measures.values()))


def judge(qrels: Qrels, run: Mapping[str, Mapping[str, float]], measures: Mapping[str, Any]) -> dict[str, Any]:
    """Judge the results of each query.

    Results are ranked as trec_eval ranks them: by score in float32, the highest first, then by document id, the last
    one first. NaN counts as higher than all other scores. Documents without a judgement are not relevant. Values are
    those of pytrec_eval. Grades that are not integers are multiplied by a power of ten and rounded, to at most 6
    decimals; the gain of nDCG is linear, so nDCG does not change.

    Args:
        qrels: Judgements, with at least one query.
        run: Results. Queries without results have the value 0; queries without judgements are left out.
        measures: See `parse_measures`.

    Returns:
        Name of a measure -> query id -> value, for all queries of `qrels` in their order.

    Raises:
        MeasureError: A grade is not finite, is above 10 million, or is not an integer and a measure has `rel=`.
    """
    grades = _integer_grades(qrels, measures)
    ranked = {query: _ranks(run[query]) for query in qrels if run.get(query)}
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    for found in ir_measures.iter_calc(list(measures.values()), grades, ranked):
        values[_name_of(found.measure)][found.query_id] = float(found.value)
    return values


def means(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over the queries of each measure, from the result of `judge`."""
    return {name: statistics.fmean(of_query.values()) for name, of_query in values.items()}


def ranked(found: Mapping[str, float]) -> list[str]:
    """The documents of a query's results, the best first, in the order of trec_eval; see `judge`."""
    with np.errstate(over="ignore"):
        scores = np.fromiter(found.values(), dtype=np.float64, count=len(found)).astype(np.float32).tolist()
    keys = {
        document: (math.isnan(score), 0.0 if math.isnan(score) else score, document)
        for document, score in zip(found, scores, strict=True)
    }
    return sorted(found, key=keys.__getitem__, reverse=True)


def _ranks(found: Mapping[str, float]) -> dict[str, float]:
    """Strictly decreasing scores, so that programs that break ties in another way give the same result."""
    return {document: float(len(found) - place) for place, document in enumerate(ranked(found))}


def _parse(word: str) -> Any:
    matched = re.fullmatch(r"(\w+)(\(.*\))?(?:@(.*))?", word)
    name = None if matched is None else _known_names().get(matched[1].lower())
    if matched is None or name is None:
        raise MeasureError(f"The measure {word!r} is unknown. Give one or several, such as {_EXAMPLES}.")
    cutoff = matched[3]
    if cutoff is not None and not re.fullmatch(r"[1-9][0-9]*", cutoff):
        raise MeasureError(f"The measure {word!r} has the cut-off {cutoff!r}; expected a positive integer.")
    try:
        measure: Any = ir_measures.parse_measure(f"{name}{matched[2] or ''}" + (f"@{cutoff}" if cutoff else ""))
        lacking = [
            name for name, about in measure.SUPPORTED_PARAMS.items() if about.required and name not in measure.params
        ]
        if not lacking:
            measure.validate_params()
    except (AssertionError, ValueError) as error:
        raise MeasureError(f"The measure {word!r} is invalid: {error}. Examples are {_EXAMPLES}.") from None
    if lacking:
        what = f"a cut-off, such as {word}@10" if "cutoff" in lacking else f"the parameter {lacking[0]}, in parentheses"
        raise MeasureError(f"The measure {word!r} needs {what}.")
    if not isinstance(measure.aggregator(), MeanAgg):
        raise MeasureError(f"The measure {word!r} is no mean over queries. Give one or several, such as {_EXAMPLES}.")
    providers = [one for one in ir_measures.DefaultPipeline.providers if one.NAME != _NEEDS_INTEGER_IDS]
    if not any(one.is_available() and one.supports(measure) for one in providers):
        raise MeasureError(
            f"The measure {word!r} is not supported: no installed package computes it for ids that are no integers. "
            "Leave it out, or see ir-measur.es."
        )
    return measure


@functools.cache
def _known_names() -> dict[str, str]:
    """Names of ir_measures in lower case -> as ir_measures writes them."""
    return {name.lower(): name for name in registry}


def _name_of(measure: Any) -> str:
    """The name of a measure, as users write it."""
    name, at, cutoff = str(measure).partition("@")
    plain, bracket, parameters = name.partition("(")
    return _NAMES.get(plain, plain) + bracket + parameters + at + cutoff


def _integer_grades(qrels: Qrels, measures: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The grades as integers, as pytrec_eval needs them."""
    distinct = {grade for grades in qrels.values() for grade in grades.values()}
    if not all(map(math.isfinite, distinct)):
        raise MeasureError("A grade of a judgement is not finite. Correct it, or remove the judgement.")
    decimals = next((count for count in range(_MAX_DECIMALS) if _are_integers(distinct, 10**count)), _MAX_DECIMALS)
    factor = 10**decimals
    if decimals and (others := [name for name in measures if measures[name].params.keys() & {"rel", "gains"}]):
        example = next(grade for grade in distinct if not float(grade).is_integer())
        raise MeasureError(f"{others[0]} needs grades that are integers; a judgement has the grade {example:g}.")
    if distinct and max(distinct) * factor > _MAX_GRADE:
        raise MeasureError(
            f"The highest grade is {max(distinct):g}" + (f", with {decimals} decimals" if decimals else "") + ": too "
            f"many levels of relevance. Give at most {_MAX_GRADE:,}; scale or round the grades."
        )
    levels = {grade: max(1, round(grade * factor)) if grade > 0 else round(grade * factor) for grade in distinct}
    return {query: {document: levels[grade] for document, grade in grades.items()} for query, grades in qrels.items()}


def _are_integers(grades: set[float], factor: int) -> bool:
    return all(math.isclose(grade * factor, round(grade * factor), rel_tol=1e-12) for grade in grades)
