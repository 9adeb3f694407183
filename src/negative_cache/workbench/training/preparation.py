"""The model of a run before its training: its prompts, its limits and its weights."""

from __future__ import annotations

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from negative_cache.workbench.models import prepare_for_training, set_prompts
from negative_cache.workbench.training.config import RunError, TrainingSettings


def prepare(model: SentenceTransformer, settings: TrainingSettings) -> list[str]:
    """Apply the settings that the saved model keeps; return notes for the user, a line each.

    Raises:
        RunError: A setting has no effect on this model, or the model does not support it.
    """
    if isinstance(model[0], StaticEmbedding):
        settings.check_static()
    set_inputs(model, settings)
    return prepare_for_training(model)


def set_inputs(model: SentenceTransformer, settings: TrainingSettings) -> None:
    """Apply the settings of what the model encodes: the prompts, and the tokens after which a text is cut.

    Raises:
        RunError: The model has no positions for `max_seq_length` tokens.
    """
    set_prompts(model, settings.query_prompt, settings.document_prompt)
    length = settings.max_seq_length
    if length is None:
        return
    config = getattr(model[0], "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise RunError(
            f"--max-seq-length is {length}; the model has positions for {positions} tokens. Use at most that."
        )
    model.max_seq_length = length
