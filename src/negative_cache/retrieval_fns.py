"""How to pick one element from each row of scores."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn


class AbstractRetrievalFn(nn.Module, abc.ABC):
    """Scores `[batch, n]` -> int64 indices `[batch, 1]`."""

    @abc.abstractmethod
    def forward(self, scores: Tensor) -> Tensor:
        """Pick one index per row."""


class MaxScoreRetrievalFn(AbstractRetrievalFn):
    """The highest score, the first one of equals."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.argmax(dim=1, keepdim=True)


class GumbelMaxRetrievalFn(AbstractRetrievalFn):
    """A draw from `softmax(inv_temp * scores)`, as the maximum of scores perturbed by Gumbel noise.

    The noise is float64 and never infinite, so that no element wins by a tie at the noise's upper end.

    Args:
        inv_temp: Factor of the scores; 1 gives the estimator of the paper, other values a biased one.
    """

    def __init__(self, inv_temp: float = 1.0) -> None:
        super().__init__()
        self.inv_temp = inv_temp

    def forward(self, scores: Tensor) -> Tensor:
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64
        # An exponential variable that is 0 would make the noise infinite; the smallest number replaces it.
        exponential = torch.empty_like(scores, dtype=dtype).exponential_().clamp_(min=torch.finfo(dtype).tiny)
        return (self.inv_temp * scores.to(dtype) - exponential.log()).argmax(dim=1, keepdim=True)
