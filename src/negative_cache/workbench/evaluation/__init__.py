"""Evaluation: search in a corpus with a model, measures of the results, and TREC files.

Imports `negative_cache.workbench.data` and `files`.
"""

from negative_cache.workbench.evaluation.encoding import EncodingOptions, OnProgress
from negative_cache.workbench.evaluation.index import Index, index_of
from negative_cache.workbench.evaluation.measures import DEFAULT_MEASURES, Run, depth_of, judge, means, parse_measures
from negative_cache.workbench.evaluation.quality import Quality, evaluate, judge_split, make_evaluator, matching_run
from negative_cache.workbench.evaluation.searching import Hit, search, search_splits

__all__ = [
    "DEFAULT_MEASURES",
    "EncodingOptions",
    "Hit",
    "Index",
    "OnProgress",
    "Quality",
    "Run",
    "depth_of",
    "evaluate",
    "index_of",
    "judge",
    "judge_split",
    "make_evaluator",
    "matching_run",
    "means",
    "parse_measures",
    "search",
    "search_splits",
]
