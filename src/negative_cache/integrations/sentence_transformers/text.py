"""Conversion of anchors or documents from model inputs to cached features, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from negative_cache.cache.validation import roll_rows
from negative_cache.integrations.sentence_transformers.tokens import TOKENS, TYPES, to_tokens


class CachedTexts:
    """Converts the model inputs of texts to cached features, and encodes cached features with the model.

    Args:
        name: "anchors" or "documents", for error messages.
        get_model: Returns the model without wrappers. A trainer may replace or wrap the model later.
        embed: Model inputs -> embeddings `[n, dim]`, with gradient.
    """

    def __init__(self, name: str, get_model: Callable[[], Any], embed: Callable[[dict[str, Any]], Tensor]) -> None:
        self._name = name
        self._get_model = get_model
        self._embed = embed
        self._is_flat = False
        self._pad_token_id = 0
        self._pads_left = False
        # Constants are inputs that are the same for all texts of a column: the route and the prompt length.
        self._latest_constants: dict[str, Any] = {}
        self._cached_constants: dict[str, Any] | None = None

    def from_inputs(self, inputs: dict[str, Any], is_cached: bool) -> dict[str, Tensor]:
        """Convert the model inputs of a column of texts to cached features.

        Args:
            inputs: The output of `model.preprocess`.
            is_cached: Whether the texts will be stored in the cache and re-encoded later.

        Returns:
            See `to_tokens`.

        Raises:
            ValueError: The inputs are not text, or their route or prompt length differs from that of the cached texts.
        """
        constants = self._constants_of(inputs)
        self._latest_constants = constants
        features = to_tokens({key: value for key, value in inputs.items() if key != "prompt_length"}, self._is_left())
        if is_cached:
            self._remember(constants, "offsets" in inputs)
        return features

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """Encode cached texts: embeddings `[n, dim]`, with gradient to the model."""
        tokens = features[TOKENS].to(torch.int64)
        is_token = tokens > 0
        constants = self._cached_constants or {}
        if self._is_flat:
            lengths = is_token.sum(dim=1)
            return self._embed({"input_ids": tokens[is_token] - 1, "offsets": lengths.cumsum(0) - lengths, **constants})
        if self._pads_left:
            shifts = -is_token.flip(1).int().argmax(dim=1)  # the padding at the end of each text
            tokens, is_token = roll_rows(tokens, shifts), roll_rows(is_token, shifts)
            features = {key: roll_rows(value, shifts) for key, value in features.items() if key == TYPES}
        inputs: dict[str, Any] = {
            "input_ids": torch.where(is_token, tokens - 1, self._pad_token_id),
            "attention_mask": is_token.to(torch.int64),
            **constants,
        }
        if TYPES in features:
            inputs[TYPES] = features[TYPES].to(torch.int64)
        return self._embed(inputs)

    def to_strings(self, features: dict[str, Tensor]) -> list[str]:
        """Decode texts with the tokenizer of the latest column, without special tokens; synchronizes the device."""
        tokens = [[token - 1 for token in row if token] for row in features[TOKENS].tolist()]
        tokenizer = self._tokenizer()
        decode = getattr(tokenizer, "batch_decode", None) or tokenizer.decode_batch
        strings: list[str] = decode(tokens, skip_special_tokens=True)
        return strings

    def _constants_of(self, inputs: dict[str, Any]) -> dict[str, Any]:
        length = inputs.get("prompt_length")
        constants = {k: v for k, v in inputs.items() if not isinstance(v, Tensor) and k != "prompt_length"}
        # Only pooling that excludes the prompt makes the embedding depend on where the prompt ends.
        if length is not None and _excludes_prompts(self._get_model()):
            constants["prompt_length"] = int(length.flatten()[0]) if isinstance(length, Tensor) else int(length)
        return constants

    def _remember(self, constants: dict[str, Any], is_flat: bool) -> None:
        if self._cached_constants is None:
            self._cached_constants, self._is_flat = constants, is_flat
            self._pad_token_id = getattr(self._tokenizer(), "pad_token_id", None) or 0
            self._pads_left = self._is_left()
        elif constants != self._cached_constants or is_flat != self._is_flat:
            raise ValueError(
                f"The inputs of these {self._name} include {constants}, those of the cached ones "
                f"{self._cached_constants}. Cached texts are re-encoded together, so all of them need the same route "
                "and, if the pooling excludes prompts, prompts of the same length. Give each dataset a loss of its own."
            )

    def _is_left(self) -> bool:
        """Whether the tokenizer of the latest column pads on the left."""
        return getattr(self._tokenizer(), "padding_side", "right") == "left"

    def _tokenizer(self) -> Any:
        """The tokenizer of the latest column; a model with several routes has one per route."""
        first, constants = self._get_model()[0], self._latest_constants
        resolve = getattr(first, "_resolve_route", None)
        if resolve is not None:
            first = first.sub_modules[resolve(task=constants.get("task"), modality=constants.get("modality"))][0]
        return getattr(first, "tokenizer", None)


def _excludes_prompts(model: Any) -> bool:
    """Whether the model's pooling excludes the tokens of the prompt."""
    return any(getattr(module, "include_prompt", True) is False for module in model.modules())
