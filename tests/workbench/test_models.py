"""Models that are built from texts."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from negative_cache.workbench.models import load_model, prepare_for_training, train_tokenizer


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_can_tokenize(monkeypatch: pytest.MonkeyPatch):
    """As the workers of a data loader do. The threads of the tokenizers library do not survive the fork."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    texts = [f"text number {number}" for number in range(64)]
    tokenizer = train_tokenizer(texts)
    tokenizer.encode_batch(texts)  # starts the threads
    process = multiprocessing.get_context("fork").Process(target=tokenizer.encode_batch, args=(texts,))
    process.start()
    process.join(timeout=10)
    is_hanging = process.is_alive()
    process.kill()
    assert not is_hanging
    assert process.exitcode == 0


def test_what_training_does_differently_from_evaluation_is_said():
    model = load_model("tiny", ["a text", "another text"], seed=0)
    assert prepare_for_training(model) == []
    model.bfloat16()
    model.similarity_fn_name = "dot"
    model.prompts = {"query": "query: ", "document": ""}
    half, similarity, prompts = prepare_for_training(model)
    assert "trained and saved as float32" in half
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "cosine similarity, evaluation that of the model, dot" in similarity
    assert prompts == "Training and evaluation use the prompts 'query: ' before queries and '' before documents."
