"""One cache for several processes in plain PyTorch, with DDP, checkpoints and resume.

    torchrun --nproc-per-node 2 examples/several_ranks.py --folder run
    torchrun --nproc-per-node 2 examples/several_ranks.py --folder run --steps 200    # resumes from the last checkpoint

On GPUs, each process uses one GPU and the NCCL backend; on CPUs, the gloo backend. The number of processes may change
between two runs: the rows of the cache are redistributed.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from negative_cache import NegativeCacheLoss
from negative_cache.checkpoint import load_checkpoint, save_checkpoint

VOCABULARY, BATCH, LENGTH = 5000, 32, 12


def documents_of(step: int, rank: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Ids `[BATCH]` and words `[BATCH, LENGTH]` of the documents of a step, which differ between ranks."""
    ids = torch.arange(BATCH) + BATCH * (step * num_ranks + rank)
    words = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(int(ids[0])))
    return ids, words


def save(target: Path, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: NegativeCacheLoss) -> None:
    """Write a checkpoint to a temporary folder and rename it, so that `target` is complete or does not exist."""
    partial = target.with_name(target.name + ".partial")
    save_checkpoint(loss_fn, partial / "cache")  # collective: each rank writes its rows
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, partial / "model.pt")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    options = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    encoder = nn.EmbeddingBag(VOCABULARY, 64).to(device)
    model = DistributedDataParallel(encoder)
    loss_fn = NegativeCacheLoss(
        lambda features: normalize(model(features["words"]), dim=-1),
        cache_size=8192,  # rows of all ranks together
        process_group="world",
        seed=0,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    start = 0
    checkpoints = sorted(options.folder.glob("step-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    if checkpoints:
        load_checkpoint(loss_fn, checkpoints[-1] / "cache")
        loss_fn.to(device)
        saved = torch.load(checkpoints[-1] / "model.pt", map_location=device, weights_only=True)
        encoder.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = int(checkpoints[-1].name.split("-")[1])

    for step in range(start, options.steps):
        ids, words = (tensor.to(device) for tensor in documents_of(step, rank, num_ranks))
        queries = normalize(model(words[:, : LENGTH // 3]), dim=-1)
        documents = normalize(model(words), dim=-1)
        loss = loss_fn(queries, documents, {"words": words}, document_ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % options.save_steps == 0:
            save(options.folder / f"step-{step + 1}", encoder, optimizer, loss_fn)
            if rank == 0:
                fill = loss_fn.metrics()["fill"]
                print(f"step {step + 1}: loss {loss.item():.4f}, cache {fill:.0%} full", flush=True)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
