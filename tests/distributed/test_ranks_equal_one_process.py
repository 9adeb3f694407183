"""One pool over several processes equals one process that has all rows, in distribution and in gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from negative_cache import (
    CacheLossHandler,
    CacheManager,
    DistributedCacheClassificationLoss,
    FixedLenFeature,
    MaxScoreRetrievalFn,
    NegativeCache,
    NegativeCacheLoss,
    RaggedFeature,
)
from negative_cache.cache.validation import RaggedRows
from negative_cache.distributed import shard_sizes
from negative_cache.distributed.collectives import Ranks
from negative_cache.distributed.packing import pack_rows, unpack_rows
from negative_cache.distributed.routes import choose_shard
from negative_cache.distributed.shard_search import top_k_of_shard
from stats import ALPHA, chi_square, mean_gradient
from support import as_on_a_gpu, assert_same_state, run_ranks, snapshot

DIM, SCALE = 6, 3.0
# Rows and batch of each rank: uneven shards, an empty one, unequal batches.
LAYOUTS = {
    1: ([24], [5]),
    2: ([16, 8], [3, 5]),
    3: ([13, 0, 11], [4, 1, 2]),
}


def embeddings(num_rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(num_rows, DIM, generator=generator), dim=1)


def part(values: Tensor, sizes: list[int], rank: int) -> Tensor:
    return values[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


def filled_cache(rows: Tensor, numbers: Tensor) -> NegativeCache:
    """A cache whose feature "row" says the global row; an empty shard has one row that is not filled."""
    specs = {
        "row": FixedLenFeature([], torch.int64),
        "tokens": RaggedFeature(torch.int32),
        "embedding": FixedLenFeature([DIM], torch.float32),
    }
    manager = CacheManager(specs, max(len(rows), 1))
    cache = manager.init_cache()
    if len(rows):
        tokens = [torch.arange(1, 2 + int(number) % 4, dtype=torch.int32) for number in numbers]
        cache = manager.update_cache(cache, new_items={"row": numbers, "tokens": tokens, "embedding": rows})
    return cache


class Table(nn.Module):
    """Document embeddings by row; checks that tokens arrived with their rows."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(table.clone())

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        lengths = (features["tokens"] > 0).sum(dim=1)
        assert torch.equal(lengths, features["row"] % 4 + 1)
        assert features["tokens"].shape[1] == int(lengths.max())
        return self.weight[features["row"]]


def setting(rank: int, world_size: int) -> tuple[Any, ...]:
    sizes, batches = LAYOUTS[world_size]
    table, queries, positives = embeddings(24, 1), embeddings(sum(batches), 2), embeddings(sum(batches), 3)
    cache = filled_cache(part(table, sizes, rank), part(torch.arange(24), sizes, rank))
    return table, queries, positives, cache, batches


def exact_gradient(table: Tensor, queries: Tensor, positives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse, loss and its gradient to the table, by the dense formulas in float64."""
    table = table.double().requires_grad_()
    scores = SCALE * queries.double() @ table.T
    positive = SCALE * (queries.double() * positives.double()).sum(dim=1)
    lse = scores.logsumexp(dim=1)
    loss = nn.functional.softplus(lse - positive)
    (gradient,) = torch.autograd.grad(loss.mean(), table)
    return scores.detach(), loss.detach(), gradient


def check_distribution(rank: int, world_size: int, folder: Path) -> None:
    table, queries, positives, cache, batches = setting(rank, world_size)
    torch.manual_seed(7)  # the same on all ranks, as users have it
    encoder = Table(table)
    loss_fn = DistributedCacheClassificationLoss("embedding", ("row", "tokens"), lambda s: SCALE * s)
    own_queries, own_positives = part(queries, batches, rank), part(positives, batches, rank)
    scores, losses, truth = exact_gradient(table, queries, positives)
    rows, gradients = [], []
    for _ in range(250):
        drawn: list[Tensor] = []

        def recording(features: dict[str, Tensor], drawn: list[Tensor] = drawn) -> Tensor:
            drawn.append(features["row"])
            return encoder(features)

        encoder.weight.grad = None
        result = loss_fn(recording, own_queries, own_positives, {"cache": cache})
        result.training_loss.backward()
        gradient = encoder.weight.grad.clone()
        dist.all_reduce(gradient)  # what DDP does
        gradients.append(gradient.flatten() / world_size)
        rows.append(drawn[0])
        (data, indices, mask) = (d["cache"] for d in result[2:5])
        assert bool(mask.all()) or len(indices) == len(own_queries)
        if len(indices):
            # the embeddings that came to their owner are those of its rows
            torch.testing.assert_close(data["embedding"][mask], cache.data["embedding"][indices[mask]])
    torch.testing.assert_close(
        result.interpretable_loss, part(losses, batches, rank).mean().float(), rtol=1e-5, atol=1e-6
    )
    drawn_rows = torch.stack(rows)
    for query in range(len(own_queries)):
        probabilities = part(scores, batches, rank)[query].softmax(dim=0)
        assert chi_square(drawn_rows[:, query], probabilities) > ALPHA
        assert chi_square(drawn_rows[:, query], probabilities.flip(0)) < ALPHA  # the test can fail
    found = torch.stack(gradients).double()
    assert mean_gradient(found, truth.flatten()) > ALPHA
    assert mean_gradient(found, 1.5 * truth.flatten()) < ALPHA


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_draws_and_gradients_equal_one_process(world_size: int, tmp_path: Path):
    run_ranks(check_distribution, world_size, tmp_path)


def check_draws_of_ranks_are_independent(rank: int, world_size: int, folder: Path) -> None:
    """The same query on both ranks, the same seed: their draws must not be the same ones."""
    table, queries, positives, cache, _ = setting(rank, world_size)
    torch.manual_seed(0)
    loss_fn = DistributedCacheClassificationLoss("embedding", ("row", "tokens"), lambda s: SCALE * s)
    pairs = []
    for _ in range(100):
        drawn: list[Tensor] = []
        loss_fn(
            lambda f, drawn=drawn: (drawn.append(f["row"]), table[f["row"]])[1],
            queries[:2],
            positives[:2],
            {"cache": cache},
        )
        both = [torch.empty_like(drawn[0]) for _ in range(world_size)]
        dist.all_gather(both, drawn[0])
        pairs.append(both[0] == both[1])
    assert float(torch.stack(pairs).float().mean()) < 0.5


def test_ranks_with_equal_seeds_draw_independently(tmp_path: Path):
    run_ranks(check_draws_of_ranks_are_independent, 2, tmp_path)


def check_best_rows(rank: int, world_size: int, folder: Path) -> None:
    table, queries, positives, cache, batches = setting(rank, world_size)
    own_queries, own_positives = part(queries, batches, rank), part(positives, batches, rank)
    best = (queries @ table.T).argsort(dim=1, descending=True)
    own_best = part(best, batches, rank)
    loss_fn = DistributedCacheClassificationLoss("embedding", ("row", "tokens"), lambda s: SCALE * s)
    loss_fn._retrieval_fn = MaxScoreRetrievalFn()
    drawn: list[Tensor] = []
    result = loss_fn(
        lambda f: (drawn.append(f["row"]), table[f["row"]])[1], own_queries, own_positives, {"cache": cache}, 5
    )
    assert torch.equal(drawn[0], own_best[:, 0])
    for query, features in enumerate(result.topk_features):
        assert torch.equal(features["row"], own_best[query, :5])
        assert torch.equal((features["tokens"] > 0).sum(dim=1), features["row"] % 4 + 1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_best_rows_over_all_shards(world_size: int, tmp_path: Path):
    run_ranks(check_best_rows, world_size, tmp_path)


def check_subgroup(rank: int, world_size: int, folder: Path) -> None:
    group = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(ValueError, match="not a member"):
            Ranks(group)
        return
    table, queries, positives, _, _ = setting(0, 2)
    sizes, batches = LAYOUTS[2]
    me = rank // 2
    cache = filled_cache(part(table, sizes, me), part(torch.arange(24), sizes, me))
    loss_fn = DistributedCacheClassificationLoss(
        "embedding", ("row", "tokens"), lambda s: SCALE * s, process_group=group
    )
    _, losses, _ = exact_gradient(table, queries, positives)
    result = loss_fn(Table(table), part(queries, batches, me), part(positives, batches, me), {"cache": cache})
    torch.testing.assert_close(result.interpretable_loss, part(losses, batches, me).mean().float())
    bad = part(queries, batches, me) * (torch.nan if rank == 2 else 1.0)
    with pytest.raises(ValueError, match="Rank 2, step 1: query_embeddings has NaN"):
        loss_fn(Table(table), bad, part(positives, batches, me), {"cache": cache})


def test_a_subgroup(tmp_path: Path):
    run_ranks(check_subgroup, 3, tmp_path)


# NegativeCacheLoss

BATCH, STEPS = 4, 12


class Documents(nn.Module):
    def __init__(self, seed: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(64, DIM, generator=generator))
        self.shift = nn.Parameter(torch.zeros(DIM))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return nn.functional.normalize(self.table[features["number"]] + self.shift, dim=1)


def numbers_of(step: int, world_size: int) -> Tensor:
    """Document numbers of a step, of all ranks; documents come again, also on another rank, also twice in a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(40, (BATCH * world_size,), generator=generator)


def check_cache_has_each_document_once(rank: int, world_size: int, folder: Path) -> None:
    """Ids over shards: one row per document over all ranks, and it is the newest embedding."""
    model = Documents()
    loss_fn = NegativeCacheLoss(model, cache_size=2 * 40 + 6, num_samples=1, seed=0, process_group="world")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        numbers = numbers_of(step, world_size)[rank * BATCH : (rank + 1) * BATCH]
        features = {"number": numbers}
        loss = loss_fn(model(features) * 0.9, model(features), features, document_ids=numbers)
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size
        before = model(features).detach()
        optimizer.step()
        cache = loss_fn.cache
        ids = Ranks(dist.group.WORLD).gather([cache.document_ids], [[43]] * world_size)[0]
        ids = ids[ids >= 0]
        assert len(ids.unique()) == len(ids)
        everything = torch.cat([numbers_of(s, world_size) for s in range(step + 1)]).unique()
        assert torch.equal(ids.sort().values, everything)
        held = cache.document_ids[cache.filled]
        assert torch.equal(held, cache.data["number"][cache.filled])
        # documents of this step that this rank holds have the embedding of this step
        for document in numbers.tolist():
            at = (cache.document_ids == document).nonzero().flatten()
            if len(at):
                torch.testing.assert_close(cache.data["embedding"][at[0]], before[numbers == document][0])
                assert int(cache.age[at[0]]) == 0


def test_each_document_has_one_row_over_all_ranks(tmp_path: Path):
    run_ranks(check_cache_has_each_document_once, 2, tmp_path)


def check_equal_to_one_process(rank: int, world_size: int, folder: Path) -> None:
    """Eval loss, with ids masked across ranks, hard negatives and a learnable scale, equals one process's."""
    model, batches = Documents(), [BATCH, BATCH - 1, BATCH + 1][:world_size]
    sharded = NegativeCacheLoss(model, 48, 5.0, num_samples=1, learnable_scale=True, seed=1, process_group="world")
    whole = NegativeCacheLoss(model, 48, 5.0, num_samples=1, learnable_scale=True, seed=1)
    for step in range(6):
        numbers = numbers_of(step, 3)[: sum(batches)]
        own = part(numbers, batches, rank)
        sharded(model({"number": own}), model({"number": own}), {"number": own}, document_ids=own)
        whole(model({"number": numbers}), model({"number": numbers}), {"number": numbers}, document_ids=numbers)
    numbers, negatives = numbers_of(99, 3)[: sum(batches)], torch.arange(30, 30 + sum(batches))
    queries = embeddings(sum(batches), 4)

    def loss_of(loss_fn: NegativeCacheLoss, sizes: list[int], at: int) -> Tensor:
        own, negative = part(numbers, sizes, at), part(negatives, sizes, at)
        return loss_fn(
            part(queries, sizes, at),
            model({"number": own}),
            {"number": own},
            document_ids=own,
            positive_ids=(own[:, None] + 1) % 40,
            negative_embeddings=model({"number": negative}),
            negative_features={"number": negative},
            negative_ids=negative,
        )

    sharded.eval(), whole.eval()
    gradients = []
    for loss_fn, sizes, at in ((sharded, batches, rank), (whole, [sum(batches)], 0)):
        model.zero_grad()
        loss_fn.log_scale.grad = None
        loss = loss_of(loss_fn, sizes, at)
        loss.backward()
        value, table = loss.detach().clone(), model.table.grad.clone()
        if loss_fn is sharded:
            dist.all_reduce(value), dist.all_reduce(table)
            value, table = value / world_size, table / world_size
        gradients.append((value, table, loss_fn.log_scale.grad.clone()))
    for mine, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-6)
    # every rank has the same gradient of the scale
    scales = Ranks(dist.group.WORLD).gather([gradients[0][2][None]], [[1]] * world_size)[0]
    assert bool((scales == scales[0]).all())


@pytest.mark.parametrize("world_size", [2, 3])
def test_loss_and_gradients_equal_one_process(world_size: int, tmp_path: Path):
    run_ranks(check_equal_to_one_process, world_size, tmp_path)


def check_errors_are_named_and_write_nothing(rank: int, world_size: int, folder: Path) -> None:
    model = Documents()
    loss_fn = NegativeCacheLoss(model, 32, in_batch=False, seed=0, process_group="world")
    good = torch.arange(BATCH) + 10 * rank

    def step(numbers: Tensor = good, factor: float = 1.0, encoder: Any = model) -> Tensor:
        loss_fn.document_encoder = encoder
        embedded = model({"number": numbers})
        return loss_fn(embedded * factor, embedded, {"number": numbers}, document_ids=numbers)

    for _ in range(3):
        step()
    before = snapshot(loss_fn)
    with pytest.raises(ValueError, match=r"Rank 1, step 3: `query_embeddings` has NaN"):
        step(factor=torch.nan if rank == 1 else 1.0)
    embedded = model({"number": good})
    with pytest.raises(ValueError, match=r"Rank 1, step 3: .*`document_ids` has shape"):
        loss_fn(embedded, embedded, {"number": good}, document_ids=good[: 2 if rank == 1 else BATCH])
    assert_same_state(before, snapshot(loss_fn))

    def broken(features: dict[str, Tensor]) -> Tensor:
        if rank == 0:
            raise KeyError("no such input")
        return model(features)

    with pytest.raises(RuntimeError, match=r"Rank 0, step 3: KeyError: 'no such input'"):
        step(encoder=broken)
    with pytest.raises(ValueError, match=r"Rank 0, step 3: The document encoder.s output, stored as .*, has NaN"):
        step(encoder=lambda f: model(f) * (torch.nan if rank == 0 else 1.0))
    after = snapshot(loss_fn)
    assert_same_state(
        {k: v for k, v in before.items() if "cache." in k}, {k: v for k, v in after.items() if "cache." in k}
    )
    assert bool(step().isfinite())


def test_one_ranks_bad_input_is_named_and_writes_nothing(tmp_path: Path):
    run_ranks(check_errors_are_named_and_write_nothing, 2, tmp_path)


def failing(rank: int, world_size: int, folder: Path) -> None:
    assert rank != 1, "this rank fails"


def test_a_failing_rank_fails_the_test(tmp_path: Path):
    with pytest.raises(Exception, match="this rank fails"):
        run_ranks(failing, 2, tmp_path)


def check_replicas(rank: int, world_size: int, folder: Path) -> None:
    """use_cross_replica: caches of all ranks stay equal, with either loss and unequal batches."""
    from negative_cache import CacheClassificationLoss

    for kind in (CacheClassificationLoss, DistributedCacheClassificationLoss):
        torch.manual_seed(rank)
        model = Documents()
        specs = {"number": FixedLenFeature([], torch.int64), "embedding": FixedLenFeature([DIM], torch.float32)}
        handler = CacheLossHandler(
            CacheManager(specs, 19), kind("embedding", ("number",)), "embedding", ("number",), use_cross_replica=True
        )
        batches = [3, 2]
        for step in range(12):
            own = part(numbers_of(step, 2), batches, rank)
            documents = model({"number": own})
            loss = handler.update_cache_and_compute_loss(model, documents, documents, {"number": own})
            assert bool(loss.isfinite())
            with torch.no_grad():
                model.shift += 0.1
            for key, value in handler.cache.state_dict().items():
                both = [torch.empty_like(value) for _ in range(world_size)]
                dist.all_gather(both, value)
                assert torch.equal(both[0], both[1]), (kind, step, key)
        assert int(handler.cache.num_filled) == 19


def test_replicas_stay_equal_with_either_loss(tmp_path: Path):
    run_ranks(check_replicas, 2, tmp_path)


def check_replicated_lse(rank: int, world_size: int, folder: Path) -> None:
    table, queries, positives, _, batches = setting(rank, world_size)
    cache = filled_cache(table, torch.arange(24))  # all rows on every rank
    loss_fn = DistributedCacheClassificationLoss("embedding", ("row", "tokens"), lambda s: SCALE * s)
    loss_fn.is_replicated = True
    _, losses, _ = exact_gradient(table, queries, positives)
    result = loss_fn(Table(table), part(queries, batches, rank), part(positives, batches, rank), {"cache": cache})
    torch.testing.assert_close(result.interpretable_loss, part(losses, batches, rank).mean().float())
    assert bool(((result.updated_item_indices["cache"] // 12) == rank).all())  # each owns its half


def test_replicated_rows_are_counted_once(tmp_path: Path):
    run_ranks(check_replicated_lse, 2, tmp_path)


def check_write_back(rank: int, world_size: int, folder: Path) -> None:
    """Re-encoded embeddings reach the owner's rows, and LRU makes these rows young."""
    model = Documents()
    specs = {"number": FixedLenFeature([], torch.int64), "embedding": FixedLenFeature([DIM], torch.float32)}
    loss_fn = DistributedCacheClassificationLoss("embedding", ("number",), lambda s: SCALE * s)
    handler = CacheLossHandler(CacheManager(specs, 30), loss_fn, "embedding", ("number",))
    for step in range(5):
        own = torch.arange(3) + 3 * (2 * step + rank)
        documents = model({"number": own})
        handler.update_cache_and_compute_loss(model, documents, documents, {"number": own})
    with torch.no_grad():
        model.shift += 1.0
    old = handler.cache.data["embedding"].clone()
    own = torch.arange(3) + 40
    documents = model({"number": own})
    handler.update_cache_and_compute_loss(model, documents, documents, {"number": own})
    cache = handler.cache
    changed = (
        ((cache.data["embedding"] != old).any(dim=1) & cache.filled & (cache.data["number"] < 40)).nonzero().flatten()
    )
    counts = Ranks(dist.group.WORLD).sizes(len(changed), torch.device("cpu"))
    assert 0 < sum(n for (n,) in counts) <= 6
    expected = model({"number": cache.data["number"][changed]}).detach()
    torch.testing.assert_close(cache.data["embedding"][changed], expected)
    assert bool((cache.age[changed] == 0).all())


def test_new_embeddings_reach_the_owner(tmp_path: Path):
    run_ranks(check_write_back, 2, tmp_path)


def check_branches_of_a_gpu(rank: int, world_size: int, folder: Path) -> None:
    with as_on_a_gpu():
        check_cache_has_each_document_once(rank, world_size, folder)
        check_write_back(rank, world_size, folder)
        check_distribution(rank, world_size, folder)


def test_where_reading_a_value_would_synchronize_the_claims_hold_too(tmp_path: Path):
    run_ranks(check_branches_of_a_gpu, 2, tmp_path)


def test_choose_shard_is_proportional():
    lse = torch.tensor([[1.0, -torch.inf], [2.0, -torch.inf], [-torch.inf, -torch.inf]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, 20_000, generator=generator, dtype=torch.float64)
    owner = choose_shard(lse, uniform)
    assert chi_square(owner[0], lse[:, 0].softmax(0)) > ALPHA
    assert bool((owner[1] == -1).all())
    assert int(choose_shard(lse, torch.full((2, 1), 1 - 2**-53, dtype=torch.float64))[0]) == 1


@pytest.mark.parametrize(("num_rows", "num_ranks"), [(10, 3), (2, 3), (8, 4)])
def test_shard_sizes(num_rows: int, num_ranks: int):
    sizes = shard_sizes(num_rows, num_ranks)
    assert sum(sizes) == num_rows
    assert max(sizes) - min(sizes) <= 1


def test_groups_are_split_in_proportion():
    assert [top_k_of_shard(64, [100, 100], r) for r in range(2)] == [32, 32]
    assert [top_k_of_shard(10, [30, 10, 0], r) for r in range(3)] == [8, 2, 0]
    assert [top_k_of_shard(1, [50, 50], r) for r in range(2)] == [1, 1]


def test_rows_survive_packing():
    features = {
        "embedding": torch.randn(3, 4).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "none": torch.zeros(3, 0),
        "tokens": RaggedRows(torch.tensor([[1, 2], [3, 0], [0, 0]], dtype=torch.int32), torch.tensor([2, 1, 0])),
    }
    specs = {
        "embedding": FixedLenFeature([4], torch.bfloat16),
        "flag": FixedLenFeature([], torch.bool),
        "none": FixedLenFeature([0], torch.float32),
        "tokens": RaggedFeature(torch.int32),
    }
    rows = unpack_rows(pack_rows(features, {"tokens": 5}), specs, {"tokens": 5})
    for key in ("embedding", "flag", "none"):
        assert torch.equal(rows[key], features[key])
    assert torch.equal(rows["tokens"].values[:, :2], features["tokens"].values)
    assert torch.equal(rows["tokens"].lengths, features["tokens"].lengths)


def check_staleness(rank: int, world_size: int, folder: Path) -> None:
    table = embeddings(200, seed=0)
    loss_fn = NegativeCacheLoss(
        lambda f: table[f["row"]], 32, 0.1, in_batch=False, shared=False, seed=rank, process_group="world"
    )
    for number in range(12):
        generator = torch.Generator().manual_seed(100 * number + rank)
        rows = torch.randint(len(table), (2,), generator=generator)
        queries = torch.randn(2, DIM, generator=generator)
        loss_fn(queries.requires_grad_(), table[rows], {"row": rows})
        assert loss_fn.metrics()["staleness"] == 0.0


def test_an_encoder_that_does_not_change_has_no_staleness_on_any_rank(tmp_path: Path):
    """Each rank compares its own rows, not those that its queries drew."""
    run_ranks(check_staleness, 2, tmp_path)
