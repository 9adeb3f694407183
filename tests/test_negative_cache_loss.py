"""`NegativeCacheLoss`: arguments, what a step writes, evaluation, state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dense import Exact, Problem, exact
from negative_cache import FixedLenFeature, NegativeCache, NegativeCacheLoss, RaggedFeature
from support import assert_same_state, snapshot

DIM, WIDTH, SIZE, SCALE = 4, 6, 16, 5.0
# Beside the default: the method of the paper, in which each query has draws of its own, and none from the batch.
SETTINGS = {"default": {}, "own draws": {"in_batch": False, "shared": False}}
both_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


class DenseEncoder(nn.Module):
    """Normalised projection of a vector `x`; records the features of each call."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(DIM, WIDTH, generator=generator))
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        self.calls.append(features)
        return normalize(features["x"] @ self.weight.T, dim=1)


def batch_of(ids: list[int]) -> dict[str, Tensor]:
    """Features of documents: `x` is a function of the id, which is a feature too, so that draws can be read."""
    every = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(7))
    return {"x": every[ids], "id": torch.tensor(ids)}


def queries_of(count: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def make_loss(encoder: Any = None, size: int = SIZE, scale: float = SCALE, **settings: Any) -> NegativeCacheLoss:
    return NegativeCacheLoss(
        DenseEncoder() if encoder is None else encoder, size, scale, **{"seed": 0, "num_samples": 1, **settings}
    )


def train(loss_fn: NegativeCacheLoss, ids: list[int], queries: Tensor | None = None, **arguments: Any) -> Tensor:
    """One step on documents with these ids; returns the loss."""
    features = batch_of(ids)
    with torch.no_grad():
        documents = loss_fn.document_encoder(features)
    queries = queries_of(len(ids)) if queries is None else queries
    return loss_fn(queries, documents, features, **{"document_ids": torch.tensor(ids), **arguments})


def filled_loss(ids: list[int], **settings: Any) -> NegativeCacheLoss:
    """A loss after one step with these documents: they are in rows 0, 1, ..."""
    loss_fn = make_loss(**settings)
    train(loss_fn, ids)
    loss_fn.document_encoder.calls.clear()
    return loss_fn


def cache_of(loss_fn: NegativeCacheLoss) -> NegativeCache:
    assert loss_fn.cache is not None
    return loss_fn.cache


def dense_loss(
    loss_fn: NegativeCacheLoss,
    queries: Tensor,
    ids: list[int],
    given: tuple[int, ...] = (),
    positive_ids: Tensor | None = None,
) -> Exact:
    """What a step of `train` returns, by the dense formulas; row 0 of the cache must hold document 0, and so on."""
    with torch.no_grad():
        table = DenseEncoder()(batch_of(list(range(100)))).double()
    stale = table[:0]
    if loss_fn.cache is not None:
        num_rows = int(loss_fn.cache.num_filled)
        assert loss_fn.cache.document_ids[:num_rows].tolist() == list(range(num_rows))
        stale = loss_fn.cache.embeddings("embedding")[:num_rows].double()
    positives = torch.empty(len(ids), 0, dtype=torch.int64) if positive_ids is None else positive_ids
    documents, given_ids = torch.tensor(ids), torch.tensor(given, dtype=torch.int64)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    problem = Problem(queries.detach().double(), table, documents, given_ids, positives, stale, scale)
    return exact(problem, in_batch=loss_fn.in_batch)


def assert_equal_value(loss: Tensor, expected: Exact) -> None:
    torch.testing.assert_close(loss.detach().double(), expected.value, rtol=1e-5, atol=1e-6)


def drawn_ids(loss_fn: NegativeCacheLoss) -> list[Tensor]:
    return [call["id"] for call in loss_fn.document_encoder.calls if "id" in call]


# Construction


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_size": 0}, "`cache_size` is 0"),
        ({"cache_size": 10.5}, "`cache_size` is 10.5; it must be an integer of at least 1"),
        ({"matryoshka_dims": (4, 4)}, "`matryoshka_dims` is .*; expected numbers of components, each once"),
        ({"scale": 0.0}, "`scale` is 0.0"),
        ({"scale": float("nan")}, "`scale` is nan"),
        ({"scale": float("inf")}, "`scale` is inf"),
        ({"num_samples": 0}, "`num_samples` is 0"),
        (
            {"num_samples": 1.5, "shared": False},
            "`num_samples` is 1.5; without shared documents, .* expected an integer",
        ),
        ({"num_samples": -0.5}, '`num_samples` is -0.5; it must be above 0, such as 0.25. Or "auto"'),
        ({"num_samples": float("inf")}, "`num_samples` is inf"),
        ({"embedding_dtype": torch.int32}, "`embedding_dtype` is torch.int32"),
        (
            {"specs": {"embedding": FixedLenFeature([2], torch.float32)}},
            "'embedding', which the cache adds itself. Leave",
        ),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        NegativeCacheLoss(DenseEncoder(), **{"cache_size": SIZE, **settings})


def test_an_encoder_without_gradient_is_refused_where_the_batch_has_one():
    encoder = torch.nn.Linear(WIDTH, DIM)
    loss_fn = NegativeCacheLoss(lambda f: encoder(f["x"]).detach(), SIZE, num_samples=1)
    features = {"x": torch.randn(4, WIDTH)}
    queries = torch.randn(4, DIM)
    loss_fn(queries, encoder(features["x"]), features)  # nothing is drawn yet
    with pytest.raises(ValueError, match="embeddings without gradient, but those of the batch's documents have one"):
        loss_fn(queries, encoder(features["x"]), features)
    loss_fn(queries.requires_grad_(), encoder(features["x"]).detach(), features).backward()  # documents are frozen


def test_specs_are_taken_from_the_first_batch():
    loss_fn = make_loss(lambda features: features["x"][:, :DIM])
    features = {**batch_of([1, 2]), "input_ids": torch.tensor([[5, 0, 0], [5, 6, 0]]), "words": [torch.ones(3)] * 2}
    loss_fn(queries_of(2), queries_of(2), features)
    assert cache_of(loss_fn).specs == {
        "embedding": FixedLenFeature([DIM], torch.float32),
        "x": FixedLenFeature([WIDTH], torch.float32),
        "id": FixedLenFeature([], torch.int64),
        "input_ids": RaggedFeature(torch.int64),
        "words": RaggedFeature(torch.float32),
    }


def test_given_specs_are_used():
    """A narrower dtype than that of the batch, room for wider items, and another padding value."""
    specs = {"x": FixedLenFeature([WIDTH], torch.float32), "id": FixedLenFeature([3], torch.int16, 9)}
    loss_fn = make_loss(specs=specs, embedding_dtype=torch.bfloat16)
    loss_fn(queries_of(2), queries_of(2), {"x": batch_of([1, 2])["x"], "id": torch.tensor([[1, 2], [3, 4]])})
    data = cache_of(loss_fn).data
    assert data["embedding"].dtype == torch.bfloat16
    assert data["id"].dtype == torch.int16
    assert data["id"][:2].tolist() == [[1, 2, 9], [3, 4, 9]]


def test_the_encoder_is_not_part_of_the_module():
    encoder = DenseEncoder().eval()
    loss_fn = make_loss(encoder, learnable_scale=True)
    loss_fn.train()
    train(loss_fn, [1, 2])
    assert not encoder.training
    loss_fn.eval()
    encoder.train()
    train(loss_fn, [1, 2])
    assert encoder.training
    assert [name for name, _ in loss_fn.named_parameters()] == ["log_scale"]
    assert not any("weight" in name for name in loss_fn.state_dict())
    assert all(isinstance(value, Tensor) for value in loss_fn.state_dict().values())


def test_the_encoder_can_be_replaced():
    loss_fn = filled_loss([1, 2])
    other = DenseEncoder(seed=5)
    loss_fn.document_encoder = other
    assert loss_fn.document_encoder is other
    train(loss_fn, [3, 4])
    assert len(other.calls) == 2  # by `train`, the documents of the batch; then the sampled rows
    assert not any("weight" in name for name in loss_fn.state_dict())


# A step


def test_the_first_step_is_the_cross_entropy_of_the_batch():
    """Nothing is in the cache yet: nothing is encoded, and the gradient is exact."""
    loss_fn = make_loss()
    encoder = loss_fn.document_encoder
    queries, documents = queries_of(3).requires_grad_(), encoder(batch_of([0, 1, 2])).detach().requires_grad_()
    encoder.calls.clear()
    loss = loss_fn(queries, documents, batch_of([0, 1, 2]), torch.tensor([0, 1, 2]))
    loss.backward()
    plain = torch.nn.functional.cross_entropy(SCALE * queries @ documents.T, torch.arange(3))
    torch.testing.assert_close(loss, plain)
    for leaf, gradient in zip((queries, documents), torch.autograd.grad(plain, (queries, documents)), strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    assert encoder.calls == []
    assert cache_of(loss_fn).document_ids.tolist() == [0, 1, 2] + [-1] * (SIZE - 3)


def test_without_in_batch_negatives_the_first_step_has_loss_zero_and_a_backward_pass():
    loss_fn = make_loss(in_batch=False)
    queries = queries_of(3).requires_grad_()
    loss = train(loss_fn, [1, 2, 3], queries)
    loss.backward()
    assert loss.item() == 0
    assert queries.grad is not None
    assert not queries.grad.any()
    assert len(loss_fn.document_encoder.calls) == 1  # by `train`: nothing was sampled
    assert cache_of(loss_fn).filled.tolist() == [True] * 3 + [False] * (SIZE - 3)


@both_settings
def test_the_second_step_reaches_the_encoder_through_the_sampled_rows(settings: dict[str, Any]):
    """Queries and documents have no graph here: the gradient of the encoder comes from re-encoded rows alone."""
    loss_fn = filled_loss([1, 2, 3], **settings)
    loss = train(loss_fn, [4, 5, 6])
    loss.backward()
    assert loss.item() > 0
    assert loss_fn.document_encoder.weight.grad.abs().max() > 1e-3
    (drawn,) = drawn_ids(loss_fn)[1:]
    assert set(drawn.tolist()) <= {1, 2, 3}


@both_settings
def test_the_value_is_that_of_the_dense_loss(settings: dict[str, Any]):
    loss_fn = filled_loss([0, 1, 2, 3], num_samples=3, **settings)
    queries = queries_of(2, seed=1)
    expected = dense_loss(loss_fn, queries, [5, 6])
    assert_equal_value(train(loss_fn, [5, 6], queries), expected)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_each_sampled_document_is_encoded_once_for_all_queries(num_samples: int):
    loss_fn = filled_loss(list(range(12)), num_samples=num_samples, scale=1.0)
    train(loss_fn, [20, 21, 22])
    (drawn,) = drawn_ids(loss_fn)[1:]
    assert len(drawn) == len(drawn.unique()) == 3 * num_samples


@both_settings
def test_sampled_rows_get_their_new_embeddings(settings: dict[str, Any]):
    loss_fn = filled_loss([1, 2, 3], **settings)
    encoder = loss_fn.document_encoder
    with torch.no_grad():
        encoder.weight.add_(torch.randn(DIM, WIDTH, generator=torch.Generator().manual_seed(1)))
    old = cache_of(loss_fn).embeddings("embedding")[:3].clone()
    train(loss_fn, [4, 5])
    drawn = set(drawn_ids(loss_fn)[1].tolist())
    with torch.no_grad():
        new = encoder(batch_of([1, 2, 3]))
    assert 0 < len(drawn) < 3
    for row, document in enumerate([1, 2, 3]):
        expected = new[row] if document in drawn else old[row]
        torch.testing.assert_close(cache_of(loss_fn).embeddings("embedding")[row], expected)
        assert int(cache_of(loss_fn).age[row]) == (0 if document in drawn else 1)


def test_a_cached_document_is_updated_in_its_row():
    loss_fn = filled_loss([1, 2, 3])
    features = batch_of([2, 7])
    documents = queries_of(2, seed=9)
    loss_fn(queries_of(2), documents, features, document_ids=torch.tensor([2, 7]))
    cache = cache_of(loss_fn)
    assert cache.document_ids[:5].tolist() == [1, 2, 3, 7, -1]
    assert int(cache.num_filled) == 4
    torch.testing.assert_close(cache.embeddings("embedding")[1], documents[0])


def test_without_ids_every_document_gets_a_row():
    loss_fn = make_loss()
    for _ in range(2):
        train(loss_fn, [1, 2], document_ids=None)
    assert int(cache_of(loss_fn).num_filled) == 4
    assert cache_of(loss_fn).document_ids.unique().tolist() == [-1]


@both_settings
@pytest.mark.parametrize("positive_ids", [None, torch.tensor([[3, 6, 99], [5, -1, -1]])], ids=["own", "more"])
def test_known_positives_of_a_query_do_not_count(settings: dict[str, Any], positive_ids: Tensor | None):
    """Documents 1 and 6 are in the cache and in the batch; of more positives, 6 is one of both queries."""
    loss_fn = filled_loss([0, 1, 2, 3, 4, 5, 6], **settings)
    queries = queries_of(2, seed=1)
    expected = dense_loss(loss_fn, queries, [1, 6], positive_ids=positive_ids)
    assert_equal_value(train(loss_fn, [1, 6], queries, positive_ids=positive_ids), expected)


def draws_of_documents_1_to_6(**arguments: Any) -> set[tuple[int, int]]:
    """(query, document) over 30 steps in which queries with the positives 1 and 2 have draws of their own."""
    loss_fn = filled_loss([1, 2, 3, 4, 5, 6], num_samples=4, scale=1.0, **SETTINGS["own draws"])
    filled = loss_fn.cache
    found = set()
    for _ in range(30):
        loss_fn.cache = copy.deepcopy(filled)
        loss_fn.document_encoder.calls.clear()
        train(loss_fn, [1, 2], **arguments)
        drawn = drawn_ids(loss_fn)[1].view(2, 4)
        found |= {(query, document) for query in range(2) for document in drawn[query].tolist()}
    return found


def test_a_query_never_draws_its_known_positives():
    everything = {(query, document) for query in range(2) for document in range(1, 7)}
    assert draws_of_documents_1_to_6(document_ids=None) == everything
    assert draws_of_documents_1_to_6() == everything - {(0, 1), (1, 2)}
    more = torch.tensor([[3, 5, 99], [6, -1, -1]])
    positives = {(0, 1), (1, 2), (0, 3), (0, 5), (1, 6)}
    assert draws_of_documents_1_to_6(positive_ids=more) == everything - positives
    assert draws_of_documents_1_to_6(positive_ids=more, document_ids=None) == everything - positives | {(0, 1), (1, 2)}


@both_settings
def test_a_query_that_has_only_positives_has_loss_zero(settings: dict[str, Any]):
    """With own draws it gets the other query's one, without gradient; no other row is touched."""
    loss_fn = filled_loss([1, 2], **settings)
    queries = queries_of(2).requires_grad_()
    loss = train(loss_fn, [4, 3], queries, positive_ids=torch.tensor([[1, 2, 3], [1, 4, -1]]))
    loss.backward()
    assert drawn_ids(loss_fn)[1].tolist() == [2, 2]
    assert cache_of(loss_fn).age[:4].tolist() == [1, 0, 0, 0]
    assert loss.isfinite()
    assert loss > 0
    assert queries.grad is not None
    assert not queries.grad[0].any()
    assert queries.grad[1].any()


@pytest.mark.parametrize("name", ["document_ids", "positive_ids", "negative_ids"])
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda ids: torch.cat([ids, ids]), ValueError),
        (lambda ids: ids - 10, ValueError),
        (lambda ids: ids.float(), TypeError),
        (lambda ids: ids > 0, TypeError),
    ],
    ids=["length", "below -1", "float", "bool"],
)
def test_wrong_ids_are_refused(name: str, make, error: type[Exception]):
    loss_fn = filled_loss([1, 2, 3])
    good = torch.tensor([4, 5])
    bad = make(good[:, None]) if name == "positive_ids" else make(good)
    arguments = {name: bad}
    if name == "negative_ids":
        arguments |= {"negative_embeddings": queries_of(2), "negative_features": batch_of([4, 5])}
    before = snapshot(loss_fn)
    with pytest.raises(error, match=f"`{name}`"):
        train(loss_fn, [4, 5], **arguments)
    assert_same_state(before, snapshot(loss_fn))


def test_positive_ids_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"`positive_ids` has shape \[2\]; expected \[2, n\]"):
        train(make_loss(), [1, 2], positive_ids=torch.tensor([1, 2]))


# Wrong and broken batches: an error, and everything as it was


def with_nan(values: Tensor) -> Tensor:
    values = values.clone()
    values[1, 2] = float("nan")
    return values


WRONG_BATCHES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "empty": (
        {"queries": queries_of(0), "documents": queries_of(0), "features": batch_of([])},
        ValueError,
        "The batch is empty",
    ),
    "larger than the cache": (
        {"queries": queries_of(17), "documents": queries_of(17), "features": batch_of([1] * 17)},
        ValueError,
        "`cache_size` is 16; the batch has 17 documents",
    ),
    "other numbers": ({"queries": queries_of(3)}, ValueError, r"\[3, 4\].*\[2, 4\]"),
    "other dimension": (
        {"queries": torch.ones(2, DIM + 1), "documents": torch.ones(2, DIM + 1)},
        ValueError,
        "5 dimensions, the cached embeddings have 4",
    ),
    "one dimension": ({"queries": torch.ones(2), "documents": torch.ones(2)}, ValueError, r"expected the same \[batch"),
    "integers": ({"queries": torch.ones(2, DIM, dtype=torch.int64)}, TypeError, "`query_embeddings` is torch.int64"),
    "two devices": ({"documents": torch.ones(2, DIM, device="meta")}, ValueError, "on meta, `query_embeddings` on cpu"),
    "device of the cache": (
        {"queries": torch.ones(2, DIM, device="meta"), "documents": torch.ones(2, DIM, device="meta")},
        ValueError,
        r"on meta, the cache on cpu. Move the loss: loss.to\('meta'\)",
    ),
    "features of another number": (
        {"features": batch_of([1, 2, 3])},
        ValueError,
        r"`document_features\['.*'\]` has 3 documents; there are 2 embeddings",
    ),
    "a missing feature": ({"features": {"x": torch.ones(2, WIDTH)}}, ValueError, r"missing \['id'\]"),
    "an unknown feature": ({"features": {**batch_of([1, 2]), "z": torch.ones(2)}}, ValueError, r"\['z'\]"),
    "a longer feature": (
        {"features": {**batch_of([1, 2]), "x": torch.ones(2, WIDTH + 1)}},
        ValueError,
        r"`document_features\['x'\]` has shape \[2, 7\]; the spec says \['\*', 6\]",
    ),
    "floats for integers": ({"features": {**batch_of([1, 2]), "id": torch.ones(2)}}, TypeError, "torch.float32"),
    "nan in queries": ({"queries": with_nan(queries_of(2))}, ValueError, "`query_embeddings` has NaN or infinity"),
    "nan in documents": ({"documents": with_nan(queries_of(2))}, ValueError, "`document_embeddings` has NaN"),
    "infinity": ({"documents": queries_of(2) / 0}, ValueError, "`document_embeddings` has NaN or infinity"),
    "nan in features": (
        {"features": {**batch_of([1, 2]), "x": with_nan(torch.ones(2, WIDTH))}},
        ValueError,
        "NaN or infinity in 1 of 2 rows",
    ),
    "nan in negatives": (
        {"negative_embeddings": with_nan(queries_of(2)), "negative_features": batch_of([5, 6])},
        ValueError,
        "`negative_embeddings` has NaN",
    ),
    "negatives of another dimension": (
        {"negative_embeddings": torch.ones(2, 3), "negative_features": batch_of([5, 6])},
        ValueError,
        r"`negative_embeddings` has shape \[2, 3\]; expected \[m, 4\]",
    ),
    "negatives without features": ({"negative_embeddings": queries_of(2)}, ValueError, "needs `negative_features`"),
    "features without negatives": ({"negative_features": batch_of([5])}, ValueError, "need `negative_embeddings`"),
    "ids without negatives": ({"negative_ids": torch.tensor([5])}, ValueError, "need `negative_embeddings`"),
    "negatives that lack a feature": (
        {"negative_embeddings": queries_of(1), "negative_features": {"id": torch.tensor([5])}},
        ValueError,
        r"`negative_features` must have the keys \['id', 'x'\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_wrong_batches_are_refused_and_change_nothing(case: str):
    changes, error, message = WRONG_BATCHES[case]
    loss_fn = filled_loss([1, 2, 3])
    before = snapshot(loss_fn)
    batch = {"queries": queries_of(2), "documents": queries_of(2, 1), "features": batch_of([4, 5]), **changes}
    with pytest.raises(error, match=message):
        loss_fn(batch.pop("queries"), batch.pop("documents"), batch.pop("features"), **batch)
    assert_same_state(before, snapshot(loss_fn))


def test_a_wrong_first_batch_leaves_no_cache():
    loss_fn = make_loss()
    with pytest.raises(ValueError, match=r"`document_features\['id'\]` has 1 documents; there are 2 embeddings"):
        loss_fn(queries_of(2), queries_of(2), {**batch_of([4, 5]), "id": torch.tensor([1])})
    assert loss_fn.cache is None
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2 rows"):
        loss_fn(queries_of(2), queries_of(2), {**batch_of([4, 5]), "x": with_nan(torch.ones(2, WIDTH))})
    assert loss_fn.cache is None
    train(loss_fn, [1, 2])
    assert int(cache_of(loss_fn).num_filled) == 2


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (lambda features: torch.full((len(features["x"]), DIM), float("nan")), ValueError, "output, .* has NaN"),
        (lambda features: torch.ones(len(features["x"]), DIM + 1), ValueError, r"shape \[2, 5\]; expected \[2, 4\]"),
        (lambda features: torch.ones(DIM), ValueError, r"shape \[4\]; expected \[2, 4\]"),
        (lambda features: {"sentence_embedding": torch.ones(2, DIM)}, TypeError, "returned dict"),
    ],
)
def test_a_broken_encoder_leaves_the_cache_as_it_was(encoder, error: type[Exception], message: str):
    loss_fn = filled_loss([1, 2, 3])
    before = snapshot(cache_of(loss_fn))
    loss_fn.document_encoder = encoder
    with pytest.raises(error, match=message):
        loss_fn(queries_of(2), queries_of(2, 1), batch_of([4, 5]))
    assert_same_state(before, snapshot(cache_of(loss_fn)))


# In-batch negatives


@both_settings
def test_a_given_negative_counts_once_and_not_for_queries_that_it_is_a_positive_of(settings: dict[str, Any]):
    """Document 2 is in the cache and among the negatives, document 4 is a positive."""
    loss_fn = filled_loss([0, 1, 2], **settings)
    queries = queries_of(2)
    negatives = DenseEncoder()(batch_of([2, 4, 7])).detach().requires_grad_()
    expected = dense_loss(loss_fn, queries, [4, 5], (2, 4, 7))
    loss = train(
        loss_fn,
        [4, 5],
        queries,
        negative_embeddings=negatives,
        negative_features=batch_of([2, 4, 7]),
        negative_ids=torch.tensor([2, 4, 7]),
    )
    assert_equal_value(loss, expected)
    loss.backward()
    assert negatives.grad is not None
    start = 2 * queries.numel()  # the gradient of queries and documents comes first
    gradient = expected.gradient[start : start + negatives.numel()].view_as(negatives)
    torch.testing.assert_close(negatives.grad.double(), gradient, rtol=1e-4, atol=1e-6)
    assert 2 not in torch.cat(drawn_ids(loss_fn)[1:]).tolist()
    assert cache_of(loss_fn).document_ids[:7].tolist() == [0, 1, 2, 4, 5, 7, -1]


@both_settings
def test_given_negatives_count_in_the_first_step(settings: dict[str, Any]):
    loss_fn = make_loss(**settings)
    negatives = DenseEncoder()(batch_of([5, 6, 7])).detach().requires_grad_()
    expected = dense_loss(loss_fn, queries_of(2), [1, 2], (5, 6, 7))
    loss = train(loss_fn, [1, 2], negative_embeddings=negatives, negative_features=batch_of([5, 6, 7]))
    assert_equal_value(loss, expected)
    loss.backward()
    assert negatives.grad is not None
    assert bool(negatives.grad.any(dim=1).all())
    assert int(cache_of(loss_fn).num_filled) == 5


# Evaluation


@both_settings
@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_evaluation_gives_the_exact_loss_and_changes_nothing(mode: str, settings: dict[str, Any]):
    loss_fn = filled_loss([0, 1, 2, 3, 4], **settings)
    queries = queries_of(2, 3)
    expected, before = dense_loss(loss_fn, queries, [1, 9]), snapshot(loss_fn)
    loss_fn.train(mode != "eval")
    with torch.set_grad_enabled(mode != "no_grad"):
        loss = train(loss_fn, [1, 9], queries)
    assert_same_state(before, snapshot(loss_fn))
    assert len(loss_fn.document_encoder.calls) == 1  # by `train`: nothing was sampled
    assert_equal_value(loss, expected)


@both_settings
def test_evaluation_before_any_training_counts_the_batch_alone(settings: dict[str, Any]):
    loss_fn = make_loss(**settings).eval()
    expected = dense_loss(loss_fn, queries_of(2), [1, 2])
    loss = train(loss_fn, [1, 2])
    assert_equal_value(loss, expected)
    assert (loss.item() == 0) == (not loss_fn.in_batch)
    assert loss_fn.cache is None


@both_settings
def test_evaluation_counts_given_negatives(settings: dict[str, Any]):
    loss_fn = make_loss(**settings).eval()
    negatives = DenseEncoder()(batch_of([5, 6, 7])).detach()
    loss = train(loss_fn, [1, 2], negative_embeddings=negatives, negative_features=batch_of([5, 6, 7]))
    assert_equal_value(loss, dense_loss(loss_fn, queries_of(2), [1, 2], (5, 6, 7)))


@both_settings
def test_evaluation_takes_batches_larger_than_the_cache(settings: dict[str, Any]):
    loss_fn = make_loss(size=3, **settings)
    train(loss_fn, [0, 1, 2])
    loss = train(loss_fn.eval(), list(range(20, 29)))
    assert_equal_value(loss, dense_loss(loss_fn, queries_of(9), list(range(20, 29))))


# Randomness


def drawn_in_three_steps(**settings: Any) -> list[int]:
    loss_fn = filled_loss(list(range(12)), scale=1.0, **settings)
    for step in range(3):
        train(loss_fn, [20 + step, 30 + step, 40 + step])
    return torch.cat(drawn_ids(loss_fn)[1::2]).tolist()


def test_draws_are_those_of_the_seed():
    assert drawn_in_three_steps(seed=1) == drawn_in_three_steps(seed=1)
    assert drawn_in_three_steps(seed=1) != drawn_in_three_steps(seed=2)


def test_without_a_seed_the_global_generator_gives_one():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first, second = drawn_in_three_steps(seed=None), drawn_in_three_steps(seed=None)
        torch.manual_seed(5)
        assert drawn_in_three_steps(seed=None) == first
    assert first != second


def test_a_step_leaves_the_global_generator_alone():
    loss_fn = filled_loss([1, 2, 3])
    before = torch.random.get_rng_state()
    train(loss_fn, [4, 5])
    assert torch.equal(before, torch.random.get_rng_state())


# State


class Run:
    """Training of a token encoder, with all that a checkpoint must hold."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.encoder = nn.EmbeddingBag(60, DIM, padding_idx=0, mode="mean")
        self.loss_fn = NegativeCacheLoss(self.embed, 20, num_samples=2, learnable_scale=True, seed=3, **settings)
        self.parameters = [*self.encoder.parameters(), *self.loss_fn.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=0.05)

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        return normalize(self.encoder(features["input_ids"]), dim=1)

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randperm(40, generator=generator)[:6]
            lengths = 1 + ids % 5
            tokens = (1 + ids[:, None] + torch.arange(5)) * (torch.arange(5) < lengths[:, None])
            documents = {"input_ids": tokens[:, : int(lengths.max())]}
            queries = normalize(self.encoder(tokens[:, :1]), dim=1)
            loss = self.loss_fn(queries, self.embed(documents), documents, document_ids=ids)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("settings", [{}, {"specs": {"input_ids": RaggedFeature(torch.int64, 5)}}, {"use_lru": False}])
def test_a_resumed_run_equals_an_uninterrupted_one(settings: dict[str, Any], tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    whole, first, second = Run(**settings), Run(**settings), Run(**settings)
    losses = whole.steps(0, 10)
    assert first.steps(0, 5) == losses[:5]
    torch_files.save_file(first.loss_fn.state_dict(), tmp_path / "loss.safetensors")
    second.loss_fn.load_state_dict(torch_files.load_file(tmp_path / "loss.safetensors"))
    second.encoder.load_state_dict(first.encoder.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert second.steps(5, 10) == losses[5:]
    assert len(set(losses)) == 10
    for a, b in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)
    one, other = cache_of(whole.loss_fn), cache_of(second.loss_fn)
    for key, value in one.data.items():
        assert torch.equal(value, other.data[key])
    for name in ("filled", "document_ids", "written", "step"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(whole.loss_fn.generator.get_state(), second.loss_fn.generator.get_state())


def test_a_state_without_a_cache_loads_into_a_new_module():
    source, target = make_loss(seed=1), make_loss(seed=2)
    target.load_state_dict(source.state_dict())
    assert target.cache is None
    assert torch.equal(source.generator.get_state(), target.generator.get_state())


def test_a_module_inside_another_is_saved_with_it():
    outer, other = nn.ModuleDict({"loss": filled_loss([1, 2])}), nn.ModuleDict({"loss": make_loss(seed=9)})
    other.load_state_dict(outer.state_dict())
    assert_same_state(snapshot(outer), snapshot(other))


SPECS = {"x": FixedLenFeature([WIDTH], torch.float32), "id": FixedLenFeature([], torch.int64)}


@pytest.mark.parametrize("is_new", [False, True], ids=["used", "new"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": SIZE + 1}, "The saved cache has 16 rows, this one has 17"),
        ({"embedding_dtype": torch.bfloat16}, "'embedding' is .*float32.*bfloat16"),
        ({"specs": {**SPECS, "x": FixedLenFeature([WIDTH + 2], torch.float32)}}, "feature 'x' is .*6.*8"),
        ({"specs": {**SPECS, "id": FixedLenFeature([], torch.int32)}}, "feature 'id' is .*int64.*int32"),
        ({"specs": {**SPECS, "x": RaggedFeature(torch.float32)}}, "feature 'x' is "),
    ],
)
def test_another_cache_is_not_loaded(settings: dict[str, Any], message: str, is_new: bool):
    saved = filled_loss([1, 2, 3]).state_dict()
    target = make_loss(lambda features: features["x"][:, :DIM], **{"seed": 7, **settings})
    if not is_new:
        target(queries_of(2), queries_of(2), batch_of([8, 9]))
    before = snapshot(target)
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(saved)
    assert_same_state(before, snapshot(target))
    assert (target.cache is None) == is_new


def test_other_feature_names_are_not_loaded():
    saved = filled_loss([1, 2, 3]).state_dict()
    for specs in ({"x": SPECS["x"]}, {**SPECS, "z": SPECS["id"]}):
        target = make_loss(specs=specs)
        with pytest.raises(ValueError, match=r"\['(id|z)'\]"):
            target.load_state_dict(saved)
        assert target.cache is None


def test_a_used_module_can_load_an_earlier_state():
    loss_fn = filled_loss([1, 2, 3])
    before = snapshot(loss_fn)
    train(loss_fn, [4, 5])
    first = snapshot(loss_fn)
    loss_fn.load_state_dict(before)
    train(loss_fn, [4, 5])
    assert_same_state(first, snapshot(loss_fn))


# Which rows are replaced


@pytest.mark.parametrize(("use_lru", "replaced"), [(True, 2), (False, 1)])
def test_the_oldest_or_the_least_recently_sampled_row_is_replaced(use_lru: bool, replaced: int):
    """Rows hold the documents 1, 2, 3. A query next to 1, at a huge scale, samples it: LRU keeps it."""
    loss_fn = make_loss(size=3, scale=1e4, use_lru=use_lru)
    with torch.no_grad():
        near_first = loss_fn.document_encoder(batch_of([1]))
    for document in (1, 2, 3):
        train(loss_fn, [document], near_first)
    train(loss_fn, [4], near_first)
    expected = [1, 2, 3]
    expected[replaced - 1] = 4
    assert cache_of(loss_fn).document_ids.tolist() == expected


# Ragged features


def test_sampled_rows_are_padded_to_the_longest_of_them():
    """Documents of 3, 9 and 5 tokens, each sampled by a query next to it."""
    widths = []

    def encoder(features: dict[str, Tensor]) -> Tensor:
        widths.append(features["input_ids"].shape[1])
        assert torch.equal(features["attention_mask"], (features["input_ids"] != 0).long())
        return torch.eye(DIM)[features["input_ids"][:, 0] - 1]

    lengths = torch.tensor([3, 9, 5])
    mask = (torch.arange(12) < lengths[:, None]).long()
    tokens = mask * torch.arange(1, 4)[:, None]
    features = {"input_ids": tokens, "attention_mask": mask}
    loss_fn = make_loss(encoder, scale=1e4)
    loss_fn(torch.eye(DIM)[:3], torch.eye(DIM)[:3], features)
    for rows, expected in (([0], 3), ([1], 9), ([2], 5), ([0, 2], 5), ([1, 0], 9)):
        cache = copy.deepcopy(loss_fn.cache)
        one = {key: value[rows] for key, value in features.items()}
        # with unknown ids, as those of other documents, the documents are negatives of their queries
        loss_fn(torch.eye(DIM)[rows], -torch.eye(DIM)[rows], one, torch.full((len(rows),), -1))
        assert widths[-1] == expected
        loss_fn.cache = cache


# Precision and devices


def test_a_step_trains_under_bfloat16_autocast():
    encoder = DenseEncoder()
    loss_fn = make_loss(encoder, num_samples=2)
    losses = []
    for step in range(3):
        features = batch_of([3 * step + 1, 3 * step + 2, 3 * step + 3])
        with torch.autocast("cpu", torch.bfloat16):
            queries = features["x"].flip(1) @ encoder.weight.T
            losses.append(loss_fn(queries, features["x"] @ encoder.weight.T, features))
        losses[-1].backward()
    assert [loss.dtype for loss in losses] == [torch.float32] * 3
    assert losses[-1] > 0
    assert bool(encoder.weight.grad.isfinite().all())
    assert cache_of(loss_fn).embeddings("embedding").dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_embeddings_are_stored_in_the_given_dtype(dtype: torch.dtype):
    loss_fn = filled_loss([1, 2, 3], embedding_dtype=dtype)
    assert cache_of(loss_fn).embeddings("embedding").dtype == dtype
    torch.testing.assert_close(
        train(loss_fn, [4, 5]), train(filled_loss([1, 2, 3]), [4, 5]), rtol=0.02, atol=0, check_dtype=False
    )


def test_features_stay_on_the_feature_device():
    loss_fn = filled_loss([1, 2], feature_device="cpu")
    train(loss_fn, [3, 4])
    data = cache_of(loss_fn.to("meta")).data
    assert {key: value.device.type for key, value in data.items()} == {"embedding": "meta", "x": "cpu", "id": "cpu"}
    moved = cache_of(filled_loss([1, 2]).to("meta")).data
    assert {value.device.type for value in moved.values()} == {"meta"}


# Metrics


def test_metrics_describe_the_last_step():
    loss_fn = make_loss()
    assert loss_fn.metrics() == {"interpretable_loss": 0.0, "staleness": 0.0, "fill": 0.0}
    train(loss_fn, [1, 2])
    first = loss_fn.metrics()
    names = {"interpretable_loss", "positive_probability", "cache_share", "staleness", "near_duplicates", "fill"}
    assert set(first) == {*names, "documents_per_query"}
    assert (first["cache_share"], first["staleness"], first["near_duplicates"], first["fill"]) == (0, 0, 0, 2 / SIZE)
    loss = train(loss_fn, [3, 4])
    assert loss_fn.metrics()["interpretable_loss"] == pytest.approx(loss.item())
    assert loss_fn.metrics()["staleness"] == pytest.approx(0, abs=1e-10)
    assert loss_fn.metrics()["fill"] == 4 / SIZE
    with torch.no_grad():
        loss_fn.document_encoder.weight.neg_()  # every embedding c becomes -c: |c - -c|^2 / |c|^2 = 4
    train(loss_fn, [5, 6])
    assert loss_fn.metrics()["staleness"] > 1


def test_metrics_raise_once_for_rejected_embeddings():
    """On a GPU, rows that are not finite are counted on the device; here the count is set by hand."""
    loss_fn = filled_loss([1, 2])
    cache_of(loss_fn).num_rejected += 3
    with pytest.raises(ValueError, match="3 embeddings that were not finite"):
        loss_fn.metrics()
    assert loss_fn.metrics()["fill"] == 2 / SIZE


def test_a_learnable_scale_is_a_parameter():
    loss_fn = filled_loss([1, 2, 3], learnable_scale=True, scale=7.0)
    assert loss_fn.log_scale is not None
    assert loss_fn.scale.item() == pytest.approx(7.0)
    train(loss_fn, [4, 5]).backward()
    assert loss_fn.log_scale.grad is not None
    assert loss_fn.log_scale.grad.abs() > 0
    assert "log_scale" in loss_fn.state_dict()
    assert make_loss().log_scale is None


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (FixedLenFeature([], torch.uint8, -1), ValueError, "default_value -1"),
        (FixedLenFeature([], torch.int64, torch.int64), TypeError, "expected a number"),
        (RaggedFeature(torch.int64, 0), ValueError, "max_length 0"),
    ],
)
def test_wrong_specs_are_refused(spec: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        NegativeCacheLoss(lambda features: torch.ones(2, 3), 8, specs={"words": spec})
