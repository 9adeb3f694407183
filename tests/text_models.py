"""Small sentence-transformers models of the texts in `support`, and what tests of their losses have in common."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.sentence_transformers.tokens import TOKENS
from negative_cache.integrations.trainer import NegativeCacheTrainer
from negative_cache.workbench.models import load_model
from support import ANCHORS, HARD, POSITIVES

VERSION = tuple(int(part) for part in sentence_transformers.__version__.split(".")[:2])
TEXTS = [*ANCHORS, *POSITIVES, *HARD]
PAIRS = {"anchor": ANCHORS, "positive": POSITIVES}
TRIPLETS = {**PAIRS, "negative": HARD}


def make_static(dim: int = 32, seed: int = 0, texts: list[str] = TEXTS) -> SentenceTransformer:
    """Static embeddings of the words of `texts`."""
    torch.manual_seed(seed)
    words = sorted({word for text in texts for word in text.split()})
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=dim)], device="cpu")


@functools.cache  # training the tokenizer again would number the tokens in another way
def _tiny() -> SentenceTransformer:
    return load_model("tiny", TEXTS, 0).to("cpu")


def make_tiny(dropout: float = 0.1) -> SentenceTransformer:
    """A transformer of two layers, whose embeddings have 128 dimensions."""
    model = copy.deepcopy(_tiny())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def make_router() -> SentenceTransformer:
    """Queries by a static model, documents by a transformer: other tokenizers, other inputs."""
    towers = Router.for_query_document(
        query_modules=list(make_static(dim=128).children()), document_modules=list(make_tiny(dropout=0.0).children())
    )
    return SentenceTransformer(modules=[towers], device="cpu")


def make_trainer(
    model: SentenceTransformer,
    loss: Any,
    data: Any,
    folder: Path,
    steps: int = 6,
    evaluated: Any = None,
    **settings: Any,
) -> NegativeCacheTrainer:
    defaults = {"learning_rate": 1e-3, "save_strategy": "no", "per_device_train_batch_size": 4, "logging_steps": 1}
    args = SentenceTransformerTrainingArguments(
        str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        lr_scheduler_type="constant", **defaults | settings,
    )  # fmt: skip
    data = Dataset.from_dict(data) if isinstance(data, dict) and isinstance(next(iter(data.values())), list) else data
    return NegativeCacheTrainer(model=model, args=args, train_dataset=data, eval_dataset=evaluated, loss=loss)


def train(*args: Any, **settings: Any) -> NegativeCacheTrainer:
    trainer = make_trainer(*args, **settings)
    trainer.train()
    return trainer


def encode(model: SentenceTransformer, texts: list[str], **options: Any) -> Tensor:
    return model.eval().encode(texts, convert_to_tensor=True, normalize_embeddings=True, **options)


def encode_cached(loss: NegativeCacheRankingLoss) -> Tensor:
    """Cached documents, re-encoded in the order of their rows."""
    loss.model.eval()
    cache = loss.cache_loss.cache
    rows = cache.filled.nonzero()[:, 0]
    with torch.no_grad():
        return loss.cache_loss.document_encoder(cache.read(rows, [k for k in cache.specs if k != "embedding"]))


def cached_texts(loss: NegativeCacheRankingLoss) -> list[str]:
    """The texts of all cached documents, as the tokenizer decodes them."""
    cache = loss.cache_loss.cache
    return sorted(loss._documents.to_strings(cache.read(cache.filled.nonzero()[:, 0], [TOKENS])))
