"""A decoder of transformers with last-token pooling: cached texts get the padding that its tokenizer gives."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import Qwen2Config, Qwen2Model

from negative_cache import NegativeCacheLoss
from negative_cache.integrations.sentence_transformers.text import CachedTexts
from negative_cache.integrations.sentence_transformers.tokens import TOKENS, hash_tokens
from support import POSITIVES
from text_models import make_tiny

VOCABULARY, PAD = 200, 199


def new_model() -> Qwen2Model:
    torch.manual_seed(0)
    return Qwen2Model(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    ).train()


def last_token(states: Tensor, mask: Tensor) -> Tensor:
    """The last column if every text ends there, else the last token by the length of each text."""
    if bool(mask[:, -1].all()):
        return states[:, -1]
    return states[torch.arange(len(states)), mask.sum(dim=1) - 1]


def batch_of(number: int, side: str) -> dict[str, Tensor]:
    rng = random.Random(number)
    lengths = [rng.randint(3, 10 + 5 * number) for _ in range(16)]
    ids, mask = torch.full((16, max(lengths)), PAD), torch.zeros(16, max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        inside = slice(-length, None) if side == "left" else slice(length)
        ids[row, inside] = torch.tensor([rng.randrange(PAD) for _ in range(length)])
        mask[row, inside] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_training_no_embedding_is_stale(side: str):
    model = new_model()

    def encode(features: dict[str, Tensor]) -> Tensor:
        return normalize(last_token(model(**features).last_hidden_state, features["attention_mask"]), dim=-1)

    loss_fn = NegativeCacheLoss(encode, cache_size=256, num_samples=1, seed=0)
    staleness = []
    for number in range(5):
        documents = batch_of(number, side)
        queries = encode({key: value[:, :4] if side == "right" else value[:, -4:] for key, value in documents.items()})
        loss_fn(queries, encode(documents), documents, torch.arange(16) + 16 * number)
        staleness.append(loss_fn.metrics()["staleness"])
    assert max(staleness) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_sentence_transformers_texts_are_padded_as_by_their_tokenizer(side: str):
    """All inputs of the model, for any of the texts."""
    model = make_tiny()
    model.tokenizer.padding_side = side
    seen: list[dict[str, Tensor]] = []

    def embed(inputs: dict[str, Tensor]) -> Tensor:
        seen.append(inputs)
        return torch.zeros(len(inputs["input_ids"]), 1)

    texts = CachedTexts("documents", lambda: model, embed)
    features = texts.from_inputs(model.preprocess(POSITIVES), is_cached=True)
    for chosen in ([0, 1], [11, 0, 5], list(range(12))):
        width = int((features[TOKENS][chosen] > 0).sum(dim=1).max())
        texts.embed({key: value[chosen, :width] for key, value in features.items()})  # without padding at the end
        expected = model.preprocess([POSITIVES[i] for i in chosen])
        for key, value in seen[-1].items():
            if isinstance(value, Tensor):
                assert torch.equal(value, expected[key]), key
    model.tokenizer.padding_side = "right"
    again = texts.from_inputs(model.preprocess(POSITIVES), is_cached=False)
    assert torch.equal(hash_tokens(features[TOKENS]), hash_tokens(again[TOKENS]))
