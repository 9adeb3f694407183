"""The label column of `NegativeCacheRankingLoss`: a document is known by its tokens and by its labels."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from negative_cache import checkpoint
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.sentence_transformers import loss as module
from negative_cache.integrations.sentence_transformers.labels import have_other_text
from support import ANCHORS, HARD, POSITIVES, columns, run_ranks
from text_models import make_static


@pytest.fixture
def model() -> SentenceTransformer:
    return make_static()


def make_loss(model: SentenceTransformer, **options) -> NegativeCacheRankingLoss:
    return NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0, **options)


def step(loss: NegativeCacheRankingLoss, positives: list[str], labels: object = None, *more: list[str]) -> float:
    """The value of a training step; the anchors are the first ones."""
    given = None if labels is None else torch.tensor(labels)
    value: Tensor = loss(columns(loss.model, ANCHORS[: len(positives)], positives, *more), given)
    return float(value.detach())


@pytest.mark.parametrize("label", [[1, 2, 3], [[1, 9], [2, 9], [3, 9]]])
def test_equal_texts_are_no_negatives_whatever_their_labels(model: SentenceTransformer, label: list):
    """In the batch, and from the cache under other labels."""
    texts = [POSITIVES[0], POSITIVES[0], POSITIVES[2]]
    assert step(make_loss(model), texts, label) == pytest.approx(step(make_loss(model), texts))
    without, given = make_loss(model), make_loss(model)
    values = [(step(without, POSITIVES[:3]), step(given, POSITIVES[:3], label)) for _ in range(2)]
    values.append((step(without, POSITIVES[:3]), step(given, POSITIVES[:3], [[x + 10 for x in row] for row in label]
        if isinstance(label[0], list) else [x + 10 for x in label])))  # fmt: skip
    for expected, value in values:
        assert value == pytest.approx(expected)
    assert int(given.cache_loss.cache.num_filled) == 3
    assert given.metrics()["near_duplicates"] == 0  # no document is left to be drawn
    assert step(given, HARD[:3], label if label == [1, 2, 3] else None) > 0  # other texts are negatives


def test_further_labels_hide_documents_of_the_cache(model: SentenceTransformer):
    loss = make_loss(model)
    step(loss, POSITIVES[:2], [[0, -1], [1, -1]])
    # both cached documents are positives of the only anchor: no negative is left
    assert step(loss, POSITIVES[:1], [[0, 1]]) == 0.0
    assert step(loss, POSITIVES[:1], [[0, -1]]) > 0.0


def test_further_labels_hide_documents_of_the_batch_with_equal_texts(model: SentenceTransformer):
    """Document 7 has the text of document 1, which is a positive of the first anchor."""
    two = step(make_loss(model), [POSITIVES[0], POSITIVES[1]], [[0, 7], [7, -1]])
    three = step(make_loss(model), [POSITIVES[0], POSITIVES[1], POSITIVES[1]], [[0, 7], [7, -1], [1, 7]])
    assert two != three  # the third anchor has a loss
    loss = make_loss(model).eval()
    value = loss(columns(model, ANCHORS[:1], POSITIVES[:1], [POSITIVES[0]]), torch.tensor([[0, 7]]))
    assert float(value.detach()) == 0.0


def test_a_negative_without_label_keeps_the_label_of_its_row(model: SentenceTransformer):
    loss = make_loss(model)
    step(loss, POSITIVES[:2], [[0, -1], [1, -1]])
    step(loss, [POSITIVES[3]], [[3, -1]], [POSITIVES[1]])  # document 1 again, as a negative without label
    assert sorted(loss.cache_loss.cache.document_ids[:3, 1].tolist()) == [0, 1, 3]
    assert step(loss, [POSITIVES[0]], [[0, 1]], [POSITIVES[0]]) == pytest.approx(
        step(make_loss_after(loss, model), [POSITIVES[0]], [[0, 1]], [POSITIVES[0]])
    )


def make_loss_after(loss: NegativeCacheRankingLoss, model: SentenceTransformer) -> NegativeCacheRankingLoss:
    """A loss with the state of another one."""
    again = make_loss(model)
    again.load_state_dict(loss.state_dict())
    assert again.cache_loss.cache.num_ids == 2
    return again


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 0], [3, 1, 4, 3], [5, 5, 5, 5]], ids=["NLI classes", "grades", "one class"]
)
def test_labels_that_are_no_ids_are_ignored_with_a_warning(
    model: SentenceTransformer, labels: list[int], caplog: pytest.LogCaptureFixture
):
    loss, without = make_loss(model), make_loss(model)
    with caplog.at_level(logging.WARNING):
        assert step(loss, POSITIVES[:4], labels) == pytest.approx(step(without, POSITIVES[:4]))
        assert step(loss, POSITIVES[4:8], labels) == pytest.approx(step(without, POSITIVES[4:8]))
    assert int(loss.cache_loss.cache.num_filled) == 8
    assert len(caplog.records) == 1
    assert (
        f"the label of {POSITIVES[1 if labels[0] == labels[1] else 3][:60].lower()!r} names another text" in caplog.text
    )
    assert "remove it or rename it" in caplog.text


def test_a_label_whose_text_changes_in_a_later_batch(model: SentenceTransformer, caplog: pytest.LogCaptureFixture):
    loss = make_loss(model)
    step(loss, POSITIVES[:4], [10, 11, 12, 13])
    with caplog.at_level(logging.WARNING):
        step(loss, POSITIVES[:4], [13, 10, 11, 12])
    assert "does not hold ids of documents" in caplog.text
    assert int(loss.cache_loss.cache.num_filled) == 4  # by their tokens they are the same documents
    loss = make_loss(model)
    step(loss, POSITIVES[:4], [[10, 11], [11, -1], [12, -1], [13, -1]])
    before = checkpoint.full_state_dict(loss.cache_loss)["cache.written"].clone()
    with pytest.raises(ValueError, match=r"the label of .* names another text, too.* Give each text an id of its own"):
        step(loss, POSITIVES[:4], [[13, -1], [11, -1], [12, -1], [10, -1]])
    assert torch.equal(loss.cache_loss.cache.written, before)


def test_evaluation_may_have_labels_of_its_own(model: SentenceTransformer, caplog: pytest.LogCaptureFixture):
    loss = make_loss(model)
    step(loss, POSITIVES[:4], [[0, 9], [1, -1], [2, -1], [3, -1]])
    without = make_loss(model)
    step(without, POSITIVES[:4])
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        step(loss, POSITIVES[4:8], [[0, 9], [1, -1], [2, -1], [3, -1]])
        # classes, and ratings of pairs, are no labels of documents; training goes on as before
        for labels in ([5, 5, 6, 6], [1, 0, 1, 0]):
            assert step(loss, POSITIVES[4:8], labels) == pytest.approx(step(without, POSITIVES[4:8]))
    assert not caplog.records
    step(loss, POSITIVES[4:8], [14, 15, 16, 17])
    assert sorted(loss.cache_loss.cache.document_ids[:8, 1].tolist()) == [0, 1, 2, 3, 14, 15, 16, 17]


def check_ranks(rank: int, world_size: int, folder: Path) -> None:
    """A label of another text on one rank is an error on all ranks."""
    loss = make_loss(make_static(), gather_across_devices=True)
    texts = POSITIVES[4 * rank : 4 * rank + 4]
    first = 4 * rank
    step(loss, texts, [[first + number, 99] for number in range(4)])
    wrong = [[first + (number + rank) % 4, 99] for number in range(4)]
    with pytest.raises(ValueError, match="Rank 1, step 1: The `label` column does not hold ids of documents"):
        step(loss, texts, wrong)
    assert step(loss, texts, [[first + number, 99] for number in range(4)]) > 0


def test_an_error_in_labels_is_raised_on_all_ranks(tmp_path: Path):
    run_ranks(check_ranks, 2, tmp_path)


def test_ids_of_equal_texts_in_a_corpus_are_warned_of(model: SentenceTransformer, caplog: pytest.LogCaptureFixture):
    loss = make_loss(model)
    with caplog.at_level(logging.WARNING):
        loss.fill_from([*POSITIVES[:3], POSITIVES[0]], ids=[5, 6, 7, 8], show_progress_bar=False)
    assert "1 ids name a text that has another id, too" in caplog.text
    other = make_loss(model)
    other.fill_from(POSITIVES[:3], show_progress_bar=False)
    with pytest.raises(ValueError, match="Pass ids in every call of `fill_from`"):
        other.fill_from(POSITIVES[3:6], ids=[1, 2, 3], show_progress_bar=False)


def test_contradictions_on_a_gpu_are_read_in_some_steps(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(module, "reads_without_sync", lambda value: False)
    monkeypatch.setattr(module, "CHECK_EVERY", 3)
    loss = make_loss(model)
    step(loss, POSITIVES[:4], [10, 11, 12, 13])
    with caplog.at_level(logging.WARNING):
        for count in range(3):
            assert not caplog.records, count
            step(loss, POSITIVES[:4], [13, 10, 11, 12])
    assert "4 of the latest labels had another text before" in caplog.text


def test_a_cache_without_labels_takes_labels_that_add_nothing_and_refuses_others(model: SentenceTransformer):
    loss = make_loss(model)
    loss.fill_from(POSITIVES, show_progress_bar=False)
    step(loss, POSITIVES[:4], [10, 11, 12, 13])
    assert int(loss.cache_loss.cache.num_filled) == 12
    with pytest.raises(ValueError, match="Pass their ids to `fill_from`"):
        step(loss, POSITIVES[:2], [[10, 11], [11, 10]])
    loss = make_loss(model)
    loss.fill_from(POSITIVES[:6], ids=range(6), show_progress_bar=False)
    loss.fill_from(POSITIVES[6:], show_progress_bar=False)
    step(loss, HARD[:3])  # a dataset without labels
    assert loss.cache_loss.cache.document_ids[:, 1].tolist() == [*range(6), *[-1] * 26]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.5, 1.0, 2.0]), "must hold integer document ids"),
        (torch.tensor([1, 2]), r"has shape \[2\]; expected \[3\]"),
        (torch.tensor([1, -2, 3]), "has the value -2"),
    ],
)
def test_labels_of_a_wrong_kind_are_refused(model: SentenceTransformer, labels: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        make_loss(model)(columns(model, ANCHORS[:3], POSITIVES[:3]), labels)


def test_contradictions_are_found_in_any_order():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        labels, texts = (torch.randint(-1, 6, (12,), generator=generator) for _ in range(2))
        found = have_other_text(labels, texts, None).tolist()
        pairs = list(zip(labels.tolist(), texts.tolist(), strict=True))
        first = dict(reversed(pairs))
        assert found == [label >= 0 and text != first[label] for label, text in pairs]
