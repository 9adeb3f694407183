"""What the runs of the stage "quality" say together: the rates chosen, means over seeds, and differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.finetuning import BASELINE
from benchmarks.gpu.results import Row

Ranks = dict[str, dict[str, dict[str, list[float]]]]
"""Data set -> loss -> seed -> reciprocal rank (0 beyond rank 10) of each test query, at the chosen rate."""


def chosen_rate(rows: Sequence[Row], data: str, loss: str) -> float | None:
    """The rate of the sweep that is best on the dev split; None if no run of it has ended."""
    swept = [row for row in rows if row["data"] == data and row["loss"] == loss and row["is_sweep"]]
    scores = {_number(row["rate"]): _number(row["dev_mrr@10"]) for row in swept if "error" not in row}
    return max(scores, key=lambda rate: scores[rate], default=None)


def read_ranks(path: Path) -> Ranks:
    """What is in `quality_ranks.json`; empty if there is no such file."""
    ranks: Ranks = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return ranks


def summary(rows: Sequence[Row], ranks: Ranks | None = None) -> list[Row]:
    """Each data set and loss over its seeds, at the chosen rate, and its difference to `in-batch`.

    Args:
        rows: Of the results.
        ranks: See `read_ranks`; without them there are no p-values.

    Returns:
        `data`, `loss`, `rate`, `seeds` (their number), `documents_encoded`, the means and sample standard deviations
        of `test_mrr@10` and `test_ndcg@10` (`..._std`, None of one seed), `difference` of the mean MRR@10 to that of
        `in-batch`, and `p_value`, two-sided, paired over queries, whose reciprocal ranks are means over seeds. The
        last two are None where there is nothing to compare.
    """
    result: list[Row] = []
    for data, loss in dict.fromkeys((str(row["data"]), str(row["loss"])) for row in rows):
        final = _final_rows(rows, data, loss)
        if not final:
            continue
        told: Row = {"data": data, "loss": loss, "rate": final[0]["rate"], "seeds": len(final)}
        told["documents_encoded"] = round(statistics.fmean(_number(row["documents_encoded"]) for row in final))
        for metric in ("test_mrr@10", "test_ndcg@10"):
            values = [_number(row[metric]) for row in final]
            told |= {metric: statistics.fmean(values), f"{metric}_std": _deviation(values)}
        result.append(told | _against_baseline(_final_rows(rows, data, BASELINE), told, (ranks or {}).get(data, {})))
    return result


def _final_rows(rows: Sequence[Row], data: str, loss: str) -> list[Row]:
    """Rows at the chosen rate, without errors."""
    rate = chosen_rate(rows, data, loss)
    of_loss = [row for row in rows if row["data"] == data and row["loss"] == loss and "error" not in row]
    return [row for row in of_loss if row["rate"] == rate]


def _against_baseline(baseline: Sequence[Row], told: Row, ranks: dict[str, dict[str, list[float]]]) -> Row:
    if not baseline or told["loss"] == BASELINE:
        return {"difference": None, "p_value": None}
    mean = statistics.fmean(_number(row["test_mrr@10"]) for row in baseline)
    p = _p_value(ranks.get(str(told["loss"]), {}), ranks.get(BASELINE, {}))
    return {"difference": _number(told["test_mrr@10"]) - mean, "p_value": p}


def _p_value(first: dict[str, list[float]], second: dict[str, list[float]]) -> float | None:
    """Of a two-sided paired t-test over queries; None if there is nothing to compare or no query differs."""
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
