"""The effect of narrower rows on the distribution of the draws and on the quality of the trained model.

    python -m benchmarks.precision --data python-code --model static

Trains once per dtype and seed, with num_samples=1, from the same weights and with the same order of the data. The total
variation of two distributions over the cache's rows is half the sum of the absolute differences of their probabilities;
the mean over test queries is printed. For each dtype, the two are the distribution that the pass samples from and the
exact softmax over the same rows. For comparison, the last line has the total variation of the softmax over the stale
rows that training left in the cache and the softmax over the same documents, re-encoded.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import Tensor

from negative_cache import NegativeCacheLoss
from negative_cache.cache.columns import quantize
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.trainer import NegativeCacheTrainer
from negative_cache.objective.batch import EMBEDDING
from negative_cache.retrieval import RowPool
from negative_cache.retrieval.tile_scores import TileProduct, narrow_products
from negative_cache.workbench.data import RetrievalData, load_data
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.model_names import learning_rate_of
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training.config import EMBEDDING_DTYPES

SCALE = 20.0


def train(
    model: SentenceTransformer, data: RetrievalData, dtype: str, seed: int, options: argparse.Namespace
) -> NegativeCacheRankingLoss:
    """Train `model` in place, and return its loss, which has the cache."""
    loss = NegativeCacheRankingLoss(
        model, options.cache_size, SCALE, num_samples=1, embedding_dtype=getattr(torch, dtype), seed=seed
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch_size,
            num_train_epochs=options.epochs,
            learning_rate=learning_rate_of(options.model),
            warmup_steps=0.1,
            seed=seed,
            data_seed=seed,
            batch_sampler="no_duplicates",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        NegativeCacheTrainer(model=model, args=arguments, train_dataset=data.training_set(), loss=loss).train()
    return loss


@torch.no_grad()
def encode_rows(loss: NegativeCacheLoss) -> tuple[Tensor, Tensor]:
    """Cached and new embeddings of the filled rows: `[n, dim]` each."""
    cache = loss.cache
    assert cache is not None
    rows = cache.filled.nonzero().squeeze(1)
    keys = [key for key in cache.specs if key != EMBEDDING]
    encoded = torch.cat([loss.document_encoder(cache.read(part, keys)) for part in torch.split(rows, 512)])
    return cache.embeddings(EMBEDDING)[rows].float(), encoded


def softmax_of_pass(queries: Tensor, rows: Tensor, dtype: str) -> Tensor:
    """The distribution that the pass over the rows samples from if they are stored as `dtype`: `[batch, n]`."""
    values, scales = quantize(rows) if dtype == "int8" else (rows.to(getattr(torch, dtype)), None)
    pool = RowPool(values, torch.ones(len(rows), dtype=torch.bool), scales)
    product = TileProduct(SCALE * queries, pool, 2048)
    scores = torch.empty(len(rows), len(queries))
    with narrow_products(pool):
        for start in range(0, len(rows), product.max_rows):
            stop = min(start + product.max_rows, len(rows))
            product(pool.slice(start, stop), scores[start:stop])
    return scores.T.double().softmax(dim=1)


def exact_softmax(queries: Tensor, rows: Tensor) -> Tensor:
    """The softmax over the rows: float64 `[batch, n]`."""
    return (SCALE * queries.double() @ rows.double().T).softmax(dim=1)


def total_variation(first: Tensor, second: Tensor) -> float:
    """Half the sum of absolute differences, averaged over queries."""
    return float((first - second).abs().sum(dim=1).mean() / 2)


def variations(model: SentenceTransformer, loss: NegativeCacheRankingLoss, data: RetrievalData) -> dict[str, float]:
    """The total variation due to each dtype, and due to staleness."""
    texts = [data.queries[key] for key in list(data.judged("test"))[:256]]
    queries = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False).cpu()
    cached, encoded = encode_rows(loss.cache_loss)
    truth = exact_softmax(queries, encoded)
    of_dtypes = {dtype: total_variation(softmax_of_pass(queries, encoded, dtype), truth) for dtype in EMBEDDING_DTYPES}
    return {**of_dtypes, "staleness": total_variation(exact_softmax(queries, cached), truth)}


def measure(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """MRR@10 of each dtype for each seed, and the total variations of the first seed."""
    data = load_data(options.data)
    texts = list(data.training_texts())
    quality: dict[str, list[float]] = {dtype: [] for dtype in options.dtypes}
    found: dict[str, float] = {}
    for seed in range(options.seeds):
        untrained = load_model(options.model, texts, seed)
        for dtype in options.dtypes:
            print(f"training: seed {seed}, {dtype}", file=sys.stderr)
            model = copy.deepcopy(untrained)
            loss = train(model, data, dtype, seed, options)
            metrics: dict[str, Any] = evaluate(model, data, ("test",))["test"].metrics()
            quality[dtype].append(metrics["MRR@10"])
            print(f"MRR@10 {metrics['MRR@10']:.4f}", file=sys.stderr)
            if not found:  # float32 comes first
                found = variations(model, loss, data)
                print(f"total variation {found}", file=sys.stderr)
    return quality, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="python-code")
    parser.add_argument("--model", default="static")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--cache-size", type=int, default=16_384)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=list(EMBEDDING_DTYPES), choices=EMBEDDING_DTYPES)
    options = parser.parse_args()
    options.dtypes.sort(key=EMBEDDING_DTYPES.index)
    quality, found = measure(options)
    table = Table(
        title=f"{options.data}, {options.model}, B={options.batch_size}, N={options.cache_size}, "
        f"{options.epochs:g} epochs, {options.seeds} seed(s)"
    )
    for name in ("rows", "total variation", "MRR@10", "sd over seeds"):
        table.add_column(name, justify="left" if name == "rows" else "right")
    for dtype in options.dtypes:
        values = quality[dtype]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        table.add_row(dtype, f"{found[dtype]:.5f}", f"{statistics.mean(values):.4f}", spread)
    table.add_row("stale rows, for comparison", f"{found['staleness']:.5f}", "", "")
    Console().print(table)


if __name__ == "__main__":
    main()
