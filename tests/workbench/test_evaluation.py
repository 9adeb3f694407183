"""Encoding of a corpus."""

from __future__ import annotations

import pytest
import torch

from negative_cache.workbench import evaluation
from negative_cache.workbench.models import load_model


def test_documents_are_encoded_in_chunks_with_progress(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluation, "TEXTS_PER_CHUNK", 3)
    texts = ["one", "a much longer one than that", "three or so", "", "five", "a six", "seven is it"]
    model = load_model("static", texts, seed=0)
    reported: list[tuple[int, int]] = []
    found = evaluation.encode_documents(model, texts, lambda *progress: reported.append(progress))
    torch.testing.assert_close(found, model.encode_document(texts, convert_to_tensor=True))
    assert reported == [(3, 7), (6, 7), (7, 7)]
