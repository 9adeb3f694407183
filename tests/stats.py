"""Statistical checks that several test modules share: each returns a p-value of the null hypothesis "correct"."""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

# A correct sampler fails a check below this once in a million seeds; seeds are fixed, so a test that passed keeps
# passing, and the some hundred checks together would fail one in 10,000 choices of seeds. The power tests ask
# that a wrong sampler falls below the same line.
ALPHA = 1e-6


def chi_square(rows: Tensor, probabilities: Tensor) -> float:
    """p-value of draws `rows [n]` under `probabilities [num_rows]`; 0 if an impossible row was drawn."""
    counts = torch.bincount(rows, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(rows)
    if bool((counts[expected == 0] > 0).any()):
        return 0.0
    # The chi-square law needs some 5 draws per cell: rarer rows are put together in one cell.
    is_rare = (expected > 0) & (expected < 5)
    counts = torch.cat([counts[expected >= 5], counts[is_rare].sum()[None]])
    expected = torch.cat([expected[expected >= 5], expected[is_rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = float(((counts - expected).square() / expected).sum())
    return float(stats.chi2.sf(statistic, max(len(expected) - 1, 1)))


def independence(first: Tensor, second: Tensor, probabilities: Tensor) -> float:
    """p-value of pairs of draws `[n]`, `[n]` under the product of `probabilities` with themselves."""
    joint = probabilities[:, None] * probabilities
    return chi_square(first * len(probabilities) + second, joint.flatten())


def mean_gradient(gradients: Tensor, exact: Tensor) -> float:
    """p-value of the mean of independent `gradients [n, dim]` being `exact [dim]`.

    The largest deviation in units of the mean's own standard error, with Bonferroni's correction for dim.
    Components without noise must be equal but for rounding.
    """
    count, dim = gradients.shape
    error = gradients.mean(dim=0) - exact
    spread = gradients.std(dim=0)
    size = exact.abs().max().clamp(min=1e-300)
    is_constant = spread < 1e-9 * size
    if bool((error[is_constant].abs() > 1e-8 * size).any()):
        return 0.0
    if bool(is_constant.all()):
        return 1.0
    worst = float((error / spread)[~is_constant].abs().max()) * math.sqrt(count)
    return min(1.0, 2 * dim * float(stats.t.sf(worst, count - 1)))
