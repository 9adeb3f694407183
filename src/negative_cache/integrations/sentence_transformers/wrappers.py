"""Wrappers around the model or the loss: DDP, torch.compile, MatryoshkaLoss, AdaptiveLayerLoss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import Router
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_WRAPPED = ("_orig_mod", "module")  # the attributes in which torch.compile and DDP keep the model


def unwrap(model: nn.Module) -> Any:
    """The model without DDP and torch.compile."""
    inner = next((getattr(model, name) for name in _WRAPPED if isinstance(getattr(model, name, None), nn.Module)), None)
    return model if inner is None else unwrap(inner)


def check_wrappers(model: nn.Module, columns: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError if a wrapper of the model cannot encode sampled documents.

    Args:
        model: The model, as the trainer has wrapped it.
        columns: Model inputs of each column of texts.
    """
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1 and any("offsets" in c for c in columns):
        raise ValueError(
            "The model is in nn.DataParallel, which splits inputs by row, but the inputs of StaticEmbedding have no "
            "rows. Start one process per GPU, `torchrun --nproc-per-node N script.py`, or make a single GPU visible, "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if isinstance(model, DistributedDataParallel) and torch.is_grad_enabled():
        _check_unused_parameters(model)
    for module in {id(module): module for module in (model, unwrap(model))}.values():
        # While MatryoshkaLoss or AdaptiveLayerLoss calls this loss, the model's `forward` is a `ForwardDecorator`.
        decorator = type(vars(module).get("forward"))
        if decorator.__name__ != "ForwardDecorator":
            continue
        if decorator.__module__.endswith(".matryoshka"):
            raise ValueError(
                "MatryoshkaLoss of this version of sentence-transformers calls the loss once per dimension with the "
                "same embeddings, but each call samples other documents. Use NegativeCacheRankingLoss(model, "
                "matryoshka_dims=(256, 128)) without it, or update sentence-transformers to 5.7."
            )
        raise ValueError(
            "AdaptiveLayerLoss and Matryoshka2dLoss take the embeddings of the batch from earlier layers, but cached "
            "embeddings are those of the last layer. Use NegativeCacheRankingLoss without them."
        )


def _check_unused_parameters(model: DistributedDataParallel) -> None:
    """Raise ValueError if DDP would take the parameters of one route for unused because another route ran last."""
    if not model.find_unused_parameters or model.static_graph:
        return
    for module in model.modules():
        if not isinstance(module, Router):
            continue
        routes = [{id(p) for p in route.parameters() if p.requires_grad} for route in module.sub_modules.values()]
        if any(route != routes[0] for route in routes):
            raise ValueError(
                "DDP searches for unused parameters after each forward pass, but each pass of a Router uses one of its "
                'routes. The backward pass would fail with "Expected to mark a variable ready only once". Set '
                "ddp_find_unused_parameters=False in the training arguments."
            )


def matryoshka_dims(calculate_loss: Any, dim: int) -> tuple[int, ...]:
    """The dimensions below `dim` that a MatryoshkaLoss around the loss requests; empty if there is none.

    Args:
        calculate_loss: The loss's attribute `calculate_loss`, which MatryoshkaLoss replaces.
        dim: Dimensions of the model's embeddings.

    Raises:
        ValueError: The dimensions exclude `dim`, have weights other than 1, or are sampled per step.
    """
    dims = getattr(calculate_loss, "matryoshka_dims", None)
    if dims is None:
        return ()
    weights, count = calculate_loss.matryoshka_weights, calculate_loss.n_dims_per_step
    if dim not in dims or set(weights) != {1} or 0 < count < len(dims):
        raise ValueError(
            f"MatryoshkaLoss has matryoshka_dims={list(dims)}, matryoshka_weights={list(weights)} and "
            f"n_dims_per_step={count}. Around NegativeCacheRankingLoss the dimensions must include the model's {dim}, "
            "and all of them must have weight 1 and be used in each step."
        )
    return tuple(number for number in dims if number != dim)
