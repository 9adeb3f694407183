"""The model of a run before its training: its prompts, its limits and its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import nn
from transformers import PreTrainedConfig

from negative_cache.workbench.models import freeze_unused, prepare_for_training, set_max_seq_length, set_prompts
from negative_cache.workbench.training.config import RunError, TrainingSettings


def prepare(model: SentenceTransformer, settings: TrainingSettings) -> list[str]:
    """Apply the settings that the saved model keeps; return notes for the user, a line each.

    Raises:
        RunError: A setting has no effect on this model, or the model does not support it.
    """
    if isinstance(model[0], StaticEmbedding):
        settings.check_static()
    set_inputs(model, settings)
    if settings.dropout is not None:
        _set_dropout(model, settings.dropout)
    return prepare_for_training(model)


def set_inputs(model: SentenceTransformer, settings: TrainingSettings) -> None:
    """Apply the settings of what the model encodes: the prompts, and the tokens after which a text is cut.

    Raises:
        ModelError: The model is static, or `max_seq_length` exceeds the number of its positions.
    """
    set_prompts(model, settings.query_prompt, settings.document_prompt)
    if settings.max_seq_length is not None:
        set_max_seq_length(model, settings.max_seq_length)


def _set_dropout(model: SentenceTransformer, probability: float) -> None:
    """Set the probability of all dropout: of layers, of attention, and in the configuration that is saved.

    Raises:
        RunError: The model has no dropout.
    """
    is_set = False
    for module in model.modules():
        configurations = [value for value in vars(module).values() if isinstance(value, PreTrainedConfig)]
        for owner in (module, *configurations):
            for name, value in list(vars(owner).items()):
                is_dropout = "drop" in name or (name == "p" and isinstance(owner, nn.Dropout))
                if is_dropout and isinstance(value, int | float) and not isinstance(value, bool):
                    setattr(owner, name, probability)
                    is_set = True
    if not is_set:
        raise RunError("--dropout has no effect: the model has no dropout. Leave it out.")


def add_lora(model: SentenceTransformer, rank: int, seed: int) -> str:
    """Add adapters of a rank to all linear layers, and train nothing else; return a note on the number of parameters.

    Raises:
        RunError: The model does not support adapters.
    """
    from peft import LoraConfig, TaskType
    from transformers import set_seed

    set_seed(seed)
    config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    try:
        model.add_adapter(config)
    except (AttributeError, ValueError) as error:
        raise RunError(f"--lora: this model does not take adapters: {error}. Leave --lora out.") from error
    freeze_unused(model)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    return f"LoRA of rank {rank} trains {trained:,} parameters, and keeps {sum(size for size, _ in sizes) - trained:,}."


def merge_lora(model: SentenceTransformer) -> None:
    """Merge the adapters into the weights, so that the saved model needs neither peft nor the initial model."""
    for body in _with_adapters(model):
        for name, layer in list(body.named_modules()):
            if hasattr(layer, "get_base_layer"):
                layer.merge()
                parent, _, attribute = name.rpartition(".")
                setattr(body.get_submodule(parent), attribute, layer.get_base_layer())
        body._hf_peft_config_loaded = False
        del body.peft_config


def _with_adapters(model: SentenceTransformer) -> Iterator[Any]:
    return (module for module in model.modules() if getattr(module, "_hf_peft_config_loaded", False))
