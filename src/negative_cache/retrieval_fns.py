"""Functions that pick one element from each row of scores."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from negative_cache.retrieval.randomness import WITHOUT_FLOAT64


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

    The noise is float64 (float32 on MPS and XPU) and never infinite, so that no tie of infinite values can occur.

    Args:
        inv_temp: Factor of the scores. 1 gives the estimator of the paper; other values give a biased estimator.
    """

    def __init__(self, inv_temp: float = 1.0) -> None:
        super().__init__()
        self.inv_temp = inv_temp

    def forward(self, scores: Tensor) -> Tensor:
        dtype = torch.float32 if scores.device.type in WITHOUT_FLOAT64 else torch.float64
        # An exponential variable of 0 would make the noise infinite, so it is clamped to the smallest normal number.
        exponential = torch.empty_like(scores, dtype=dtype).exponential_().clamp_(min=torch.finfo(dtype).tiny)
        return (self.inv_temp * scores.to(dtype) - exponential.log()).argmax(dim=1, keepdim=True)
