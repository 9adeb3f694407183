"""Texts as a tokenizer gives them, as the cache keeps them: one feature of tokens, whatever the model's inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from negative_cache.cache.specs import RaggedFeature

# In the cache a token is its id + 1, so that 0 is padding whatever the tokenizer pads with.
TOKENS, TYPES = "tokens", "token_type_ids"
SPECS = {TOKENS: RaggedFeature(torch.int32), TYPES: RaggedFeature(torch.uint8)}
_PADDED_KEYS = {"input_ids", "attention_mask", "token_type_ids"}
_FLAT_KEYS = {"input_ids", "offsets"}


def take_tokens(features: dict[str, Any]) -> dict[str, Tensor]:
    """What the cache keeps of a column of texts: `tokens [batch, width]` and, if given, `token_type_ids`."""
    tensors = {key: value for key, value in features.items() if isinstance(value, Tensor)}
    if set(tensors) == _FLAT_KEYS:
        return {TOKENS: _pad_flat(tensors["input_ids"] + 1, tensors["offsets"])}
    if not {"input_ids", "attention_mask"} <= set(tensors) <= _PADDED_KEYS or tensors["input_ids"].dim() != 2:
        raise ValueError(
            f"The model's inputs are {sorted(tensors)}; the cache keeps text given as padded input_ids and "
            "attention_mask, or as StaticEmbedding's input_ids and offsets. Images, audio and flattened "
            "flash-attention batches cannot be cached; for the latter turn flattening off."
        )
    is_token = tensors["attention_mask"].bool()
    kept = {TOKENS: (tensors["input_ids"] + 1) * is_token}
    if TYPES in tensors:
        kept[TYPES] = tensors[TYPES]
    return kept


def _pad_flat(values: Tensor, offsets: Tensor) -> Tensor:
    """Sequences that lie one behind the other, as rows filled up with 0."""
    lengths = torch.diff(offsets, append=offsets.new_full((1,), len(values)))
    width = int(lengths.max()) if len(lengths) else 0
    inside = torch.arange(width, device=values.device) < lengths[:, None]
    return values.new_zeros(inside.shape).masked_scatter_(inside, values)


def stack(parts: list[Tensor]) -> Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def hash_tokens(tokens: Tensor) -> Tensor:
    """A 62-bit hash of each row's tokens, whatever its padding: int64 `[batch]`.

    Sum over the tokens of a mix of token and position; integer arithmetic wraps around.
    """
    is_token = tokens > 0
    positions = is_token.cumsum(dim=1)
    return (_mix(tokens + (positions << 32)) * is_token).sum(dim=1) & ((1 << 62) - 1)


def _mix(values: Tensor) -> Tensor:
    values = (values ^ (values >> 31)) * 0x7FB5D329728EA185
    values = (values ^ (values >> 27)) * -0x7E25210B43D22BB3
    return values ^ (values >> 33)
