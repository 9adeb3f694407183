"""Random numbers from a generator that the user can seed, the same on every device and in compiled code."""

from __future__ import annotations

import math
import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

# Types of devices without float64: Apple's GPUs, and many of Intel's. Sums and uniforms are float32 on them, float64 on
# all others. A float32 sum is exact enough over a few hundred blocks or rows, but not over all rows of a cache.
WITHOUT_FLOAT64 = {"mps", "xpu"}


def _registry() -> MutableMapping[int, torch.Generator]:
    """Generators by id. If torch is too old for weak references to them, they are kept alive, about 5 kB each."""
    try:
        weakref.ref(torch.Generator())
    except TypeError:
        return {}
    return weakref.WeakValueDictionary()


# `torch.compile` cannot hold a generator; compiled code refers to it by its id.
_generators = _registry()


class _Generator(torch.Generator):
    """A CPU generator that can be sent to another process; torch's own passes on a tensor that it frees too early."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.initial_seed(), bytes(self.get_state().tolist()))


def _restored(seed: int, state: bytes) -> torch.Generator:
    generator = new_generator(seed)
    return generator.set_state(torch.tensor(list(state), dtype=torch.uint8, device="cpu"))


def new_generator(seed: int | None = None) -> torch.Generator:
    """Create a CPU generator with the given seed, or with a seed from torch's global generator."""
    generator = _Generator()
    generator.manual_seed(int(torch.randint(2**62, (), device="cpu").item()) if seed is None else seed)
    register(generator)
    return generator


def register(generator: torch.Generator) -> None:
    """Make a generator known to compiled code; called before compilation."""
    if not torch.compiler.is_compiling():
        _generators[id(generator)] = generator


def uniforms(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniforms in [0, 1) from a CPU generator, the same on every device: float64, or float32 on `WITHOUT_FLOAT64`."""
    if torch.compiler.is_compiling():
        drawn: Tensor = torch.ops.negative_cache.uniforms(id(generator), shape, device)
        return drawn
    register(generator)
    return _uniforms(id(generator), shape, device)


def sample(scores: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw positions from the softmax of `scores [batch, n]` by inverse CDF: int64 `[batch, num_samples]`.

    The cumulative sums and the uniforms are float64, so that improbable positions are neither lost nor tied. Without
    float64, a draw takes two steps, with short sums: a block, then a position in it. A row without a finite score gives
    arbitrary positions.
    """
    top = scores.amax(dim=1, keepdim=True)
    scores = scores - torch.where(top.isfinite(), top, 0)
    if scores.device.type in WITHOUT_FLOAT64:
        return _sample_by_blocks(scores.exp(), num_samples, generator)
    weights = scores.to(torch.float64).exp()
    uniform = uniforms((scores.shape[0], num_samples), generator, scores.device)
    return inverse_cdf(weights.cumsum(dim=1), uniform)


def inverse_cdf(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Draw positions in proportion to weights: int64 `[batch, n]`. Weight 0 is drawn only if all weights are 0.

    Args:
        cumulative: `[batch, length]`: cumulative sums of the weights.
        uniform: `[batch, n]` in [0, 1), in the same dtype.
    """
    cumulative = cumulative.contiguous()
    # `right=True` never ends on an element of weight 0: its cumulative sum equals that of the element before it.
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last = cumulative.argmax(dim=1, keepdim=True)  # the first position with the full sum, in case rounding went beyond
    return torch.minimum(drawn, last)


def _sample_by_blocks(weights: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw positions in proportion to `weights [batch, n]`, in about sqrt(n) blocks: int64 `[batch, num_samples]`."""
    batch, count = weights.shape
    size = math.isqrt(max(count - 1, 0)) + 1
    blocks = torch.nn.functional.pad(weights, (0, -count % size)).view(batch, -1, size)
    in_all, in_block = uniforms((2, batch, num_samples), generator, weights.device)
    block = inverse_cdf(blocks.sum(dim=2).cumsum(dim=1), in_all)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, size)).cumsum(dim=2)
    within = inverse_cdf(inside.flatten(0, 1), in_block.reshape(-1, 1)).view_as(block)
    return block * size + within


def _uniforms(generator: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if generator not in _generators:
        raise RuntimeError(
            "Compiled code draws from a generator that is not registered: run one step uncompiled first."
        )
    pins = device.type == "cuda"  # a copy from pageable memory would synchronize the device
    drawn = torch.rand(
        tuple(shape), generator=_generators[generator], dtype=torch.float64, device="cpu", pin_memory=pins
    )
    if device.type in WITHOUT_FLOAT64:
        # Rounding may give 1, which is no uniform. The copy is synchronous: `drawn` must not be freed before its end.
        return drawn.to(torch.float32).clamp_(max=1 - 2**-24).to(device)
    return drawn.to(device, non_blocking=True)


def _define() -> None:
    """Register `_uniforms` as an operator whose calls are never merged or dropped by the compiler."""
    tags = (torch.Tag.nondeterministic_seeded,)
    torch.library.define(
        "negative_cache::uniforms", "(int generator, SymInt[] shape, Device device) -> Tensor", tags=tags
    )
    torch.library.impl("negative_cache::uniforms", "BackendSelect", _uniforms)
    torch.library.register_fake(
        "negative_cache::uniforms",
        lambda generator, shape, device: torch.empty(
            shape, dtype=torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64, device=device
        ),
    )


_define()
