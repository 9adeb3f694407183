"""`NegativeCacheLoss` with shared documents as an estimator: its mean gradient against that of the dense loss.

The cached embeddings are stale: not what the encoder makes. The exact gradient then has the softmax of the cached
embeddings and the scores of new ones: `sum_k softmax_k grad s_k - grad s_positive`, with the batch's documents among
the k.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from negative_cache import FixedLenFeature, NegativeCacheLoss, drawing, estimators
from negative_cache.sharing import choose
from stats import ALPHA, mean_gradient
from support import as_on_a_gpu

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


class Found(NamedTuple):
    """Gradients to queries, documents, given negatives, table and logarithm of the scale, `[passes, n]`; and values."""

    gradients: Tensor
    values: Tensor


class Exact(NamedTuple):
    gradient: Tensor
    value: Tensor


def exact(
    with_ids: bool = True,
    in_batch: bool = True,
    top_k: int | None = None,
    stale: Tensor = STALE,
    is_fresh: bool = False,
    counts_twice: bool = False,
    positives: Tensor = POSITIVES,
) -> Exact:
    """Row by row from the dense formulas; the last three make mistakes that the test must notice."""
    leaves = [x.clone().requires_grad_() for x in (QUERIES, TABLE[DOCUMENTS], TABLE[GIVEN], TABLE, SCALE.log())]
    queries, documents, given, table, log_scale = leaves
    scale = log_scale.exp()
    ids = torch.cat([DOCUMENTS, GIVEN]) if with_ids else torch.full((BATCH + len(GIVEN),), -1)
    fresh = torch.cat([documents, given]) if in_batch else given
    ids = ids if in_batch else ids[BATCH:]
    total, losses = torch.zeros((), dtype=torch.float64), []
    for query in range(BATCH):
        own = {*positives[query].tolist(), int(DOCUMENTS[query])} if with_ids else set()
        seen: set[int] = set()
        columns = []
        for column, document in enumerate(ids.tolist()):
            is_repeated = document >= 0 and document in seen and not counts_twice
            is_own = in_batch and column == query
            if not (is_repeated or is_own or document in own - {-1}):
                columns.append(column)
            seen.add(document)
        rows = [row for row in range(NUM_ROWS) if not with_ids or row not in own | (set() if counts_twice else seen)]
        cached = torch.full((CACHE_SIZE,), -torch.inf, dtype=torch.float64)
        cached[rows] = SCALE * stale[rows].double() @ QUERIES[query]
        if top_k is not None:  # the best row of each of equal groups
            groups = cached.view(top_k, -1)
            cached = torch.where(groups == groups.amax(1, keepdim=True), groups, -torch.inf).flatten()
        cached = cached[:NUM_ROWS]
        positive = scale * queries[query] @ documents[query]
        scores = torch.cat([positive[None], scale * fresh[columns] @ queries[query], cached])
        live = torch.cat([scores[: 1 + len(columns)], scale * table[:NUM_ROWS] @ queries[query]])
        losses.append((scores.logsumexp(0) - scores[0]).detach())
        weights = (live if is_fresh else scores).detach().softmax(0)
        total = total + (weights * live).sum() - positive
    gradients = torch.autograd.grad(total / BATCH, leaves)
    return Exact(torch.cat([gradient.flatten() for gradient in gradients]), torch.stack(losses).mean())


class Encoder:
    """The embedding of a document is its row of a table; keeps the last output and its rows."""

    def __call__(self, features: dict[str, Tensor]) -> Tensor:
        self.rows = features["row"]
        self.output = TABLE[self.rows].clone().requires_grad_()
        return self.output


def filled_loss(encoder: Any, with_ids: bool = True, **settings: Any) -> NegativeCacheLoss:
    """A loss whose cache holds the stale embeddings of the first documents."""
    specs = {"row": FixedLenFeature([], torch.int64)}
    settings = {"embedding_dtype": torch.float64, "specs": specs, "seed": 0, "learnable_scale": True, **settings}
    loss_fn = NegativeCacheLoss(encoder, CACHE_SIZE, 2.0, **settings)
    rows, ids = torch.arange(NUM_ROWS), torch.arange(NUM_ROWS)
    loss_fn(STALE, STALE, {"row": rows}, ids if with_ids else None)
    return loss_fn


def collect(passes: int = PASSES, with_ids: bool = True, **settings: Any) -> Found:
    encoder = Encoder()
    loss_fn = filled_loss(encoder, with_ids, **settings)
    cache = loss_fn.cache
    gradients, values = [], []
    for _ in range(passes):
        loss_fn.cache = copy.deepcopy(cache)  # what the last pass wrote is not there
        leaves = [x.clone().requires_grad_() for x in (QUERIES, TABLE[DOCUMENTS], TABLE[GIVEN])]
        loss = loss_fn(
            *leaves[:2],
            {"row": DOCUMENTS},
            DOCUMENTS if with_ids else None,
            POSITIVES if with_ids else None,
            negative_embeddings=leaves[2],
            negative_features={"row": GIVEN},
            negative_ids=GIVEN if with_ids else None,
        )
        loss_fn.log_scale.grad = None
        loss.backward()
        table = torch.zeros_like(TABLE).index_add(0, encoder.rows, encoder.output.grad)
        gradients.append(
            torch.cat([*(leaf.grad.flatten() for leaf in leaves), table.flatten(), loss_fn.log_scale.grad[None]])
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
    check(default, exact())


CASES: dict[str, dict[str, Any]] = {
    "sharing alone": {"num_candidates": 1},
    "three documents per query": {"num_samples": 3},
    "the best row of each group": {"top_k": 4},
    "without ids": {"with_ids": False},
    "given negatives alone": {"in_batch": False, "num_candidates": 2},
    "nothing shared": {"shared": False},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_other_settings_are_unbiased(settings: dict[str, Any]):
    truth = {key: settings[key] for key in ("with_ids", "in_batch", "top_k") if key in settings}
    check(collect(**settings), exact(**truth))


def test_what_cannot_be_looked_at_is_unbiased():
    with as_on_a_gpu():
        check(collect(), exact())


# What the test must notice

MISTAKES: dict[str, dict[str, Any]] = {
    "the cache's softmax of new embeddings": {"is_fresh": True},
    "the batch's documents are left out": {"in_batch": False},
    "documents count twice": {"counts_twice": True},
    "known positives are negatives": {"positives": torch.full_like(POSITIVES, -1)},
    "no ids": {"with_ids": False},
    "groups of rows": {"top_k": 4},
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_another_gradient_is_rejected(default: Found, mistake: dict[str, Any]):
    assert mean_gradient(default.gradients, exact(**mistake).gradient) < ALPHA


def without_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> Any:
        choice = choose(*given)
        return choice._replace(factors=torch.ones_like(choice.factors))

    monkeypatch.setattr(drawing, "choose", wrong)


def without_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh = estimators.balance_weights
    monkeypatch.setattr(estimators, "balance_weights", lambda log, counts, m: weigh(log, counts.clamp(max=1), m))


def with_a_wrong_share(monkeypatch: pytest.MonkeyPatch) -> None:
    right = estimators.readable_loss
    monkeypatch.setattr(estimators, "readable_loss", lambda s, drawn, lse, fresh: right(s, 1.4 * drawn, lse, fresh))


def with_a_lost_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = drawing.candidates_of

    def wrong(*given: Any) -> Any:
        candidates = right(*given)
        return candidates._replace(weights=candidates.weights.masked_fill(candidates.rows == 3, 0))

    monkeypatch.setattr(drawing, "candidates_of", wrong)


@pytest.mark.parametrize("break_it", [without_factors, without_counts, with_a_wrong_share, with_a_lost_row])
def test_a_broken_estimator_is_rejected(break_it: Any, monkeypatch: pytest.MonkeyPatch):
    break_it(monkeypatch)
    assert mean_gradient(collect(100).gradients, exact().gradient) < ALPHA


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
    loss_fn = NegativeCacheLoss(encoder, 80, 1.0, specs=specs, embedding_dtype=torch.float64, seed=0, shared=shared)
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
