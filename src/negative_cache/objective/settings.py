"""Checks of what a loss is made with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from negative_cache.cache.specs import Specs, check_embedding_dtype
from negative_cache.cache.table import check_feature_folder
from negative_cache.objective.batch import SCORED


def check_settings(
    *,
    cache_size: int,
    scale: float,
    top_k: int | None,
    num_samples: int,
    num_candidates: int | None,
    shared: bool,
    matryoshka_dims: Sequence[int],
    warmup_fill: float,
    refresh_per_step: int,
    absolute_margin: float | None,
    relative_margin: float | None,
    guide_margin: float,
    embedding_dtype: torch.dtype,
    specs: Specs | None,
    feature_folder: Path | str | None,
    feature_device: torch.device | str | None,
) -> None:
    """Raise ValueError for settings of `NegativeCacheLoss` that make no sense, TypeError for a dtype that is none."""
    if not isinstance(cache_size, int) or cache_size < 1:
        raise ValueError(f"`cache_size` is {cache_size}; it must be a whole number of at least 1.")
    if isinstance(matryoshka_dims, int):
        raise ValueError(
            f"`matryoshka_dims` is {matryoshka_dims}; expected several numbers, such as ({matryoshka_dims},)."
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"`scale` is {scale}; it must be a positive number.")
    if top_k is not None and not 1 <= top_k <= cache_size:
        raise ValueError(f"`top_k` is {top_k}; it must be from 1 to the cache's {cache_size} rows.")
    if num_samples < 1:
        raise ValueError(f"`num_samples` is {num_samples}; it must be at least 1.")
    if num_candidates is not None and not shared:
        raise ValueError(f"`num_candidates` is {num_candidates}; candidates are only chosen from with shared=True.")
    if num_candidates is not None and num_candidates < num_samples:
        raise ValueError(
            f"`num_candidates` is {num_candidates}; it must be at least `num_samples`, {num_samples}, which are chosen "
            "from them."
        )
    if matryoshka_dims and not shared:
        raise ValueError("`matryoshka_dims` needs shared=True: shorter embeddings use what was drawn for all queries.")
    if any(dim < 1 for dim in matryoshka_dims) or len(set(matryoshka_dims)) < len(matryoshka_dims):
        raise ValueError(f"`matryoshka_dims` is {list(matryoshka_dims)}; expected numbers of components, each once.")
    if not 0 <= warmup_fill <= 1:
        raise ValueError(f"`warmup_fill` is {warmup_fill}; it must be a share of the cache's rows, from 0 to 1.")
    if not 0 <= refresh_per_step <= cache_size:
        raise ValueError(f"`refresh_per_step` is {refresh_per_step}; it must be from 0 to the {cache_size} rows.")
    margins = {"absolute_margin": absolute_margin, "relative_margin": relative_margin, "guide_margin": guide_margin}
    for name, margin in margins.items():
        if margin is not None and not math.isfinite(margin):
            raise ValueError(f"`{name}` is {margin}; it must be a number.")
    if relative_margin is not None and not 0 <= relative_margin <= 1:
        raise ValueError(
            f"`relative_margin` is {relative_margin}; it is a share of the positive's similarity, from 0 to 1: 0.05 "
            "hides documents above 95 % of it."
        )
    check_embedding_dtype(embedding_dtype)
    for key in SCORED:
        if specs is not None and key in specs:
            raise ValueError(f"`specs` has the key {key!r}, which the cache itself uses. Rename the feature.")
    if feature_folder is not None:
        check_feature_folder(feature_folder, feature_device, specs or {})


def default_candidates(num_samples: int) -> int:
    """Rows drawn per query, of which `num_samples` are encoded: twice as many, but from 8 to 16, or as many."""
    return max(8, min(16, 2 * num_samples), num_samples)
