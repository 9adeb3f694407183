"""The module that holds the cache of a loss, which is created at the first step and saved with the loss."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from negative_cache.cache.rows import CacheHolder, NegativeCache, state_of
from negative_cache.cache.specs import (
    Features,
    FeatureSpec,
    Specs,
    check_feature,
    check_specs,
    embedding_spec,
    infer_specs,
    spec_from_json,
)
from negative_cache.distributed import check_picklable, shard_sizes, world
from negative_cache.distributed.collectives import Ranks
from negative_cache.objective.batch import EMBEDDING, SCORED
from negative_cache.sampling.encode import DocumentEncoder

if TYPE_CHECKING:
    from typing_extensions import Self


class CacheModule(CacheHolder):
    """Holds this rank's rows of a cache, the generator for draws, and the settings known before the first step.

    Args:
        document_encoder: Features `{key: [n, ...]}` -> embeddings `[n, dim]`.
        cache_size: Number of rows of all ranks.
        specs: Spec per document feature; None to infer them from the first batch.
        embedding_dtype, feature_device, process_group: See `NegativeCacheLoss`.
        generator: Source of randomness.
    """

    def __init__(
        self,
        document_encoder: DocumentEncoder,
        cache_size: int,
        specs: Specs | None,
        embedding_dtype: torch.dtype,
        feature_device: torch.device | str | None,
        generator: torch.Generator,
        process_group: dist.ProcessGroup | Literal["world"] | None,
    ) -> None:
        super().__init__()
        self.document_encoder = document_encoder
        self.cache_size = cache_size
        if specs is not None:
            check_specs(specs)
        self.specs: dict[str, FeatureSpec] | None = None if specs is None else dict(specs)
        self.embedding_dtype = embedding_dtype
        self.embedding_dim: int | None = None  # set if it is known before the first step
        self.feature_device = feature_device
        self.generator = generator
        self._first_state = generator.get_state()
        self._process_group = process_group
        self._ranks: Ranks | None = None

    @property
    def document_encoder(self) -> DocumentEncoder:
        """The encoder of cached documents; may be replaced at any time. TypeError if it is not callable."""
        return self._document_encoder[0]

    @document_encoder.setter
    def document_encoder(self, encoder: DocumentEncoder) -> None:
        if not callable(encoder):
            raise TypeError(
                f"`document_encoder` is {type(encoder).__name__}, which is not callable; expected a module or function "
                "of features {key: [n, ...]} that returns embeddings [n, dim]."
            )
        # Inside a tuple, the encoder is not a submodule: the caller manages its parameters and its training mode.
        self._document_encoder = (encoder,)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("document_encoder", "cache"):  # nn.Module would register a module and bypass the property
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
        """The process group that shares the cache; None for this process alone."""
        if self._process_group != "world":
            return self._process_group
        return world()

    @property
    def ranks(self) -> Ranks:
        """The processes that share the cache."""
        if self._ranks is None or self._ranks.group is not self.process_group:
            self._ranks = Ranks(self.process_group)
        return self._ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the cache, the generator and the encoder. The copy has the same process group."""
        memo[id(self._process_group)] = self._process_group
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy({**self.__dict__, "_ranks": None}, memo))  # type: ignore[no-untyped-call]
        if other.document_encoder is self.document_encoder:
            warnings.warn(
                f"The copy of {type(self).__name__} has the same document encoder as the original, because a function "
                "is not copied. Assign `document_encoder` of the copy, or pass a module or a method of a module.",
                stacklevel=2,
            )
        return other

    def __getstate__(self) -> dict[str, Any]:
        check_picklable(self, self._process_group, 'process_group="world"')
        return {**self.__dict__, "_ranks": None}

    def _specs_for(self, document_features: Features) -> dict[str, FeatureSpec]:
        """The specs of all features of the cache; before the first step, those of the document features."""
        if not isinstance(document_features, Mapping):
            raise TypeError(
                f"`document_features` is {type(document_features).__name__}; expected a dict of feature name -> "
                "values, the input of the document encoder."
            )
        specs = self.specs if self.cache is None else self.cache.specs
        if not specs:
            return infer_specs(document_features)
        for key, value in document_features.items():
            is_usual = isinstance(value, Tensor) and value.layout == torch.strided and value.dim() > 0
            if not isinstance(value, Tensor) or not is_usual or value.is_nested or value.is_meta:
                check_feature(f"document_features[{key!r}]", value)
        return specs

    def step_number(self) -> int:
        """The number of steps that have updated the cache; synchronizes the device."""
        return 0 if self.cache is None else int(self.cache.step)

    def _new_cache(self, specs: Specs, device: torch.device, num_ids: int = 1) -> NegativeCache:
        """Create an empty cache for this rank's part of the rows, with `num_ids` ids per document."""
        num_rows = self.cache_size
        if self.process_group is not None:
            num_rows = shard_sizes(self.cache_size, self.ranks.size)[self.ranks.rank]
        if num_rows == 0:
            raise ValueError(
                f"`cache_size` is {self.cache_size}, less than the {self.ranks.size} ranks that share it. "
                "Use a larger cache."
            )
        return NegativeCache.empty(specs, num_rows, device, self.feature_device, SCORED, num_ids=num_ids)

    def get_extra_state(self) -> Tensor:
        """The generator's state, uint8."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the generator's state, so that the draws continue where the saved run stopped."""
        self.generator.set_state(state.cpu())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, _, _, _, error_messages = args
        is_other = prefix + "_extra_state" not in state_dict
        if is_other and any(key.startswith(prefix) and key.endswith(".filled") for key in state_dict):
            state = f"The state under {prefix!r}" if prefix else "The state"
            error_messages.append(
                f"{state} is that of a handler, or of another module with caches; expected that of "
                f"{type(self).__name__}. Begin with an empty cache, which fills in some steps."
            )
        if self.cache is None and prefix + "cache.filled" in state_dict:
            saved = state_of(state_dict, prefix + "cache.")
            (dim,) = saved["specs"].pop(EMBEDDING)["shape"]
            specs = {key: spec_from_json(spec) for key, spec in saved["specs"].items()}
            scored = {key: spec for key, spec in specs.items() if key in SCORED}  # known at the first step
            specs = {**(self.specs or specs), **scored, EMBEDDING: embedding_spec(dim, self.embedding_dtype)}
            device = state_dict[prefix + "cache.filled"].device
            cache = self._new_cache(specs, device, state_dict[prefix + "cache.document_ids"][:1].numel() or 1)
            cache.check_loadable(state_dict, prefix + "cache.")
            self.cache = cache
        super()._load_from_state_dict(state_dict, prefix, *args)
