"""Uniform numbers from a generator that the user can seed, the same on every device, also in compiled code."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

import torch
from torch import Tensor


def _registry() -> MutableMapping[int, torch.Generator]:
    """Generators by number; where torch is too old for weak references to them they are kept, some 5 kB each."""
    try:
        weakref.ref(torch.Generator())
    except TypeError:
        return {}
    return weakref.WeakValueDictionary()


# `torch.compile` cannot hold a generator; compiled code names it by its number.
_generators = _registry()


def new_generator(seed: int | None = None) -> torch.Generator:
    """A CPU generator with the given seed, or one taken from torch's global generator."""
    generator = torch.Generator()
    generator.manual_seed(int(torch.randint(2**62, ()).item()) if seed is None else seed)
    register(generator)
    return generator


def register(generator: torch.Generator) -> None:
    """Let compiled code draw from a generator; for what runs before it is compiled."""
    if not torch.compiler.is_compiling():
        _generators[id(generator)] = generator


def uniforms(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """float64 uniforms in [0, 1) from a CPU generator, the same on every device."""
    if torch.compiler.is_compiling():
        drawn: Tensor = torch.ops.negative_cache.uniforms(id(generator), shape, device)
        return drawn
    register(generator)
    return _uniforms(id(generator), shape, device)


def _uniforms(generator: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if generator not in _generators:
        raise RuntimeError(
            "Compiled code draws from a generator that is gone, or is new: run one step uncompiled first."
        )
    pins = device.type == "cuda"  # from pageable memory the copy would be waited for
    drawn = torch.rand(
        tuple(shape), generator=_generators[generator], dtype=torch.float64, device="cpu", pin_memory=pins
    )
    return drawn.to(device, non_blocking=True)


def _define() -> None:
    """Make `_uniforms` an operator that is never merged with another call of it or left out."""
    tags = (torch.Tag.nondeterministic_seeded,)
    torch.library.define(
        "negative_cache::uniforms", "(int generator, SymInt[] shape, Device device) -> Tensor", tags=tags
    )
    torch.library.impl("negative_cache::uniforms", "BackendSelect", _uniforms)
    torch.library.register_fake(
        "negative_cache::uniforms",
        lambda generator, shape, device: torch.empty(shape, dtype=torch.float64, device=device),
    )


_define()
