"""Options of the sentence-transformers loss: a guide, both directions, shorter embeddings, a corpus put in before."""

import math

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from test_sentence_transformers import columns

from negative_cache.checkpoint import load_checkpoint, save_checkpoint
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.trainer import NegativeCacheTrainer
from negative_cache.workbench.models import train_tokenizer
from support import ANCHORS, HARD, POSITIVES, assert_same_state, snapshot


@pytest.fixture
def guide() -> SentenceTransformer:
    """Another model, with another tokenizer."""
    torch.manual_seed(1)
    return SentenceTransformer(
        modules=[StaticEmbedding(train_tokenizer([*ANCHORS, *HARD]), embedding_dim=24)], device="cpu"
    )


def encode(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    return model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)


def steps(loss: NegativeCacheRankingLoss, model: SentenceTransformer, count: int = 4, **kwargs) -> torch.Tensor:
    for step in range(count):
        at = slice(4 * (step % 3), 4 * (step % 3) + 4)
        value = loss(columns(model, ANCHORS[at], POSITIVES[at]), kwargs.get("labels"))
        value.backward()
    return value.detach()


def test_a_guide_hides_what_it_finds_better_than_the_positive(static, guide):
    """With no room for negatives at all the loss is 0; with all room it is that without a guide."""
    free = NegativeCacheRankingLoss(static, 32, seed=0)
    closed = NegativeCacheRankingLoss(static, 32, seed=0, guide=guide, guide_margin=3.0)
    opened = NegativeCacheRankingLoss(static, 32, seed=0, guide=guide, guide_margin=-3.0)
    values = [steps(loss, static) for loss in (free, closed, opened)]
    assert values[1] == 0
    assert values[0] > 0
    torch.testing.assert_close(values[2], values[0])
    assert closed.metrics()["masked"] == pytest.approx(8 / 12)  # the batch's own rows were hidden before
    assert opened.metrics()["masked"] == 0
    assert not any("guide" in name for name, _ in closed.named_modules())
    cached = closed.cache_loss.cache.data["guide_embedding"]
    expected = encode(guide, [text.lower() for text in POSITIVES])
    torch.testing.assert_close(cached[:12], expected)


def test_a_guide_decides_by_its_own_similarities(static, guide):
    loss = NegativeCacheRankingLoss(static, 32, seed=0, guide=guide).eval()
    q, p = (encode(guide, texts[:4]) for texts in (ANCHORS, POSITIVES))
    with torch.no_grad():
        value = loss(columns(static, ANCHORS[:4], POSITIVES[:4]), None)
        a, b = (encode(static, texts[:4]) for texts in (ANCHORS, POSITIVES))
    similarities = q @ p.T
    hidden = similarities > similarities.diagonal()[:, None]
    scores = (20 * a @ b.T).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(scores, torch.arange(4)))


def test_both_directions_are_the_mean_of_two_losses(static):
    """The first step has no cache: it is the symmetric in-batch loss."""
    loss = NegativeCacheRankingLoss(static, 32, symmetric=True, learnable_scale=True, seed=0)
    value = loss(columns(static, ANCHORS[:4], POSITIVES[:4]), None)
    a, b = (encode(static, texts[:4]) for texts in (ANCHORS, POSITIVES))
    there, back = (torch.nn.functional.cross_entropy(20 * s, torch.arange(4)) for s in (a @ b.T, b @ a.T))
    torch.testing.assert_close(value.detach(), (there + back) / 2)
    steps(loss, static)
    assert len(list(loss.parameters())) == len(list(static.parameters())) + 1  # one scale for both
    assert int(loss.query_cache_loss.cache.num_filled) == 12
    cached = loss.query_cache_loss.document_encoder(loss.query_cache_loss.cache.read(torch.arange(12), ["tokens"]))
    texts = encode(static, ANCHORS)
    assert sorted(cached[:, 0].tolist()) == pytest.approx(sorted(texts[:, 0].tolist()), abs=1e-5)
    assert {"query_staleness", "staleness"} <= set(loss.metrics())


def test_everything_at_once_trains_logs_and_resumes(minilm, tmp_path):
    def make() -> NegativeCacheRankingLoss:
        return NegativeCacheRankingLoss(
            minilm, 64, symmetric=True, matryoshka_dims=(128, 64), relative_margin=0.05, refresh_per_step=2, seed=0
        )

    loss = make()
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=4, learning_rate=2e-5, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    dataset = Dataset.from_dict({"anchor": ANCHORS, "positive": POSITIVES, "negative": HARD})
    trainer = NegativeCacheTrainer(model=minilm, args=arguments, train_dataset=dataset, loss=loss)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("cache_loss", "query_cache_loss"):
        for metric in ("interpretable_prediction_loss", "staleness", "gradient_norm_ratio", "masked"):
            assert all(math.isfinite(entry[f"cache/{name}/{metric}"]) for entry in logged)
    for number, part in enumerate((loss.cache_loss, loss.query_cache_loss)):
        save_checkpoint(part, tmp_path / f"cache-{number}")
    other = make()
    for number, part in enumerate((other.cache_loss, other.query_cache_loss)):
        load_checkpoint(part, tmp_path / f"cache-{number}")
    assert_same_state(snapshot(loss.cache_loss), snapshot(other.cache_loss))
    assert_same_state(snapshot(loss.query_cache_loss), snapshot(other.query_cache_loss))


@pytest.mark.parametrize("name", ["minilm", "static"])
def test_a_corpus_fills_the_cache(name, request, capsys):
    model = request.getfixturevalue(name)
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    model.train()
    loss.fill_from([*POSITIVES, *HARD], ids=range(100, 124), batch_size=5)
    assert model.training
    assert "Filling the cache" in capsys.readouterr().err
    cache = loss.cache_loss.cache
    assert cache.document_ids[:24].tolist() == list(range(100, 124))
    expected = encode(model.eval(), [*POSITIVES, *HARD])
    torch.testing.assert_close(cache.data["embedding"][:24], expected, rtol=1e-4, atol=1e-5)
    labels = torch.arange(100, 104)
    loss(columns(model, ANCHORS[:4], POSITIVES[:4]), labels)
    assert int(cache.num_filled) == 24  # the documents went into their own rows
    assert cache.age[:4].tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="do not fit"):
        loss.fill_from(ANCHORS, show_progress_bar=False)


def test_a_corpus_without_ids_is_known_by_its_tokens(static):
    loss = NegativeCacheRankingLoss(static, 32, seed=0)
    loss.fill_from(POSITIVES, show_progress_bar=False)
    loss(columns(static, ANCHORS[:4], POSITIVES[:4]), None)
    assert int(loss.cache_loss.cache.num_filled) == 12


def test_the_model_card_says_what_was_set(static, guide):
    config = NegativeCacheRankingLoss(static, 64, guide=guide, symmetric=True, num_samples=6).get_config_dict()
    assert config["symmetric"] is True
    assert config["guide"]
    assert config["num_candidates"] == 12
    assert config["shared"] is True


def test_autocast_changes_no_weights(static):
    """Everything about drawn documents is float32, whatever the encoder computes in."""
    loss = NegativeCacheRankingLoss(static, 32, seed=0)
    steps(loss, static)
    found = []
    original = loss.cache_loss._loss

    def seen(step, scale, scores, fresh, negatives, encoded):
        found.extend(value.dtype for serving in negatives.serving for value in serving)
        return original(step, scale, scores, fresh, negatives, encoded)

    loss.cache_loss._loss = seen
    with torch.autocast("cpu", torch.bfloat16):
        loss(columns(static, ANCHORS[:4], POSITIVES[:4]), None).backward()
    assert found == [torch.float32, torch.float32]
