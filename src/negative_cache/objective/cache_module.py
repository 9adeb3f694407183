"""The cache of a loss: made at the first step, shared by the ranks of a process group, saved with the loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from negative_cache.cache.rows import CacheHolder, NegativeCache, state_of
from negative_cache.cache.specs import Features, FeatureSpec, Specs, embedding_spec, infer_specs, spec_from_json
from negative_cache.distributed.ranks import Ranks, shard_sizes, world
from negative_cache.objective.batch import EMBEDDING, SCORED
from negative_cache.sampling.draw import DocumentEncoder


class RanksCache(CacheHolder):
    """Holds this rank's rows of a cache, the generator of its draws, and what is known before there are rows.

    Args:
        document_encoder: Features `{key: [n, ...]}` -> embeddings `[n, dim]`.
        cache_size: Rows of all ranks.
        specs: Spec per document feature; None for those of the first batch.
        embedding_dtype, feature_device, feature_folder, process_group: See `NegativeCacheLoss`.
        generator: Source of randomness.
    """

    def __init__(
        self,
        document_encoder: DocumentEncoder,
        cache_size: int,
        specs: Specs | None,
        embedding_dtype: torch.dtype,
        feature_device: torch.device | str | None,
        feature_folder: str | Path | None,
        generator: torch.Generator,
        process_group: dist.ProcessGroup | Literal["world"] | None,
    ) -> None:
        super().__init__()
        # In a tuple, the encoder is no submodule: its parameters and its training mode are the caller's.
        self._document_encoder = (document_encoder,)
        self.cache_size = cache_size
        self.specs: dict[str, FeatureSpec] | None = None if specs is None else dict(specs)
        self.embedding_dtype = embedding_dtype
        self.embedding_dim: int | None = None  # where it is known before the first step
        self.feature_device = feature_device
        self.feature_folder = feature_folder
        self.generator = generator
        self._first_state = generator.get_state()
        self._process_group = process_group
        self._ranks: Ranks | None = None

    @property
    def document_encoder(self) -> DocumentEncoder:
        """The encoder of drawn rows; may be replaced at any time."""
        return self._document_encoder[0]

    @document_encoder.setter
    def document_encoder(self, encoder: DocumentEncoder) -> None:
        self._document_encoder = (encoder,)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("document_encoder", "cache"):  # nn.Module would register a module, and never reach the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def cache(self) -> NegativeCache | None:
        """This rank's rows; None before the first step."""
        return self._held.get("cache")

    @cache.setter
    def cache(self, cache: NegativeCache) -> None:
        self._held["cache"] = cache

    @cache.deleter
    def cache(self) -> None:
        self._held.pop("cache", None)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes that share the cache; None for this one alone."""
        if self._process_group != "world":
            return self._process_group
        return world()

    @property
    def ranks(self) -> Ranks:
        """The processes that share the cache."""
        if self._ranks is None or self._ranks.group is not self.process_group:
            self._ranks = Ranks(self.process_group)
        return self._ranks

    def _specs_for(self, document_features: Features) -> dict[str, FeatureSpec]:
        """The specs of documents: the cache's, or what is known before there is one."""
        if not isinstance(document_features, Mapping):
            raise TypeError(
                f"`document_features` is {type(document_features).__name__}; expected a dict of feature name -> "
                "values, what the document encoder takes."
            )
        if self.cache is None:
            return self.specs or infer_specs(document_features)
        return {key: spec for key, spec in self.cache.specs.items() if key not in SCORED}

    def step_number(self) -> int:
        """How many steps have updated the cache; waits for the device."""
        return 0 if self.cache is None else int(self.cache.step)

    def _new_cache(self, specs: Specs, device: torch.device) -> NegativeCache:
        """An empty cache of this rank's share of the rows."""
        num_rows = shard_sizes(self.cache_size, self.ranks.size)[self.ranks.rank]
        if num_rows == 0:
            raise ValueError(f"`cache_size` is {self.cache_size}, less than the {self.ranks.size} ranks that share it.")
        return NegativeCache.empty(specs, num_rows, device, self.feature_device, SCORED, self.feature_folder)

    def get_extra_state(self) -> Tensor:
        """The generator's state, uint8."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue the draws where the saved run stopped."""
        self.generator.set_state(state.cpu())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.cache is None and prefix + "cache.filled" in state_dict:
            saved = state_of(state_dict, prefix + "cache.")
            (dim,) = saved["specs"].pop(EMBEDDING)["shape"]
            specs = {key: spec_from_json(spec) for key, spec in saved["specs"].items()}
            scored = {key: spec for key, spec in specs.items() if key in SCORED}  # known at the first step
            specs = {**(self.specs or specs), **scored, EMBEDDING: embedding_spec(dim, self.embedding_dtype)}
            device = state_dict[prefix + "cache.filled"].device
            cache = self._new_cache(specs, device)
            cache.check_loadable(state_dict, prefix + "cache.")
            self.cache = cache
        super()._load_from_state_dict(state_dict, prefix, *args)
