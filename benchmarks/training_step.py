"""A training step of a transformer on texts of random tokens: forward, backward, AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal
from unittest.mock import patch

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from benchmarks.encoders import full_cache_loss, minilm, random_encoder, random_texts
from benchmarks.sizes import TrainingSizes
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.sampling import choose

IN_BATCH = "in-batch"
MINILM = "all-MiniLM-L6-v2"


def random_model(sizes: TrainingSizes, device: torch.device) -> tuple[str, SentenceTransformer]:
    """A transformer with random weights, after its name."""
    name = f"random, {sizes.layers} layers x {sizes.hidden}"
    return name, random_encoder(sizes.hidden, sizes.layers, sizes.length, device)


def pretrained_model(sizes: TrainingSizes, device: torch.device) -> tuple[str, SentenceTransformer] | None:
    """MiniLM, after its name; None if it is not to be measured or not installed."""
    model = minilm(device) if sizes.use_minilm else None
    return None if model is None else (MINILM, model)


def cache_loss(
    model: SentenceTransformer,
    sizes: TrainingSizes,
    dtype: str,
    num_samples: float | Literal["auto"],
    device: torch.device,
) -> NegativeCacheRankingLoss:
    """The loss with a full cache.

    Args:
        model: The encoder.
        sizes: The sizes of the step and of the cache.
        dtype: Stored dtype of embeddings.
        num_samples: See `NegativeCacheLoss`.
        device: The device of the model.
    """
    loss = full_cache_loss(model, sizes.rows, sizes.length, getattr(torch, dtype), device, num_samples)
    loss.cache_loss.is_waiting = False
    return loss


def keep_waiting(loss: NegativeCacheRankingLoss, step: Callable[[], None]) -> Callable[[], None]:
    """The same step of a loss that waits in each call: its limit is infinite, and an eighth of the rows is free."""

    def call() -> None:
        cache = loss.cache_loss.cache
        assert cache is not None
        cache.filled[-cache.num_rows // 8 :] = False
        loss.cache_loss.is_waiting = True
        with patch.object(choose, "PAYS_ABOVE", math.inf):
            step()

    return call


def training_step(
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    sizes: TrainingSizes,
    device: torch.device,
    num_columns: int = 2,
) -> Callable[[], None]:
    """A step on new texts, with `num_columns` texts per pair."""

    def step() -> None:
        texts = [random_texts(sizes.batch, sizes.length, device) for _ in range(num_columns)]
        optimizer.zero_grad()
        loss(texts, None).backward()
        optimizer.step()

    return step
