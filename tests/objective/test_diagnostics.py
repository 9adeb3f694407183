"""The metrics of a step, each against its definition on a small case; and the warnings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from negative_cache import FixedLenFeature, NegativeCache, NegativeCacheLoss
from negative_cache.objective import loss as objective
from negative_cache.objective.diagnostics import LONG_PATIENCE, PATIENCE, Diagnostics, update_numbers
from support import as_on_a_gpu

DIM, SCALE, NUM_ROWS, SIZE = 3, 2.0, 6, 10
SPECS = {"row": FixedLenFeature([], torch.int64)}


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TABLE = randn(12, DIM, seed=0)
QUERIES = randn(3, DIM, seed=1)
STALE = TABLE[:NUM_ROWS] + 0.3 * randn(NUM_ROWS, DIM, seed=2)
DOCUMENTS = torch.tensor([8, 9, 10])


def filled_loss(stale: Tensor = STALE, **settings: Any) -> NegativeCacheLoss:
    """A loss whose cache holds documents 0 to 5, and whose encoder keeps its last output."""

    def encoder(features: dict[str, Tensor]) -> Tensor:
        encoder.rows = features["row"]
        encoder.output = TABLE[features["row"]].clone().requires_grad_()
        return encoder.output

    settings = {"embedding_dtype": torch.float64, "specs": SPECS, "seed": 0, **settings}
    loss_fn = NegativeCacheLoss(encoder, SIZE, SCALE, **{"num_samples": 1, **settings})
    rows = torch.arange(NUM_ROWS)
    loss_fn(stale, stale, {"row": rows}, rows)
    return loss_fn


def step(
    loss_fn: NegativeCacheLoss, queries: Tensor = QUERIES, documents: Tensor | None = None, **given: Any
) -> tuple[Tensor, list[Tensor]]:
    """A training step with its backward pass: the loss, and the leaves."""
    documents = TABLE[DOCUMENTS] if documents is None else documents
    leaves = [queries.clone().requires_grad_(), documents.clone().requires_grad_()]
    loss = loss_fn(*leaves, {"row": DOCUMENTS[: len(queries)]}, DOCUMENTS[: len(queries)], **given)
    loss.backward()
    return loss.detach(), leaves


def kept_tensors(loss_fn: NegativeCacheLoss) -> list[Tensor]:
    """All tensors in the records of the last step."""
    values = [value for record in loss_fn.diagnostics._records for value in (*record.args, *record.keywords.values())]
    nested = [part for value in values if isinstance(value, dict) for part in value.values()]
    return [value for value in (*values, *nested) if isinstance(value, Tensor)]


# The loss's own numbers


def test_metrics_are_those_of_the_dense_softmax():
    loss_fn = filled_loss()
    loss, _ = step(loss_fn)
    metrics = loss_fn.metrics()
    batch = SCALE * QUERIES @ TABLE[DOCUMENTS].T
    scores = torch.cat([batch, SCALE * QUERIES @ STALE.T], dim=1)
    probabilities = scores.softmax(1)
    own = probabilities[:, :3].diagonal()
    assert metrics["interpretable_loss"] == pytest.approx(float(-own.log().mean()))
    assert metrics["interpretable_loss"] == pytest.approx(float(loss))
    # exp(-loss) of each query, then the mean
    assert metrics["positive_probability"] == pytest.approx(float(own.mean()))
    assert metrics["cache_share"] == pytest.approx(float(probabilities[:, 3:].sum(1).mean()))
    assert metrics["fill"] == (NUM_ROWS + 3) / SIZE
    assert set(metrics) == {
        "interpretable_loss",
        "positive_probability",
        "cache_share",
        "fill",
        "staleness",
        "staleness_youngest",
        "staleness_oldest",
        "age",
        "effective_negatives",
        "near_duplicates",
        "gradient_norm_ratio",
        "documents_per_query",
        "in_batch_noise",
        "sampling_noise",
    }


def mean_of(number: str, loss_fn: NegativeCacheLoss, queries: Tensor, steps: int = 100) -> tuple[float, float]:
    """Mean and standard error of a number over steps from one cache; of `effective_negatives`, those of its inverse."""
    found, before = [], {key: value.clone() for key, value in loss_fn.cache.state_dict().items()}
    for _ in range(steps):
        step(loss_fn, queries)
        found.append(loss_fn.metrics()[number])
        loss_fn.cache.load_state_dict(before)
    values = torch.tensor(found, dtype=torch.float64)
    values = 1 / values if number == "effective_negatives" else values
    return float(values.mean()), float(values.std()) / steps**0.5


@pytest.mark.parametrize("shared", [True, False])
def test_effective_negatives_are_the_inverse_of_the_mean_sum_of_squares(shared: bool):
    """Where nothing is stale. Its inverse is a mean over draws; 5 standard errors are passed less often than ALPHA."""
    loss_fn = filled_loss(TABLE[:NUM_ROWS], shared=shared)
    truth = float((SCALE * QUERIES @ TABLE[:NUM_ROWS].T).softmax(1).square().sum(1).mean())
    mean, error = mean_of("effective_negatives", loss_fn, QUERIES)
    assert abs(mean - truth) < 5 * error
    assert abs(mean - 1.3 * truth) > 5 * error  # the test can fail
    assert truth * 1.3 < 1


@pytest.mark.parametrize("shared", [True, False])
def test_near_duplicates_are_the_softmax_weight_of_copies_of_the_positive(shared: bool):
    """Row 2 is a longer copy of the second query's positive, row 4 nearly one of the third's."""
    stale = TABLE[:NUM_ROWS].clone()
    copies = {2: 1.2 * TABLE[9], 4: TABLE[10] + 0.05 * randn(DIM, seed=5) * TABLE[10].norm()}
    loss_fn = filled_loss(stale, shared=shared)
    table = TABLE.clone()
    for row, copy in copies.items():
        table[row] = stale[row] = copy
    loss_fn.cache.write(torch.arange(NUM_ROWS), {"embedding": stale})
    loss_fn.document_encoder = lambda f: table[f["row"]].clone().requires_grad_()
    cosines = torch.nn.functional.cosine_similarity(TABLE[DOCUMENTS][:, None], table[:NUM_ROWS], dim=2)
    queries = TABLE[DOCUMENTS] / 2
    weights = (SCALE * queries @ stale.T).softmax(1)
    truth = float((weights * (cosines >= 0.99)).sum(1).mean())
    assert [int(row) for row in (cosines >= 0.99).any(0).nonzero()] == [2, 4]
    mean, error = mean_of("near_duplicates", loss_fn, queries)
    assert abs(mean - truth) < 5 * error
    assert abs(mean) > 5 * error  # the test can fail


@pytest.mark.parametrize("kind", ["shared", "own", "given negatives"])
def test_the_ratio_of_gradient_norms_is_that_of_the_leaves(kind: str):
    loss_fn = filled_loss(shared=kind != "own", num_samples=2)
    given: dict[str, Any] = {}
    negatives = TABLE[[11]].clone().requires_grad_()
    if kind == "given negatives":
        given = {"negative_embeddings": negatives, "negative_features": {"row": torch.tensor([11])}}
    _, (queries, documents) = step(loss_fn, **given)
    sides = [documents.grad, loss_fn.document_encoder.output.grad, negatives.grad]
    square = sum(float(gradient.square().sum()) for gradient in sides if gradient is not None)
    assert loss_fn.metrics()["gradient_norm_ratio"] == pytest.approx(
        (float(queries.grad.square().sum()) / square) ** 0.5
    )
    # a step whose backward pass has not run has none
    loss_fn(QUERIES.clone().requires_grad_(), TABLE[DOCUMENTS], {"row": DOCUMENTS}, DOCUMENTS)
    assert "gradient_norm_ratio" not in loss_fn.metrics()


def test_a_later_step_does_not_add_to_an_earlier_ones_gradients():
    loss_fn = filled_loss()
    leaves = [(QUERIES.clone().requires_grad_(), TABLE[DOCUMENTS].clone().requires_grad_()) for _ in range(2)]
    losses = [loss_fn(queries, documents, {"row": DOCUMENTS}, DOCUMENTS) for queries, documents in leaves]
    (losses[0] + losses[1]).backward()
    square = sum(float(x.grad.square().sum()) for x in (leaves[1][1], loss_fn.document_encoder.output))
    expected = (float(leaves[1][0].grad.square().sum()) / square) ** 0.5
    assert loss_fn.metrics()["gradient_norm_ratio"] == pytest.approx(expected)


def test_evaluation_does_not_change_the_numbers_of_training():
    loss_fn = filled_loss()
    step(loss_fn)
    before = loss_fn.metrics()
    loss_fn.eval()(QUERIES, TABLE[DOCUMENTS].flip(0), {"row": DOCUMENTS})
    assert loss_fn.metrics() == before


def test_records_of_a_step_are_small_and_hold_no_graph():
    """They hold rows of the batch and re-encoded rows: nothing of the size of the cache, nothing with a graph."""
    loss_fn = filled_loss(absolute_margin=0.5, learnable_scale=True)
    step(loss_fn)
    kept = kept_tensors(loss_fn)
    assert len(kept) > 10
    assert len(loss_fn.diagnostics._records) == 6
    assert not any(value.requires_grad for value in kept)
    assert not any(SIZE in value.shape for value in kept)


def test_many_products_are_not_kept(monkeypatch: pytest.MonkeyPatch):
    """Their numbers are those of products that are kept."""
    found = []
    for most in (2**18, 0):
        monkeypatch.setattr(objective, "MAX_KEPT", most)
        loss_fn = filled_loss()
        step(loss_fn)
        found.append(loss_fn.metrics())
    kept = kept_tensors(loss_fn)
    assert found[0] == pytest.approx(found[1])
    assert max(value.numel() for value in kept) <= SIZE * DIM


def test_numbers_are_those_of_the_step_whatever_becomes_of_the_embeddings():
    """Embeddings may be views of larger tensors, which are not kept alive, or change in place later."""
    count = len(QUERIES)
    large = torch.randn(count, 50, DIM, dtype=torch.float64)
    outputs: list[Tensor] = []

    def encode(features: dict[str, Tensor]) -> Tensor:
        outputs.append(torch.randn(len(features["row"]), 50, DIM, dtype=torch.float64))
        return outputs[-1][:, 0]

    loss_fn = NegativeCacheLoss(encode, SIZE, embedding_dtype=torch.float64, seed=0)
    for _ in range(SIZE // count + 2):
        loss_fn(QUERIES, large[:, 0], {"row": torch.arange(count)})
    before = loss_fn.metrics()
    for value in (large, *outputs):
        value.fill_(7.0)
    assert loss_fn.metrics() == before
    kept = kept_tensors(loss_fn)
    assert max(value.untyped_storage().nbytes() for value in kept) < large.nbytes


# Staleness


def make_cache(ages: list[int]) -> tuple[NegativeCache, Tensor, Tensor]:
    """A cache, new embeddings of its rows, and how stale each is: row i has `i + 1` squared over the norm's square."""
    count = len(ages)
    encoded = torch.zeros(count, DIM, dtype=torch.float64)
    encoded[:, 0] = 2.0
    cached = encoded.clone()
    cached[:, 1] = torch.arange(1, count + 1)
    staleness = torch.arange(1, count + 1, dtype=torch.float64).square() / 4
    return NegativeCache({"embedding": cached}, ages), encoded, staleness


def age_of(cache: NegativeCache, rows: Tensor) -> Tensor:
    """In the step to come."""
    return cache.step + 1 - cache.written[rows]


def test_staleness_is_reported_by_age():
    cache, encoded, staleness = make_cache([5, 1, 9, 0, 7, 3, 2, 8])
    rows = torch.tensor([0, 2, 3, 4, 5, 7, 1])  # ages 5, 9, 0, 7, 3, 8, 1; seven rows, a quarter is two
    found = update_numbers(cache.data["embedding"][rows], encoded[rows], age_of(cache, rows), None)
    assert float(found["staleness"]) == pytest.approx(float(staleness[rows].mean()))
    assert float(found["staleness_youngest"]) == pytest.approx(float(staleness[[3, 1]].mean()))
    assert float(found["staleness_oldest"]) == pytest.approx(float(staleness[[2, 7]].mean()))
    assert float(found["age"]) == pytest.approx(1 + (5 + 9 + 0 + 7 + 3 + 8 + 1) / 7)


def test_staleness_leaves_out_masked_rows():
    cache, encoded, staleness = make_cache([5, 1, 9, 0])
    rows, mask = torch.tensor([0, 1, 2, 3]), torch.tensor([True, True, False, False])
    found = update_numbers(cache.data["embedding"], encoded, age_of(cache, rows), mask)
    assert float(found["staleness"]) == pytest.approx(float(staleness[:2].mean()))
    assert float(found["staleness_youngest"]) == pytest.approx(float(staleness[1]))
    assert float(found["staleness_oldest"]) == pytest.approx(float(staleness[0]))
    assert float(found["age"]) == pytest.approx(4.0)
    nothing = update_numbers(cache.data["embedding"], encoded, age_of(cache, rows), torch.zeros(4, dtype=torch.bool))
    assert all(float(value) == 0 for value in nothing.values())


def test_staleness_of_a_step_is_that_of_the_re_encoded_rows():
    for is_on_a_gpu in (False, True):
        loss_fn = filled_loss()
        cached = loss_fn.cache.data["embedding"].clone()
        if is_on_a_gpu:
            with as_on_a_gpu():
                step(loss_fn)
        else:
            step(loss_fn)
        is_encoded = (loss_fn.cache.data["embedding"][:NUM_ROWS] != cached[:NUM_ROWS]).any(1)
        new = TABLE[:NUM_ROWS][is_encoded]
        expected = (cached[:NUM_ROWS][is_encoded] - new).square().sum(1) / new.square().sum(1)
        assert loss_fn.metrics()["staleness"] == pytest.approx(float(expected.mean()))
        assert loss_fn.metrics()["age"] == 1.0


# Warnings


def warnings_of(caplog: pytest.LogCaptureFixture, act: Callable[[], Any]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="negative_cache"):
        act()
    return [record.getMessage() for record in caplog.records]


def test_good_numbers_give_no_warning(caplog: pytest.LogCaptureFixture):
    loss_fn = filled_loss(TABLE[:NUM_ROWS])
    step(loss_fn)
    assert warnings_of(caplog, lambda: [loss_fn.metrics() for _ in range(PATIENCE)]) == []


def test_stale_embeddings_give_one_warning_with_advice(caplog: pytest.LogCaptureFixture):
    loss_fn = filled_loss(-TABLE[:NUM_ROWS])
    step(loss_fn)
    (message,) = warnings_of(caplog, lambda: [loss_fn.metrics() for _ in range(PATIENCE)])
    assert "staleness 4.00" in message
    assert "learning rate" in message
    assert "refresh_per_step" in message
    assert "Or `document_encoder` is not the encoder of `document_embeddings`" in message
    loss_fn.cache.write(torch.arange(NUM_ROWS), {"embedding": -TABLE[:NUM_ROWS]})
    step(loss_fn)
    assert loss_fn.metrics()["staleness"] > 0.5
    assert warnings_of(caplog, lambda: [loss_fn.metrics() for _ in range(PATIENCE)]) == []


def test_embeddings_that_are_only_old_are_not_blamed_on_the_encoder(caplog: pytest.LogCaptureFixture):
    loss_fn = filled_loss(0.1 * TABLE[:NUM_ROWS])  # staleness 0.81
    step(loss_fn)
    (message,) = warnings_of(caplog, lambda: [loss_fn.metrics() for _ in range(PATIENCE)])
    assert "staleness 0.81" in message
    assert "document_encoder" not in message


@pytest.mark.parametrize(
    ("factor", "larger", "smaller"), [(1e3, "documents", "queries"), (1e-3, "queries", "documents")]
)
def test_an_uneven_gradient_gives_one_warning_with_advice(
    factor: float, larger: str, smaller: str, caplog: pytest.LogCaptureFixture
):
    """Queries that are `factor` times as long give documents so much more gradient, and themselves as much."""
    loss_fn = filled_loss(TABLE[:NUM_ROWS])
    loss_fn._fixed_scale = SCALE / factor
    step(loss_fn, factor * QUERIES)
    (message,) = warnings_of(caplog, lambda: [loss_fn.metrics() for _ in range(PATIENCE)])
    assert f"The gradient of the {larger}' embeddings is" in message
    assert f"times that of the {smaller}'" in message
    assert "learning rate" in message
    step(loss_fn, factor * QUERIES)
    assert warnings_of(caplog, lambda: [loss_fn.metrics() for _ in range(PATIENCE)]) == []


def readings_of_training(
    ids: str | None, distinct: int, dropout: float = 0.0, key: str = "row", **settings: Any
) -> list[dict[str, float]]:
    """The metrics of each of 12 steps, each with 8 of `distinct` documents in turn.

    Args:
        ids: "right", "unknown", or "new" for a new id whenever a document occurs; None to pass none.
        distinct: Number of distinct documents.
        dropout: Dropout of the embeddings.
        key: Name of the feature; "float" is a floating point one.
        **settings: Of the loss.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Parameter(torch.randn(distinct, 16, generator=generator))

    def encode(features: dict[str, Tensor]) -> Tensor:
        embeddings = table[features[key].long()]
        if dropout:
            embeddings = embeddings * torch.bernoulli(torch.full_like(embeddings, 1 - dropout), generator=generator)
        return normalize(embeddings, dim=1)

    loss_fn = NegativeCacheLoss(encode, 64, seed=0, **settings)
    optimizer, readings = torch.optim.SGD([table], 0.05), []
    for number in range(12):
        rows = (torch.arange(8) + 8 * number) % distinct
        features = {key: rows.float() if key == "float" else rows}
        documents = encode(features)
        queries = normalize(documents + 0.5 * torch.randn(8, 16, generator=generator), dim=1)
        given = {"right": rows, "unknown": torch.full_like(rows, -1), "new": torch.arange(8) + 8 * number, None: None}
        loss_fn(queries, documents, features, given[ids]).backward()
        readings.append(loss_fn.metrics())
        optimizer.step()
        optimizer.zero_grad()
    return readings


def test_copies_of_the_positives_give_one_warning_with_advice(caplog: pytest.LogCaptureFixture):
    (message,) = warnings_of(caplog, lambda: readings_of_training("unknown", distinct=16))
    assert "near_duplicates" in message
    assert "above 0.05" in message
    assert "document_ids" in message
    assert "label column" in message
    assert "relative_margin" in message


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ids", ["unknown", "new"])
def test_copies_are_seen_through_dropout(ids: str, shared: bool, caplog: pytest.LogCaptureFixture):
    """Documents with the features of the positive, whatever their embeddings; those without dropout are near, too."""
    found: list[dict[str, float]] = []
    options: dict[str, Any] = {"dropout": 0.15, "num_samples": 4, "shared": shared}
    (message,) = warnings_of(caplog, lambda: found.extend(readings_of_training(ids, 16, **options)))
    assert "near_duplicates" in message
    without = readings_of_training(ids, 16, **{**options, "dropout": 0.0})
    assert 0.1 < found[-1]["near_duplicates"] < without[-1]["near_duplicates"]


@pytest.mark.parametrize(
    ("ids", "distinct", "settings"),
    [
        (None, 200, {}),
        (None, 16, {}),
        (None, 16, {"dropout": 0.15, "num_samples": 1}),
        ("right", 16, {}),
        ("right", 16, {"dropout": 0.15, "num_samples": 1}),
        ("unknown", 16, {"relative_margin": 0.05}),
    ],
    ids=["distinct documents", "hashes", "hashes and dropout", "ids", "ids and dropout", "a margin"],
)
def test_training_without_copies_gives_no_warning(
    ids: str | None, distinct: int, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    readings: list[dict[str, float]] = []
    assert warnings_of(caplog, lambda: readings.extend(readings_of_training(ids, distinct, **settings))) == []
    assert max(reading.get("near_duplicates", 0.0) for reading in readings) <= 0.05


def test_what_cannot_be_seen_is_said(caplog: pytest.LogCaptureFixture):
    """Floats have no hash, and with dropout, embeddings of a document are not near each other."""
    (message,) = warnings_of(caplog, lambda: readings_of_training(None, 16, 0.15, key="float", num_samples=1))
    assert "no hash of the features `float`" in message
    assert "`near_duplicates` shows this only if the encoder has no dropout" in message
    assert "Pass document_ids" in message


def test_there_are_no_near_duplicates_while_the_loss_leaves_the_cache_out():
    assert readings_of_training(None, 200)[0]["near_duplicates"] == 0


@pytest.mark.parametrize(("masked", "count"), [(0.49, 0), (0.51, 1)])
def test_a_margin_that_hides_most_of_the_cache_for_long_gives_one_warning(
    masked: float, count: int, caplog: pytest.LogCaptureFixture
):
    cache, diagnostics = make_cache([0])[0], Diagnostics()
    diagnostics.begin([partial(dict, masked=torch.tensor(masked))])
    for _ in range(LONG_PATIENCE - 1):
        diagnostics.read(cache)
    assert caplog.records == []
    for _ in range(LONG_PATIENCE):
        diagnostics.read(cache)
    assert [record.getMessage()[:49] for record in caplog.records] == [
        "Most of the cache is hidden as false negatives: m"
    ] * count


@pytest.mark.parametrize(
    ("staleness", "ratio", "copies", "count"),
    [(0.49, 9.9, 0.04, 0), (0.51, 1.0, 0.0, 1), (0.0, 0.09, 0.0, 1), (0.0, 1.0, 0.06, 1), (0.6, 11.0, 0.5, 3)],
)
def test_warnings_begin_at_their_thresholds(
    staleness: float, ratio: float, copies: float, count: int, caplog: pytest.LogCaptureFixture
):
    cache, diagnostics = make_cache([0])[0], Diagnostics()
    values = {"staleness": torch.tensor(staleness), "near_duplicates": torch.tensor(copies)}
    diagnostics.begin([partial(dict, values)])
    queries, documents = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    diagnostics.watch(queries, [documents])
    (ratio * queries + documents).sum().backward()
    assert diagnostics.read(cache)["gradient_norm_ratio"] == pytest.approx(ratio)
    assert caplog.records == []  # one bad reading is none
    for _ in range(2 * PATIENCE):
        diagnostics.read(cache)
    assert len(caplog.records) == count


def test_bad_readings_with_a_good_one_between_them_give_no_warning(caplog: pytest.LogCaptureFixture):
    cache, diagnostics = make_cache([0])[0], Diagnostics()
    for staleness in [0.9] * (PATIENCE - 1) + [0.1] + [0.9] * (PATIENCE - 1):
        diagnostics.begin([partial(dict, staleness=torch.tensor(staleness))])
        diagnostics.read(cache)
    assert caplog.records == []
    diagnostics.read(cache)
    assert len(caplog.records) == 1
