"""False negatives: margins and a guide hide documents of the cache and of the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from negative_cache import FixedLenFeature, NegativeCacheLoss
from negative_cache.objective.batch import GUIDE
from negative_cache.objective.loss import FalseNegativeLimits
from negative_cache.retrieval import Ceilings, RowPool, Scale, Search, retrieve
from negative_cache.retrieval.dense import grouped_top_k, retrieve_dense
from negative_cache.retrieval.search import dense_scores
from negative_cache.retrieval.tiled import retrieve_tiled
from stats import ALPHA, chi_square
from support import as_on_a_gpu

DIM, GUIDE_DIM = 4, 3


def randn(*size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Margins


def test_margins_set_ceilings():
    similarities = torch.tensor([0.8, 0.0, -0.4], dtype=torch.float64)
    assert FalseNegativeLimits().ceilings(similarities) is None
    expected = {
        FalseNegativeLimits(0.1): [0.7, -0.1, -0.5],
        FalseNegativeLimits(-0.1): [0.9, 0.1, -0.3],
        FalseNegativeLimits(None, 0.05): [0.76, 0.0, -0.42],  # below a negative similarity too
        FalseNegativeLimits(0.1, 0.25): [0.6, -0.1, -0.5],  # the stricter one
        FalseNegativeLimits(None, 0.0): [0.8, 0.0, -0.4],
    }
    for limits, ceilings in expected.items():
        found = limits.ceilings(similarities)
        torch.testing.assert_close(found, torch.tensor(ceilings, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_stricter_margin_counts(similarity: float, absolute: float, relative: float):
    found = FalseNegativeLimits(absolute, relative).ceilings(torch.tensor([similarity], dtype=torch.float64))
    assert found is not None
    assert float(found) == pytest.approx(min(similarity - absolute, similarity - relative * abs(similarity)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"relative_margin": 1.5}, "`relative_margin` is 1.5"),
        ({"relative_margin": -0.1}, "`relative_margin` is -0.1"),
        ({"absolute_margin": float("nan")}, "`absolute_margin` is nan"),
        ({"guide_margin": float("inf")}, "`guide_margin` is inf"),
    ],
)
def test_margins_out_of_range_are_refused(given: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        NegativeCacheLoss(lambda f: f["x"], 8, **given)


# The pass over the rows


class Case(NamedTuple):
    search: Search  # with ceilings
    hidden: Tensor  # [batch, rows]: by the ceilings, one by one


def make_case(kind: str, dtype: torch.dtype = torch.float64, num_rows: int = 150, batch: int = 5) -> Case:
    """Some rows are not filled, some excluded; biases, which do not count for the ceilings."""
    queries, rows = randn(batch, DIM, seed=0, dtype=dtype), randn(num_rows, DIM, seed=1, dtype=dtype)
    filled = randn(num_rows, seed=2) > -1
    biases = 3 * randn(num_rows, seed=3, dtype=torch.float32)
    guide_queries, guide_rows = randn(batch, GUIDE_DIM, seed=4), randn(num_rows, GUIDE_DIM, seed=5)
    scores = torch.linspace(-1, 3, batch, dtype=torch.float64)
    guide_scores = torch.linspace(2, -0.5, batch, dtype=torch.float64)
    hidden = torch.zeros(batch, num_rows, dtype=torch.bool)
    for query in range(batch):
        for row in range(num_rows):
            score = 2.0 * float(queries[query].double() @ rows[row].double())
            opinion = float(guide_queries[query] @ guide_rows[row])
            hidden[query, row] |= kind != "guide" and score > float(scores[query])
            hidden[query, row] |= kind != "margins" and opinion > float(guide_scores[query])
    pool = RowPool(rows, filled, biases=biases)
    ceilings = Ceilings(
        None if kind == "guide" else scores.to(pool.score_dtype),
        *(() if kind == "margins" else (guide_queries, RowPool(guide_rows, filled), guide_scores)),
    )
    excluded = torch.tensor([[3, -1], [num_rows // 3, 4], [-1, -1], [7, 8], [num_rows - 1, 0]])
    return Case(Search(queries, pool, Scale(2.0), excluded, ceilings), hidden)


def expected_scores(case: Case) -> Tensor:
    """The scores without ceilings, from which hidden rows are removed one by one."""
    return dense_scores(case.search._replace(ceilings=None)).masked_fill(case.hidden, -torch.inf)


KINDS = ["margins", "guide", "both"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("how", ["dense", "one tile", "tiles of 32", "tiles of 32, on a GPU", "float32"])
def test_ceilings_hide_rows_from_the_pass(kind: str, top_k: int | None, how: str):
    case = make_case(kind, torch.float32 if how == "float32" else torch.float64)
    search, generator = case.search._replace(top_k=top_k, num_samples=50, num_best=4), torch.Generator().manual_seed(0)
    if how == "dense":
        found = retrieve_dense(search, generator)
    elif how == "tiles of 32":
        found = retrieve_tiled(search, generator, tile_rows=32)
    elif how == "tiles of 32, on a GPU":
        with as_on_a_gpu():
            found = retrieve_tiled(search, generator, tile_rows=32)
    else:
        found = retrieve(search, generator)
    scores = expected_scores(case)
    is_own = (search.excluded[:, :, None] == torch.arange(search.pool.num_rows)).any(dim=1)
    assert found.num_hidden.tolist() == (case.hidden & search.pool.is_candidate & ~is_own).sum(1).tolist()
    assert int(found.num_hidden.min()) > 0
    if top_k is not None:
        best, rows = grouped_top_k(scores, top_k)
        scores = torch.full_like(scores, -torch.inf).scatter(1, rows, best)
    tolerance = 1e-5 if how == "float32" else 1e-12
    torch.testing.assert_close(found.lse, scores.logsumexp(1), rtol=tolerance, atol=tolerance)
    best_scores = scores.topk(4, dim=1).values
    torch.testing.assert_close(found.best_scores, best_scores, rtol=tolerance, atol=tolerance)
    assert bool((scores.gather(1, found.rows) > -torch.inf).all())


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_softmax_of_what_is_left(kind: str):
    case = make_case(kind, num_rows=40)
    search = case.search._replace(num_samples=4000)
    found = retrieve_tiled(search, torch.Generator().manual_seed(0), tile_rows=16)
    probabilities = expected_scores(case).softmax(1)
    unlimited = dense_scores(search._replace(ceilings=None)).softmax(1)
    for query in range(len(probabilities)):
        assert chi_square(found.rows[query], probabilities[query]) > ALPHA
        assert chi_square(found.rows[query], unlimited[query]) < ALPHA


def test_a_query_from_which_all_rows_are_hidden_gets_none():
    ceilings = Ceilings(torch.full((5,), -1e9, dtype=torch.float64))
    search = make_case("margins").search._replace(ceilings=ceilings, num_best=2)
    for retrieve_fn in (retrieve, retrieve_dense):
        found = retrieve_fn(search, torch.Generator())
        assert bool((found.lse == -torch.inf).all())
        assert bool((found.best_rows == -1).all())


# The loss

NUM_ROWS, BATCH, SCALE = 10, 4, 2.0
SPECS = {"row": FixedLenFeature([], torch.int64)}
TABLE, QUERIES = randn(16, DIM, seed=11), 0.8 * randn(BATCH, DIM, seed=12)
GUIDE_TABLE = randn(16, GUIDE_DIM, seed=13, dtype=torch.float32)
GUIDE_QUERIES = randn(BATCH, GUIDE_DIM, seed=14, dtype=torch.float32)
DOCUMENTS, GIVEN = torch.tensor([10, 1, 11, 12]), torch.tensor([13, 2])


def make_loss(is_guided: bool, **settings: Any) -> NegativeCacheLoss:
    loss_fn = NegativeCacheLoss(
        lambda f: TABLE[f["row"]].clone().requires_grad_(),
        20,
        SCALE,
        num_samples=1,
        specs=SPECS,
        embedding_dtype=torch.float64,
        seed=0,
        **settings,
    )
    rows = torch.arange(NUM_ROWS)
    guide = GUIDE_TABLE[rows] if is_guided else None
    loss_fn(TABLE[rows], TABLE[rows], {"row": rows}, rows, guide_queries=guide, guide_documents=guide)
    return loss_fn


def call(loss_fn: NegativeCacheLoss, is_guided: bool) -> Tensor:
    return loss_fn(
        QUERIES.clone().requires_grad_(),
        TABLE[DOCUMENTS].clone().requires_grad_(),
        {"row": DOCUMENTS},
        DOCUMENTS,
        negative_embeddings=TABLE[GIVEN].clone().requires_grad_(),
        negative_features={"row": GIVEN},
        negative_ids=GIVEN,
        guide_queries=GUIDE_QUERIES if is_guided else None,
        guide_documents=GUIDE_TABLE[torch.cat([DOCUMENTS, GIVEN])] if is_guided else None,
    )


def dense_value(
    absolute: float | None = None,
    relative: float | None = None,
    guide: float | None = None,
    hides_in: tuple[str, ...] = ("batch", "cache"),
) -> tuple[float, int]:
    """Mean loss, and how many of the cache's rows were hidden from queries."""
    losses, num_hidden = [], 0
    for query in range(BATCH):
        own = int(DOCUMENTS[query])
        similarity = float(QUERIES[query] @ TABLE[own])
        opinion = float(GUIDE_QUERIES[query] @ GUIDE_TABLE[own])
        in_batch = [*DOCUMENTS.tolist(), *GIVEN.tolist()]
        scores = [SCALE * similarity]
        for place, documents in (("batch", in_batch), ("cache", [r for r in range(NUM_ROWS) if r not in in_batch])):
            for document in documents:
                if document == own:
                    continue
                value = float(QUERIES[query] @ TABLE[document])
                is_hidden = absolute is not None and value > similarity - absolute
                is_hidden |= relative is not None and value > similarity - relative * abs(similarity)
                its = float(GUIDE_QUERIES[query] @ GUIDE_TABLE[document])
                is_hidden |= guide is not None and its > opinion - guide
                num_hidden += is_hidden and place == "cache"
                if not (is_hidden and place in hides_in):
                    scores.append(SCALE * value)
        losses.append(torch.tensor(scores, dtype=torch.float64).logsumexp(0) - scores[0])
    return float(torch.stack(losses).mean()), num_hidden


CASES = [{"absolute": 0.2}, {"relative": 0.1}, {"absolute": -0.6, "relative": 0.0}, {"guide": 0.1}, {"guide": -0.5}]
CASES = [*CASES, {"absolute": -1.0, "relative": 0.0, "guide": -1.0}]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("is_training", [True, False])
def test_the_loss_hides_documents_of_cache_and_batch(case: dict[str, float], is_training: bool):
    given = {f"{name}_margin": value for name, value in case.items()}
    loss_fn = make_loss("guide" in case, **given).train(is_training)
    value = float(call(loss_fn, "guide" in case).detach())
    expected, num_hidden = dense_value(**case)
    assert value == pytest.approx(expected, rel=1e-12)
    if is_training:
        assert loss_fn.metrics()["masked"] == pytest.approx(num_hidden / BATCH / NUM_ROWS)
    # what the test must notice
    assert num_hidden > 0
    for hides_in in ((), ("batch",), ("cache",)):
        assert value != pytest.approx(dense_value(**case, hides_in=hides_in)[0], rel=1e-3)


def test_a_hidden_document_is_not_trained_on():
    """A hidden document of the cache is not drawn; one of the batch gets no gradient from the query."""
    seen: set[int] = set()
    loss_fn = make_loss(False, absolute_margin=0.2)
    encode = loss_fn.document_encoder
    loss_fn.document_encoder = lambda f: (seen.update(f["row"].tolist()), encode(f))[1]
    for _ in range(20):
        call(loss_fn, False).backward()
        loss_fn.cache.write(torch.arange(NUM_ROWS), {"embedding": TABLE[:NUM_ROWS]})
    ceilings = (QUERIES * TABLE[DOCUMENTS]).sum(1) - 0.2
    products = QUERIES @ TABLE.T
    hidden_from_all = {r for r in range(16) if bool((products[:, r] > ceilings).all())}
    assert not seen & hidden_from_all
    documents = TABLE[DOCUMENTS].clone().requires_grad_()
    queries = QUERIES.clone()
    (gradient,) = torch.autograd.grad(
        make_loss(False, absolute_margin=0.2).eval()(queries, documents, {"row": DOCUMENTS}, DOCUMENTS), documents
    )
    for column, document in enumerate(DOCUMENTS.tolist()):
        visible = [q for q in range(BATCH) if q != column and products[q, document] <= ceilings[q]]
        along = torch.linalg.lstsq(QUERIES[[column, *visible]].T, gradient[column]).solution
        rebuilt = QUERIES[[column, *visible]].T @ along
        torch.testing.assert_close(rebuilt, gradient[column], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"guide_queries": GUIDE_QUERIES}, ValueError, "must be given together"),
        ({"guide_documents": GUIDE_TABLE[:BATCH]}, ValueError, "must be given together"),
        (
            {"guide_queries": GUIDE_QUERIES, "guide_documents": GUIDE_TABLE[:3]},
            ValueError,
            "`guide_documents` has shape",
        ),
        ({"guide_queries": GUIDE_QUERIES[:2], "guide_documents": GUIDE_TABLE[:4]}, ValueError, "`guide_queries` has"),
        ({"guide_queries": GUIDE_QUERIES.long(), "guide_documents": GUIDE_TABLE[:4]}, TypeError, "is torch.int64"),
    ],
)
def test_a_wrong_guide_is_refused(given: dict[str, Tensor], error: type[Exception], message: str):
    loss_fn = make_loss(False)
    with pytest.raises(error, match=message):
        loss_fn(QUERIES, TABLE[DOCUMENTS], {"row": DOCUMENTS}, DOCUMENTS, **given)
    both = {"guide_queries": GUIDE_QUERIES, "guide_documents": GUIDE_TABLE[DOCUMENTS]}
    with pytest.raises(ValueError, match="`guide_documents` must be given in every step or in none"):
        loss_fn(QUERIES, TABLE[DOCUMENTS], {"row": DOCUMENTS}, DOCUMENTS, **both)


def test_the_guides_embeddings_are_saved_with_the_cache():
    saved = make_loss(True)
    loaded = NegativeCacheLoss(saved.document_encoder, 20, SCALE, specs=SPECS, embedding_dtype=torch.float64)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.cache.data[GUIDE][:NUM_ROWS], GUIDE_TABLE[:NUM_ROWS])
    assert torch.equal(call(loaded.eval(), True), call(saved.eval(), True))


def test_a_guide_is_as_exact_under_autocast():
    """In bfloat16 255.5 is 256, above the ceiling of 255.75."""
    guide = torch.tensor([[256.75, 0.0], [255.5, 0.0], [0.0, 1.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    rows = torch.arange(3)
    values = []
    for enabled in (False, True):
        loss_fn = NegativeCacheLoss(lambda f: TABLE[f["row"]].float(), 8, 1.0, guide_margin=1.0, specs=SPECS)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            embedded = TABLE[rows].float()
            given = {"guide_queries": queries, "guide_documents": guide}
            values.append(float(loss_fn(embedded, embedded, {"row": rows}, rows, **given)))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] > 0
