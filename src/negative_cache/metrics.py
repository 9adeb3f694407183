"""What is logged of caches: their metrics under the same tags, whatever trains the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from negative_cache.negative_cache_loss import NegativeCacheLoss

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# The handlers write the same numbers under these names.
_TAGS = {"interpretable_loss": "interpretable_prediction_loss"}


def cache_losses(module: nn.Module | Mapping[str, nn.Module]) -> dict[str, NegativeCacheLoss]:
    """Every `NegativeCacheLoss` in a module or a dict of modules, once, by its first path; a module's own is "loss"."""
    roots = {"": module} if isinstance(module, nn.Module) else module
    seen: set[nn.Module] = set()  # one loss may serve several datasets
    return {
        ".".join(part for part in (root, path) if part) or "loss": child
        for root, parent in roots.items()
        for path, child in parent.named_modules(memo=seen)
        if isinstance(child, NegativeCacheLoss)
    }


def tagged_metrics(module: nn.Module | Mapping[str, nn.Module]) -> dict[str, float]:
    """Metrics of every cache within a module, by the tags under which they are logged; waits for the device.

    Args:
        module: A `NegativeCacheLoss`, a model or another loss that has some in it, or a dict of those.

    Returns:
        `cache/interpretable_prediction_loss`, `cache/staleness`, `cache/fill` and so on, see
        `NegativeCacheLoss.metrics`; with several caches `cache/PATH/staleness`. Empty without a cache.

    Raises:
        ValueError: Embeddings that were not finite were kept out of a cache since the last call.
    """
    losses = cache_losses(module)
    return {
        f"{'cache' if len(losses) == 1 else f'cache/{name}'}/{_TAGS.get(metric, metric)}": value
        for name, loss in losses.items()
        for metric, value in loss.metrics().items()
    }


def write_metrics(writer: SummaryWriter, module: nn.Module | Mapping[str, nn.Module], step: int) -> None:
    """Write `tagged_metrics(module)` to TensorBoard, for a global step."""
    for tag, value in tagged_metrics(module).items():
        writer.add_scalar(tag, value, step)
