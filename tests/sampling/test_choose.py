"""The choice of shared documents: every outcome of the draws and of the choice is enumerated, nothing is sampled."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from negative_cache import estimators
from negative_cache.estimators import (
    balance_weights,
    cache_share,
    importance,
    inclusion_probabilities,
    systematic_sample,
)
from negative_cache.retrieval import Ceilings, RowPool, Scale, Search
from negative_cache.retrieval.dense import retrieve_dense
from negative_cache.retrieval.search import dense_scores
from negative_cache.sampling.choose import Candidates, choose, count_equal, weigh_candidates
from support import as_on_a_gpu

QUERIES, ROWS, DIM = 2, 3, 4


class Case(NamedTuple):
    search: Search  # two queries and three rows; the second query does not see row 0
    lse: Tensor  # [2]
    rho: Tensor  # [2, 3]


@pytest.fixture(scope="module")
def case() -> Case:
    generator = torch.Generator().manual_seed(0)
    queries, rows = (torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in (QUERIES, ROWS))
    pool = RowPool(rows, torch.ones(ROWS, dtype=torch.bool))
    search = Search(queries, pool, excluded=torch.tensor([[-1], [0]]))
    scores = dense_scores(search)
    return Case(search, scores.logsumexp(1), scores.softmax(1))


def outcomes(rho: Tensor, num_samples: int):
    """All draws of `num_samples` rows per query, `[queries * num_samples]`, with their probabilities."""
    query = torch.arange(len(rho)).repeat_interleave(num_samples)
    for drawn in itertools.product(range(rho.shape[1]), repeat=len(query)):
        rows = torch.tensor(drawn)
        probability = float(rho[query, rows].prod())
        if probability > 0:
            yield rows, probability


def weigh(case: Case, rows: Tensor, num_samples: int) -> Candidates:
    search = case.search._replace(num_samples=num_samples)
    return weigh_candidates(search, case.lse, rows, torch.ones_like(rows, dtype=torch.bool))


def by_row(values: Tensor, rows: Tensor) -> Tensor:
    """`values [batch, n]` of `rows [n]`, added up per row: `[batch, 3]`."""
    return torch.zeros(len(values), ROWS, dtype=values.dtype).index_add(1, rows, values)


def expected_weights(case: Case, num_samples: int) -> Tensor:
    return sum(
        probability * by_row(candidates.views[0].weights, candidates.rows)
        for rows, probability in outcomes(case.rho, num_samples)
        for candidates in [weigh(case, rows, num_samples)]
    )


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_the_mean_of_the_weights_is_the_softmax(case: Case, num_samples: int):
    torch.testing.assert_close(expected_weights(case, num_samples), case.rho, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mistake", ["counts", "num_samples", "own probability alone"])
def test_wrong_weights_have_another_mean(case: Case, mistake: str, monkeypatch: pytest.MonkeyPatch):
    def wrong(log_probabilities: Tensor, counts: Tensor, num_samples: int) -> Tensor:
        if mistake == "counts":
            return balance_weights(log_probabilities, counts.clamp(max=1), num_samples)
        if mistake == "num_samples":
            return balance_weights(log_probabilities, counts, 1)
        own = counts / (num_samples * len(log_probabilities))
        return own.to(log_probabilities).expand_as(log_probabilities)

    monkeypatch.setattr(estimators, "balance_weights", wrong)
    assert float((expected_weights(case, 2) - case.rho).abs().max()) > 0.05


@pytest.mark.parametrize("num_samples", [1, 2])
def test_no_draw_weighs_more_than_one_of_its_own(case: Case, num_samples: int):
    for rows, _ in outcomes(case.rho, num_samples):
        candidates = weigh(case, rows, num_samples)
        counts = torch.bincount(rows, minlength=ROWS)[candidates.rows]
        assert bool((candidates.views[0].weights <= counts / num_samples + 1e-12).all())


def choices(sizes: Tensor, query: Tensor, count: int):
    """All outcomes of the choice: it is constant between the points at which the running sum has whole distances."""
    units, step = inclusion_probabilities(sizes, count)
    edges = sorted({0, int(step), *(units[query.argsort(stable=True)].cumsum(0) % step).tolist()})
    for low, high in itertools.pairwise(edges):
        yield choose(sizes, query, count, uniform_at(low, int(step))), (high - low) / int(step)


def uniform_at(start: int, step: int) -> Tensor:
    """The smallest uniform for which the grid starts at `start`, from 0 to step - 1."""
    return torch.tensor(-(-start * 2**62 // step))


def fixed_point(uniform: float) -> Tensor:
    """A uniform in fixed point."""
    return torch.tensor(int(uniform * 2**62))


def two_phases(case: Case, num_candidates: int, count: int, has_factors: bool = True) -> tuple[Tensor, Tensor]:
    """The means of the final weights by row, and of the correction."""
    shares = torch.tensor([0.9, 0.2], dtype=torch.float64)
    weights, corrections = torch.zeros_like(case.rho), torch.zeros_like(case.search.queries)
    for rows, probability in outcomes(case.rho, num_candidates):
        candidates = weigh(case, rows, num_candidates)
        for choice, part in choices(*candidates.sizes(shares, case.search.queries), count):
            factors = choice.factors if has_factors else torch.ones_like(choice.factors)
            (final,) = candidates.weigh(choice.at, factors)
            assert len(choice.at.unique()) == len(choice.at) <= count
            weights += probability * part * by_row(final.weights, candidates.rows[choice.at])
            corrections += probability * part * final.correction
    return weights, corrections


@pytest.mark.parametrize(("num_candidates", "count"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_chosen_documents_have_the_softmax_as_their_mean(case: Case, num_candidates: int, count: int):
    weights, correction = two_phases(case, num_candidates, count)
    torch.testing.assert_close(weights, case.rho, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(correction, torch.zeros_like(correction), rtol=0, atol=1e-12)


def test_chosen_documents_without_their_factors_have_another_mean(case: Case):
    weights, correction = two_phases(case, 2, 1, has_factors=False)
    assert float((weights - case.rho).abs().max()) > 0.05
    assert float(correction.abs().max()) > 0.05


# The parts


def test_candidates_have_the_probabilities_of_the_pass_that_drew_them(monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []

    def recorded(log_probabilities: Tensor, counts: Tensor, num_samples: int) -> Tensor:
        seen.append(log_probabilities)
        return balance_weights(log_probabilities, counts, num_samples)

    monkeypatch.setattr(estimators, "balance_weights", recorded)
    generator = torch.Generator().manual_seed(1)
    queries, rows = (torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in (5, 11))
    is_candidate = torch.rand(len(rows), generator=generator) > 0.2
    search = Search(
        queries,
        RowPool(rows, is_candidate, biases=torch.randn(len(rows), generator=generator)),
        Scale(2.0),
        excluded=torch.tensor([[0, 5], [1, -1], [7, 8], [-1, -1], [10, 2]]),
        ceilings=Ceilings(torch.full((5,), 1.5, dtype=torch.float64)),
        num_samples=6,
    )
    drawn = retrieve_dense(search, generator)
    flat = drawn.rows.flatten()
    found = weigh_candidates(search, drawn.lse, flat, torch.ones_like(flat, dtype=torch.bool))
    truth = dense_scores(search)
    assert bool((truth[:, found.rows] == -torch.inf).any())
    (log_probabilities,) = seen
    torch.testing.assert_close(log_probabilities, truth.log_softmax(1)[:, found.rows], rtol=1e-12, atol=1e-12)
    assert found.rows.tolist() == list(dict.fromkeys(flat.tolist()))
    torch.testing.assert_close(found.views[0].cached, rows[found.rows], rtol=0, atol=0)


def test_a_query_without_negatives_has_weights_of_zero(case: Case):
    lse = torch.stack([case.lse[0], torch.tensor(-torch.inf, dtype=torch.float64)])
    rows, is_drawn = torch.tensor([2, 2, 0, 0]), torch.tensor([True, True, False, False])
    search = case.search._replace(excluded=torch.tensor([[-1, -1, -1], [0, 1, 2]]), num_samples=2)
    found = weigh_candidates(search, lse, rows, is_drawn)
    assert found.rows.tolist() == [2]
    assert found.views[0].weights.tolist() == [[1.0], [0.0]]  # two draws of two, and no other query could draw it


def test_padded_candidates_have_the_same_weights(case: Case):
    """On a GPU the numbers of candidates and of chosen documents are fixed; placeholders have the weight 0."""
    shares = torch.tensor([0.9, 0.2], dtype=torch.float64)
    queries = case.search.queries
    for rows, _ in outcomes(case.rho, 2):
        found = weigh(case, rows, 2)
        with as_on_a_gpu():
            fixed = weigh(case, rows, 2)
        assert len(fixed.rows) == 4
        torch.testing.assert_close(
            by_row(fixed.views[0].weights, fixed.rows), by_row(found.views[0].weights, found.rows), rtol=1e-14, atol=0
        )
        assert torch.equal(fixed.positions[found.positions], found.positions)
        for number in range(8):
            uniform = fixed_point((number + 0.5) / 8)
            choice = choose(*found.sizes(shares, queries), 2, uniform)
            with as_on_a_gpu():
                other = choose(*fixed.sizes(shares, queries), 2, uniform)
            assert len(other.at) == 2
            at = other.at[other.is_chosen]
            assert sorted(fixed.rows[at].tolist()) == sorted(found.rows[choice.at].tolist())
            assert other.factors[~other.is_chosen].tolist() == [0.0] * int((~other.is_chosen).sum())
            (final,), (padded,) = found.weigh(choice.at, choice.factors), fixed.weigh(other.at, other.factors)
            torch.testing.assert_close(
                by_row(padded.weights, fixed.rows[other.at]),
                by_row(final.weights, found.rows[choice.at]),
                rtol=1e-12,
                atol=0,
            )
            torch.testing.assert_close(padded.correction, final.correction, rtol=1e-10, atol=1e-14)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12))
def test_count_equal_counts_at_the_first_occurrence(entries: list[tuple[int, bool]]):
    rows = torch.tensor([row for row, _ in entries], dtype=torch.int64)
    mask = torch.tensor([counts for _, counts in entries], dtype=torch.bool)
    seen: set[int] = set()
    expected = []
    for row, counts in entries:
        expected.append(sum(r == row and c for r, c in entries) if counts and row not in seen else 0)
        if counts:
            seen.add(row)
    assert count_equal(rows, mask).tolist() == expected


def test_the_share_is_the_derivative_of_the_loss_by_the_lse_of_the_cache():
    values = [torch.tensor(x, dtype=torch.float64) for x in ([0.3, -2.0, 40.0], [1.0, 3.0, -40.0], [0.5, -1.0, 2.0])]
    positive, lse, in_batch_lse = values
    leaf = lse.clone().requires_grad_()
    loss = torch.nn.functional.softplus(torch.logaddexp(leaf, in_batch_lse) - positive)
    (expected,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(cache_share(positive, lse, in_batch_lse), expected, rtol=1e-12, atol=0)
    nothing = torch.full((3,), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(cache_share(positive, lse, nothing), (lse - positive).sigmoid(), rtol=1e-12, atol=0)
    assert cache_share(positive, nothing, in_batch_lse).tolist() == [0, 0, 0]
    assert cache_share(positive, nothing, nothing).tolist() == [0, 0, 0]


def test_importance_is_the_norm_of_a_documents_gradient_where_queries_are_orthogonal():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    queries = basis[:3] * torch.tensor([[0.5], [1.0], [3.0]], dtype=torch.float64)
    weights, shares = (torch.rand(size, generator=generator, dtype=torch.float64) for size in ((3, 4), (3,)))
    documents = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((shares[:, None] * weights * (queries @ documents.T)).sum(), documents)
    torch.testing.assert_close(importance(weights, shares, queries), gradient.norm(dim=1), rtol=1e-12, atol=0)


SIZES = st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e12), st.sampled_from([1.0, 1.0, 2.0])), min_size=1)


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(1, 12), st.sampled_from([torch.float32, torch.float64]))
def test_inclusion_probabilities_are_proportional_to_sizes_but_at_most_1(
    sizes: list[float], count: int, dtype: torch.dtype
):
    given = torch.tensor(sizes, dtype=dtype)
    units, step = inclusion_probabilities(given, count)
    assert units.dtype == step.dtype == torch.int64
    assert bool(((units >= 0) & (units <= step)).all())
    assert torch.equal(units > 0, given > 0)
    num_possible = int((given > 0).sum())
    if num_possible <= count:
        assert int(units.sum()) == num_possible * int(step)
        return
    assert int(units.sum()) <= count * int(step)  # else the grid would not reach the last elements
    chances, factor = units / step.double(), exact_factor(given.double(), count)
    assert float((chances - (factor * given).clamp(max=1)).abs().max()) <= 2**-19 + 2**-29


def exact_factor(sizes: Tensor, count: int) -> float:
    """The t for which `sum min(1, t * size)` is `count`, by bisection."""
    low, high = 0.0, 2 * count / float(sizes[sizes > 0].min())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * sizes).clamp(max=1).sum()) < count else (low, middle)
    return high


def test_inclusion_probabilities_keep_small_float32_sizes():
    """Sums of float32 sizes would lose the small ones: 100,000 of them are worth as much as the large one."""
    sizes = torch.cat([torch.tensor([1e8]), torch.ones(100_000)])
    units, step = inclusion_probabilities(sizes, 3)
    assert int(units[0]) == int(step)
    small = units[1:] / step.double()
    torch.testing.assert_close(small, torch.full((100_000,), 2e-5, dtype=torch.float64), rtol=2**-19, atol=2**-29)


def test_sizes_that_are_no_numbers_give_probabilities_all_the_same():
    """Their weights are no numbers either, so that the loss tells; the choice must only not fail."""
    for wrong in (torch.nan, torch.inf):
        units, step = inclusion_probabilities(torch.tensor([1.0, wrong, 0.0, 2.0, 3.0]), 2)
        assert bool(((units >= 0) & (units <= step)).all())
        assert int(step) > 0


# Multiples of 1/16 have exact sums: the choice is constant on each of 16 intervals of the uniform.
STEPS = 16


@settings(deadline=None)
@given(st.lists(st.integers(0, STEPS), min_size=1, max_size=10))
def test_a_systematic_sample_takes_each_element_with_its_probability_and_at_most_once(parts: list[int]):
    parts = [*parts, -sum(parts) % STEPS]
    total = sum(parts) // STEPS
    count = max(total, 1)
    taken = torch.zeros(len(parts), dtype=torch.int64)
    bounds = torch.tensor([0, *itertools.accumulate(parts)])
    sums = (bounds - bounds[:, None]).triu()  # of the parts from one place to another
    for number in range(STEPS):
        for offset in (0.0, 0.5):  # the edge belongs to the interval
            uniform = fixed_point((number + offset) / STEPS)
            at, is_chosen = systematic_sample(torch.tensor(parts), torch.tensor(STEPS), count, uniform)
            assert int(is_chosen.sum()) == total
            chosen = at[is_chosen]
            assert chosen.tolist() == sorted(set(chosen.tolist()))
            taken[chosen] += 1
            # each neighbourhood gets its share, rounded up or down
            below = torch.searchsorted(chosen, torch.arange(len(bounds)))
            found = (below - below[:, None]).triu()
            assert bool(((sums // STEPS <= found) & (found <= -(-sums // STEPS))).all())
    assert taken.tolist() == [2 * part for part in parts]


@given(st.integers(1, 2**32), st.integers(0, 2**62 - 1))
def test_the_grid_starts_at_the_uniform_times_the_step(step: int, uniform: int):
    """Exactly, so that each of the starts from 0 to step - 1 is as probable as any other."""
    start = uniform * step >> 62
    for end_of_first, expected in ((start, 1), (start + 1, 0)):
        units = torch.tensor([end_of_first, 1])
        at, is_chosen = systematic_sample(units, torch.tensor(step), 1, torch.tensor(uniform))
        assert (int(at), bool(is_chosen)) == (expected, True)


def test_a_grid_that_is_longer_than_the_sum_has_points_that_do_not_count():
    units, step = torch.tensor([2**30, 0, 2**30]), torch.tensor(2**30)
    for uniform in (0.0, 0.3, 1 - 2**-40):
        at, is_chosen = systematic_sample(units, step, 5, fixed_point(uniform))
        assert at[is_chosen].tolist() == [0, 2]
        assert is_chosen.tolist() == [True, True, False, False, False]
        assert bool((units[at] > 0).all())  # what does not count can be encoded all the same


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1e6])
def test_a_sum_that_falls_short_by_rounding_fills_nearly_every_grid(scale: float):
    units, step = inclusion_probabilities(torch.full((30,), scale), 3)
    at, is_chosen = systematic_sample(units, step, 3, fixed_point(1 - 2**-17))
    assert bool(is_chosen.all())
    assert at.tolist() == [9, 19, 29]


def test_each_querys_candidates_get_their_share_of_the_choice():
    sizes = torch.ones(12, dtype=torch.float64)
    query = torch.tensor([2, 0, 1] * 4)
    for number in range(8):
        choice = choose(sizes, query, 6, fixed_point((number + 0.5) / 8))
        assert query[choice.at].bincount().tolist() == [2, 2, 2]
        assert choice.factors.tolist() == pytest.approx([2.0] * 6, rel=2**-19)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_many_candidates_each_is_chosen_with_the_inverse_of_its_factor(dtype: torch.dtype):
    """4,096 of 65,536 candidates. Half of them have small chances, which a float32 sum of 4,096 would lose.

    An equidistant grid of uniforms enumerates the choice: the number of its points in an interval differs by less than
    one from the interval's share of them.
    """
    sizes = torch.rand(65_536, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-3]).repeat(32_768)
    query, taken, points = torch.arange(len(sizes)) % 512, torch.zeros(len(sizes)), 16
    factors = torch.zeros(len(sizes), dtype=torch.float64)
    for number in range(points):
        choice = choose(sizes.to(dtype), query, 4096, fixed_point((number + 0.5) / points))
        assert choice.factors.dtype == dtype
        taken[choice.at] += 1
        factors[choice.at] = choice.factors.double()
    is_taken = taken > 0
    assert int(is_taken.sum()) > 16_384
    assert float((taken - points / factors)[is_taken].abs().max()) < 1
    of_small = 4096 * float(sizes[1::2].sum() / sizes.sum())  # expected per choice; a lost half would give 0
    assert float(taken[1::2].sum()) / points == pytest.approx(of_small, abs=1)
