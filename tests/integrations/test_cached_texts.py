"""Texts as the cache stores them are re-encoded as the model encodes the texts themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.sentence_transformers.text import CachedTexts
from negative_cache.integrations.sentence_transformers.tokens import TOKENS, hash_tokens, pad_flat
from support import ANCHORS, POSITIVES, columns
from text_models import encode, encode_cached, make_router, make_static, make_tiny


@pytest.mark.parametrize("kind", ["minilm", "static"])
def test_cached_documents_are_encoded_as_the_model_encodes_their_text(kind: str, request: pytest.FixtureRequest):
    """For every row, whatever its padding was."""
    model = (request.getfixturevalue("minilm") if kind == "minilm" else make_static()).eval()
    loss = NegativeCacheRankingLoss(model, cache_size=12, num_samples=1)
    for start in (0, 6):
        loss(columns(model, ANCHORS[start : start + 6], POSITIVES[start : start + 6]), None)
    encoded = encode_cached(loss)
    torch.testing.assert_close(encoded, encode(model, POSITIVES))
    torch.testing.assert_close(loss.cache_loss.cache.data["embedding"], encoded)


def test_hash_depends_on_tokens_and_order_but_not_on_padding():
    rows = torch.tensor([[3, 4, 5, 0], [0, 3, 4, 5], [4, 3, 5, 0], [3, 4, 5, 6], [3, 4, 0, 0]])
    hashes = hash_tokens(rows).tolist()
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
    assert min(hashes) >= 0
    torch.manual_seed(0)
    many = torch.randint(1, 50, (20_000, 6))
    assert len(set(hash_tokens(many).tolist())) == len(many.unique(dim=0))


def test_flat_sequences_are_padded_with_0():
    padded = pad_flat(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2, 2]))
    assert padded.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]


@pytest.mark.parametrize(("num_values", "offsets"), [(3, [0, 2, 5]), (2, [0, 2, 2, 4]), (4, [3, 5]), (8, [3, 5])])
def test_flat_sequences_that_were_cut_are_refused(num_values: int, offsets: list[int]):
    """A dispatcher cuts token ids and offsets to the rows of a rank."""
    message = rf'have {num_values} token ids, but offsets from {offsets[0]} to {offsets[-1]}.*"dispatch_batches": False'
    with pytest.raises(ValueError, match=message):
        pad_flat(torch.arange(num_values), torch.tensor(offsets))


def test_the_padding_is_that_of_the_documents_tokenizer():
    """RoBERTa numbers positions by what is no padding: another token there would be another input."""
    model = make_tiny()
    model.tokenizer.pad_token_id = 3
    texts = CachedTexts("documents", lambda: model, lambda inputs: inputs["input_ids"])
    features = texts.from_inputs(model.preprocess(POSITIVES[:3]), is_cached=True)
    ids = texts.embed(features)
    assert set(ids[features[TOKENS] == 0].tolist()) == {3}
    again = texts.from_inputs(model.preprocess(POSITIVES[:3]), is_cached=False)
    assert torch.equal(hash_tokens(features[TOKENS]), hash_tokens(again[TOKENS]))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"pixel_values": torch.zeros(2, 3, 4, 4), "image_grid_thw": torch.ones(2, 3)}, "Images"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 8]), "max_length_q": 4}, "flattened flash-attention"),
        ({"input_features": torch.zeros(2, 8, 8)}, "audio"),
    ],
)
def test_inputs_other_than_padded_text_are_refused(given: dict[str, Any], error: str):
    model = make_tiny()
    loss = NegativeCacheRankingLoss(model, 32)
    anchors, positives = columns(model, ANCHORS[:2], POSITIVES[:2])
    with pytest.raises(ValueError, match=error):
        loss([anchors, {**positives, **given}], None)
    if "cu_seq_lens_q" in given:
        positives["input_ids"] = positives["input_ids"].reshape(1, -1)
        del positives["attention_mask"]
        with pytest.raises(ValueError, match=error):
            loss([anchors, {**positives, **given}], None)
    assert loss.cache_loss.cache is None


def test_prompts_of_other_lengths_are_refused_if_the_pooling_excludes_them():
    model = make_tiny()
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)

    def batch(prompt: str) -> list[dict[str, Any]]:
        return [model.preprocess(ANCHORS[:3]), model.preprocess(POSITIVES[:3], prompt=prompt)]

    loss(batch("an essay "))
    loss(batch("what is known about "))  # here the prompt is a part of the text like any other
    next(module for module in model.modules() if isinstance(module, Pooling)).include_prompt = False
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
    loss(batch("an essay "))
    with pytest.raises(ValueError, match=r"prompt_length.*loss of its own"):
        loss(batch("what is known about "))
    with torch.no_grad():
        assert loss.eval()(batch("what is known about ")) > 0  # evaluation stores nothing that is re-encoded later
    per_row = batch("an essay ")
    per_row[1]["prompt_length"] = torch.tensor([per_row[1]["prompt_length"]] * 3)  # as a streaming dataset has it
    loss.train()(per_row)


def test_documents_by_two_routes_are_refused():
    model = make_router()
    documents = [model.preprocess(POSITIVES, task=task) for task in ("document", "query")]
    with pytest.raises(ValueError, match="the same route"):
        NegativeCacheRankingLoss(model, 32)([model.preprocess(ANCHORS, task="query"), *documents])
