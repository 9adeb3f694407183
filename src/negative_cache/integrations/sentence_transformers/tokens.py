"""Conversion of texts to cached features: one feature of token ids for all kinds of model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from negative_cache.cache.hashing import mix
from negative_cache.cache.specs import RaggedFeature
from negative_cache.cache.validation import roll_rows

# A token is stored as its id + 1, so that 0 is padding whatever the tokenizer's padding id.
TOKENS, TYPES = "tokens", "token_type_ids"
SPECS = {TOKENS: RaggedFeature(torch.int32), TYPES: RaggedFeature(torch.uint8)}
_PADDED_KEYS = {"input_ids", "attention_mask", "token_type_ids"}
_FLAT_KEYS = {"input_ids", "offsets"}


def to_tokens(inputs: dict[str, Any], pads_left: bool = False) -> dict[str, Tensor]:
    """Convert the model inputs of a column of texts to cached features.

    Args:
        inputs: Padded `input_ids` and `attention_mask`, int `[batch, length]`, with or without `token_type_ids`; or the
            flat `input_ids [n]` and `offsets [batch]` of `StaticEmbedding`. Values that are not tensors are ignored.
        pads_left: Whether padded inputs may have padding on the left.

    Returns:
        `tokens`, int `[batch, length]`, and `token_type_ids` if they were given; padded on the right.

    Raises:
        ValueError: The tensors are not the inputs of padded or flat text, or flat token ids were cut.
    """
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    if set(tensors) == _FLAT_KEYS:
        return {TOKENS: pad_flat(tensors["input_ids"] + 1, tensors["offsets"])}
    if not {"input_ids", "attention_mask"} <= set(tensors) <= _PADDED_KEYS or tensors["input_ids"].dim() != 2:
        raise ValueError(
            f"The model inputs are {sorted(tensors)}; expected text, as padded input_ids and attention_mask or as the "
            "input_ids and offsets of StaticEmbedding. Images, audio and flattened flash-attention batches cannot be "
            "cached; disable flattening."
        )
    features = {TOKENS: (tensors["input_ids"] + 1) * tensors["attention_mask"].bool()}
    if TYPES in tensors:
        features[TYPES] = tensors[TYPES]
    if not pads_left:
        return features
    starts = (features[TOKENS] == 0).cumprod(dim=1).sum(dim=1)
    return {key: roll_rows(value, starts) for key, value in features.items()}


def pad_flat(values: Tensor, offsets: Tensor) -> Tensor:
    """Split `values [n]` at `offsets [batch]` into rows `[batch, longest]`, padded with 0.

    Raises:
        ValueError: The offsets do not start at 0, descend, or exceed the number of values.
    """
    edges = torch.cat([offsets, offsets.new_full((1,), len(values))])
    lengths = edges.diff()
    if not len(lengths):
        return values.new_zeros(0, 0)
    width, least, first = torch.stack([lengths.max(), lengths.min(), edges[0]]).tolist()
    if least < 0 or first != 0:
        raise ValueError(
            f"{len(offsets)} texts have {len(values)} token ids, but offsets from {first} to {int(offsets.max())}: the "
            "ids were cut. accelerate cuts the flat input_ids of StaticEmbedding if it dispatches batches of a stream. "
            'Set accelerator_config={"dispatch_batches": False} in the training arguments.'
        )
    inside = torch.arange(width, device=values.device) < lengths[:, None]
    return values.new_zeros(inside.shape).masked_scatter_(inside, values)


def concatenate_rows(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate `[n_i, width_i]` to `[sum(n_i), max(width_i)]`, padded with 0."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def hash_tokens(tokens: Tensor) -> Tensor:
    """Hash each text of `tokens [batch, length]`, independent of its padding: int64 `[batch]`, 62 bits.

    The hash is the sum over all tokens of a mix of token and position.
    """
    is_token = tokens > 0
    positions = is_token.cumsum(dim=1)
    return (mix(tokens + (positions << 32)) * is_token).sum(dim=1) & ((1 << 62) - 1)
