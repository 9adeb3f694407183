"""Score transforms that are multiplications: queries are multiplied instead of all scores."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from negative_cache.features import is_free_to_read
from negative_cache.retrieval.pool import ScoreTransform


@dataclass(frozen=True)
class Scale:
    """Multiplies scores by a factor: a float, or a tensor `[]`."""

    factor: float | Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        return scores * self.factor


# Which functions were found to multiply, on devices where looking at the answer is not for free.
_known: weakref.WeakKeyDictionary[ScoreTransform, bool] = weakref.WeakKeyDictionary()


def factor_of(transform: ScoreTransform | None, device: torch.device) -> float | Tensor | None:
    """The factor by which a score transform multiplies; None if it does something else.

    Other functions than `Scale` are tried on scores of every size. On a GPU that is waited for once per function.
    """
    if transform is None:
        return 1.0
    if isinstance(transform, Scale):
        return transform.factor
    probes = _probes(device)
    try:
        values = transform(probes)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None  # it wants other shapes; with the scores it says so itself
    if not isinstance(values, Tensor) or values.shape != probes.shape:
        return None
    factor = values[0, 0].detach()
    if is_free_to_read(values):
        return factor if _is_multiplied(values, probes) else None
    try:
        if transform not in _known:
            _known[transform] = _is_multiplied(values, probes)
        return factor if _known[transform] else None
    except TypeError:  # a callable object that cannot be a key
        return None


def _probes(device: torch.device) -> Tensor:
    """Scores `[n, 1]` of which the first is 1: powers of two, for which products are exact, and some others."""
    powers = 2.0 ** torch.arange(-20, 31, device=device, dtype=torch.float32)
    others = torch.linspace(-123.4, 123.4, 64, device=device)
    zero_and_one = torch.tensor([1.0, 0.0]).to(device, non_blocking=True)
    return torch.cat([zero_and_one, powers, -powers, others])[:, None]


def _is_multiplied(values: Tensor, probes: Tensor) -> bool:
    return bool(torch.isclose(values, probes * values[0], rtol=1e-6, atol=0).all())
