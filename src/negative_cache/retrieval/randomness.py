"""Random numbers from a generator that the user can seed, the same on every device and in compiled code."""

from __future__ import annotations

import math
import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor


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


def uniforms(
    shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniforms in [0, 1) from a CPU generator, the same on every device.

    Args:
        shape: The shape of the result.
        generator: Source of randomness.
        device: Where the result is.
        dtype: float32 or float64; int64 for fixed point, integers from 0 to 2^62 - 1 in units of 2^-62.
    """
    if torch.compiler.is_compiling():
        drawn: Tensor = torch.ops.negative_cache.random_integers(id(generator), shape, device)
    else:
        register(generator)
        drawn = _random_integers(id(generator), shape, device)
    if dtype == torch.int64:
        return drawn
    # Small numbers keep the full precision of the dtype. Large ones may be rounded to 1, which is not below 1.
    return (drawn.to(dtype) * 2.0**-62).clamp_(max=1 - torch.finfo(dtype).eps / 2)


def sample(scores: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw positions from the softmax of `scores [batch, n]` by inverse CDF: int64 `[batch, num_samples]`.

    A draw takes two steps: one of about sqrt(n) blocks, then a position in it. A float32 sum over all positions would
    lose and tie improbable ones; over sqrt(n) of them it does not. A row without a finite score gives arbitrary
    positions.
    """
    top = scores.amax(dim=1, keepdim=True)
    weights = (scores - torch.where(top.isfinite(), top, 0)).exp()
    batch, count = weights.shape
    size = math.isqrt(max(count - 1, 0)) + 1
    blocks = torch.nn.functional.pad(weights, (0, -count % size)).view(batch, -(-count // size), size)
    in_all, in_block = uniforms((2, batch, num_samples), generator, weights.device, weights.dtype)
    block = inverse_cdf(blocks.sum(dim=2).cumsum(dim=1), in_all)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, size)).cumsum(dim=2)
    within = inverse_cdf(inside.flatten(0, 1), in_block.reshape(-1, 1)).view_as(block)
    return block * size + within


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


def _random_integers(generator: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers from 0 to 2^62 - 1, from the generator with this id: int64."""
    if generator not in _generators:
        raise RuntimeError(
            "Compiled code draws from a generator that is not registered: run one step uncompiled first."
        )
    pins = device.type == "cuda"  # a copy from pageable memory would synchronize the device
    drawn = torch.empty(tuple(shape), dtype=torch.int64, device="cpu", pin_memory=pins)
    drawn.random_(2**62, generator=_generators[generator])
    # The memory of `drawn` must not be freed before the end of the copy, which is not guaranteed on these devices.
    return drawn.to(device, non_blocking=device.type not in ("mps", "xpu"))


def _define() -> None:
    """Register `_random_integers` as an operator whose calls are never merged or dropped by the compiler."""
    tags = (torch.Tag.nondeterministic_seeded,)
    torch.library.define(
        "negative_cache::random_integers", "(int generator, SymInt[] shape, Device device) -> Tensor", tags=tags
    )
    torch.library.impl("negative_cache::random_integers", "BackendSelect", _random_integers)
    torch.library.register_fake(
        "negative_cache::random_integers",
        lambda generator, shape, device: torch.empty(shape, dtype=torch.int64, device=device),
    )


_define()
