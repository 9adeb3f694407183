"""A training loop in plain PyTorch: two towers on synthetic texts, mixed precision, gradient accumulation, evaluation.

    python examples/plain_loop.py                    # about ten seconds on one core
    python examples/plain_loop.py --compile          # with compiled encoders
    python examples/plain_loop.py --log-dir runs     # with TensorBoard

A document consists of twelve words of one of many topics. A query consists of some of its words, translated to another
language. The towers must learn the translation. Before and after training, the script prints the fraction of held-out
queries whose document ranks first, or in the first ten, among all documents.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from negative_cache import NegativeCacheLoss, write_metrics

VOCABULARY, NUM_DOCUMENTS, LENGTH, QUERY_LENGTH = 1_000, 6_000, 12, 6
BATCH, ACCUMULATION, EPOCHS = 64, 2, 4


def make_texts() -> tuple[Tensor, Tensor]:
    """Words of queries `[documents, QUERY_LENGTH]` and of documents `[documents, LENGTH]`, int64."""
    generator = torch.Generator().manual_seed(0)
    translation = torch.randperm(VOCABULARY, generator=generator)
    topics = torch.randint(VOCABULARY, (300, 40), generator=generator)
    topic = torch.randint(len(topics), (NUM_DOCUMENTS, 1), generator=generator)
    documents = topics[topic, torch.randint(40, (NUM_DOCUMENTS, LENGTH), generator=generator)]
    return translation[documents[:, :QUERY_LENGTH]], documents


class Tower(nn.Module):
    """Encodes words `[n, length]` to normalized embeddings `[n, 128]`."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 128)
        self.body = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128))

    def forward(self, words: Tensor) -> Tensor:
        pooled = self.words(words).mean(dim=1)
        return normalize(pooled + self.body(pooled), dim=-1)


@torch.no_grad()
def hits(
    query_tower: nn.Module, document_tower: nn.Module, queries: Tensor, documents: Tensor, held_out: Tensor
) -> str:
    scores = query_tower(queries[held_out]) @ document_tower(documents).T
    rank = (scores > scores.gather(1, held_out[:, None])).sum(dim=1)
    return f"hit@1 {(rank < 1).float().mean():.1%}, hit@10 {(rank < 10).float().mean():.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--log-dir")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer = None
    if options.log_dir:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(options.log_dir)

    torch.manual_seed(0)
    queries, documents = (words.to(device) for words in make_texts())
    ids = torch.randperm(NUM_DOCUMENTS)
    training, held_out = ids[:-500], ids[-500:].to(device)
    query_tower, document_tower = Tower().to(device), Tower().to(device)
    if options.compile:
        query_tower.compile(dynamic=True)
        document_tower.compile(dynamic=True)

    loss_fn = NegativeCacheLoss(
        lambda features: document_tower(features["words"].long()), cache_size=4_096, learnable_scale=True, seed=0
    ).to(device)
    parameters = [*query_tower.parameters(), *document_tower.parameters(), *loss_fn.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    step = 0
    print("before:", hits(query_tower, document_tower, queries, documents, held_out), flush=True)
    for epoch in range(EPOCHS):
        for number, batch in enumerate(training[torch.randperm(len(training))].to(device).split(BATCH), start=1):
            words = documents[batch]
            with torch.autocast(device.type, torch.bfloat16):
                embedded = query_tower(queries[batch]), document_tower(words)
                loss = loss_fn(*embedded, {"words": words.int()}, document_ids=batch)
            (loss / ACCUMULATION).backward()
            if number % ACCUMULATION:
                continue
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if writer and step % 10 == 0:
                write_metrics(writer, loss_fn, step)
        health = loss_fn.metrics()
        print(
            f"epoch {epoch + 1}: loss {health['interpretable_loss']:.2f}, cache {health['fill']:.0%} full, "
            f"staleness {health['staleness']:.3f}",
            flush=True,
        )
    print("after: ", hits(query_tower, document_tower, queries, documents, held_out))
    if writer:
        writer.close()


if __name__ == "__main__":
    main()
