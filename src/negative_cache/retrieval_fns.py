"""Functions that pick one element from each row of scores."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn


class AbstractRetrievalFn(nn.Module, abc.ABC):
    """A function from scores `[batch, n]` to int64 indices `[batch, 1]`."""

    @abc.abstractmethod
    def forward(self, scores: Tensor) -> Tensor:
        """Pick one index per row."""


class MaxScoreRetrievalFn(AbstractRetrievalFn):
    """Picks the highest score; of equal scores, the first."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.argmax(dim=1, keepdim=True)


class GumbelMaxRetrievalFn(AbstractRetrievalFn):
    """Draws from `softmax(inv_temp * scores)`, as the maximum of scores with added Gumbel noise.

    The noise is float32, or float64 for float64 scores. Large values have all digits of the dtype, so that ties at the
    maximum are rare, and none is infinite.

    Args:
        inv_temp: Factor of the scores. 1 gives the estimator of the paper; other values give a biased estimator.
    """

    def __init__(self, inv_temp: float = 1.0) -> None:
        super().__init__()
        self.inv_temp = inv_temp

    def forward(self, scores: Tensor) -> Tensor:
        dtype = torch.promote_types(scores.dtype, torch.float32)
        limits, shape = torch.finfo(dtype), (2, *scores.shape)
        # Uniforms of 60 bits: those near 0, which become the largest noise, have all digits of the dtype.
        coarse, fine = torch.randint(2**30, shape, dtype=torch.int32, device=scores.device).to(dtype)
        uniform = ((coarse + fine * 2.0**-30) * 2.0**-30).clamp_(max=1 - limits.eps / 2)
        exponential = -torch.log1p(-uniform)
        # An exponential variable of 0 would make the noise infinite, so it is clamped to the smallest normal number.
        noise = -exponential.clamp_(min=limits.tiny).log()
        return (self.inv_temp * scores.to(dtype) + noise).argmax(dim=1, keepdim=True)
