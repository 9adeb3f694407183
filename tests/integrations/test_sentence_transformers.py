"""The loss inside sentence-transformers' own trainer, with a real MiniLM and with StaticEmbedding."""

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    util,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.sentence_transformers.loss import _ids
from negative_cache.integrations.sentence_transformers.tokens import _pad_flat, hash_tokens
from support import ANCHORS, HARD, POSITIVES


def columns(model, *texts):
    return [model.preprocess(column) for column in texts]


def train(model, loss, folder, steps=6, batch_size=4, **data):
    args = SentenceTransformerTrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=1e-2 if isinstance(model[0], StaticEmbedding) else 2e-5,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    dataset = Dataset.from_dict(data)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=dataset, eval_dataset=dataset, loss=loss)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["minilm", "static"])
@pytest.mark.parametrize("with_labels", [False, True])
def test_trains_in_the_real_trainer_and_does_not_write_in_evaluation(name, with_labels, request, tmp_path):
    model = request.getfixturevalue(name)
    loss = NegativeCacheRankingLoss(model, cache_size=64, seed=0)
    labels = {"label": list(range(100, 112))} if with_labels else {}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = train(model, loss, tmp_path, anchor=ANCHORS, positive=POSITIVES, **labels)
    cache = loss.cache_loss.cache
    assert int(cache.num_filled) == 12  # two epochs: every document has one row
    if with_labels:
        assert sorted(cache.document_ids[cache.filled].tolist()) == list(range(100, 112))
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    state = {key: value.clone() for key, value in loss.cache_loss.state_dict().items()}
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_loss"] < 20
    assert all(torch.equal(state[key], value) for key, value in loss.cache_loss.state_dict().items())
    assert loss.metrics()["fill"] == 12 / 64


@pytest.mark.parametrize("name", ["minilm", "static"])
def test_cached_documents_are_encoded_as_the_model_encodes_their_text(name, request):
    """What is re-encoded from the cache is the document itself, for every row, whatever its padding was."""
    model = request.getfixturevalue(name).eval()
    loss = NegativeCacheRankingLoss(model, cache_size=12)
    for start in (0, 6):
        loss(columns(model, ANCHORS[start : start + 6], POSITIVES[start : start + 6]), None)
    cached = loss.cache_loss.cache.read(torch.arange(12), [k for k in loss.cache_loss.cache.specs if k != "embedding"])
    with torch.no_grad():
        encoded = loss._sides[1].encode(cached)
    torch.testing.assert_close(encoded, model.encode(POSITIVES, convert_to_tensor=True, normalize_embeddings=True))
    torch.testing.assert_close(loss.cache_loss.cache.data["embedding"], encoded)


@pytest.mark.parametrize("name", ["minilm", "static"])
def test_extra_columns_are_negatives_and_enter_the_cache(name, request, tmp_path):
    model = request.getfixturevalue(name)
    loss = NegativeCacheRankingLoss(model, cache_size=64, seed=0)
    first = loss(columns(model, ANCHORS[:4], POSITIVES[:4], HARD[:4]), None)
    q, p, n = (
        model.encode(t[:4], convert_to_tensor=True, normalize_embeddings=True) for t in (ANCHORS, POSITIVES, HARD)
    )
    model.eval()
    expected = torch.nn.functional.cross_entropy(20 * q @ torch.cat([p, n]).T, torch.arange(4))
    # the first batch has no cache: its loss is the cross-entropy against the batch and the extra column (up to dropout)
    torch.testing.assert_close(first.detach(), expected, rtol=0.2 if name == "minilm" else 1e-4, atol=0.5)
    assert int(loss.cache_loss.cache.num_filled) == 8
    train(model, loss, tmp_path, steps=3, anchor=ANCHORS, positive=POSITIVES, negative=HARD)
    assert int(loss.cache_loss.cache.num_filled) == 24


def test_a_hard_negative_with_the_positives_text_is_no_negative(static):
    loss = NegativeCacheRankingLoss(static, cache_size=16)
    value = loss(columns(static, ANCHORS[:1], POSITIVES[:1], POSITIVES[:1]), None)
    assert value.item() == 0.0  # its only negative is the positive itself


def test_labels_in_two_columns_name_further_positives(static):
    loss = NegativeCacheRankingLoss(static, cache_size=16)
    batch = columns(static, ANCHORS[:2], POSITIVES[:2])
    loss(batch, torch.tensor([[0, -1], [1, -1]]))
    # both cached documents are positives of the only anchor: nothing is left to compare with
    value = loss(columns(static, ANCHORS[:1], POSITIVES[:1]), torch.tensor([[0, 1]]))
    assert value.item() == 0.0
    value = loss(columns(static, ANCHORS[:1], POSITIVES[:1]), torch.tensor([[0, -1]]))
    assert value.item() > 0.0


def test_model_card_shows_configuration_and_citation(static, tmp_path):
    loss = NegativeCacheRankingLoss(static, cache_size=48, scale=10.0, top_k=4)
    train(static, loss, tmp_path / "out", steps=1, anchor=ANCHORS, positive=POSITIVES)
    static.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "NegativeCacheRankingLoss" in card
    assert '"cache_size": 48' in card
    assert "lindgren2021efficient" in card
    assert loss.temperature == 0.1


def test_learnable_scale_is_trained(static, tmp_path):
    loss = NegativeCacheRankingLoss(static, cache_size=32, learnable_scale=True, seed=0)
    train(static, loss, tmp_path, anchor=ANCHORS, positive=POSITIVES)
    assert loss.scale != pytest.approx(20.0)


def test_hash_depends_on_tokens_and_order_but_not_on_padding():
    rows = torch.tensor([[3, 4, 5, 0], [0, 3, 4, 5], [4, 3, 5, 0], [3, 4, 5, 6], [3, 4, 0, 0]])
    hashes = hash_tokens(rows).tolist()
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
    assert min(hashes) >= 0
    torch.manual_seed(0)
    many = torch.randint(1, 50, (20_000, 6))
    assert len(set(hash_tokens(many).tolist())) == len(many.unique(dim=0))


def test_flat_sequences_are_padded_back():
    padded = _pad_flat(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2, 2]))
    assert padded.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]


def test_bad_input_is_refused_with_the_reason(static):
    loss = NegativeCacheRankingLoss(static, cache_size=16)
    batch = columns(static, ANCHORS[:2], POSITIVES[:2])
    with pytest.raises(ValueError, match="1 text column"):
        loss(batch[:1], None)
    with pytest.raises(ValueError, match="integer document ids"):
        loss(columns(static, ANCHORS[:2], POSITIVES[:2]), torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="expected \\[2\\]"):
        loss(columns(static, ANCHORS[:2], POSITIVES[:2]), torch.tensor([1, 2, 3]))
    images = {**columns(static, POSITIVES[:2])[0], "pixel_values": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="Images"):
        loss([columns(static, ANCHORS[:2])[0], images], None)
    with pytest.raises(ValueError, match="inner product"):
        NegativeCacheRankingLoss(static, similarity_fct=util.euclidean_sim)
    assert loss.cache_loss.cache is None


def test_ids_keep_the_text_hash_as_a_further_positive():
    hashes = torch.tensor([11, 12])
    assert _ids(None, hashes)[0].tolist() == [11, 12]
    ids, positives = _ids(torch.tensor([1, 2]), hashes)
    assert ids.tolist() == [1, 2]
    assert positives.tolist() == [[11], [12]]


def test_tokens_in_a_file(minilm, static, tmp_path):
    losses = []
    for options in ({}, {"feature_folder": tmp_path}):
        loss = NegativeCacheRankingLoss(minilm, cache_size=16, seed=0, **options)
        torch.manual_seed(0)  # dropout, where another test has left it on
        for _ in range(2):
            value = loss(columns(minilm, ANCHORS, POSITIVES))
        losses.append((value.item(), loss.cache_loss.cache))
    assert losses[0][0] == losses[1][0]
    first, second = (cache.data for _, cache in losses)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert losses[1][1].specs["tokens"].max_length == minilm.max_seq_length
    with pytest.raises(ValueError, match="max_seq_length is inf"):
        NegativeCacheRankingLoss(static, feature_folder=tmp_path)
