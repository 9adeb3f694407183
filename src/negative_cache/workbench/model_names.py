"""What the name of a model says, without loading it: how its weights begin, and its default learning rate."""

from __future__ import annotations

import json
from pathlib import Path

DISTILLED = "static:"  # before the name of a model

# Learning rates at which each kind of model trains well with AdamW.
LEARNING_RATES = {"static": 5e-2, "tiny": 5e-4}  # of models with random weights
PRETRAINED_LEARNING_RATE, PRETRAINED_STATIC_LEARNING_RATE = 2e-5, 1e-2
ADAPTER_LEARNING_RATE = 2e-4


def learning_rate_of(name: str, has_adapters: bool = False) -> float:
    """The default learning rate of a model, or of its adapters alone."""
    if has_adapters:
        return ADAPTER_LEARNING_RATE
    if name.startswith(DISTILLED) or _is_saved_static(name):
        return PRETRAINED_STATIC_LEARNING_RATE
    return LEARNING_RATES.get(name, PRETRAINED_LEARNING_RATE)


def learning_rate_rule() -> str:
    """The rule of `learning_rate_of` in words."""
    own = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    return (
        f"{own}, {PRETRAINED_STATIC_LEARNING_RATE:g} for {DISTILLED}NAME and other trained static models, "
        f"{PRETRAINED_LEARNING_RATE:g} for all others, {ADAPTER_LEARNING_RATE:g} with --lora"
    )


def is_from_scratch(name: str) -> bool:
    """Whether a model starts with random weights."""
    return name in LEARNING_RATES


def _is_saved_static(name: str) -> bool:
    """Whether a folder has a saved static model."""
    path = Path(name) / "modules.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))[0]["type"].endswith("StaticEmbedding")
