"""Rows with any number of negatives: the collator, and the losses that get its batches."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, Features, LargeList, Value
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss, RaggedNegativesCollator
from negative_cache.integrations.sentence_transformers.columns import list_columns
from support import ANCHORS, HARD, POSITIVES, run_ranks
from text_models import cached_texts, encode, make_static, make_tiny, make_trainer, train

# Of the twelve documents: the positives 0 to 11, the given negatives 100 to 111.
NEGATIVES = [[HARD[0], HARD[1], HARD[2]], [], [HARD[1], POSITIVES[0]], [HARD[3]]]
IDS = [[100, 101, 102], [], [101, 0], [103]]
ROWS = [
    {"anchor": a, "positive": p, "label": label, "negative": n, "negative_label": i}
    for a, p, label, n, i in zip(ANCHORS, POSITIVES, [[0, 102], [1], [2], [3]], NEGATIVES, IDS, strict=False)
]


def dense(model: SentenceTransformer, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """The loss of `ROWS` in float64 and its gradient to the first weights, query by query.

    Document 102 is a known positive of the first row, and document 0 the positive of the first row.
    """
    texts = [HARD[0], HARD[1], HARD[3]]
    queries, positives, negatives = (
        model(model.preprocess(part))["sentence_embedding"].double() for part in (ANCHORS[:4], POSITIVES[:4], texts)
    )
    queries, documents = (normalize(x[:, :dim], dim=1) for x in (queries, torch.cat([positives, negatives])))
    losses = []
    for at, query in enumerate(queries):
        scores = torch.stack([20 * (query @ document) for document in documents])
        losses.append(scores.logsumexp(0) - scores[at])
    value = torch.stack(losses).mean()
    return value.detach(), gradient_of(value, model)


def gradient_of(value: Tensor, model: SentenceTransformer) -> Tensor:
    model.zero_grad()
    value.backward()
    return next(model.parameters()).grad.double()


def features_of(
    model: SentenceTransformer, rows: list[dict[str, Any]], collator: RaggedNegativesCollator | None = None
) -> tuple[list[dict[str, Any]], Tensor | None]:
    """The columns and labels that the trainer passes to a loss."""
    batch = (collator or RaggedNegativesCollator(model.preprocess))(rows)
    names = [name for name in ("anchor", "positive", "negative") if f"{name}_input_ids" in batch]
    columns = [{k.removeprefix(f"{n}_"): v for k, v in batch.items() if k.startswith(f"{n}_")} for n in names]
    return columns, batch.get("label")


def strings(model: SentenceTransformer, column: dict[str, Any]) -> list[str]:
    """Texts of a column of a static model."""
    edges = [*column["offsets"].tolist(), len(column["input_ids"])]
    ids = column["input_ids"].tolist()
    return [model.tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(edges)]


def test_a_batch_has_each_negative_once_without_positives_of_any_row():
    model = make_static()
    columns, labels = features_of(model, ROWS)
    assert strings(model, columns[2]) == [HARD[0], HARD[1], HARD[3]]
    assert labels.tolist() == [[0, 102], [1, -1], [2, -1], [3, -1], [100, -1], [101, -1], [103, -1]]


def test_without_ids_negatives_are_compared_by_text():
    model = make_static()
    rows = [{key: row[key] for key in ("anchor", "positive", "negative")} for row in ROWS]
    columns, labels = features_of(model, rows)
    assert strings(model, columns[2]) == [HARD[0], HARD[1], HARD[2], HARD[3]]
    assert labels is None


@pytest.mark.parametrize("empty", [[], None])
def test_a_batch_without_negatives_has_two_columns(empty: list[str] | None):
    rows = [{**row, "negative": empty, "negative_label": empty} for row in ROWS]
    columns, labels = features_of(make_static(), rows)
    assert len(columns) == 2
    assert labels.tolist() == [[0, 102], [1, -1], [2, -1], [3, -1]]


def test_batches_without_lists_are_those_of_sentence_transformers():
    model = make_static()
    rows = [
        {"anchor": a, "positive": p, "negative": n, "label": 1}
        for a, p, n in zip(ANCHORS, POSITIVES, HARD, strict=True)
    ]
    found = RaggedNegativesCollator(model.preprocess)(rows)
    expected = SentenceTransformerTrainer.data_collator_class(model.preprocess)(rows)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key])


def test_prompts_apply_to_the_column_of_negatives_and_its_order_is_no_reason_to_warn(
    caplog: pytest.LogCaptureFixture,
):
    model = make_static()
    collator = RaggedNegativesCollator(model.preprocess, prompts={"negative": "much "})
    with caplog.at_level(logging.WARNING):
        batch = collator(ROWS)
    column = {key: batch[f"negative_{key}"] for key in ("input_ids", "offsets")}
    assert strings(model, column) == ["much " + HARD[at] for at in (0, 1, 3)]
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"negative": ["a", None]}, TypeError, "'negative' has the value None in a list; expected texts"),
        ({"negative_label": [1]}, ValueError, "3 texts in the column 'negative' and 1 ids in 'negative_label'"),
        ({"other": ["a"]}, ValueError, "The columns negative, other have lists of texts; expected one"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(change: dict[str, Any], error: type[Exception], message: str):
    rows = [{**ROWS[0], **({"negative_label": [1, 2]} if "negative" in change else {}), **change}]
    with pytest.raises(error, match=message):
        RaggedNegativesCollator(make_static().preprocess)(rows)


LOSSES: dict[str, Any] = {
    "in-batch": MultipleNegativesRankingLoss,
    "gradcache": lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    "empty cache": lambda model: NegativeCacheRankingLoss(model, cache_size=64, num_samples=1, seed=0),
    "waiting cache": lambda model: NegativeCacheRankingLoss(model, cache_size=64, seed=0),
}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("tiny", name) for name in LOSSES), *(("static", n) for n in LOSSES if n != "gradcache")]
)
def test_value_and_gradient_are_those_of_a_dense_loss(kind: str, name: str):
    model = make_static() if kind == "static" else make_tiny(dropout=0.0)
    loss = LOSSES[name](model)
    if name == "waiting cache":
        loss(
            *features_of(model, [{"anchor": ANCHORS[5], "positive": POSITIVES[5], "label": [5], "negative": HARD[5:9]}])
        )
    found = loss(*features_of(model, ROWS))
    value, gradient = dense(model)
    torch.testing.assert_close(found.detach().double(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of(found, model), gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["guide", "symmetric", "matryoshka"])
def test_a_guide_both_directions_and_truncated_embeddings_take_any_number_of_negatives(kind: str):
    model = make_static()
    options: dict[str, Any] = {
        "guide": {"guide": make_static(dim=24, seed=1), "guide_margin": -3.0},  # hides nothing
        "symmetric": {"symmetric": True},
        "matryoshka": {"matryoshka_dims": (8,)},
    }[kind]
    found = NegativeCacheRankingLoss(model, cache_size=64, seed=0, **options)(*features_of(model, ROWS))
    (value, gradient), other = dense(model), (torch.zeros(()), torch.zeros(()))
    if kind == "matryoshka":
        other = dense(model, 8)
    elif kind == "symmetric":
        anchors, positives = (
            model(model.preprocess(x[:4]))["sentence_embedding"].double() for x in (ANCHORS, POSITIVES)
        )
        scores = 20 * normalize(positives, dim=1) @ normalize(anchors, dim=1).T
        backwards = cross_entropy(scores, torch.arange(4))
        value, gradient = value / 2, gradient / 2
        other = (backwards.detach() / 2, gradient_of(backwards, model) / 2)
    torch.testing.assert_close(found.detach().double(), value + other[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of(found, model), gradient + other[1], rtol=1e-3, atol=1e-6)


def test_a_cached_negative_does_not_count_for_a_query_that_it_is_a_positive_of():
    model = make_static()
    loss = NegativeCacheRankingLoss(model, cache_size=64, num_samples=1, seed=0)
    loss(*features_of(model, ROWS))  # caches documents 0 to 3, 100, 101 and 103
    row = {"anchor": ANCHORS[7], "positive": POSITIVES[7], "label": [7, 101], "negative": [], "negative_label": []}
    found = loss(*features_of(model, [row]))
    query, documents = encode(model, [ANCHORS[7]]), encode(model, [POSITIVES[7], *POSITIVES[:4], HARD[0], HARD[3]])
    expected = cross_entropy(20 * query @ documents.T, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)


def test_labels_of_negatives_contradict_those_of_other_texts():
    model = make_static()
    rows = [{**ROWS[0], "negative_label": [100, 100, 102]}]
    with pytest.raises(ValueError, match="the label of 'an essay that mentions bread once' names another text"):
        NegativeCacheRankingLoss(model, cache_size=64)(*features_of(model, rows))
    columns, labels = features_of(model, ROWS)
    message = r"`labels` has shape \[5, 2\]; expected \[4\] or \[4, n\], or with the labels of the negatives \[7, n\]"
    with pytest.raises(ValueError, match=message):
        NegativeCacheRankingLoss(model, cache_size=64)(columns, labels[:5])


DATA = {
    "anchor": ANCHORS,
    "positive": POSITIVES,
    "label": [[at] for at in range(12)],
    "negative": [HARD[at : at + at % 3] for at in range(12)],
    "negative_label": [[100 + other for other in range(at, min(12, at + at % 3))] for at in range(12)],
}


def test_columns_of_lists_are_found_whatever_wrote_them():
    small = Dataset.from_dict(DATA)
    kinds = {"negative": LargeList(Value("large_string")), "positive": Value("large_string")}
    large = small.cast(Features({**small.features, **kinds}))
    assert list_columns(small) == list_columns(large) == ["negative", "negative_label"]


@pytest.mark.parametrize("kind", ["static", "tiny"])
def test_the_trainer_takes_lists_of_negatives_and_fills_every_batch(kind: str, tmp_path: Path):
    model = make_static() if kind == "static" else make_tiny()
    loss = NegativeCacheRankingLoss(model, cache_size=64, seed=0)
    data = Dataset.from_dict(DATA)
    trainer = train(model, loss, data, tmp_path, steps=3, evaluated=data, batch_sampler="no_duplicates")
    assert [len(batch) for batch in trainer.get_train_dataloader().batch_sampler] == [4, 4, 4]
    given = {text for texts in DATA["negative"] for text in texts}
    assert cached_texts(loss) == sorted([*POSITIVES, *given])
    assert 0 < trainer.evaluate()["eval_loss"] < 20
    model.save_pretrained(str(tmp_path / "model"))  # with a model card that describes the data
    assert "negative" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_sentence_transformers_own_trainer_takes_lists_of_negatives_with_the_collator(tmp_path: Path):
    model = make_static()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(DATA), loss=MultipleNegativesRankingLoss(model),
        data_collator=RaggedNegativesCollator(model.preprocess),
    )  # fmt: skip
    trainer.train()
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_ranks_with_different_numbers_of_negatives_compute_the_loss_of_one_process(tmp_path: Path):
    run_ranks(check_ranks, 2, tmp_path)


def check_ranks(rank: int, world_size: int, folder: Path) -> None:
    for of_ranks in ([[0, 1], [2, 3]], [[0, 2, 3], [1]]):  # the last row has no negatives
        model = make_static()
        rows = [ROWS[at] for at in of_ranks[rank]]
        with pytest.raises(ValueError, match="'negative' has lists of negatives, whose number differs between the 2"):
            RaggedNegativesCollator(model.preprocess)(rows)
        loss = NegativeCacheRankingLoss(model, cache_size=64, seed=0, gather_across_devices=True)
        collator = RaggedNegativesCollator(model.preprocess, varies_by_rank=True)
        found = loss(*features_of(model, rows, collator)) / world_size  # DDP averages over ranks
        gradient, total = gradient_of(found, model), found.detach().double()
        for value in (gradient, total):
            dist.all_reduce(value)
        expected_total, expected_gradient = dense(model)
        torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)
        filled = loss.cache_loss.cache.num_filled.clone()
        dist.all_reduce(filled)
        assert int(filled) == 7  # each document has one row


def test_the_trainer_lets_only_losses_with_a_cache_differ_between_ranks(tmp_path: Path):
    model = make_static()
    cached, plain = NegativeCacheRankingLoss(model, cache_size=64), MultipleNegativesRankingLoss(model)
    for loss, expected in ((cached, True), (MatryoshkaLoss(model, cached, [32]), True), (plain, False)):
        assert make_trainer(model, loss, DATA, tmp_path).data_collator.varies_by_rank is expected
