"""Models that are built from texts."""

from __future__ import annotations

import multiprocessing

import pytest

from negative_cache.workbench.models import train_tokenizer


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
