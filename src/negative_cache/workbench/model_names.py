"""What the name of a model says, without loading it: how its weights begin, its default learning rate, and whether it
can be loaded."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from negative_cache.workbench.suggestions import did_you_mean_path

DISTILLED = "static:"  # before the name of a model

# Learning rates at which each kind of model trains well with AdamW.
LEARNING_RATES = {"static": 5e-2, "tiny": 5e-4}  # of models with random weights
PRETRAINED_LEARNING_RATE, PRETRAINED_STATIC_LEARNING_RATE = 2e-5, 1e-2
ADAPTER_LEARNING_RATE = 2e-4

MODEL_FILES = ("modules.json", "config.json")  # of which a folder with a model has one

HUB_TIMEOUT = 10.0  # seconds


class ModelError(ValueError):
    """A model that cannot be loaded."""


def learning_rate_of(name: str, has_adapters: bool = False) -> float:
    """The default learning rate of a model, or of its adapters alone."""
    if has_adapters:
        return ADAPTER_LEARNING_RATE
    if is_from_scratch(name):
        return LEARNING_RATES[name]
    return PRETRAINED_STATIC_LEARNING_RATE if is_static(name) else PRETRAINED_LEARNING_RATE


def learning_rate_rule() -> str:
    """The rule of `learning_rate_of` in words."""
    own = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    return (
        f"{own}, {PRETRAINED_STATIC_LEARNING_RATE:g} for {DISTILLED}NAME and other trained static models, "
        f"{PRETRAINED_LEARNING_RATE:g} for all others, {ADAPTER_LEARNING_RATE:g} with --lora"
    )


def is_static(name: str) -> bool:
    """Whether a model is a table of token embeddings, which trains in minutes."""
    return name == "static" or name.startswith(DISTILLED) or _is_saved_static(name)


def is_from_scratch(name: str) -> bool:
    """Whether a model starts with random weights."""
    return name in LEARNING_RATES


def distilled_from(name: str) -> str | None:
    """The name of the model from which a static one is made; None for another model."""
    return name.removeprefix(DISTILLED) if name.startswith(DISTILLED) else None


def base_on_hub(name: str) -> str | None:
    """The id on the hub of the model that a model begins with, after it was loaded; None if it is not from there."""
    base = distilled_from(name) or name
    if is_from_scratch(base) or Path(base).exists():
        return None
    return next((repository for repository in _repositories(base) if _is_cached(repository)), None)


def about_begin(name: str) -> str:
    """What a model is before training; empty if it is what its name says."""
    if is_from_scratch(name):
        return f"random weights (--model {name})"
    base = distilled_from(name)
    return "" if base is None else f"the static model made from {base}, not {base} itself"


def check_model(name: str) -> None:
    """Raise ModelError if there is no such model to train; see `load_model`."""
    if not is_from_scratch(name):
        base = distilled_from(name)
        check_trained(name if base is None else base, others=tuple(LEARNING_RATES) if base is None else ())


def check_trained(name: str, others: Collection[str] = ()) -> None:
    """Raise ModelError if there is no such trained model: no folder, and no model in the local cache or on the hub.

    Args:
        name: Its name or path.
        others: What may be given in place of a trained model.
    """
    if is_from_scratch(name) or name.startswith(DISTILLED):
        raise ModelError(f"{name!r} is a model that train and compare make. Give the --output of train.")
    path = Path(name)
    if path.is_dir():
        return
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"Cannot load the model {name!r}: it is not a directory.{did_you_mean_path(name, suits=is_model)} Give "
            "the --output of train, or the name of a model on the Hugging Face hub."
        )
    _ask_hub(name, others)


def is_model(path: Path) -> bool:
    """Whether a folder has a saved model."""
    return any((path / file).is_file() for file in MODEL_FILES)


def _is_saved_static(name: str) -> bool:
    """Whether a folder has a saved static model."""
    path = Path(name) / "modules.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))[0]["type"].endswith("StaticEmbedding")


def _ask_hub(name: str, others: Collection[str]) -> None:
    """Raise unless a model is in the local cache or on the hub. Loading a missing model would retry for a minute."""
    from huggingface_hub import HfApi

    failed = ""
    for repository in _repositories(name):
        try:
            if _is_cached(repository):
                return
            HfApi().model_info(repository, timeout=HUB_TIMEOUT)
            return
        except Exception as error:
            failed = str(error).strip().partition("\n")[0]
    near = did_you_mean_path(name, *others, *_cached_models(name), suits=is_model)
    raise ModelError(
        f"Cannot load the model {name!r}: it is not a directory and not in the local cache, and the Hugging Face hub "
        f"does not have it or cannot be reached ({failed}).{near} Give "
        f"{''.join(f'{other}, ' for other in others)}a folder or the name of a model on the hub."
    )


def _repositories(name: str) -> list[str]:
    """The repositories on the hub that a name may stand for, in the order in which sentence-transformers tries them."""
    return [name] if "/" in name else [f"sentence-transformers/{name}", name]


def _is_cached(repository: str) -> bool:
    """Whether the local cache of the hub has a model."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(repository, file), str) for file in MODEL_FILES)


def _cached_models(name: str) -> list[str]:
    """The models in the local cache of the hub; without their owner if `name` has none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = Path(HF_HUB_CACHE).glob("models--*--*")
    found = (folder.name.removeprefix("models--").replace("--", "/") for folder in folders)
    return [model if "/" in name else model.rpartition("/")[2] for model in found]
