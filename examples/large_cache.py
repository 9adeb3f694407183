"""A large cache on a small machine: int8 embeddings, and the documents' tokens in a memory-mapped file.

python examples/large_cache.py --cache-size 262144 --folder /a/folder/on/a/fast/disk

Trains a small two-tower model on documents that it makes: a query has some words of its document. Prints the memory
that was predicted before anything was made, and what there is in the end. Takes minutes; with
--cache-size 16384 seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from negative_cache import NegativeCacheLoss, RaggedFeature, predict_bytes

NUM_WORDS, DIM, MAX_TOKENS = 5000, 256, 128
SPECS = {"tokens": RaggedFeature(torch.int16, max_length=MAX_TOKENS)}


class Tower(nn.Module):
    """The normalised mean of word embeddings; token 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(NUM_WORDS, DIM, mode="mean", padding_idx=0)

    def forward(self, tokens: Tensor) -> Tensor:
        return normalize(self.words(tokens.long()), dim=1)


def make_batch(step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[size, 4]`, documents `[size, MAX_TOKENS]` and their ids; a document has 16 to MAX_TOKENS words."""
    rng = torch.Generator().manual_seed(step)
    documents = torch.randint(1, NUM_WORDS, (size, MAX_TOKENS), generator=rng, dtype=torch.int16)
    lengths = torch.randint(16, MAX_TOKENS + 1, (size, 1), generator=rng)
    queries = documents[:, :4].clone()
    return queries, documents.masked_fill_(torch.arange(MAX_TOKENS) >= lengths, 0), step * size + torch.arange(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-size", type=int, default=65_536)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the file of tokens is made")
    options = parser.parse_args()
    predicted = predict_bytes(
        options.cache_size,
        DIM,
        options.batch_size,
        embedding_dtype=torch.int8,
        specs=SPECS,
        mean_lengths={"tokens": (16 + MAX_TOKENS) / 2},
        features_on_disk=True,
    )
    for name in predicted._fields:
        print(f"predicted {name:12} {getattr(predicted, name) / 1e6:8.1f} MB")

    torch.manual_seed(0)
    tower = Tower()
    loss_fn = NegativeCacheLoss(
        lambda features: tower(features["tokens"]),
        options.cache_size,
        embedding_dtype=torch.int8,
        specs=SPECS,
        feature_folder=options.folder,
        seed=0,
    )
    optimizer = torch.optim.Adam(tower.parameters(), lr=0.01)
    num_steps = -(-options.cache_size // options.batch_size) + 5  # until the cache is full
    started = time.perf_counter()
    for step in range(num_steps):
        queries, documents, ids = make_batch(step, options.batch_size)
        loss = loss_fn(tower(queries), tower(documents), {"tokens": documents}, document_ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(num_steps // 10, 1) == 0:
            print(f"step {step:5} of {num_steps}: loss {loss.item():.3f}, fill {loss_fn.metrics()['fill']:.2f}")
    seconds = time.perf_counter() - started

    assert loss_fn.cache is not None
    buffers = dict(loss_fn.cache.named_buffers())
    on_disk = buffers.pop("feature_tokens.arena").nbytes
    print(f"{num_steps} steps in {seconds:.1f} s; loss {loss.item():.3f} against {options.cache_size:,} documents")
    print(f"the cache has {sum(buffer.nbytes for buffer in buffers.values()) / 1e6:.1f} MB in memory")
    print(f"and up to {on_disk / 1e6:.1f} MB of tokens on disk")


if __name__ == "__main__":
    main()
