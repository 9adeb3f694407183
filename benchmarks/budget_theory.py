"""The noise of a step's gradient, the error of choosing documents, and the budget that they recommend.

Everything is in the unit of `estimators.importance`, relative to the noise of the batch, V0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import torch

from benchmarks.estimators_tried import first_phase
from benchmarks.gradients import Objective, make_batch
from benchmarks.report import Row, Table
from benchmarks.sizes import Case, VarianceSizes
from benchmarks.stages import Corpus, Stage
from negative_cache import estimators
from negative_cache.sampling.choose import number_to_choose
from negative_cache.sampling.config import AUTO_STEPS, Noise, draws_per_query

BUDGETS = {"1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "1": 1.0, "2": 2.0, "4": 4.0}
COUNTS = tuple(2 ** (exponent / 2) for exponent in range(-8, 5))  # per query, for the best one: 1/16 to 4
STEPS = {"one": math.inf, "many": AUTO_STEPS}
COLUMNS = {
    "stage": "stage",
    "batch": "B",
    "rows": "N",
    "noise": "V0 per query",
    "in_batch": "in_batch_noise",
    "budget": "num_samples",
    "error_one": "error of the choice",
    "removed_one": "removed by the last",
    "best_one": "best per query",
    "error_many": f"error, T={AUTO_STEPS}",
    "removed_many": f"removed, T={AUTO_STEPS}",
    "best_many": f"best, T={AUTO_STEPS}",
}
NOTE = (
    "V0: the noise of a batch, estimators.batch_noise; per query, it is the mean square of one minus the positive's "
    "probability. All other noises and errors are relative to V0. in_batch_noise: as in metrics(), but from the exact "
    "softmax. Error: estimators.choice_error, of unbiased weights and of those for a mean over "
    f"T={AUTO_STEPS} steps. Removed: estimators.error_removed by the last document. Best: the documents per query "
    "(1/16 to 4) with the smallest product of noise and cost, estimators.best_count, if a batch costs as much as B "
    "documents. Means over batches; of the best, geometric ones."
)


def theory_table(corpus: Corpus, stages: Mapping[str, Stage], given: VarianceSizes) -> Table:
    """A row per budget in each case in which all estimators are compared."""
    rows: list[Row] = []
    for case in given.cases:
        if case.is_complete:
            batches = [make_batch(corpus, stages[case.stage], case, seed) for seed in range(given.batches)]
            noises = [measure_noise(Objective(batch, in_batch=True), seed) for seed, batch in enumerate(batches)]
            rows += _rows(case, noises)
    return Table("variance-budget", "Noise of a step, and the error of a budget in theory", COLUMNS, rows, NOTE)


@torch.no_grad()
def measure_noise(objective: Objective, seed: int) -> Noise:
    """The noise of the step of an objective with in-batch negatives, with as many draws as the library's."""
    probabilities, shares, queries, cached = objective.situation
    generator = torch.Generator().manual_seed(seed)
    candidates = first_phase(objective.situation, generator, draws_per_query(1, shared=True))[1]
    num_rows, others = torch.tensor(len(cached), device=queries.device), len(queries) - 1
    concentration = probabilities.square().sum(dim=1)
    return Noise(
        batch=estimators.batch_noise(*objective.scores, queries),
        in_batch=estimators.in_batch_noise(shares, concentration, queries, num_rows, others),
        sizes=estimators.importance(candidates.weights, shares, queries),
    )


def _rows(case: Case, noises: list[Noise]) -> list[Row]:
    """A row per budget, with means over batches."""
    of_case: Row = {
        "stage": case.stage,
        "batch": case.batch,
        "rows": case.rows,
        "noise": statistics.mean(float(noise.batch) for noise in noises) / case.batch,
        "in_batch": statistics.mean(float(noise.in_batch / noise.batch) for noise in noises),
    }
    counts = sorted({number_to_choose(budget, case.batch) for budget in COUNTS})
    for key, num_steps in STEPS.items():
        best = [
            estimators.best_count(noise.sizes, counts, float(noise.batch), batch_cost=case.batch, num_steps=num_steps)
            for noise in noises
        ]
        of_case[f"best_{key}"] = statistics.geometric_mean(best) / case.batch
    rows: list[Row] = []
    for name, budget in BUDGETS.items():
        row, count = {**of_case, "budget": name}, number_to_choose(budget, case.batch)
        for key, num_steps in STEPS.items():
            errors = [estimators.choice_error(noise.sizes, count, num_steps) / noise.batch for noise in noises]
            row[f"error_{key}"] = statistics.mean(map(float, errors))
            if count > 1:
                removed = [estimators.error_removed(noise.sizes, count, num_steps) / noise.batch for noise in noises]
                row[f"removed_{key}"] = statistics.mean(map(float, removed))
        rows.append(row)
    return rows
