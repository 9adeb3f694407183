"""Fine-tuning of a pretrained encoder with each loss on the same pairs, and its evaluation.

With the same seed, every loss gets the same pairs in the same batches for the same number of epochs, unless its name
says otherwise. No two pairs of a batch share a query, a document or the first mined negative.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from benchmarks.gpu.results import Row
from negative_cache.cache.device_copies import to_device
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.data.texts import Texts as StoredTexts

UNTRAINED, BASELINE = "untrained", "in-batch"
EPOCHS, MAX_TOKENS = {"nl2bash": 2, "medquad": 2}, {"squad": 128}  # 1 and 64 for other data sets
# Rates that were best on the dev split among 2e-5, 6e-5, 2e-4 and 6e-4: of all losses, and of the gradient cache.
SWEPT = {"nl2bash": (2e-4, 6e-4), "medquad": (2e-4, 6e-4)}
SCALE, MAX_NORM, WARM_UP = 20.0, 1.0, 0.1
MAX_CACHE = 131_072
MINED_RANKS, NUM_MINED = (10, 50), 4
HELD_OUT = 10  # without a dev split, one of this many training queries is a dev query
ENCODED_AT_ONCE, QUERIES_AT_ONCE = 512, 256
METRICS = ("MRR@10", "nDCG@10", "R@100")


@dataclass(frozen=True)
class Plan:
    """The amount of training.

    Attributes:
        rates: Learning rates of the sweep, the most promising first.
        seeds: Seeds; the sweep uses the first one.
        batch: Pairs of a batch.
        processes: Runs at the same time.
        is_bf16: Whether encoders train under autocast to bfloat16.
        max_tokens: Highest number of tokens of a text.
        max_pairs: Training pairs to keep; None for all pairs, and for all queries and documents.
        max_epochs: Highest number of epochs.
        num_trained: Data sets to train on; for the others, only the untrained model is measured.
    """

    rates: tuple[float, ...] = (6e-5, 2e-5, 2e-4)
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 64
    processes: int = 12
    is_bf16: bool = True
    max_tokens: int = 512
    max_pairs: int | None = None
    max_epochs: int = 2
    num_trained: int = 100


REHEARSAL = Plan(
    rates=(6e-5,),
    seeds=(0, 1),
    batch=8,
    processes=1,
    is_bf16=False,
    max_tokens=16,
    max_pairs=16,
    max_epochs=1,
    num_trained=1,
)


class Encoder:
    """A model that counts the texts it encodes, and that may train under autocast to bfloat16.

    As in transformers' trainer, autocast covers only the model, so that losses are computed in float32.

    Attributes:
        model: The model.
        untrained: A frozen copy of the model as it was given.
        num_texts: Texts that the model has encoded.
    """

    def __init__(self, model: SentenceTransformer, is_bf16: bool) -> None:
        self.model = model
        self.device: torch.device = model.device
        self.num_texts = 0
        self.untrained = copy.deepcopy(model).requires_grad_(False).eval()
        self._is_bf16 = is_bf16
        self._forward = model.forward
        model.forward = self._counting_forward

    def _counting_forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        self.num_texts += len(features["input_ids"])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_bf16 and self.model.training):
            result: dict[str, Any] = self._forward(features, **options)
        result["sentence_embedding"] = result["sentence_embedding"].float()
        return result

    @torch.no_grad()
    def embed(self, texts: Texts, rows: Tensor | None = None) -> Tensor:
        """Embeddings `[n, dim]` of the texts `rows [n]`, or of all: float32, of unit length."""
        self.model.eval()
        rows = torch.arange(len(texts.lengths)) if rows is None else rows
        order = texts.lengths[rows].argsort(descending=True)  # texts of similar length need little padding
        chunks = [rows[order[part]] for part in _slices(len(rows), ENCODED_AT_ONCE)]
        parts = [self.model(texts.features(chunk, self.device))["sentence_embedding"] for chunk in chunks]
        return normalize(torch.cat(parts), dim=-1)[order.argsort().to(self.device)]


MakeLoss = Callable[[Encoder, Plan, int, int], nn.Module]
"""Encoder, plan, rows of the cache, seed -> loss."""


def _in_batch(encoder: Encoder, plan: Plan, cache_size: int, seed: int) -> nn.Module:
    return MultipleNegativesRankingLoss(encoder.model, scale=SCALE)


def _gist(encoder: Encoder, plan: Plan, cache_size: int, seed: int) -> nn.Module:
    return GISTEmbedLoss(encoder.model, encoder.untrained, temperature=1 / SCALE)


def _gradient_cache(encoder: Encoder, plan: Plan, cache_size: int, seed: int) -> nn.Module:
    return CachedMultipleNegativesRankingLoss(encoder.model, scale=SCALE, mini_batch_size=plan.batch)


def _paper(encoder: Encoder, plan: Plan, cache_size: int, seed: int) -> nn.Module:
    options: dict[str, Any] = {"num_samples": 1, "in_batch": False, "shared": False}
    return NegativeCacheRankingLoss(encoder.model, cache_size, SCALE, **options, seed=seed)


def _negative_cache(encoder: Encoder, plan: Plan, cache_size: int, seed: int) -> nn.Module:
    return NegativeCacheRankingLoss(encoder.model, cache_size, SCALE, seed=seed)


def _one_per_query(encoder: Encoder, plan: Plan, cache_size: int, seed: int) -> nn.Module:
    return NegativeCacheRankingLoss(encoder.model, cache_size, SCALE, num_samples=1, seed=seed)


class Kind(NamedTuple):
    """A loss and its input.

    Attributes:
        make: Creates it.
        epochs: Multiple of the epochs of the other losses.
        batches: Batches of the plan per step.
        num_mined: Mined negatives per pair, each in a column of its own.
        passes: How often it encodes each text.
        cost: Work per pair in encodings with gradient, for estimates of time.
        is_extra: Whether it runs after the other losses of all data sets.
    """

    make: MakeLoss
    epochs: float = 1
    batches: int = 1
    num_mined: int = 0
    passes: int = 1
    cost: float = 2.0
    is_extra: bool = False


GRADIENT_CACHE = "gradient cache 16x"
KINDS = {
    BASELINE: Kind(_in_batch),
    "negative cache": Kind(_negative_cache, cost=2.5),
    "in-batch, 1.25 times the epochs": Kind(_in_batch, epochs=1.25, cost=2.5),
    "in-batch + mined negative": Kind(_in_batch, num_mined=1, cost=3.0),
    "GIST, guided by the untrained model": Kind(_gist, cost=3.0),
    "negative cache, 1 per query": Kind(_one_per_query, cost=3.5, is_extra=True),
    "in-batch, twice the epochs": Kind(_in_batch, epochs=2, cost=4.0, is_extra=True),
    "in-batch + 4 mined negatives": Kind(_in_batch, num_mined=NUM_MINED, cost=6.0, is_extra=True),
    GRADIENT_CACHE: Kind(_gradient_cache, batches=16, passes=2, cost=3.0, is_extra=True),
    "negative cache, paper": Kind(_paper, cost=3.5, is_extra=True),
}


def rates_of(data: str, loss: str, plan: Plan) -> tuple[float, ...]:
    """The learning rates to sweep; a single one where an earlier sweep of four has chosen it."""
    if data not in SWEPT:
        return plan.rates
    return (SWEPT[data][loss == GRADIENT_CACHE],)


class Job(NamedTuple):
    """A task of a worker; the loss `UNTRAINED` prepares the data set and measures the untrained model."""

    data: str
    loss: str
    rate: float | None = None
    seed: int | None = None
    is_sweep: bool = False


class Texts(NamedTuple):
    """Tokenized texts.

    Attributes:
        ids: int32 `[n, width]`, padded on the right.
        lengths: int64 `[n]`.
        identity: int64 `[n]`, equal for texts with equal tokens.
    """

    ids: Tensor
    lengths: Tensor
    identity: Tensor

    def features(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Model inputs of the texts `rows [m]`, padded to the longest of them."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        mask = torch.arange(width) < lengths[:, None]
        return {
            "input_ids": to_device(self.ids[rows, :width].long(), device),
            "attention_mask": to_device(mask.long(), device),
        }


class Split(NamedTuple):
    """Queries with their relevant documents.

    Attributes:
        queries: int64 `[m]`: rows of queries.
        relevant: int64 `[m, w]`: rows of documents, padded with -1.
    """

    queries: Tensor
    relevant: Tensor


class Dataset(NamedTuple):
    """A data set in the form that runs use.

    Attributes:
        pairs: int64 `[n, 2 + NUM_MINED]`: rows of the query, its positive and its mined negatives.
        labels: int64 `[n, w]`: identities of the positive and the query's other positives, padded with -1.
    """

    name: str
    queries: Texts
    documents: Texts
    pairs: Tensor
    labels: Tensor
    dev: Split
    test: Split

    @property
    def cache_size(self) -> int:
        return min(MAX_CACHE, 1 << (len(self.documents.lengths).bit_length() - 1))

    def work(self, plan: Plan) -> float:
        """Pairs times tokens of a run; 32 tokens account for the fixed cost of a text."""
        tokens = 32 + float(self.documents.lengths.float().mean())
        return epochs_of(self.name, plan) * len(self.pairs) * tokens


def epochs_of(name: str, plan: Plan) -> int:
    return min(plan.max_epochs, EPOCHS.get(name, 1))


def make_dataset(data: RetrievalData, encoder: Encoder, plan: Plan) -> Dataset:
    """Tokenize all texts, and mine negatives of each training pair with the untrained encoder."""
    data = _with_dev(data)
    if plan.max_pairs is not None:
        data = _cut(data, plan.max_pairs)
    limit = min(plan.max_tokens, MAX_TOKENS.get(data.name, 64))
    query_names, document_names = list(data.queries), sorted(data.corpus)  # equal scores rank in the order of ids
    queries = tokenize(encoder.model, [data.queries[name] for name in query_names], limit)
    documents = tokenize(encoder.model, [data.corpus[name] for name in document_names], limit)
    rows = {name: row for row, name in enumerate(query_names)}, {name: row for row, name in enumerate(document_names)}
    dev, test = (_split(data.judged(split), *rows) for split in ("dev", "test"))
    pairs, labels = _pairs(data.judged("train"), *rows, documents.identity)
    mined = mine(encoder.embed(queries), encoder.embed(documents), documents.identity, pairs, labels)
    return Dataset(
        name=data.name,
        queries=queries,
        documents=documents,
        pairs=torch.cat([pairs, mined], dim=1),
        labels=labels,
        dev=dev,
        test=test,
    )


def _with_dev(data: RetrievalData) -> RetrievalData:
    """Without a dev split, hold out every tenth training query."""
    if data.qrels.get("dev"):
        return data
    train = data.judged("train")
    held_out = sorted(train)[::HELD_OUT]
    rest = {query: documents for query, documents in train.items() if query not in set(held_out)}
    return replace(data, qrels={**data.qrels, "train": rest, "dev": {query: train[query] for query in held_out}})


def _cut(data: RetrievalData, max_pairs: int) -> RetrievalData:
    """Keep some training queries with one document each, half as many of the other splits, and their documents."""
    qrels = {split: _spread(data.judged(split), max_pairs // 2) for split in ("dev", "test")}
    train = _spread(data.judged("train"), max_pairs)
    qrels["train"] = {query: documents[:1] for query, documents in train.items()}
    used = {document for split in qrels.values() for documents in split.values() for document in documents}
    return replace(
        data,
        corpus=StoredTexts.of((name, text) for name, text in data.corpus.items() if name in used),
        queries=StoredTexts.of((query, data.queries[query]) for split in qrels.values() for query in split),
        qrels=qrels,
    )


def _spread(qrels: dict[str, list[str]], count: int) -> dict[str, list[str]]:
    """Up to `count` queries, evenly spread, as neighbours are often similar."""
    queries, count = list(qrels), min(count, len(qrels))
    return {query: qrels[query] for query in (queries[at * len(queries) // count] for at in range(count))}


def tokenize(model: SentenceTransformer, texts: Sequence[str], max_tokens: int) -> Texts:
    """Tokenize texts with the model's own preprocessing, to at most `max_tokens` each."""
    model.max_seq_length = max_tokens
    rows: list[Tensor] = []
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        features = model.preprocess(list(texts[start : start + ENCODED_AT_ONCE]))
        for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True):
            rows.append(ids[mask.bool()].to(torch.int32))
    seen: dict[bytes, int] = {}
    identity = [seen.setdefault(row.numpy().tobytes(), len(seen)) for row in rows]
    padded = pad_sequence(rows, batch_first=True)
    return Texts(padded, torch.tensor([len(row) for row in rows]), torch.tensor(identity))


def _split(qrels: dict[str, list[str]], queries: dict[str, int], documents: dict[str, int]) -> Split:
    relevant = [torch.tensor([documents[name] for name in names]) for names in qrels.values()]
    padded = pad_sequence(relevant, batch_first=True, padding_value=-1)
    return Split(torch.tensor([queries[name] for name in qrels]), padded)


def _pairs(
    qrels: dict[str, list[str]], queries: dict[str, int], documents: dict[str, int], identity: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of query and positive `[n, 2]`, and labels `[n, w]`."""
    pairs, labels, names_of = [], [], identity.tolist()
    for query, names in qrels.items():
        positives = [documents[name] for name in names]
        for own in positives:
            pairs.append((queries[query], own))
            labels.append([names_of[own], *(names_of[other] for other in positives if other != own)])
    width = max(map(len, labels))
    return torch.tensor(pairs), torch.tensor([row + [-1] * (width - len(row)) for row in labels])


def mine(queries: Tensor, documents: Tensor, identity: Tensor, pairs: Tensor, labels: Tensor) -> Tensor:
    """Negatives of each pair, drawn from ranks 10 to 50 of the documents that are not positives of its query.

    Args:
        queries: Embeddings `[q, dim]`.
        documents: Embeddings `[d, dim]`.
        identity: int64 `[d]`.
        pairs: int64 `[n, 2]`.
        labels: int64 `[n, w]`.

    Returns:
        int64 `[n, NUM_MINED]`: rows of documents, different ones if there are as many.

    Raises:
        ValueError: All documents are positives of a query.
    """
    identity = identity.to(documents.device)
    generator = torch.Generator().manual_seed(0)
    mined = []
    for at_once in _slices(len(pairs), QUERIES_AT_ONCE):
        scores = queries[pairs[at_once, 0].to(queries.device)] @ documents.T
        for column in labels[at_once].to(documents.device).T:
            scores.masked_fill_(identity == column[:, None], -math.inf)
        found = scores.topk(min(MINED_RANKS[1], scores.shape[1]))
        count = int(found.values.isfinite().sum(dim=1).min())
        if count == 0:
            raise ValueError("All documents are judged relevant to a query; expected others, too. Add documents.")
        first = min(MINED_RANKS[0], count) - 1
        order = torch.rand(len(scores), count - first, generator=generator).argsort(dim=1)
        at = first + order[:, torch.arange(NUM_MINED) % (count - first)]
        mined.append(found.indices.cpu().gather(1, at))
    return torch.cat(mined)


def make_batches(identities: Tensor, size: int, seed: int, epoch: int) -> list[Tensor]:
    """Batches of an epoch, in random order: no row occurs twice, and no value in two rows of a batch.

    As in sentence-transformers' sampler without duplicates, a row that conflicts goes into a later batch. The last
    rows have few, frequent values; batches smaller than an eighth of `size` are omitted.

    Args:
        identities: int64 `[n, k]`.
        size: Rows of a batch; the last ones may be smaller.
        seed: Seed of the order.
        epoch: Each epoch has another order.

    Returns:
        Rows, int64, up to `[size]` each.
    """
    order = torch.randperm(len(identities), generator=torch.Generator().manual_seed(1000 * seed + epoch)).tolist()
    values = [frozenset(row) for row in identities.tolist()]
    batches, least = [], min(size, len(order)) // 8
    while order:
        batch: list[int] = []
        used: set[int] = set()
        skipped: list[int] = []
        at = 0
        while at < len(order) and len(batch) < size:
            row = order[at]
            if used.isdisjoint(values[row]):
                batch.append(row)
                used |= values[row]
            else:
                skipped.append(row)
            at += 1
        order = skipped + order[at:]
        if len(batch) >= least:
            batches.append(torch.tensor(batch))
    return batches


def train(encoder: Encoder, dataset: Dataset, job: Job, plan: Plan) -> Row:
    """Train the encoder in place, and return the cost of the training."""
    kind, rate, seed = KINDS[job.loss], job.rate, job.seed
    assert rate is not None
    assert seed is not None
    torch.manual_seed(seed)
    model, device = encoder.model.train(), encoder.device
    epochs = kind.epochs * epochs_of(dataset.name, plan)
    batches: list[Tensor] = []
    for epoch in range(math.ceil(epochs)):
        of_epoch = _batches(dataset, plan.batch, kind.batches, seed, epoch)
        batches += of_epoch[: math.ceil(min(1.0, epochs - epoch) * len(of_epoch))]
    loss_fn = kind.make(encoder, plan, dataset.cache_size, seed).to(device).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, len(batches)))
    encoder.num_texts = 0
    began = time.monotonic()
    for rows in batches:
        loss = loss_fn(_columns(dataset, rows, kind.num_mined, device), to_device(dataset.labels[rows], device))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):  # synchronizes the device
        raise RuntimeError(f"Training with the rate {rate} ended with weights that are not finite.")
    seconds = time.monotonic() - began
    num_pairs = sum(map(len, batches))
    return {
        "epochs": epochs,
        "steps": len(batches),
        "pairs_seen": num_pairs,
        "documents_encoded": encoder.num_texts - kind.passes * num_pairs,  # texts that are not queries
        "train_seconds": round(seconds, 3),
    }


def _batches(dataset: Dataset, size: int, factor: int, seed: int, epoch: int) -> list[Tensor]:
    """Batches of `factor * size` pairs; batches of `size` avoid repeated mined negatives for all losses."""
    queries = -1 - dataset.queries.identity[dataset.pairs[:, :1]]
    documents = dataset.documents.identity[dataset.pairs[:, 1:]]
    columns = 2 if factor > 1 else 3
    return make_batches(torch.cat([queries, documents], dim=1)[:, :columns], factor * size, seed, epoch)


def _columns(dataset: Dataset, rows: Tensor, num_mined: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Model inputs of the queries, positives and, if asked, mined negatives of the pairs `rows [m]`."""
    query, *documents = dataset.pairs[rows].T
    texts = [dataset.documents.features(at, device) for at in documents[: 1 + num_mined]]
    return [dataset.queries.features(query, device), *texts]


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rate at a step, from 0: linear to 1 over the first tenth of the steps, then linear to 0.

    Unlike in transformers' schedule, the rate of the first step is above 0: a run with a gradient cache has few steps.
    """
    warm_up = max(1, round(WARM_UP * steps))
    return (step + 1) / warm_up if step < warm_up else max(0.0, (steps - step) / max(1, steps - warm_up + 1))


def evaluate(encoder: Encoder, dataset: Dataset) -> tuple[Row, list[float]]:
    """Metrics of the dev and test splits in the whole corpus, and the reciprocal ranks of the test queries."""
    documents = encoder.embed(dataset.documents)
    dev, test = (
        metrics_of(ranks_of(encoder.embed(dataset.queries, split.queries), documents, split.relevant))
        for split in (dataset.dev, dataset.test)
    )
    row: Row = {f"dev_{metric}": float(values.mean()) for metric, values in dev.items()}
    row |= {f"test_{metric}": float(values.mean()) for metric, values in test.items()}
    return row, [round(value, 6) for value in test["MRR@10"].tolist()]


def ranks_of(queries: Tensor, documents: Tensor, relevant: Tensor) -> Tensor:
    """Rank of each relevant document: 1 + documents with a higher score, or with the same score in an earlier row.

    Args:
        queries: `[m, dim]`.
        documents: `[d, dim]`.
        relevant: int64 `[m, w]`, padded with -1.

    Returns:
        int64 `[m, w]` on the CPU, 0 for padding.
    """
    places = torch.arange(len(documents), device=documents.device)
    ranks = []
    for at_once in _slices(len(queries), QUERIES_AT_ONCE):
        scores = queries[at_once] @ documents.T
        columns = []
        for at in relevant[at_once].to(scores.device).T[:, :, None]:
            target = scores.gather(1, at.clamp(min=0))
            is_before = (scores > target) | ((scores == target) & (places < at))
            columns.append(torch.where(at[:, 0] >= 0, 1 + is_before.sum(dim=1), 0))
        ranks.append(torch.stack(columns, dim=1).cpu())
    return torch.cat(ranks)


def metrics_of(ranks: Tensor) -> dict[str, Tensor]:
    """float64 `[m]` for each of `METRICS`, from the ranks `[m, w]` of the relevant documents, 0 for padding."""
    is_real = ranks > 0
    counts = is_real.sum(dim=1)
    best = torch.where(is_real, ranks, 1 << 40).amin(dim=1).double()
    gains = torch.where(is_real & (ranks <= 10), 1 / (ranks + 1).double().log2(), 0.0).sum(dim=1)
    ideal = (1 / torch.arange(2, 12).double().log2()).cumsum(0)[counts.clamp(max=10) - 1]
    recall = (is_real & (ranks <= 100)).sum(dim=1) / counts.double()
    return dict(zip(METRICS, (torch.where(best <= 10, 1 / best, 0.0), gains / ideal, recall), strict=True))
