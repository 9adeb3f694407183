"""A training loop with accelerate: one cache for all processes, gradient accumulation, resume.

    accelerate launch --num_processes 2 examples/with_accelerate.py --folder run               # on two GPUs
    torchrun --nproc-per-node 2 examples/with_accelerate.py --folder run --cpu                 # on CPUs
    torchrun --nproc-per-node 2 examples/with_accelerate.py --folder run --cpu --epochs 4      # resumes

The number of processes may change between two runs. `python examples/with_accelerate.py --folder run` uses one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from negative_cache import NegativeCacheLoss, tagged_metrics
from negative_cache.checkpoint import load_checkpoint, save_checkpoint

VOCABULARY, NUM_DOCUMENTS, LENGTH, BATCH = 1_000, 4_096, 12, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    order = DataLoaderConfiguration(use_seedable_sampler=True)  # the order depends only on the epoch
    accelerator = Accelerator(cpu=options.cpu, gradient_accumulation_steps=2, dataloader_config=order)

    torch.manual_seed(0)
    words = torch.randint(VOCABULARY, (NUM_DOCUMENTS, LENGTH))
    loader = DataLoader(TensorDataset(torch.arange(NUM_DOCUMENTS), words), BATCH, shuffle=True)
    encoder = nn.EmbeddingBag(VOCABULARY, 64)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.005)
    encoder, optimizer, loader = accelerator.prepare(encoder, optimizer, loader)

    def encode(features: dict[str, Tensor]) -> Tensor:
        return normalize(encoder(features["words"]), dim=-1)

    # The loss is not passed to `prepare`: it distributes its rows over the processes itself.
    loss_fn = NegativeCacheLoss(encode, cache_size=2_048, process_group="world", seed=0).to(accelerator.device)

    def save_cache(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        save_checkpoint(loss_fn, Path(folder) / "negative_cache")

    def load_cache(models: list[nn.Module], folder: str) -> None:
        load_checkpoint(loss_fn, Path(folder) / "negative_cache")
        loss_fn.to(accelerator.device)

    accelerator.register_save_state_pre_hook(save_cache)
    accelerator.register_load_state_pre_hook(load_cache)

    done = sorted(options.folder.glob("epoch-*"), key=lambda path: int(path.name.split("-")[1]))
    if done:
        accelerator.load_state(str(done[-1]))
    for epoch in range(len(done), options.epochs):
        loader.set_epoch(epoch)  # sets the order
        for ids, documents in loader:
            with accelerator.accumulate(encoder):
                queries = encode({"words": documents[:, : LENGTH // 3]})
                features = {"words": documents}
                loss = loss_fn(queries, encode(features), features, document_ids=ids)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(str(options.folder / f"epoch-{epoch + 1}"))
        metrics = tagged_metrics(loss_fn)  # for accelerator.log(metrics, step)
        accelerator.print(f"epoch {epoch + 1}: loss {metrics['cache/interpretable_prediction_loss']:.3f}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
