"""What the models of sentence-transformers take: as the cache keeps it, and back again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from negative_cache.integrations.sentence_transformers.tokens import TOKENS, TYPES, take_tokens

_WRAPPERS = ("_orig_mod", "module")  # where torch.compile and DDP keep the model


class TextSide:
    """The texts of one side: a batch's model inputs as the cache keeps them, cached ones as the model takes them.

    Args:
        texts: What is told of them where they are refused, such as "documents".
        model: Returns the model, which a trainer may wrap later.
        embed: Model inputs -> embeddings, with gradient.
    """

    def __init__(self, texts: str, model: Callable[[], nn.Module], embed: Callable[[dict[str, Any]], Tensor]) -> None:
        self._texts = texts
        self._model = model
        self._embed = embed
        self._is_flat = False
        self._pad_token_id = 0
        # What a column has beside tokens, the same for all of its texts: a route, the length of a prompt.
        self._latest: dict[str, Any] = {}
        self._constants: dict[str, Any] | None = None  # of what is in the cache

    def take(self, column: dict[str, Any], is_remembered: bool = True) -> dict[str, Tensor]:
        """What the cache keeps of a column of texts.

        Args:
            column: Model inputs.
            is_remembered: Whether the texts will be in the cache, to be encoded again.

        Raises:
            ValueError: The inputs are not text, or are prepared in another way than those before.
        """
        constants = {key: value for key, value in column.items() if not isinstance(value, Tensor)}
        constants.pop("prompt_length", None)
        length = column.get("prompt_length")
        if length is not None and _leaves_prompts_out(self._model()):
            constants["prompt_length"] = int(length.flatten()[0]) if isinstance(length, Tensor) else int(length)
        kept = take_tokens({key: value for key, value in column.items() if key != "prompt_length"})
        self._latest = constants
        if is_remembered:
            self._remember(constants, "offsets" in column)
        return kept

    def encode(self, cached: dict[str, Tensor]) -> Tensor:
        """Embeddings of cached texts, with gradient."""
        tokens = cached[TOKENS].to(torch.int64)
        is_token = tokens > 0
        constants = self._constants or {}
        if self._is_flat:
            lengths = is_token.sum(dim=1)
            return self._embed({"input_ids": tokens[is_token] - 1, "offsets": lengths.cumsum(0) - lengths, **constants})
        features: dict[str, Any] = {
            "input_ids": torch.where(is_token, tokens - 1, self._pad_token_id),
            "attention_mask": is_token.to(torch.int64),
            **constants,
        }
        if TYPES in cached:
            features[TYPES] = cached[TYPES].to(torch.int64)
        return self._embed(features)

    def decode(self, cached: dict[str, Tensor]) -> list[str]:
        """The texts themselves, as far as tokens tell, in the way of the column that was taken last."""
        tokens = [[token - 1 for token in row if token] for row in cached[TOKENS].tolist()]
        tokenizer = self._tokenizer()
        decode = getattr(tokenizer, "batch_decode", None) or tokenizer.decode_batch
        texts: list[str] = decode(tokens, skip_special_tokens=True)
        return texts

    def _remember(self, constants: dict[str, Any], is_flat: bool) -> None:
        if self._constants is None:
            self._constants, self._is_flat = constants, is_flat
            self._pad_token_id = getattr(self._tokenizer(), "pad_token_id", None) or 0
        elif constants != self._constants or is_flat != self._is_flat:
            raise ValueError(
                f"These {self._texts} come with {constants}, those before with {self._constants}; texts of one cache "
                "are encoded again together, so that all of them need the same route and, where the pooling leaves "
                "prompts out, prompts of the same length. Give each dataset a loss of its own."
            )

    def _tokenizer(self) -> Any:
        """The tokenizer of the column that was taken last: of its route, where the model has several."""
        first, constants = unwrap(self._model())[0], self._latest
        resolve = getattr(first, "_resolve_route", None)
        if resolve is not None:
            first = first.sub_modules[resolve(task=constants.get("task"), modality=constants.get("modality"))][0]
        return getattr(first, "tokenizer", None)


def unwrap(model: nn.Module) -> Any:
    """The model within DDP and torch.compile."""
    inner = next(
        (getattr(model, name) for name in _WRAPPERS if isinstance(getattr(model, name, None), nn.Module)), None
    )
    return model if inner is None else unwrap(inner)


def check_wrappers(model: nn.Module, columns: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError where what is around the model cannot work with documents that are drawn."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1 and any("offsets" in c for c in columns):
        raise ValueError(
            "The model is in nn.DataParallel, which deals out each input by rows to several GPUs, but the inputs of "
            "StaticEmbedding have no rows. Start one process per GPU, `torchrun --nproc-per-node N script.py`, or show "
            "the script one GPU, CUDA_VISIBLE_DEVICES=0."
        )
    for module in {id(module): module for module in (model, unwrap(model))}.values():
        kind = type(vars(module).get("forward"))
        if kind.__name__ != "ForwardDecorator":
            continue
        if kind.__module__.endswith(".matryoshka"):
            raise ValueError(
                "MatryoshkaLoss of this version of sentence-transformers runs a loss once per dimension with the "
                "embeddings of the first time, but each time other documents are drawn. Leave it out and give "
                "NegativeCacheRankingLoss(model, matryoshka_dims=(256, 128)), or update sentence-transformers to 5.7."
            )
        raise ValueError(
            "AdaptiveLayerLoss and Matryoshka2dLoss take the batch's embeddings from earlier layers, but the cache "
            "has documents as the last layer embeds them. Use NegativeCacheRankingLoss without them."
        )


def matryoshka_dims(calculate_loss: Any, dim: int) -> tuple[int, ...]:
    """The dimensions, less than `dim`, that a MatryoshkaLoss has asked for by wrapping `calculate_loss`.

    Raises:
        ValueError: It asks for what `NegativeCacheLoss` cannot do.
    """
    dims = getattr(calculate_loss, "matryoshka_dims", None)
    if dims is None:
        return ()
    weights, count = calculate_loss.matryoshka_weights, calculate_loss.n_dims_per_step
    if dim not in dims or set(weights) != {1} or 0 < count < len(dims):
        raise ValueError(
            f"MatryoshkaLoss has the dimensions {list(dims)} with the weights {list(weights)}, and n_dims_per_step "
            f"{count}; around NegativeCacheRankingLoss it can have the model's {dim} and smaller ones, all with weight "
            "1 and in each step."
        )
    return tuple(number for number in dims if number != dim)


def _leaves_prompts_out(model: nn.Module) -> bool:
    """Whether the embedding of a text depends on how much of it is a prompt."""
    return any(getattr(module, "include_prompt", True) is False for module in model.modules())
