"""The cache losses against dense formulas."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from negative_cache import (
    AbstractCacheClassificationLoss,
    AbstractRetrievalFn,
    CacheClassificationLoss,
    CacheLoss,
    CacheManager,
    FixedLenFeature,
    GumbelMaxRetrievalFn,
    MaxScoreRetrievalFn,
    NegativeCache,
    RaggedFeature,
)
from negative_cache.losses import RetrievalReturn
from support import Encoder, assert_same_state, snapshot

DIM, LEVEL = 4, 1e-4


def encoder_of(table: Tensor) -> Any:
    """Looks the feature `item` up."""
    return lambda features: table[features["item"]]


def cache_of(embeddings: Tensor, first: int = 0) -> NegativeCache:
    """Rows whose feature `item` is their number, counted from `first`."""
    return NegativeCache(
        {"item": first + torch.arange(len(embeddings)), "embedding": embeddings.clone()}, [0] * len(embeddings)
    )


def tensors(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, DIM, dtype=torch.float64, generator=generator) for size in sizes]


def new_loss(**options: Any) -> CacheClassificationLoss:
    return CacheClassificationLoss("embedding", ("item",), **options)


def grouped(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best score and row of each of k groups, the plain way."""
    groups = torch.arange(scores.shape[1]).tensor_split(k)
    rows = torch.stack([group[scores[:, group].argmax(dim=1)] for group in groups], dim=1)
    return scores.gather(1, rows), rows


@pytest.mark.parametrize("top_k", [None, 3, 7])
@pytest.mark.parametrize("scale", [1.0, 20.0, 1e4])
def test_loss_values_equal_the_dense_formula(top_k: int | None, scale: float) -> None:
    queries, positives, cached, current = tensors(5, 5, 17, 17)
    loss = new_loss(score_transform=lambda s: scale * s, top_k=top_k, reducer=None)
    result = loss(encoder_of(current), queries, positives, {"docs": cache_of(cached)})
    positive_scores = scale * (queries * positives).sum(dim=1)
    scores = scale * queries @ cached.T
    scores = scores if top_k is None else grouped(scores, top_k)[0]
    all_scores = torch.cat([positive_scores[:, None], scores], dim=1)
    expected = all_scores.logsumexp(dim=1) - positive_scores
    assert torch.allclose(result.interpretable_loss, expected, rtol=1e-12, atol=1e-9)

    rows = result.updated_item_indices["docs"]
    drawn = current[rows]
    weight = torch.sigmoid(scores.logsumexp(dim=1) - positive_scores)
    expected = weight * (scale * (queries * drawn).sum(dim=1) - positive_scores)
    assert torch.allclose(result.training_loss, expected, rtol=1e-12)
    assert torch.equal(result.updated_item_data["docs"]["embedding"], drawn)
    assert result.updated_item_mask["docs"].all()
    staleness = (cached[rows] - drawn).square().sum(dim=1) / drawn.square().sum(dim=1)
    assert torch.allclose(result.staleness, staleness)
    if top_k is not None:
        assert (grouped(scale * queries @ cached.T, top_k)[1] == rows[:, None]).any(dim=1).all()


def test_default_loss_is_a_mean_without_transform() -> None:
    queries, positives, cached = tensors(5, 5, 9)
    result = new_loss()(encoder_of(cached), queries, positives, {"docs": cache_of(cached)})
    scores = torch.cat([(queries * positives).sum(dim=1)[:, None], queries @ cached.T], dim=1)
    assert torch.allclose(result.interpretable_loss, -scores.log_softmax(dim=1)[:, 0].mean())
    assert result.training_loss.shape == result.staleness.shape == ()
    assert result.staleness == 0
    assert result.topk_features is None


def test_reducer_may_be_reassigned() -> None:
    queries, positives, cached = tensors(5, 5, 9)
    loss, cache = new_loss(reducer=torch.sum), {"docs": cache_of(cached)}
    total = loss(encoder_of(cached), queries, positives, cache).interpretable_loss
    loss.reducer = None
    each = loss(encoder_of(cached), queries, positives, cache).interpretable_loss
    loss.reducer = torch.amax
    highest = loss(encoder_of(cached), queries, positives, cache).interpretable_loss
    assert each.shape == (5,)
    assert torch.allclose(total, each.sum())
    assert torch.allclose(highest, each.max())


@pytest.mark.parametrize("top_k", [None, 4])
def test_rows_are_drawn_from_the_softmax(top_k: int | None) -> None:
    query, positive, cached = tensors(1, 1, 10)
    torch.manual_seed(0)
    num_draws = 20_000
    result = new_loss(top_k=top_k)(
        encoder_of(cached), query.repeat(num_draws, 1), positive.repeat(num_draws, 1), {"docs": cache_of(cached)}
    )
    scores, rows = query @ cached.T, torch.arange(10)[None]
    scores, rows = (scores, rows) if top_k is None else grouped(scores, top_k)
    expected = torch.zeros(10, dtype=torch.float64).index_put((rows[0],), scores[0].softmax(0))
    counts = result.updated_item_indices["docs"].bincount(minlength=10)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0

    def p_value(chances: Tensor) -> float:
        return float(stats.chisquare(counts[possible].numpy(), (num_draws * chances).numpy()).pvalue)

    assert p_value(expected[possible]) > LEVEL
    assert p_value((1.1 * scores[0][rows[0].argsort()]).softmax(0)) < LEVEL


def test_mean_gradient_is_the_exact_one() -> None:
    """Where the cache is not stale. The tolerance follows from the number of draws."""
    query, positive, table = tensors(1, 1, 8)
    torch.manual_seed(0)
    num_draws = 40_000
    queries = query.repeat(num_draws, 1).requires_grad_()
    positives = positive.repeat(num_draws, 1).requires_grad_()
    loss = new_loss(reducer=torch.sum)
    loss(encoder_of(table), queries, positives, {"docs": cache_of(table)}).training_loss.backward()

    exact_query, exact_positive = query.clone().requires_grad_(), positive.clone().requires_grad_()
    scores = torch.cat([(exact_query * exact_positive).sum(dim=1), (exact_query @ table.T)[0]])
    (-scores.log_softmax(dim=0)[0]).backward()
    for drawn, exact in ((queries.grad, exact_query.grad), (positives.grad, exact_positive.grad)):
        assert drawn is not None
        assert exact is not None
        error = (drawn.mean(dim=0) - exact[0]).abs()
        assert (error <= 4.5 * drawn.std(dim=0) / num_draws**0.5 + 1e-12).all()
    assert queries.grad.std(dim=0).max() > 0.1


def test_gradient_reaches_queries_positives_encoder_and_a_learnable_scale() -> None:
    queries, positives, cached = (value.requires_grad_() for value in tensors(5, 5, 9))
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    loss = new_loss(score_transform=lambda s: s * scale)
    loss(encoder_of(cached), queries, positives, {"docs": cache_of(cached.detach())}).training_loss.backward()
    for value in (queries, positives, cached, scale):
        assert value.grad is not None
        assert value.grad.abs().sum() > 0


def test_the_draw_follows_a_learnable_scale() -> None:
    queries, positives, cached = tensors(5, 5, 9)
    scale = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    loss = new_loss(score_transform=lambda s: s * scale)
    first = loss(encoder_of(cached), queries, positives, {"docs": cache_of(cached)}).interpretable_loss
    assert torch.allclose(first, torch.tensor(10.0, dtype=torch.float64).log())
    with torch.no_grad():
        scale.fill_(1)
    second = loss(encoder_of(cached), queries, positives, {"docs": cache_of(cached)}).interpretable_loss
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(("top_k", "k"), [(None, 3), (None, 50), (5, 3), (4, 9)])
def test_top_features_are_the_dense_ones_best_first(top_k: int | None, k: int) -> None:
    queries, positives, cached = tensors(6, 6, 13)
    cache = cache_of(cached)
    cache.filled[[2, 7]] = False
    result = new_loss(score_transform=lambda s: 3 * s, top_k=top_k)(
        encoder_of(cached), queries, positives, {"docs": cache}, return_topk=k
    )
    scores = (queries @ cached.T).masked_fill(~cache.filled, -torch.inf)
    rows = torch.arange(13).expand(6, -1)
    scores, rows = (scores, rows) if top_k is None else grouped(scores, top_k)
    for query, features in enumerate(result.topk_features):
        order = scores[query].argsort(descending=True)[: min(k, int(scores[query].isfinite().sum()))]
        assert features["item"].tolist() == rows[query][order].tolist()
        assert list(features) == ["item"]


def test_named_caches_form_one_pool() -> None:
    queries, positives, cached, current = tensors(40, 40, 11, 11)
    parts = {"b": cache_of(cached[4:9], first=4), "c": cache_of(cached[9:], first=9), "a": cache_of(cached[:4])}
    torch.manual_seed(3)
    result = new_loss(reducer=None)(encoder_of(current), queries, positives, parts, return_topk=11)
    torch.manual_seed(3)
    whole = new_loss(reducer=None)(encoder_of(current), queries, positives, {"x": cache_of(cached)}, return_topk=11)
    assert torch.allclose(result.interpretable_loss, whole.interpretable_loss)
    assert torch.allclose(result.training_loss, whole.training_loss)
    assert torch.allclose(result.staleness, whole.staleness)
    for mine, other in zip(result.topk_features, whole.topk_features, strict=True):
        assert torch.equal(mine["item"], other["item"])

    assert torch.stack(list(result.updated_item_mask.values())).sum(dim=0).tolist() == [1] * 40
    manager = CacheManager(parts["a"].specs, 1)
    rows = []
    for name in sorted(parts):
        updated = manager.update_cache(
            parts[name],
            updated_item_data=result.updated_item_data[name],
            updated_item_indices=result.updated_item_indices[name],
            updated_item_mask=result.updated_item_mask[name],
        )
        assert result.updated_item_mask[name].any()
        rows.append(updated.data["embedding"])
    drawn = whole.updated_item_indices["x"]
    expected = cached.clone()
    expected[drawn] = current[drawn]
    assert torch.equal(torch.cat(rows), expected)


def test_ragged_features_of_several_caches_keep_their_padding() -> None:
    specs = {"embedding": FixedLenFeature([2], torch.float32), "item": RaggedFeature(torch.int64, default_value=9)}
    manager = CacheManager(specs, 1)
    caches = {}
    for name, tokens in (("a", [[1]]), ("b", [[2, 3]])):
        new = {"embedding": torch.ones(1, 2), "item": torch.tensor(tokens)}
        caches[name] = manager.update_cache(manager.init_cache(), new_items=new)
    seen: list[Tensor] = []

    def encoder(features: dict[str, Tensor]) -> Tensor:
        seen.append(features["item"])
        return torch.ones(len(features["item"]), 2)

    torch.manual_seed(0)
    new_loss()(encoder, torch.ones(20, 2), torch.ones(20, 2), caches)
    assert {tuple(row) for row in seen[0].tolist()} == {(1, 9), (2, 3)}


def test_several_caches_are_padded_on_one_side() -> None:
    """On the left, because the texts of one of them were."""
    specs = {key: RaggedFeature(torch.int64) for key in ("item", "attention_mask")}
    manager = CacheManager({"embedding": FixedLenFeature([2], torch.float32), **specs}, 2)
    caches = {}
    for name, tokens, mask in (("a", [[1, 1]], [[1, 1]]), ("b", [[2, 2, 2], [9, 9, 3]], [[1, 1, 1], [0, 0, 1]])):
        new = {
            "embedding": torch.ones(len(tokens), 2),
            "item": torch.tensor(tokens),
            "attention_mask": torch.tensor(mask),
        }
        caches[name] = manager.update_cache(manager.init_cache(), new_items=new)
    assert not bool(caches["a"].pads_left("item"))
    seen: list[dict[str, Tensor]] = []

    def encoder(features: dict[str, Tensor]) -> Tensor:
        seen.append(features)
        return torch.ones(len(features["item"]), 2)

    torch.manual_seed(0)
    loss = CacheClassificationLoss("embedding", ("item", "attention_mask"))
    loss(encoder, torch.ones(40, 2), torch.ones(40, 2), caches)
    rows = zip(seen[0]["item"].tolist(), seen[0]["attention_mask"].tolist(), strict=True)
    assert {(tuple(item), tuple(mask)) for item, mask in rows} == {
        ((0, 1, 1), (0, 1, 1)),
        ((2, 2, 2), (1, 1, 1)),
        ((0, 0, 3), (0, 0, 1)),
    }


class SecondBest(AbstractRetrievalFn):
    def forward(self, scores: Tensor) -> Tensor:
        self.shape = scores.shape
        return scores.topk(2, dim=1).indices[:, 1:]


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize(("retrieval_fn", "place"), [(MaxScoreRetrievalFn(), 0), (SecondBest(), 1)])
def test_another_retrieval_fn_is_honoured(top_k: int | None, retrieval_fn: AbstractRetrievalFn, place: int) -> None:
    queries, positives, cached = tensors(6, 6, 13)
    loss = new_loss(top_k=top_k, reducer=None)
    loss._retrieval_fn = retrieval_fn
    result = loss(encoder_of(cached), queries, positives, {"docs": cache_of(cached)}, return_topk=3)
    scores, rows = queries @ cached.T, torch.arange(13).expand(6, -1)
    scores, rows = (scores, rows) if top_k is None else grouped(scores, top_k)
    order = scores.argsort(dim=1, descending=True)
    assert torch.equal(result.updated_item_indices["docs"], rows.gather(1, order)[:, place])
    assert [f["item"].tolist() for f in result.topk_features] == rows.gather(1, order)[:, :3].tolist()
    expected = torch.nn.functional.softplus(scores.logsumexp(dim=1) - (queries * positives).sum(dim=1))
    assert torch.allclose(result.interpretable_loss, expected)


@pytest.mark.parametrize("top_k", [None, 4])
def test_gumbel_max_with_another_temperature_is_honoured(top_k: int | None) -> None:
    query, positive, cached = tensors(1, 1, 10)
    torch.manual_seed(0)
    num_draws = 5_000
    loss = new_loss(top_k=top_k)
    loss._retrieval_fn = GumbelMaxRetrievalFn(inv_temp=0.25)
    result = loss(
        encoder_of(cached), query.repeat(num_draws, 1), positive.repeat(num_draws, 1), {"docs": cache_of(cached)}
    )
    scores, rows = query @ cached.T, torch.arange(10)[None]
    scores, rows = (scores, rows) if top_k is None else grouped(scores, top_k)
    counts = result.updated_item_indices["docs"].bincount(minlength=10)[rows[0]]
    assert stats.chisquare(counts.numpy(), num_draws * (0.25 * scores[0]).softmax(0).numpy()).pvalue > LEVEL
    assert stats.chisquare(counts.numpy(), num_draws * scores[0].softmax(0).numpy()).pvalue < LEVEL


def test_the_dense_path_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    class Unheard(SecondBest):
        pass

    queries, positives, cached = tensors(3, 3, 6)
    with caplog.at_level(logging.INFO, logger="negative_cache"):
        for top_k in (None, None, 3):
            loss = new_loss(top_k=top_k)
            loss._retrieval_fn = Unheard()
            loss(encoder_of(cached), queries, positives, {"docs": cache_of(cached)})
        new_loss()(encoder_of(cached), queries, positives, {"docs": cache_of(cached)})
    messages = [record.getMessage() for record in caplog.records]
    assert ["dense" in message for message in messages if "Unheard" in message] == [True]


def test_a_retrieval_fn_that_returns_another_shape_is_refused() -> None:
    queries, positives, cached = tensors(3, 3, 6)
    loss = new_loss()
    loss._retrieval_fn = lambda scores: scores.argmax(dim=1)
    with pytest.raises(ValueError, match=r"expected \[3, 1\]"):
        loss(encoder_of(cached), queries, positives, {"docs": cache_of(cached)})


def multinomial(scores: Tensor) -> Tensor:
    return scores.softmax(dim=1).multinomial(1)


@pytest.mark.parametrize("retrieval_fn", [GumbelMaxRetrievalFn(), MaxScoreRetrievalFn(), SecondBest(), multinomial])
@pytest.mark.parametrize("top_k", [None, 2])
def test_an_empty_cache_gives_loss_zero_and_backward_works(retrieval_fn: Any, top_k: int | None) -> None:
    specs = {"embedding": FixedLenFeature([DIM], torch.float32), "item": FixedLenFeature([], torch.int64)}
    manager = CacheManager(specs, 5)
    caches = {"a": manager.init_cache(), "b": manager.init_cache()}
    queries, positives = torch.randn(3, DIM, requires_grad=True), torch.randn(3, DIM, requires_grad=True)
    loss = new_loss(top_k=top_k)
    loss._retrieval_fn = retrieval_fn

    def encoder(features: dict[str, Tensor]) -> Tensor:
        raise AssertionError("There is nothing to encode.")

    result = loss(encoder, queries, positives, caches, return_topk=2)
    assert result.training_loss == result.interpretable_loss == result.staleness == 0
    result.training_loss.backward()
    assert torch.equal(queries.grad, torch.zeros(3, DIM))
    assert [features["item"].tolist() for features in result.topk_features] == [[], [], []]
    before = snapshot(caches["a"])
    updated = manager.update_cache(
        caches["a"],
        updated_item_data=result.updated_item_data["a"],
        updated_item_indices=result.updated_item_indices["a"],
        updated_item_mask=result.updated_item_mask["a"],
    )
    updated.step -= 1
    assert_same_state(before, snapshot(updated))


class Uniform(AbstractCacheClassificationLoss):
    """Takes the row with the number of the query; every row counts the same."""

    def _retrieve_from_cache(self, query_embeddings: Tensor, cache: Any, return_topk: int = 0) -> RetrievalReturn:
        rows = torch.arange(len(query_embeddings))
        data = cache["docs"].data
        return RetrievalReturn(
            retrieved_data={"item": data["item"][rows]},
            scores=torch.zeros(len(rows), cache["docs"].num_rows),
            retrieved_indices=rows[:, None],
            retrieved_cache_embeddings=data["embedding"][rows],
        )

    def _score_documents(self, query_embeddings: Tensor, doc_embeddings: Tensor) -> Tensor:
        return -(query_embeddings - doc_embeddings).square().sum(dim=1)


def test_a_subclass_needs_two_methods_only() -> None:
    queries, positives, cached = tensors(3, 3, 6)
    result = Uniform()(encoder_of(cached), queries, positives, {"docs": cache_of(cached)})
    positive_scores = -(queries - positives).square().sum(dim=1)
    lse = torch.tensor(6.0, dtype=torch.float64).log()
    assert torch.allclose(result.interpretable_loss, torch.nn.functional.softplus(lse - positive_scores).mean())
    negative_scores = -(queries - cached[:3]).square().sum(dim=1)
    expected = torch.sigmoid(lse - positive_scores) * (negative_scores - positive_scores)
    assert torch.allclose(result.training_loss, expected.mean())
    assert result.updated_item_indices["docs"].tolist() == [0, 1, 2]


def test_abstract_classes_need_their_methods() -> None:
    for cls in (CacheLoss, AbstractCacheClassificationLoss):
        with pytest.raises(TypeError, match="abstract"):
            cls()  # type: ignore[abstract]


def test_the_loss_writes_nothing() -> None:
    queries, positives, cached, current = tensors(5, 5, 9, 9)
    cache = cache_of(cached)
    before = snapshot(cache)
    new_loss()(encoder_of(current), queries, positives, {"docs": cache}, return_topk=2)
    assert_same_state(before, snapshot(cache))


def test_half_precision_embeddings_are_scored_in_float32() -> None:
    queries, positives, cached = (value.to(torch.bfloat16) for value in tensors(5, 5, 9))
    result = new_loss(score_transform=lambda s: 20 * s)(encoder_of(cached), queries, positives, {"x": cache_of(cached)})
    scores = 20 * torch.cat(
        [(queries.double() * positives).sum(dim=1)[:, None], queries.double() @ cached.double().T], 1
    )
    assert result.interpretable_loss.dtype == torch.float32
    assert torch.allclose(result.interpretable_loss.double(), -scores.log_softmax(dim=1)[:, 0].mean(), rtol=1e-5)


def wrong_inputs() -> list[tuple[dict[str, Any], type[Exception], str]]:
    queries, positives, cached = tensors(3, 3, 6)
    nan = positives.clone()
    nan[1, 2] = torch.nan
    return [
        ({"pos_doc_embeddings": positives[:2]}, ValueError, "expected the same"),
        ({"query_embeddings": queries[0]}, ValueError, "expected the same"),
        ({"query_embeddings": queries[:0], "pos_doc_embeddings": positives[:0]}, ValueError, "batch is empty"),
        ({"query_embeddings": queries[:, :2], "pos_doc_embeddings": positives[:, :2]}, ValueError, r"\[batch, 4\]"),
        ({"pos_doc_embeddings": nan}, ValueError, "pos_doc_embeddings has NaN"),
        ({"query_embeddings": nan}, ValueError, "query_embeddings has NaN"),
        ({"cache": {}}, ValueError, "no caches"),
        ({"cache": {"docs": NegativeCache({"embedding": cached}, [0] * 6)}}, ValueError, r"no features \['item'\]"),
        ({"doc_network": lambda features: cached[:2]}, ValueError, r"returned shape \[2, 4\]; expected \[3, 4\]"),
        ({"doc_network": lambda features: cached[:3, :2]}, ValueError, r"expected \[3, 4\]"),
        ({"doc_network": lambda features: (cached[:3],)}, TypeError, "returned tuple"),
        ({"doc_network": lambda features: nan}, ValueError, "encoder's output, .* has NaN"),
    ]


@pytest.mark.parametrize(("change", "error", "message"), wrong_inputs())
def test_wrong_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    queries, positives, cached = tensors(3, 3, 6)
    call = {
        "doc_network": encoder_of(cached),
        "query_embeddings": queries,
        "pos_doc_embeddings": positives,
        "cache": {"docs": cache_of(cached)},
    }
    new_loss()(**call)
    with pytest.raises(error, match=message):
        new_loss()(**{**call, **change})


def test_wrong_options_are_refused() -> None:
    with pytest.raises(TypeError, match=r"\('item',\)"):
        CacheClassificationLoss("embedding", "item")
    with pytest.raises(ValueError, match="`top_k` is 0"):
        new_loss(top_k=0)
    queries, positives, cached = tensors(3, 3, 6)
    with pytest.raises(ValueError, match="top_k is 7"):
        new_loss(top_k=7)(encoder_of(cached), queries, positives, {"docs": cache_of(cached)})


def test_the_encoder_gets_the_named_features_of_the_drawn_rows() -> None:
    torch.manual_seed(0)
    encoder = Encoder(dim=DIM)
    data = {"a": torch.arange(6), "b": 10 + torch.arange(6), "c": torch.arange(6), "embedding": torch.randn(6, DIM)}
    loss = CacheClassificationLoss("embedding", ("a", "b"))
    result = loss(encoder, torch.randn(3, DIM), torch.randn(3, DIM), {"docs": NegativeCache(data, [0] * 6)})
    rows = result.updated_item_indices["docs"]
    assert set(encoder.calls[0]) == {"a", "b"}
    assert torch.equal(encoder.calls[0]["b"], 10 + rows)
