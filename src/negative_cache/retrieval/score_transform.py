"""Score transforms that are multiplications: queries are multiplied instead of all scores."""

from __future__ import annotations

import types
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from negative_cache.cache.specs import is_free_to_read
from negative_cache.retrieval.search import ScoreTransform


@dataclass(frozen=True)
class Scale:
    """Multiplies scores by a factor: a float, or a tensor `[]`."""

    factor: float | Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        return scores * self.factor


# Which functions were found to multiply, on devices where looking at the answer is not for free.
_known: weakref.WeakKeyDictionary[ScoreTransform, bool] = weakref.WeakKeyDictionary()


def factor_of(transform: ScoreTransform | None, device: torch.device, dtype: torch.dtype) -> float | Tensor | None:
    """The factor by which a score transform multiplies scores of a dtype; None if it does something else.

    Other functions than `Scale` are tried on scores of every size. A GPU is waited for once per function, and each time
    for one that can change, because it uses more than numbers.
    """
    if transform is None:
        return 1.0
    if isinstance(transform, Scale):
        return transform.factor
    probes = _probes(device, dtype)
    try:
        values = transform(probes.clone())  # it may work in place
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None  # it wants other shapes; with the scores it says so itself
    if not isinstance(values, Tensor) or values.shape != probes.shape:
        return None
    factor = values[0, 0].detach()
    if is_free_to_read(values) or not _is_constant(transform):
        return factor if _is_multiplied(values, probes) else None
    if transform not in _known:
        _known[transform] = _is_multiplied(values, probes)
    return factor if _known[transform] else None


def _is_constant(transform: ScoreTransform) -> bool:
    """Whether a function can never do anything else: it uses no names but of modules, numbers and what it is given."""
    if not isinstance(transform, types.FunctionType):
        return False
    used = [cell.cell_contents for cell in transform.__closure__ or ()]
    used += [transform.__globals__[name] for name in transform.__code__.co_names if name in transform.__globals__]
    return all(isinstance(value, int | float | types.ModuleType) for value in [*used, *(transform.__defaults__ or ())])


def _probes(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Scores `[n, 1]` of which the first is 1: powers of two, for which products are exact, and some others."""
    powers = 2.0 ** torch.arange(-20, 31, device=device, dtype=dtype)
    others = torch.linspace(-123.4, 123.4, 64, device=device, dtype=dtype)
    one = torch.ones(1, device=device, dtype=dtype)
    return torch.cat([one, 0 * one, powers, -powers, others])[:, None]


def _is_multiplied(values: Tensor, probes: Tensor) -> bool:
    tolerance = 16 * torch.finfo(probes.dtype).eps
    return bool(torch.isclose(values, probes * values[0], rtol=tolerance, atol=0).all())
