"""A large cache on a small machine: int8 embeddings, and the documents' tokens in host memory as int16.

python examples/large_cache.py --cache-size 262144

Trains a small two-tower model on generated documents: a query contains some words of its document. Prints the
memory that is predicted before anything is allocated, and the memory of the cache at the end. Takes minutes, or seconds
with --cache-size 16384.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from negative_cache import NegativeCacheLoss, RaggedFeature, predict_bytes

NUM_WORDS, DIM, MAX_TOKENS = 5000, 256, 128
SPECS = {"tokens": RaggedFeature(torch.int16, max_length=MAX_TOKENS)}


class Tower(nn.Module):
    """The normalized mean of word embeddings; token 0 is padding."""

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


def train(tower: Tower, loss_fn: NegativeCacheLoss, batch_size: int, num_steps: int) -> float:
    """Train and return the last loss."""
    device = tower.words.weight.device
    optimizer = torch.optim.Adam(tower.parameters(), lr=0.01)
    for step in range(num_steps):
        queries, documents, ids = (part.to(device) for part in make_batch(step, batch_size))
        loss = loss_fn(tower(queries), tower(documents), {"tokens": documents}, document_ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(num_steps // 10, 1) == 0:
            print(f"step {step:5} of {num_steps}: loss {loss.item():.3f}, fill {loss_fn.metrics()['fill']:.2f}")
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-size", type=int, default=65_536)
    parser.add_argument("--batch-size", type=int, default=512)
    options = parser.parse_args()
    predicted = predict_bytes(
        options.cache_size,
        DIM,
        options.batch_size,
        embedding_dtype=torch.int8,
        specs=SPECS,
        mean_lengths={"tokens": (16 + MAX_TOKENS) / 2},
    )
    for name in predicted._fields:
        print(f"predicted {name:12} {getattr(predicted, name) / 1e6:8.1f} MB")

    torch.manual_seed(0)
    tower = Tower().to("cuda" if torch.cuda.is_available() else "cpu")
    loss_fn = NegativeCacheLoss(
        lambda features: tower(features["tokens"]),
        options.cache_size,
        embedding_dtype=torch.int8,
        specs=SPECS,
        feature_device="cpu",
        seed=0,
    )
    num_steps = -(-options.cache_size // options.batch_size) + 5  # until the cache is full
    started = time.perf_counter()
    loss = train(tower, loss_fn, options.batch_size, num_steps)
    seconds = time.perf_counter() - started

    assert loss_fn.cache is not None
    total = sum(buffer.nbytes for buffer in loss_fn.cache.buffers())
    print(f"{num_steps} steps in {seconds:.1f} s; loss {loss:.3f} against {options.cache_size:,} documents")
    print(f"the cache takes {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
