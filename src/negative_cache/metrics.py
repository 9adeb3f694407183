"""Metrics of caches, under the tags that all integrations use."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from negative_cache.negative_cache_loss import NegativeCacheLoss

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

# The tags that the handlers write, where they differ from the names of the metrics.
_TAGS = {"interpretable_loss": "interpretable_prediction_loss"}


def cache_losses(module: nn.Module | Mapping[str, nn.Module]) -> dict[str, NegativeCacheLoss]:
    """Find every `NegativeCacheLoss` in a module or a dict of modules; each is listed once, by its first path.

    Args:
        module: A module, or a dict of modules. The keys of a dict are the first parts of the paths.

    Returns:
        Path -> loss; the path of `module` itself is "loss". Empty if there is no such loss.
    """
    roots = {"": module} if isinstance(module, nn.Module) else module
    seen: set[nn.Module] = set()  # one loss may serve several datasets
    return {
        ".".join(part for part in (root, path) if part) or "loss": child
        for root, parent in roots.items()
        for path, child in parent.named_modules(memo=seen)
        if isinstance(child, NegativeCacheLoss)
    }


def tagged_metrics(module: nn.Module | Mapping[str, nn.Module]) -> dict[str, float]:
    """Return the metrics of every cache in a module, keyed by the tags for logging; synchronizes the device.

    Args:
        module: A `NegativeCacheLoss`, a model or loss that contains one or more, or a dict of these.

    Returns:
        `cache/interpretable_prediction_loss`, `cache/staleness`, `cache/fill` and the other metrics of
        `NegativeCacheLoss.metrics`; with several caches, `cache/PATH/staleness` and so on. Empty, with one warning, if
        there is no such loss.

    Raises:
        ValueError: Embeddings that were not finite were kept out of a cache since the last call.
    """
    losses = cache_losses(module)
    if not losses:
        _warn_of_no_loss()
    return {
        f"{'cache' if len(losses) == 1 else f'cache/{name}'}/{_TAGS.get(metric, metric)}": value
        for name, loss in losses.items()
        for metric, value in loss.metrics().items()
    }


@functools.cache
def _warn_of_no_loss() -> None:
    logger.warning(
        "There are no metrics, because there is no NegativeCacheLoss. Pass the loss, or a module that contains it. "
        "Handlers, such as CacheLossHandler, write their metrics themselves: pass `writer`."
    )


def warn_of_selection(metrics: Sequence[str], advice: str) -> None:
    """Warn if one of the metrics by which checkpoints are selected, or training is stopped, is the value of a loss.

    Args:
        metrics: Their names.
        advice: The setting that selects by a retrieval metric.
    """
    for metric in metrics:
        if metric.endswith("loss"):
            logger.warning(
                "Checkpoints are selected by %r. A loss says little about retrieval, and that of `NegativeCacheLoss` "
                "grows while the cache fills, so that the first checkpoint looks best. Select by a retrieval metric: "
                "%s.",
                metric,
                advice,
            )


def write_metrics(writer: SummaryWriter, module: nn.Module | Mapping[str, nn.Module], step: int) -> None:
    """Write `tagged_metrics(module)` to TensorBoard.

    Args:
        writer: The `SummaryWriter` to write to.
        module: See `tagged_metrics`.
        step: The global step of the values.
    """
    for tag, value in tagged_metrics(module).items():
        writer.add_scalar(tag, value, step)
