"""Steps on a fake GPU: where the host synchronizes it, and where a step makes float64 tensors on it.

Run as a script; prints one JSON object.

Tensors on the fake device have shapes but no values. Reading a value would synchronize a real device, and so would a
copy to the host, or a copy from the host that is not asynchronous.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import embedding, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from negative_cache import (
    CacheClassificationLoss,
    CacheLossHandler,
    CacheManager,
    FixedLenFeature,
    NegativeCache,
    NegativeCacheLoss,
    RaggedFeature,
)
from negative_cache.cache.specs import Specs

GPU = "fakegpu"
BATCH, DIM, WIDTH = 8, 16, 6


class Waits(TorchDispatchMode):
    """Counts synchronizations by the line of the library that causes them; every value that is read is `WIDTH`."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].device.type == GPU:
                self.note()
            return True if args[0].dtype == torch.bool else WIDTH
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            is_async = kwargs.get("non_blocking", False) or args[2:] == (True,)
            crosses = source.device.type != result.device.type
            if crosses and not (is_async and result.device.type == GPU):
                self.note()
        return result

    def note(self) -> None:
        frames = traceback.extract_stack()[:-2]
        last = next((frame for frame in reversed(frames) if "/src/negative_cache/" in frame.filename), frames[-1])
        self.places[f"{last.filename.rsplit('/', 1)[1]}:{last.name}: {last.line}"] += 1


class WideTensors(Waits):
    """Counts float64 and complex128 tensors on the fake device, by the line of the library that makes them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else WIDTH
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if any(x.device.type == GPU and x.dtype in (torch.float64, torch.complex128) for x in tensors):
            self.note()
        return result


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(100, DIM, device=GPU))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        vectors = embedding(features["row"], self.table)
        for key in ("tokens", "attention_mask"):
            if key in features:
                vectors = vectors + embedding(features[key], self.table).sum(dim=1)
        return normalize(vectors, dim=1)


def steps(loss: nn.Module, encoder: Encoder, **extra: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        features = {"row": torch.zeros(BATCH, dtype=torch.int64, device=GPU)}
        features |= {key: extra[key]() for key in extra if key in ("tokens", "attention_mask")}
        documents, queries = encoder(features), encoder(features)
        options = {key: make() for key, make in extra.items() if key not in features}
        loss(queries, documents, features, **options).backward()

    return run


def automatic_steps(loss: NegativeCacheLoss, encoder: Encoder, is_waiting: bool) -> Callable[[], None]:
    train = steps(loss, encoder)

    def run() -> None:
        loss.is_waiting = is_waiting
        train()

    return run


def evaluations(loss: nn.Module, encoder: Encoder) -> Callable[[], None]:
    train = steps(loss, encoder)

    def run() -> None:
        train()
        loss.eval()
        with torch.no_grad():
            features = {"row": torch.zeros(BATCH, dtype=torch.int64, device=GPU)}
            loss(encoder(features), encoder(features), features)
        loss.train()

    return run


def handler_steps(encoder: Encoder, loss: CacheClassificationLoss) -> Callable[[], None]:
    specs = {"embedding": FixedLenFeature([DIM], torch.float32), "row": FixedLenFeature([], torch.int64)}
    handler = CacheLossHandler(CacheManager(specs, 256), loss, "embedding", ("row",)).to(GPU)

    def run() -> None:
        features = {"row": torch.zeros(BATCH, dtype=torch.int64, device=GPU)}
        result = handler.update_cache_and_compute_loss(encoder, encoder(features), encoder(features), features)
        result.backward()

    return run


def new_ragged(encoder: Encoder) -> NegativeCacheLoss:
    """A loss with ragged features that have room for every row: growing their arenas would synchronize the device."""
    ragged = {key: RaggedFeature(torch.int32, 32) for key in ("tokens", "attention_mask")}
    specs: Specs = {"row": FixedLenFeature([], torch.int64), **ragged}
    loss = NegativeCacheLoss(encoder, 256, num_samples=1, seed=0, specs=specs)
    embedding_spec = FixedLenFeature([DIM], torch.float32)
    loss.cache = NegativeCache.empty({"embedding": embedding_spec, **specs}, 256, GPU, scored_keys=["embedding"])
    for key in ragged:
        column = loss.cache.get_submodule(f"feature_{key}")
        column.arena = torch.zeros(256 * 32, dtype=torch.int32, device=GPU)
    return loss


def wait_three_times() -> None:
    values = torch.zeros(3, device=GPU)
    float(values.sum())
    values.cpu()
    torch.zeros(3).to(GPU)
    torch.zeros(3).to(GPU, non_blocking=True)  # does not synchronize


def scenarios(encoder: Encoder, losses: list[CacheClassificationLoss]) -> dict[str, Callable[[], None]]:
    def ids() -> Tensor:
        return torch.zeros(BATCH, dtype=torch.int64, device=GPU)

    def guide() -> Tensor:
        return torch.zeros(BATCH, 4, device=GPU)

    def tokens() -> Tensor:
        return torch.ones(BATCH, WIDTH, dtype=torch.int32, device=GPU)

    def new(**options: Any) -> NegativeCacheLoss:
        loss = NegativeCacheLoss(encoder, 256, **{"num_samples": 1, "seed": 0, **options})
        if loss.log_scale is not None:
            loss.log_scale = nn.Parameter(torch.zeros(1, device=GPU))
        return loss

    return {
        "plain": steps(new(), encoder),
        "ids": steps(new(), encoder, document_ids=ids, positive_ids=lambda: torch.stack([ids(), ids()], dim=1)),
        "bfloat16": steps(new(embedding_dtype=torch.bfloat16), encoder),
        "evaluation": evaluations(new(), encoder),
        "int8": steps(new(embedding_dtype=torch.int8), encoder),
        "float64": steps(new(embedding_dtype=torch.float64), encoder),
        "samples and scale": steps(new(num_samples=3, learnable_scale=True, use_lru=False), encoder),
        "fraction": steps(new(num_samples=0.25), encoder),
        "automatic": automatic_steps(new(num_samples="auto"), encoder, is_waiting=False),
        "waiting": automatic_steps(new(num_samples="auto"), encoder, is_waiting=True),
        "ragged": steps(new_ragged(encoder), encoder, tokens=tokens, attention_mask=tokens),
        "given negatives": steps(
            new(),
            encoder,
            document_ids=ids,
            negative_ids=ids,
            negative_embeddings=lambda: encoder({"row": ids()}),
            negative_features=lambda: {"row": ids()},
        ),
        "own draws": steps(new(in_batch=False, shared=False), encoder),
        "margins": steps(new(absolute_margin=0.1, relative_margin=0.05), encoder, document_ids=ids),
        "guide": steps(new(), encoder, guide_queries=guide, guide_documents=guide),
        "correction": steps(new(), encoder, log_q=lambda: torch.zeros(BATCH, device=GPU)),
        "refresh": steps(new(refresh_per_step=3), encoder),
        "matryoshka": steps(new(matryoshka_dims=(8,)), encoder),
        "handler": handler_steps(encoder, losses[0]),
        "handler with top_k": handler_steps(encoder, losses[1]),
        "features on the host": steps(new(feature_device="cpu"), encoder),
        "three waits": wait_three_times,
    }


def main() -> None:
    _setup_privateuseone_for_python_backend(GPU)
    getattr(torch, GPU).get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    found: dict[str, dict[str, Any]] = {"waits": {}, "wide": {}}
    losses = [CacheClassificationLoss("embedding", ("row",), lambda s: 20.0 * s, top_k=top_k) for top_k in (None, 16)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, run in scenarios(Encoder(), losses).items():
            with Waits():  # the first step creates the cache
                run()
                run()
            with Waits() as waits:
                run()
            with WideTensors() as wide:
                run()
            found["waits"][name], found["wide"][name] = dict(waits.places), dict(wide.places)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
