"""A summary of the runs of the stage "quality": the chosen rates, means over seeds, and differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.finetuning import BASELINE
from benchmarks.gpu.results import Row

Ranks = dict[str, dict[str, dict[str, list[float]]]]
"""Data set -> loss -> seed -> reciprocal rank of each test query (0 beyond rank 10), at the chosen rate."""


def chosen_rate(rows: Sequence[Row], data: str, loss: str) -> float | None:
    """The rate of the sweep that is best on the dev split; None if no run of the sweep has ended."""
    swept = [row for row in rows if row["data"] == data and row["loss"] == loss and row["is_sweep"]]
    scores = {_number(row["rate"]): _number(row["dev_MRR@10"]) for row in swept if "error" not in row}
    return max(scores, key=lambda rate: scores[rate], default=None)


def read_ranks(path: Path) -> Ranks:
    """The content of `quality_ranks.json`; empty if there is no such file."""
    ranks: Ranks = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return ranks


def summary(rows: Sequence[Row], ranks: Ranks | None = None) -> list[Row]:
    """A row per data set and loss, over its seeds, at the chosen rate.

    Args:
        rows: Rows of the results.
        ranks: See `read_ranks`; without them there are no p-values.

    Returns:
        `data`, `loss`, `rate`, `seeds` (their number), `documents_encoded`, the means and sample standard deviations
        of `test_MRR@10` and `test_nDCG@10` (`..._std`, None for one seed), the `difference` of the mean MRR@10 from
        that of `in-batch`, and its two-sided `p_value`, paired over queries, with the means of their reciprocal ranks
        over seeds. The last two are None if there is nothing to compare.
    """
    result: list[Row] = []
    for data, loss in dict.fromkeys((str(row["data"]), str(row["loss"])) for row in rows):
        final = _final_rows(rows, data, loss)
        if not final:
            continue
        line: Row = {"data": data, "loss": loss, "rate": final[0]["rate"], "seeds": len(final)}
        line["documents_encoded"] = round(statistics.fmean(_number(row["documents_encoded"]) for row in final))
        for metric in ("test_MRR@10", "test_nDCG@10"):
            values = [_number(row[metric]) for row in final]
            line |= {metric: statistics.fmean(values), f"{metric}_std": _deviation(values)}
        result.append(line | _against_baseline(_final_rows(rows, data, BASELINE), line, (ranks or {}).get(data, {})))
    return result


def _final_rows(rows: Sequence[Row], data: str, loss: str) -> list[Row]:
    """Rows at the chosen rate, without errors."""
    rate = chosen_rate(rows, data, loss)
    of_loss = [row for row in rows if row["data"] == data and row["loss"] == loss and "error" not in row]
    return [row for row in of_loss if row["rate"] == rate]


def _against_baseline(baseline: Sequence[Row], line: Row, ranks: dict[str, dict[str, list[float]]]) -> Row:
    if not baseline or line["loss"] == BASELINE:
        return {"difference": None, "p_value": None}
    mean = statistics.fmean(_number(row["test_MRR@10"]) for row in baseline)
    p = _p_value(ranks.get(str(line["loss"]), {}), ranks.get(BASELINE, {}))
    return {"difference": _number(line["test_MRR@10"]) - mean, "p_value": p}


def _p_value(first: dict[str, list[float]], second: dict[str, list[float]]) -> float | None:
    """The p-value of a two-sided paired t-test over queries; None without two samples or a query that differs."""
    from scipy.stats import ttest_rel  # type: ignore[import-untyped]

    if not first or not second:
        return None
    a, b = ([statistics.fmean(query) for query in zip(*seeds.values(), strict=True)] for seeds in (first, second))
    p = float(ttest_rel(a, b).pvalue)
    return p if math.isfinite(p) else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
