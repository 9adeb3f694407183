"""`SentenceTransformerTrainer` with the cache in its checkpoints and logs."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from datasets import IterableDataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from negative_cache.integrations.hugging_face import NegativeCacheTrainerMixin, last_complete_checkpoint
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss, RaggedNegativesCollator
from negative_cache.integrations.sentence_transformers.columns import (
    MOST_ROWS,
    anchors_with_several_positives,
    check_dataset,
    list_columns,
)
from negative_cache.metrics import cache_losses

__all__ = ["NegativeCacheTrainer", "NegativeCacheTrainerMixin", "cache_losses", "last_complete_checkpoint"]


logger = logging.getLogger("negative_cache")


class NegativeCacheTrainer(NegativeCacheTrainerMixin, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` with the cache in its checkpoints and logs; see `NegativeCacheTrainerMixin`.

    With `StaticEmbedding`, whose inputs are flat, the batches of an `IterableDataset` are not dispatched from rank 0:
    `dispatch_batches` of the accelerator becomes False unless the training arguments set it.

    Batches are collated by `RaggedNegativesCollator`: a column of lists of texts has any number of negatives per row.
    Batch samplers without duplicates do not look at such columns.

    Without a `loss`, it is `NegativeCacheRankingLoss(model)`, which a line of the log says.

    Raises:
        ValueError: A text of a dataset is missing or empty (the message names the row), or a column has something else.
            Streamed datasets are checked batch by batch.
    """

    data_collator_class = RaggedNegativesCollator

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(SentenceTransformerTrainer).bind_partial(*args, **kwargs).arguments
        for name in ("train_dataset", "eval_dataset"):
            check_dataset(given.get(name), name)
        if given.get("loss") is None:
            kwargs["loss"] = NegativeCacheRankingLoss  # the trainer calls it with the model
            logger.warning("No `loss` was given: it is NegativeCacheRankingLoss(model), with its default settings.")
        super().__init__(*args, **kwargs)
        self._warn_of_several_positives()
        if isinstance(self.data_collator, RaggedNegativesCollator):
            losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
            self.data_collator.varies_by_rank = all(
                any(isinstance(module, NegativeCacheRankingLoss) for module in loss.modules()) for loss in losses
            )
        config = self.accelerator.dataloader_config
        is_flat = any(isinstance(module, StaticEmbedding) for module in self.model.modules())
        if config.dispatch_batches is None and is_flat:
            # A dispatcher cuts all tensors of a batch to its number of rows, also flat token ids.
            config.dispatch_batches = False
            if any(isinstance(dataset, IterableDataset) for dataset in (self.train_dataset, self.eval_dataset)):
                logger.warning(
                    "The inputs of StaticEmbedding are flat and cannot be cut into rows: dispatch_batches is set to "
                    "False, so that each rank reads the whole stream and takes its own batches."
                )

    def _warn_of_several_positives(self) -> None:
        """Warn if a positive of an anchor in another row may be drawn as its negative."""
        several = isinstance(self.loss, dict) or isinstance(self.train_dataset, dict)
        if several or not any(isinstance(module, NegativeCacheRankingLoss) for module in self.loss.modules()):
            return
        if number := anchors_with_several_positives(self.train_dataset):
            logger.warning(
                "train_dataset has no column `label`, and anchors with several positives (%d in the first %d rows): "
                "the cache may draw one of their positives as a negative. In `label`, list the ids of all positives of "
                "the row's anchor, its own positive first, as negative_cache.data.load_data(...).training_set() does.",
                number,
                min(len(self.train_dataset), MOST_ROWS),
            )

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """See `SentenceTransformerTrainer`. Lists of negatives do not count as duplicates."""
        if not isinstance(dataset, IterableDataset):
            dataset = dataset.remove_columns(list_columns(dataset))
        return super().get_batch_sampler(dataset, *args, **kwargs)
