"""`NegativeCacheLoss` by default, as an estimator: its mean gradient against that of the dense loss."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dense import Exact, Problem, exact
from negative_cache import FixedLenFeature, NegativeCacheLoss, estimators
from negative_cache.sampling import one_process
from negative_cache.sampling.choose import Candidates, Choice, choose
from stats import ALPHA, mean_gradient
from support import TableEncoder, as_on_a_gpu

NUM_ROWS, CACHE_SIZE, DIM, NUM_DOCUMENTS = 12, 20, 3, 17
SCALE = torch.tensor(2.0).log().exp().double()  # as a learnable one rounds it
# Documents 0 and 4 are in the cache too; 12 comes twice; 14 and 15 are new, given as negatives, with 4.
DOCUMENTS, GIVEN = torch.tensor([0, 12, 12, 13]), torch.tensor([14, 4, 15])
BATCH = len(DOCUMENTS)
EVERYTHING = torch.arange(NUM_DOCUMENTS)
# Beside their own documents: a row of the cache; a document of the batch; and of the last query, everything.
POSITIVES = torch.stack([torch.where(EVERYTHING == 5, 5, -1), torch.where(EVERYTHING == 13, 13, -1)])
POSITIVES = torch.cat([POSITIVES, torch.full((1, NUM_DOCUMENTS), -1), EVERYTHING[None]])
PASSES = 200
_GENERATOR = torch.Generator().manual_seed(3)
QUERIES = 0.7 * torch.randn(BATCH, DIM, generator=_GENERATOR, dtype=torch.float64)
TABLE = 0.8 * torch.randn(NUM_DOCUMENTS, DIM, generator=_GENERATOR, dtype=torch.float64)
STALE = TABLE[:NUM_ROWS] + 0.4 * torch.randn(NUM_ROWS, DIM, generator=_GENERATOR, dtype=torch.float64)

PROBLEM = Problem(QUERIES, TABLE, DOCUMENTS, GIVEN, POSITIVES, STALE, SCALE)


class Found(NamedTuple):
    """Gradients to queries, documents, given negatives, table and logarithm of the scale, `[passes, n]`; and values."""

    gradients: Tensor
    values: Tensor


def filled_loss(
    encoder: Any, with_ids: bool = True, log_q: Tensor | None = None, num_candidates: int | None = None, **settings: Any
) -> NegativeCacheLoss:
    """A loss whose cache holds the stale embeddings of the first documents."""
    specs = {"row": FixedLenFeature([], torch.int64)}
    settings = {
        "embedding_dtype": torch.float64,
        "specs": specs,
        "seed": 0,
        "learnable_scale": True,
        "num_samples": 1,
        **settings,
    }
    loss_fn = NegativeCacheLoss(encoder, CACHE_SIZE, 2.0, **settings)
    loss_fn.num_candidates = loss_fn.num_candidates if num_candidates is None else num_candidates
    rows = torch.arange(NUM_ROWS)
    ids = rows if with_ids else unknown(rows, log_q)
    loss_fn(STALE, STALE, {"row": rows}, ids, log_q=None if log_q is None else log_q[rows])
    return loss_fn


def unknown(rows: Tensor, log_q: Tensor | None) -> Tensor | None:
    """Unknown ids, so that features are not hashed; None with corrections, with which they are not either."""
    return torch.full_like(rows, -1) if log_q is None else None


def collect(passes: int = PASSES, with_ids: bool = True, log_q: Tensor | None = None, **settings: Any) -> Found:
    encoder = TableEncoder(TABLE)
    loss_fn = filled_loss(encoder, with_ids, log_q, **settings)
    new_log_q = None if log_q is None else log_q[torch.cat([DOCUMENTS, GIVEN])]
    cache = loss_fn.cache
    gradients, values = [], []
    for _ in range(passes):
        loss_fn.cache = copy.deepcopy(cache)  # without what the last pass wrote
        leaves = [x.clone().requires_grad_() for x in (QUERIES, TABLE[DOCUMENTS], TABLE[GIVEN])]
        loss = loss_fn(
            *leaves[:2],
            {"row": DOCUMENTS},
            DOCUMENTS if with_ids else unknown(DOCUMENTS, log_q),
            POSITIVES if with_ids else None,
            negative_embeddings=leaves[2],
            negative_features={"row": GIVEN},
            negative_ids=GIVEN if with_ids else unknown(GIVEN, log_q),
            log_q=new_log_q,
        )
        loss_fn.log_scale.grad = None
        loss.backward()
        table = torch.zeros_like(TABLE).index_add(0, encoder.rows, encoder.output.grad)
        gradients.append(
            torch.cat([*(leaf.grad.flatten() for leaf in leaves), table.flatten(), loss_fn.log_scale.grad])
        )
        values.append(loss.detach())
    return Found(torch.stack(gradients), torch.stack(values))


@pytest.fixture(scope="module")
def default() -> Found:
    return collect()


def check(found: Found, truth: Exact) -> None:
    assert mean_gradient(found.gradients, truth.gradient) > ALPHA
    torch.testing.assert_close(found.values, truth.value.expand_as(found.values), rtol=1e-12, atol=0)


def test_the_default_is_unbiased_and_its_value_exact(default: Found):
    check(default, exact(PROBLEM))


CASES: dict[str, dict[str, Any]] = {
    "sharing alone": {"num_candidates": 1},
    "three documents per query": {"num_samples": 3},
    "three documents for all queries": {"num_samples": 0.75},
    "one document for all queries": {"num_samples": 0.1, "passes": 800},
    "without ids": {"with_ids": False},
    # With few draws, some rows are so rare that the mean of 200 passes is not close to normal.
    "given negatives alone": {"in_batch": False, "num_candidates": 2, "passes": 800},
    "nothing shared": {"shared": False, "passes": 800},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_other_settings_are_unbiased(settings: dict[str, Any]):
    truth = {key: settings[key] for key in ("with_ids", "in_batch") if key in settings}
    check(collect(**settings), exact(PROBLEM, **truth))


def test_corrected_scores_are_unbiased():
    log_q = torch.rand(NUM_DOCUMENTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log().float()
    found = collect(with_ids=False, log_q=log_q)
    truth = exact(PROBLEM._replace(log_q=log_q.double()), with_ids=False)
    torch.testing.assert_close(found.values, truth.value.expand_as(found.values), rtol=1e-6, atol=0)  # log is float32
    assert mean_gradient(found.gradients, truth.gradient) > ALPHA
    assert mean_gradient(found.gradients, exact(PROBLEM, with_ids=False).gradient) < ALPHA


def test_a_step_that_may_not_synchronize_is_unbiased():
    with as_on_a_gpu():
        check(collect(), exact(PROBLEM))


def test_a_step_with_a_float32_cache_is_unbiased():
    with as_on_a_gpu():
        found = collect(embedding_dtype=torch.float32)
    truth = exact(PROBLEM._replace(stale=STALE.float().double()))
    torch.testing.assert_close(found.values, truth.value.expand_as(found.values), rtol=1e-6, atol=0)  # float32 sums
    assert mean_gradient(found.gradients, truth.gradient) > ALPHA
    assert mean_gradient(found.gradients, exact(PROBLEM, is_reencoded=True).gradient) < ALPHA


def test_the_oracle_has_the_gradient_of_its_value():
    """Where cached embeddings are not stale: by differences of the value."""
    current, step = PROBLEM._replace(stale=TABLE[:NUM_ROWS]), 1e-6
    gradient = exact(current).gradient
    for at in range(QUERIES.numel()):
        shift = (
            torch.zeros(QUERIES.numel(), dtype=torch.float64).index_fill_(0, torch.tensor(at), step).view_as(QUERIES)
        )
        up, down = (exact(current._replace(queries=QUERIES + sign * shift)).value for sign in (1, -1))
        torch.testing.assert_close((up - down) / (2 * step), gradient[at], rtol=1e-6, atol=1e-9)


# What the test must notice

MISTAKES: dict[str, dict[str, Any]] = {
    "the cache's softmax of re-encoded embeddings": {"is_reencoded": True},
    "the batch's documents are left out": {"in_batch": False},
    "documents count twice": {"counts_twice": True},
    "no ids": {"with_ids": False},
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_another_gradient_is_rejected(default: Found, mistake: dict[str, Any]):
    assert mean_gradient(default.gradients, exact(PROBLEM, **mistake).gradient) < ALPHA


def test_known_positives_that_count_are_rejected(default: Found):
    forgetful = PROBLEM._replace(positives=torch.full_like(POSITIVES, -1))
    assert mean_gradient(default.gradients, exact(forgetful).gradient) < ALPHA


def without_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any, **options: Any) -> Choice:
        choice = choose(*given, **options)
        return choice._replace(factors=torch.ones_like(choice.factors))

    monkeypatch.setattr(one_process, "choose", wrong)


def with_stand_ins_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents of the batch also stand in for what is re-encoded."""
    right = estimators.stand_in_weights
    monkeypatch.setattr(estimators, "stand_in_weights", lambda a, b, documents: right(a + 0.5, b + 0.5, documents))


def with_biased_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_process, "choose", lambda *given, num_steps: choose(*given, num_steps=1))


def without_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh = estimators.balance_weights
    monkeypatch.setattr(estimators, "balance_weights", lambda log, counts, m: weigh(log, counts.clamp(max=1), m))


def with_a_wrong_share(monkeypatch: pytest.MonkeyPatch) -> None:
    right = estimators.readable_loss
    monkeypatch.setattr(estimators, "readable_loss", lambda s, drawn, *given: right(s, 1.4 * drawn, *given))


def with_a_lost_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = one_process.weigh_candidates

    def wrong(*given: Any, **options: Any) -> Candidates:
        candidates = right(*given, **options)
        view = candidates.views[0]
        view = view._replace(weights=view.weights.masked_fill(candidates.rows == 3, 0))
        return candidates._replace(views=[view])

    monkeypatch.setattr(one_process, "weigh_candidates", wrong)


MISTAKEN = [
    without_factors,
    with_stand_ins_for_all,
    with_biased_factors,
    without_counts,
    with_a_wrong_share,
    with_a_lost_row,
]


@pytest.mark.parametrize("break_it", MISTAKEN)
def test_a_broken_estimator_is_rejected(break_it: Any, monkeypatch: pytest.MonkeyPatch):
    break_it(monkeypatch)
    assert mean_gradient(collect(100).gradients, exact(PROBLEM).gradient) < ALPHA


# Noise


def distances(shared: bool, passes: int = 150) -> Tensor:
    """Squared distances of single gradients from the exact one, of a batch of 16 and a cache of 64 rows."""
    generator = torch.Generator().manual_seed(0)
    queries, documents, rows = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (16, 16, 64))
    leaves = [x.requires_grad_() for x in (queries, documents, rows)]
    scores = torch.cat([queries @ documents.T, queries @ rows.T], dim=1)
    loss = (scores.logsumexp(1) - scores.diagonal()).mean()
    truth = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, leaves)])

    def encoder(features: dict[str, Tensor]) -> Tensor:
        return rows[features["row"]]

    specs = {"row": FixedLenFeature([], torch.int64)}
    settings = {"specs": specs, "embedding_dtype": torch.float64, "seed": 0, "num_samples": 1}
    loss_fn = NegativeCacheLoss(encoder, 80, 1.0, shared=shared, **settings)
    loss_fn(rows.detach(), rows.detach(), {"row": torch.arange(64)})
    cache, found = loss_fn.cache, []
    for _ in range(passes):
        loss_fn.cache = copy.deepcopy(cache)
        mean = loss_fn(queries, documents, {"row": torch.arange(16)})
        gradients = torch.autograd.grad(mean, leaves)
        found.append((torch.cat([gradient.flatten() for gradient in gradients]) - truth).square().sum())
    return torch.stack(found)


def advantage(better: Tensor, worse: Tensor, factor: float) -> float:
    """How far the mean of `better` is below `factor` times that of `worse`, in standard errors of the difference.

    Means of 150 independent distances are close to normal: 5 is passed by chance less often than ALPHA.
    """
    difference = factor * worse.mean() - better.mean()
    return float(difference / ((factor * worse).var() / len(worse) + better.var() / len(better)).sqrt())


def test_shared_documents_have_less_noise_than_own_ones():
    shared, own = distances(True), distances(False)
    assert advantage(shared, own, 0.25) > 5
    assert advantage(own, shared, 1.0) < -5
