"""Models and caches from several stages of a training on real texts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from torch.nn.utils.rnn import pad_sequence

from benchmarks.dense_baseline import SCALE
from benchmarks.timing import progress
from negative_cache import FixedLenFeature, NegativeCacheLoss
from negative_cache.cache.specs import NO_ID
from negative_cache.objective.batch import EMBEDDING
from negative_cache.workbench.data import RetrievalData, load_data
from negative_cache.workbench.data.texts import Texts as StoredTexts
from negative_cache.workbench.model_names import learning_rate_of
from negative_cache.workbench.models import load_model

MODEL = "static"
NUMBER = "number"
SPECS = {NUMBER: FixedLenFeature([], torch.int64)}  # the position of a document in the corpus
WARMUP = 0.1


class Texts(NamedTuple):
    """Token ids of many texts.

    Attributes:
        tokens: int64: the tokens of all texts, concatenated.
        starts: int64 `[n + 1]`: the position at which each text begins, and the end.
    """

    tokens: Tensor
    starts: Tensor

    def take(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of some texts, concatenated, and the position at which each of them begins."""
        starts, lengths = self.starts[numbers], self.starts[numbers + 1] - self.starts[numbers]
        offsets = lengths.cumsum(0) - lengths
        inside = torch.arange(int(lengths.sum()), device=numbers.device)
        return self.tokens[inside + (starts - offsets).repeat_interleave(lengths)], offsets


class Corpus(NamedTuple):
    """A tokenized data set.

    Attributes:
        name: Name of the data set.
        queries: The queries of the training pairs.
        documents: All documents.
        positives: int64 `[pairs, n]`: the documents of each query, the pair's own first, padded with -1.
        table: `[vocabulary, dim]`: embeddings of tokens before training.
    """

    name: str
    queries: Texts
    documents: Texts
    positives: Tensor
    table: Tensor


class Stage(NamedTuple):
    """A stage of a training.

    Attributes:
        name: Its name.
        step: Training steps before it.
        table: `[vocabulary, dim]`, with gradient.
        rows: int64 `[n]`: numbers of the cached documents, the last written first.
        cached: `[n, dim]`: their embeddings as training left them.
    """

    name: str
    step: int
    table: Tensor
    rows: Tensor
    cached: Tensor


def encode(table: Tensor, texts: Texts, numbers: Tensor) -> Tensor:
    """Mean of the tokens' embeddings, of length 1: `[n, dim]`."""
    tokens, offsets = texts.take(numbers)
    return normalize(embedding_bag(tokens, table, offsets, mode="mean"), dim=1)


def load_corpus(source: str | None, device: torch.device) -> Corpus:
    """The tokens of a data set of `load_data`, or of synthetic texts if it is None, and an untrained model."""
    data = synthetic() if source is None else load_data(source)
    training_set = data.training_set()
    progress(f"{data.name}: tokenizing")
    embedding = load_model(MODEL, data.training_texts(), seed=0)[0]

    def texts(given: Sequence[str]) -> Texts:
        encoded = [part.ids or [0] for part in embedding.tokenizer.encode_batch(given, add_special_tokens=False)]
        lengths = torch.tensor([0, *map(len, encoded)], device=device)
        return Texts(torch.tensor([token for ids in encoded for token in ids], device=device), lengths.cumsum(0))

    labels = [torch.tensor(row, device=device) for row in training_set["label"]]
    positives = pad_sequence(labels, batch_first=True, padding_value=NO_ID)
    table = embedding.embedding.weight.detach().to(device)
    return Corpus(data.name, texts(list(training_set["anchor"])), texts(list(data.corpus.values())), positives, table)


def synthetic(count: int = 400) -> RetrievalData:
    """Queries and documents of random words, which need no files."""
    source = random.Random(0)
    words = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("ab", "el", "in", "or", "um")]
    corpus = {f"d{number}": " ".join(source.choices(words, k=12)) for number in range(count)}
    queries = {f"q{number}": " ".join(corpus[f"d{number}"].split()[:4]) for number in range(count)}
    qrels = {f"q{number}": [f"d{number}"] for number in range(count)}
    return RetrievalData(
        "synthetic", StoredTexts.of(corpus), StoredTexts.of(queries), {"train": qrels, "dev": {}, "test": {}}
    )


def batches(corpus: Corpus, batch: int, seed: int) -> Iterable[Tensor]:
    """Endless batches of pair numbers; each pair occurs once per epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(corpus.positives), generator=generator).to(corpus.positives.device)
        yield from (part for part in torch.split(order, batch) if len(part) == batch)


def train(corpus: Corpus, steps: dict[str, int], batch: int, num_rows: int) -> list[Stage]:
    """Train with the library's loss and num_samples=1, and keep the model and the cache at each stage.

    Args:
        corpus: The pairs.
        steps: Name of each stage -> number of steps before it; the last one ends the training.
        batch: Pairs of a step.
        num_rows: Rows of the cache.
    """
    table = corpus.table.clone().requires_grad_()
    loss_fn = NegativeCacheLoss(
        lambda features: encode(table, corpus.documents, features[NUMBER]),
        num_rows,
        SCALE,
        num_samples=1,
        specs=SPECS,
        seed=0,
    )
    last = max(steps.values())
    optimizer = torch.optim.AdamW([table], lr=learning_rate_of(MODEL))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * last), (last - step) / ((1 - WARMUP) * last))
    )
    stages = []
    for step, pairs in enumerate(batches(corpus, batch, seed=0), start=1):
        positives = corpus.positives[pairs]
        numbers = positives[:, 0]
        queries, documents = encode(table, corpus.queries, pairs), encode(table, corpus.documents, numbers)
        loss = loss_fn(queries, documents, {NUMBER: numbers}, numbers, positives)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        stages += [_keep(name, step, table, loss_fn) for name, wanted in steps.items() if wanted == step]
        if step % 50 == 0:
            progress(f"{corpus.name}: step {step} of {last}")
        if step == last:
            break
    return stages


def _keep(name: str, step: int, table: Tensor, loss_fn: NegativeCacheLoss) -> Stage:
    cache = loss_fn.cache
    assert cache is not None
    order = cache.age.argsort(stable=True)
    order = order[cache.filled[order]]
    cached = cache.embeddings(EMBEDDING)[order]
    return Stage(name, step, table.detach().clone().requires_grad_(), cache.read(order, [NUMBER])[NUMBER], cached)
