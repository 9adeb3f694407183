"""Columns that cannot be trained on are refused before training, with the row or the column and the remedy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from negative_cache.data import RetrievalData
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss, RaggedNegativesCollator
from negative_cache.integrations.sentence_transformers.columns import check_dataset
from negative_cache.integrations.sentence_transformers.labels import number_of
from negative_cache.workbench.data.texts import Texts
from support import ANCHORS, HARD, POSITIVES, as_on_a_gpu, columns
from text_models import cached_texts, make_static, make_trainer, train

PAIRS: dict[str, Any] = {"anchor": ANCHORS, "positive": POSITIVES}


@pytest.fixture
def model() -> SentenceTransformer:
    return make_static()


def replaced(values: list[Any], at: int, value: Any) -> list[Any]:
    return [*values[:at], value, *values[at + 1 :]]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a missing anchor": (
        PAIRS | {"anchor": replaced(ANCHORS, 7, None)},
        r"train_dataset\[7\]\['anchor'\] is None; expected a text. Remove such rows: dataset.filter\(lambda row: row\[",
    ),
    "an empty positive": (
        PAIRS | {"positive": replaced(POSITIVES, 0, "")},
        r"train_dataset\[0\]\['positive'\] is ''; expected a text",
    ),
    "an empty negative": (
        PAIRS | {"negative": replaced(HARD, 11, "")},
        r"train_dataset\[11\]\['negative'\] is ''",
    ),
    "a column of ids": (
        PAIRS | {"document_id": list(range(12))},
        r"The column 'document_id' has values of type int64; expected texts. If these are ids of the positives, rename "
        r"it: dataset.rename_column\('document_id', \"label\"\). Otherwise, remove it: dataset.remove_columns\('docum",
    ),
    "ids beside labels": (PAIRS | {"label": list(range(12)), "labels": list(range(12))}, "The column 'labels' has"),
    "a weight": (
        PAIRS | {"weight": [0.5] * 12},
        r"'weight' has values of type double; .* Remove it: dataset",
    ),
    "a flag": (PAIRS | {"is_good": [True] * 12}, r"'is_good' has values of type bool; .* Remove it"),
    "lists of positives": (
        {"anchor": ANCHORS, "positive": [[text, text] for text in POSITIVES]},
        "The column 'positive' has lists of texts, which the model would encode as one text each; expected one text. "
        "Make one row per text, and name the others in a list of ids in the column `label`",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_wrong_column_is_refused_before_training(mistake: str, model: SentenceTransformer, tmp_path: Path):
    given, message = REFUSED[mistake]
    loss = NegativeCacheRankingLoss(model, 32)
    with pytest.raises(ValueError, match=message):
        make_trainer(model, loss, Dataset.from_dict(given), tmp_path)


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_wrong_column_of_a_stream_is_refused_in_its_batch(mistake: str, model: SentenceTransformer):
    """There are no numbers of rows. The collator sees what a transform of a dataset returns, too."""
    given, _ = REFUSED[mistake]
    rows = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    column = next(name for name in given if given[name] is not PAIRS.get(name) and name != "label")
    with pytest.raises(ValueError, match=f"The column '{column}' has"):
        RaggedNegativesCollator(model.preprocess)(rows)


def test_rows_are_those_of_the_dataset_that_is_given(model: SentenceTransformer, tmp_path: Path):
    """A selection numbers its own rows, and what it leaves out does not matter."""
    dataset = Dataset.from_dict(PAIRS | {"positive": replaced(POSITIVES, 2, "")})
    loss = NegativeCacheRankingLoss(model, 32)
    with pytest.raises(ValueError, match=r"train_dataset\[1\]\['positive'\] is ''"):
        make_trainer(model, loss, dataset.select([5, 2, 7, 8]), tmp_path)
    train(model, loss, dataset.select([5, 6, 7, 8]), tmp_path, steps=1)
    dataset.set_transform(lambda batch: {**batch, "positive": [text or "rain" for text in batch["positive"]]})
    train(model, loss, dataset, tmp_path, steps=3)


def test_all_datasets_are_checked(model: SentenceTransformer, tmp_path: Path):
    good, bad = Dataset.from_dict(PAIRS), Dataset.from_dict(PAIRS | {"anchor": replaced(ANCHORS, 3, "")})
    loss = NegativeCacheRankingLoss(model, 32)
    with pytest.raises(ValueError, match=r"train_dataset\['second'\]\[3\]\['anchor'\] is ''"):
        make_trainer(model, loss, DatasetDict({"first": good, "second": bad}), tmp_path)
    with pytest.raises(ValueError, match=r"eval_dataset\[3\]\['anchor'\] is ''"):
        make_trainer(model, loss, good, tmp_path, evaluated=bad)
    stream = IterableDataset.from_generator(lambda: iter(good.to_list()), features=good.features)
    train(model, loss, stream, tmp_path, steps=1)
    with pytest.raises(ValueError, match="The column 'document_id' has values of type int64"):
        make_trainer(model, loss, Dataset.from_dict(REFUSED["a column of ids"][0]).to_iterable_dataset(), tmp_path)


def test_an_empty_text_in_a_list_is_refused(model: SentenceTransformer):
    rows = [{"anchor": "a", "positive": "b", "negative": ["c", ""]}]
    with pytest.raises(TypeError, match="The column 'negative' has the value '' in a list; expected texts"):
        RaggedNegativesCollator(model.preprocess)(rows)


# Labels


LABELS = {
    "one id": [f"doc_{i}" for i in range(12)],
    "lists": [[f"doc_{i}", *(f"doc_{j}" for j in range(i % 3))] for i in range(12)],
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_may_be_texts(kind: str, model: SentenceTransformer, tmp_path: Path):
    loss = NegativeCacheRankingLoss(model, 32)
    train(model, loss, Dataset.from_dict(PAIRS | {"label": LABELS[kind]}), tmp_path, steps=3)
    assert loss._uses_labels
    stored = set(loss.cache_loss.cache.document_ids[:12, 1].tolist())
    expected = {number_of(label[0] if isinstance(label, list) else label) for label in LABELS[kind]}
    assert stored == expected
    assert all(-1 <= number < 2**62 for number in stored)


def test_further_positives_are_known_by_texts_as_labels(model: SentenceTransformer):
    """In the column, among the ids of negatives, and in `fill_from`."""
    collate = RaggedNegativesCollator(model.preprocess)
    rows = [
        {"anchor": ANCHORS[0], "positive": POSITIVES[0], "label": ["d0", "d1"], "negative": [HARD[0]],
         "negative_label": ["d1"]},
        {"anchor": ANCHORS[1], "positive": POSITIVES[1], "label": ["d1"], "negative": [HARD[1]],
         "negative_label": ["d9"]},
    ]  # fmt: skip
    batch = collate(rows)
    assert batch["label"].tolist() == [[number_of("d0"), number_of("d1")], [number_of("d1"), -1], [number_of("d9"), -1]]
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
    loss.fill_from([POSITIVES[3], POSITIVES[4]], ["d3", "d4"], show_progress_bar=False)
    labels = torch.tensor([[number_of("d0"), number_of("d3"), number_of("d4")]])
    assert loss(columns(model, ANCHORS[:1], POSITIVES[:1]), labels).item() == 0.0


def test_numbers_of_texts_are_the_same_in_every_process():
    assert number_of("doc_17") == 2229714330765135582
    assert number_of(17) == 17
    assert number_of(None) == -1


def test_unknown_labels_are_no_ratings(model: SentenceTransformer):
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
    loss(columns(model, ANCHORS[:4], POSITIVES[:4]), torch.full((4,), -1)).backward()
    assert int(loss.cache_loss.cache.num_filled) == 4
    other = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
    with pytest.raises(ValueError, match="only 0 and 1"):
        other(columns(model, ANCHORS[:4], POSITIVES[:4]), torch.tensor([-1, 0, 1, 0]))


def test_negative_labels_get_the_right_text_on_a_gpu_too(model: SentenceTransformer):
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
    with as_on_a_gpu(), pytest.raises(ValueError, match="has the value -5; document ids are 0 or larger, -1 for unk"):
        loss(columns(model, ANCHORS[:4], POSITIVES[:4]), torch.full((4,), -5))


# Losses


def test_without_a_loss_the_trainer_takes_the_negative_cache_and_says_so(
    model: SentenceTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trainer = train(model, None, Dataset.from_dict(PAIRS), tmp_path, steps=2)
    assert isinstance(trainer.loss, NegativeCacheRankingLoss)
    assert trainer.loss.model is model
    assert cached_texts(trainer.loss)
    said = [record.getMessage() for record in caplog.records if record.name == "negative_cache"]
    assert said == ["No `loss` was given: it is NegativeCacheRankingLoss(model), with its default settings."]


@pytest.mark.parametrize("kind", ["one positive", "several", "a selection", "labels"])
def test_several_positives_without_labels_give_a_warning(
    kind: str, model: SentenceTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = {"anchor": [*ANCHORS, *ANCHORS[:2]], "positive": [*POSITIVES, POSITIVES[5], POSITIVES[1]]}
    dataset = Dataset.from_dict(rows)  # the first anchor has two positives, the second one has one twice
    if kind == "one positive":
        dataset = dataset.select(range(len(ANCHORS)))
    elif kind == "a selection":
        dataset = dataset.select([12, 13, 1, 0])
    elif kind == "labels":
        dataset = dataset.add_column("label", [[number] for number in range(14)])
    make_trainer(model, NegativeCacheRankingLoss(model, 32), dataset, tmp_path)
    said = [record.getMessage() for record in caplog.records if "several positives" in record.getMessage()]
    rows = {"several": 14, "a selection": 4}.get(kind)
    assert [f"(1 in the first {rows} rows)" in message for message in said] == [True] * (rows is not None)


def test_another_loss_is_left_as_it_is(model: SentenceTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    loss = MultipleNegativesRankingLoss(model)
    assert make_trainer(model, loss, Dataset.from_dict(PAIRS), tmp_path).loss is loss
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "all-MiniLM-L6-v2"}, "`model` is str; expected a SentenceTransformer, such as SentenceTransformer"),
        ({"model": 131_072}, "`model` is int"),
        ({"model": None}, "`model` is NoneType"),
        ({"model": torch.nn.Linear(2, 2)}, "`model` is Linear; expected a SentenceTransformer.*use NegativeCacheLoss"),
        ({"guide": "a-guide"}, "`guide` is 'a-guide'; expected a SentenceTransformer, such as SentenceTransformer"),
        ({"temperature": 0.05}, "Use its inverse: scale=1 / 0.05"),
        ({"cache_size": "1024"}, "`cache_size` is '1024'"),
    ],
)
def test_wrong_arguments_are_refused_at_construction(
    arguments: dict[str, Any], message: str, model: SentenceTransformer
):
    with pytest.raises(TypeError, match=message):
        NegativeCacheRankingLoss(**{"model": model, **arguments})


def test_a_cache_smaller_than_the_batch_is_named(model: SentenceTransformer):
    loss = NegativeCacheRankingLoss(model, 8)
    with pytest.raises(ValueError, match="`cache_size` is 8; the batch has 12 documents"):
        loss(columns(model, ANCHORS, POSITIVES))


def test_the_data_of_files_is_told_to_give_its_rows():
    data = RetrievalData("pairs", Texts.of({"d": "a text"}), Texts.of({"q": "a query"}), {"train": {"q": ["d"]}})
    with pytest.raises(TypeError, match=r"train_dataset is RetrievalData.*training_set\(\)"):
        check_dataset(data, "train_dataset")
