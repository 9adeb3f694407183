"""Find score transforms that are multiplications, so that the queries are multiplied instead of all scores."""

from __future__ import annotations

import types
import weakref

import torch
from torch import Tensor

from negative_cache.cache.validation import reads_without_sync
from negative_cache.retrieval.search import Scale, ScoreTransform

# On a GPU, a check of a function synchronizes the device, so a function that cannot change is checked once.
_multiplies: weakref.WeakKeyDictionary[ScoreTransform, bool] = weakref.WeakKeyDictionary()


def factor_of(transform: ScoreTransform | None, device: torch.device, dtype: torch.dtype) -> float | Tensor | None:
    """The factor by which a score transform multiplies scores; None if it does something else.

    The function is probed with scores of all magnitudes. On a GPU, this synchronizes the device: in each pass
    for a function that uses tensors or modules and so may change, and once for any other function.
    """
    if transform is None:
        return 1.0
    if isinstance(transform, Scale):
        return transform.factor
    powers = 2.0 ** torch.arange(-20, 31, device=device, dtype=dtype)  # products with them are exact
    others = torch.linspace(-123.4, 123.4, 64, device=device, dtype=dtype)
    probes = torch.cat([powers[20:21], 0 * powers[:1], powers, -powers, others])[:, None]  # the first is 1
    try:
        values = transform(probes.clone())  # a copy: the transform may work in place
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None  # the transform expects other shapes; it raises a clear error with the scores themselves
    if not isinstance(values, Tensor) or values.shape != probes.shape:
        return None
    factor, is_kept = values[0, 0].detach(), not reads_without_sync(values) and _is_constant(transform)
    if is_kept and transform in _multiplies:
        return factor if _multiplies[transform] else None
    tolerance = 16 * torch.finfo(dtype).eps
    multiplies = bool(torch.isclose(values, probes * factor, rtol=tolerance, atol=0).all())
    if is_kept:
        _multiplies[transform] = multiplies
    return factor if multiplies else None


def _is_constant(transform: ScoreTransform) -> bool:
    """Whether a function uses only its argument, Python modules such as torch, and numbers, and so cannot change.

    Otherwise, a learned bias that starts at 0 would never be noticed.
    """
    if not isinstance(transform, types.FunctionType):
        return False
    used = [cell.cell_contents for cell in transform.__closure__ or ()]
    used += [transform.__globals__[name] for name in transform.__code__.co_names if name in transform.__globals__]
    return all(isinstance(value, int | float | types.ModuleType) for value in [*used, *(transform.__defaults__ or ())])
