"""`matryoshka_dims`: losses of truncated embeddings from the same draws."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor

from negative_cache import FixedLenFeature, NegativeCacheLoss
from negative_cache.estimators import reweigh, truncate
from stats import ALPHA, mean_gradient
from support import TableEncoder, as_on_a_gpu

NUM_ROWS, DIM, SCALE, BATCH = 12, 6, 3.0, 3


def unit(count: int, seed: int) -> Tensor:
    values = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=1)


def test_truncated_vectors_keep_their_length():
    values = 3 * unit(5, 0)
    short = truncate(values, 2)
    assert bool((short[:, 2:] == 0).all())
    torch.testing.assert_close(short.norm(dim=1), values.norm(dim=1))
    torch.testing.assert_close(torch.nn.functional.normalize(values[:, :2], dim=1) * 3, short[:, :2])
    torch.testing.assert_close(truncate(values, DIM), values)
    assert bool((truncate(torch.zeros(2, DIM), 3) == 0).all())


def test_reweighing_all_rows_is_exact():
    """With every row at its own weight, the ratio is the softmax itself."""
    scores = unit(4, 1) @ unit(9, 2).T
    log_z, logits = reweigh(torch.zeros(9, dtype=torch.float64), scores)
    torch.testing.assert_close(log_z, scores.logsumexp(dim=1))
    torch.testing.assert_close((logits - log_z[:, None]).exp(), scores.softmax(dim=1))


def make_loss(dims: tuple[int, ...], num_candidates: int) -> tuple[NegativeCacheLoss, TableEncoder, Tensor]:
    table = unit(NUM_ROWS + BATCH, 3)
    encoder = TableEncoder(table)
    loss_fn = NegativeCacheLoss(
        encoder,
        NUM_ROWS + BATCH,
        SCALE,
        num_samples=1,
        matryoshka_dims=dims,
        specs={"row": FixedLenFeature([], torch.int64)},
        embedding_dtype=torch.float64,
        seed=0,
    )
    loss_fn.num_candidates = num_candidates
    rows = torch.arange(NUM_ROWS)
    if max(dims) < DIM:
        loss_fn.fill_from([{"document_features": {"row": rows}, "document_ids": rows}])
    return loss_fn, encoder, table


def exact(dim: int, queries: Tensor, table: Tensor) -> Tensor:
    """The dense loss of embeddings truncated to `dim`: against all rows and the other documents of the batch."""
    short = truncate(table, dim)
    scores = SCALE * truncate(queries, dim) @ short.T
    return torch.nn.functional.cross_entropy(scores, torch.arange(NUM_ROWS, NUM_ROWS + BATCH))


def gradients(dims: tuple[int, ...], num_candidates: int, passes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per pass the gradients of queries, positives and rows; the exact ones; the values, and the exact value."""
    loss_fn, encoder, table = make_loss(dims, num_candidates)
    cache = loss_fn.cache
    numbers = torch.arange(NUM_ROWS, NUM_ROWS + BATCH)
    queries = unit(BATCH, 4)
    found, values = [], []
    for _ in range(passes):
        loss_fn.cache = copy.deepcopy(cache)
        q, p = queries.clone().requires_grad_(), table[numbers].clone().requires_grad_()
        loss = loss_fn(q, p, {"row": numbers}, numbers)
        loss.backward()
        rows = torch.zeros(NUM_ROWS, DIM, dtype=torch.float64).index_add_(0, encoder.rows, encoder.output.grad)
        found.append(torch.cat([q.grad.flatten(), p.grad.flatten(), rows.flatten()]))
        values.append(loss.detach())
    q, leaf = queries.clone().requires_grad_(), table.clone().requires_grad_()
    value = sum(exact(dim, q, leaf) for dim in (DIM, *dims))
    q_grad, table_grad = torch.autograd.grad(value, [q, leaf])
    truth = torch.cat([q_grad.flatten(), table_grad[NUM_ROWS:].flatten(), table_grad[:NUM_ROWS].flatten()])
    return torch.stack(found), truth, torch.stack(values), value.detach()


def test_the_bias_falls_with_the_number_of_candidates():
    """Self-normalised: with 2 draws per query the test detects the bias, with 1000 it is within the noise."""
    few, truth, few_values, value = gradients((2,), 2, 200)
    assert mean_gradient(few, truth) < ALPHA
    many, truth, many_values, _ = gradients((2,), 1000, 200)
    assert mean_gradient(many, truth) > ALPHA
    error = (few_values - value).square().mean().sqrt()
    assert (many_values - value).square().mean().sqrt() < error / 5  # sqrt(500) = 22 times less noise


def test_dimensions_not_below_those_of_the_embeddings_are_refused():
    loss_fn, _, table = make_loss((DIM,), 8)
    numbers = torch.arange(NUM_ROWS, NUM_ROWS + BATCH)
    with pytest.raises(ValueError, match="the embeddings have 6 dimensions"):
        loss_fn(unit(BATCH, 4), table[numbers], {"row": numbers}, numbers)


def test_evaluation_counts_only_whole_embeddings():
    loss_fn, _, table = make_loss((2,), 8)
    numbers = torch.arange(NUM_ROWS, NUM_ROWS + BATCH)
    queries = unit(BATCH, 4)
    value = loss_fn.eval()(queries, table[numbers], {"row": numbers}, numbers)
    torch.testing.assert_close(value, exact(DIM, queries, table))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matryoshka_dims": (0,)}, "`matryoshka_dims` is 0; it must be an integer of at least 1"),
        ({"matryoshka_dims": (4,), "shared": False}, "needs shared=True"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NegativeCacheLoss(lambda f: f["x"], 8, **settings)


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_queries_without_any_negative_have_no_loss(on_a_gpu):
    """A margin hides everything: the loss is 0 and finite, also where the host may not look at values."""
    loss_fn, _, table = make_loss((2,), 8)
    loss_fn.limits = loss_fn.limits._replace(absolute=3.0)
    numbers = torch.arange(NUM_ROWS, NUM_ROWS + BATCH)
    queries = unit(BATCH, 4).requires_grad_()
    with as_on_a_gpu() if on_a_gpu else contextlib.nullcontext():
        value = loss_fn(queries, table[numbers], {"row": numbers}, numbers)
    value.backward()
    assert float(value.detach()) == 0
    assert bool((queries.grad == 0).all())
