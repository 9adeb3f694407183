"""Does a negative cache pay for late interaction? One embedding per document proposes, MaxSim scores what was drawn.

A cache of pooled embeddings stands for the documents: row j is proposed with r_j, the mean over the batch's queries of
the softmax of pooled scores, so that a document serves all of them. The drawn documents are encoded anew, token by
token, and scored by MaxSim. In the softmax the m draws stand for all rows, each with s - log(m r_j): the sum of their
exponentials is that of the rows in expectation. Its logarithm is biased, the less the better the pooled scores propose.

    python -m benchmarks.multi_vector

The encoder is small, so that this takes minutes on one core: token embeddings, each mixed with its neighbours.
Pairs are docstring -> code of the standard library. Every row of the table encodes the same number of documents.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from negative_cache.workbench.models import train_tokenizer
from negative_cache.workbench.python_code import extract

QUERY_LENGTH, DOCUMENT_LENGTH, DIM = 16, 64, 64
POOLED_SCALE = 20.0  # of the pooled cosines
METHODS = ("in-batch", "uniform", "pooled")


class TokenEncoder(nn.Module):
    """Unit vectors of tokens `[n, width, dim]`, zero at padding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, DIM)
        self.mix = nn.Conv1d(DIM, DIM, 3, padding=1)
        nn.init.normal_(self.tokens.weight)

    def forward(self, ids: Tensor) -> Tensor:
        vectors = self.tokens(ids) * (ids > 0)[..., None]
        mixed = vectors + self.mix(vectors.transpose(1, 2)).transpose(1, 2)
        return normalize(mixed, dim=-1) * (ids > 0)[..., None]


def pool(vectors: Tensor) -> Tensor:
    """One unit vector per text, `[n, dim]`."""
    return normalize(vectors.sum(dim=1), dim=-1)


def maxsim(queries: Tensor, documents: Tensor) -> Tensor:
    """Sum over a query's tokens of the best product with a token of the document: `[queries, documents]`."""
    return torch.einsum("qid,njd->qnij", queries, documents).amax(dim=-1).sum(dim=-1)


class PooledCache:
    """The last documents, with pooled embeddings as they were when encoded last."""

    def __init__(self, size: int) -> None:
        self.ids = torch.zeros(size, DOCUMENT_LENGTH, dtype=torch.int64)
        self.names = torch.full((size,), -1)
        self.embeddings = torch.zeros(size, DIM)
        self.next = 0

    def draw(self, queries: Tensor, count: int, is_pooled: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows `[count]`, with replacement, and the log of the probability of each."""
        filled = (self.names >= 0).nonzero()[:, 0]
        chances = torch.full((len(filled),), 1 / len(filled))
        if is_pooled:
            chances = (POOLED_SCALE * queries @ self.embeddings[filled].T).softmax(dim=1).mean(dim=0)
        chosen = torch.multinomial(chances, count, replacement=True, generator=generator)
        return filled[chosen], chances[chosen].log()

    def write(self, names: Tensor, ids: Tensor, embeddings: Tensor) -> None:
        """New documents over the oldest; one that has a row goes there."""
        for name, document, embedding in zip(names.tolist(), ids, embeddings.detach(), strict=True):
            known = (self.names == name).nonzero()[:, 0]
            row = int(known[0]) if len(known) else self.next % len(self.names)
            self.next += not len(known)
            self.names[row], self.ids[row], self.embeddings[row] = name, document, embedding


def batches(count: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(size)  # type: ignore[no-untyped-call]


def train(
    method: str, queries: Tensor, documents: Tensor, options: argparse.Namespace, seed: int, vocabulary: int
) -> TokenEncoder:
    """Epochs are twice as many without a cache: then each method encodes as many documents."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder, cache = TokenEncoder(vocabulary), PooledCache(options.cache_size)
    optimizer = torch.optim.Adam(encoder.parameters(), options.learning_rate)
    has_cache = method != "in-batch"
    epochs = options.epochs * (1 if has_cache else 2)
    for at in batches(len(queries), options.batch_size, epochs, generator):
        query, document = encoder(queries[at]), encoder(documents[at])
        scores = options.scale * maxsim(query, document)
        if has_cache and cache.next:
            rows, log_chance = cache.draw(pool(query.detach()), len(at), method == "pooled", generator)
            drawn = encoder(cache.ids[rows])
            corrected = options.scale * maxsim(query, drawn) - log_chance - math.log(len(rows))
            is_known = (cache.names[rows][:, None] == at).any(dim=1)  # in the batch itself
            scores = torch.cat([scores, corrected.masked_fill(is_known, -torch.inf)], dim=1)
            cache.embeddings[rows] = pool(drawn.detach())
        loss = nn.functional.cross_entropy(scores, torch.arange(len(at)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if has_cache:
            cache.write(at, documents[at], pool(document))
    return encoder


@torch.no_grad()
def mean_reciprocal_rank(encoder: TokenEncoder, queries: Tensor, documents: Tensor, relevant: Tensor) -> float:
    """MRR@10 of the queries among all documents, by MaxSim."""
    parts = documents.split(64)  # type: ignore[no-untyped-call]
    scores = torch.cat([maxsim(encoder(queries), encoder(part)) for part in parts], dim=1)
    ranks = 1 + (scores > scores.gather(1, relevant[:, None])).sum(dim=1)
    return float(torch.where(ranks <= 10, 1 / ranks, 0).mean())


@torch.no_grad()
def worth_of_a_draw(encoder: TokenEncoder, queries: Tensor, documents: Tensor, scale: float, others: int) -> float:
    """What a document proposed by pooled scores is worth, beside one drawn from the softmax of MaxSim itself: 0 to 1.

    With p the softmax of MaxSim, the weights p / r of draws from r have the second moment `sum p^2 / r`, which is 1 for
    draws from p: its inverse is the effective share of the draws. The mean over the queries is returned.

    Args:
        others: r is the mean of the proposals of so many queries, as in a batch.
    """
    vectors = [encoder(part) for part in documents.split(64)]  # type: ignore[no-untyped-call]
    query = encoder(queries)
    exact = (scale * torch.cat([maxsim(query, part) for part in vectors], dim=1)).softmax(dim=1)
    pooled = torch.cat([pool(part) for part in vectors])
    proposed = (POOLED_SCALE * pool(query) @ pooled.T).softmax(dim=1)
    proposed = proposed[: len(queries) // others * others].view(-1, others, len(documents)).mean(dim=1)
    proposed = proposed.repeat_interleave(others, dim=0)
    return float((1 / (exact[: len(proposed)] ** 2 / proposed).sum(dim=1)).mean())


def read_pairs() -> tuple[list[str], list[str]]:
    """Docstrings and code of the modules of the standard library that lie at its top."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = {pair.document: pair.query for path in files for pair in extract(path.stem, path)}
    return list(found.values()), list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cache-size", type=int, default=2048)
    parser.add_argument("--scale", type=float, default=2.0, help="of MaxSim")
    parser.add_argument("--learning-rate", type=float, default=0.005)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    docstrings, code = read_pairs()
    tokenizer = train_tokenizer([*docstrings, *code])

    def tokens(texts: list[str], length: int) -> Tensor:
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
        return torch.tensor([encoded.ids for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)])

    queries, documents = tokens(docstrings, QUERY_LENGTH), tokens(code, DOCUMENT_LENGTH)
    numbers = torch.arange(len(queries))
    tested, trained = numbers[::8], numbers[numbers % 8 != 0]
    print(f"{len(trained):,} pairs to train with; {len(tested):,} queries among {len(documents):,} documents")
    print("| training | MRR@10 per seed | mean | seconds |\n|---|---|---|---|")
    for method in METHODS:
        begin, found = time.perf_counter(), []
        for seed in range(options.seeds):
            encoder = train(method, queries[trained], documents[trained], options, seed, tokenizer.get_vocab_size())
            found.append(mean_reciprocal_rank(encoder, queries[tested], documents, tested))
        seconds = (time.perf_counter() - begin) / options.seeds
        numbers_ = ", ".join(f"{value:.3f}" for value in found)
        if method == "pooled":
            alone, shared = (
                worth_of_a_draw(encoder, queries[tested], documents, options.scale, others)
                for others in (1, options.batch_size)
            )
        print(f"| {method} | {numbers_} | {sum(found) / len(found):.3f} | {seconds:.0f} |", flush=True)
    print(f"a pooled draw is worth {alone:.3f} of an exact one for its own query, {shared:.3f} for those of a batch")


if __name__ == "__main__":
    main()
