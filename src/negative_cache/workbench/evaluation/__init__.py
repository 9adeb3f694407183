"""Evaluation: search in a corpus with a model, measures of the results, and TREC files.

Imports `negative_cache.workbench.data` and `files`.
"""

from typing import TYPE_CHECKING

from negative_cache._lazy import lazy_attributes
from negative_cache.workbench.evaluation.defaults import DEFAULT_MEASURES

if TYPE_CHECKING:
    from negative_cache.workbench.evaluation.encoding import OnProgress
    from negative_cache.workbench.evaluation.encoding_options import EncodingOptions
    from negative_cache.workbench.evaluation.index import Index, index_of
    from negative_cache.workbench.evaluation.measures import Run, depth_of, judge, means, parse_measures
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

if not TYPE_CHECKING:  # the options of a command need the defaults alone
    __getattr__, __dir__ = lazy_attributes(
        __name__,
        {
            "encoding": ("OnProgress",),
            "encoding_options": ("EncodingOptions",),
            "index": ("Index", "index_of"),
            "measures": ("Run", "depth_of", "judge", "means", "parse_measures"),
            "quality": ("Quality", "evaluate", "judge_split", "make_evaluator", "matching_run"),
            "searching": ("Hit", "search", "search_splits"),
        },
    )
