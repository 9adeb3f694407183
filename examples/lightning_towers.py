"""Two towers in Lightning: automatic optimization, validation, checkpoints with the cache, resume.

    python examples/lightning_towers.py --folder run                 # about ten seconds on one core
    python examples/lightning_towers.py --folder run --epochs 6      # resumes from the last checkpoint
    python examples/lightning_towers.py --folder run --devices 2     # DDP: the processes share one cache

A query consists of some words of its document, translated to another language. The towers must learn the translation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from negative_cache import NegativeCacheLoss
from negative_cache.integrations.lightning import NegativeCacheMixin

VOCABULARY, NUM_DOCUMENTS, LENGTH, BATCH = 1_000, 5_000, 12, 64


class TwoTowers(NegativeCacheMixin, LightningModule):  # the mixin comes first
    def __init__(self) -> None:
        super().__init__()
        self.query_tower = nn.EmbeddingBag(VOCABULARY, 64)
        self.document_tower = nn.EmbeddingBag(VOCABULARY, 64)
        self.loss_fn = NegativeCacheLoss(
            self.encode_documents, cache_size=2_048, learnable_scale=True, seed=0, process_group="world"
        )

    def encode_documents(self, features: dict[str, Tensor]) -> Tensor:
        return normalize(self.document_tower(features["words"]), dim=-1)

    def encode_queries(self, words: Tensor) -> Tensor:
        return normalize(self.query_tower(words), dim=-1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, words, documents = batch
        features = {"words": documents}
        return self.loss_fn(self.encode_queries(words), self.encode_documents(features), features, document_ids=ids)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        _, words, documents = batch
        queries, embedded = self.encode_queries(words), self.encode_documents({"words": documents})
        # Neither depends on the cache, so they can be compared from epoch to epoch.
        self.log("val_loss", self.loss_fn.in_batch_loss(queries, embedded), sync_dist=True)
        hits = (queries @ embedded.T).argmax(dim=1) == torch.arange(len(queries), device=queries.device)
        self.log("val_hits@1", hits.float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)  # includes the loss's learnable scale


def make_data() -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    translation = torch.randperm(VOCABULARY, generator=generator)
    documents = torch.randint(VOCABULARY, (NUM_DOCUMENTS, LENGTH), generator=generator)
    pairs = torch.arange(NUM_DOCUMENTS), translation[documents[:, :4]], documents
    return TensorDataset(*(part[500:] for part in pairs)), TensorDataset(*(part[:500] for part in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args()

    torch.manual_seed(0)
    training, validation = make_data()
    last = options.folder / "last.ckpt"
    trainer = Trainer(
        max_epochs=options.epochs,
        devices=options.devices,
        strategy="auto" if options.devices == 1 else "ddp",
        logger=CSVLogger(options.folder),  # cache/interpretable_prediction_loss, cache/staleness, cache/fill, ...
        callbacks=[
            ModelCheckpoint(
                options.folder, monitor="val_hits@1", mode="max", save_last=True, enable_version_counter=False
            )
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        TwoTowers(),
        DataLoader(training, BATCH, shuffle=True),
        DataLoader(validation, BATCH),
        ckpt_path=str(last) if last.exists() else None,
    )
    if trainer.is_global_zero:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        validation = f"val_loss {metrics['val_loss']:.3f} hits@1 {metrics['val_hits@1']:.3f}"
        print(f"epoch {trainer.current_epoch}: {validation}", flush=True)
        print(f"cache {metrics['cache/fill']:.0%} full, staleness {metrics['cache/staleness']:.3f}", flush=True)


if __name__ == "__main__":
    main()
