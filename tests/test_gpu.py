"""Training as users do it: on a GPU, if there is one, with sizes for a GPU; otherwise on the CPU, with small sizes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

import fake_gpu_job
from dense import Problem, exact
from negative_cache import FixedLenFeature, NegativeCacheLoss, RaggedFeature, checkpoint, util
from negative_cache.cache.columns import dequantize, quantize
from negative_cache.retrieval import FUSED, RowPool, Scale, Search, explain, retrieve
from negative_cache.retrieval.dense import grouped_top_k
from negative_cache.retrieval.search import dense_scores
from stats import ALPHA, chi_square, mean_gradient
from support import as_on_a_gpu, needs_compiling_of_whole_steps, snapshot

pytestmark = pytest.mark.gpu

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
ROWS = 131_072 if ON_GPU else 2_048
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
VOCABULARY, BATCH, LENGTH, DIM, SIZE = 200, 32, 6, 32, 512


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """An operation that synchronizes the GPU raises an error."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make_pool(rows: int, dim: int, dtype: torch.dtype) -> tuple[RowPool, RowPool]:
    """A pool of unit rows, a tenth of which are no candidates, and the same rows in float64."""
    rng = torch.Generator().manual_seed(rows + dim)
    table = normalize(torch.randn(rows, dim, generator=rng), dim=1).to(DEVICE)
    is_candidate = (torch.rand(rows, generator=rng) < 0.9).to(DEVICE)
    values, scales = quantize(table) if dtype == torch.int8 else (table.to(dtype), None)
    exact = values if scales is None else dequantize(values, scales)
    return RowPool(values, is_candidate, scales), RowPool(exact.double(), is_candidate)


def queries_for(table: Tensor, count: int) -> Tensor:
    """Unit queries, each near some row."""
    rng = torch.Generator().manual_seed(count)
    noise = torch.randn(count, table.shape[1], generator=rng).to(DEVICE)
    return normalize(normalize(noise, dim=1) + 0.5 * table[:count].float(), dim=1)


def as_multiplied(queries: Tensor, dtype: torch.dtype) -> Tensor:
    """The queries as the product sees them, in the dtype of the rows and scaled; tf32 is off."""
    scaled = 20 * queries
    if dtype == torch.int8:
        return dequantize(*quantize(scaled)).double()
    return (scaled if dtype == torch.float32 else scaled.to(dtype)).double()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("top_k", [None, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "dim"), [(5, 384), (128, 768), (300, 256)] if ON_GPU else [(5, 24)])
def test_the_pass_equals_the_dense_one(dtype: torch.dtype, batch: int, dim: int, top_k: int | None):
    """Values, best rows and validity of draws, with rows hidden from all and from single queries."""
    pool, exact = make_pool(ROWS - 3, dim, dtype)
    queries = queries_for(exact.embeddings, batch)
    excluded = torch.randint(-1, 50, (batch, 4), generator=generator()).to(DEVICE)
    search = Search(queries, pool, Scale(20.0), excluded, top_k=top_k, num_samples=3, num_best=5)
    if ON_GPU:
        assert explain(search) == FUSED
    found = retrieve(search, generator())
    scores = dense_scores(Search(as_multiplied(queries, dtype), exact, excluded=excluded))
    unrounded = dense_scores(Search(20 * queries.double(), exact, excluded=excluded))
    rounded = float((unrounded - scores).nan_to_num(0, 0, 0).abs().max())
    assert bool((scores.gather(1, found.rows) > -torch.inf).all())
    if top_k is None:
        assert float((found.lse - scores.logsumexp(1)).abs().max()) < 1e-4 + 2 * rounded
        best = scores.topk(5, dim=1).values
        assert float((found.best_scores - best).abs().max()) < 1e-4 + 2 * rounded
        assert float((scores.gather(1, found.best_rows) - best).abs().max()) < 2e-4 + 2 * rounded
    else:
        maxima, _ = grouped_top_k(scores, top_k)
        assert float((found.lse - maxima.logsumexp(1)).abs().max()) < 1e-4 + 2 * rounded


def test_products_of_float32_rows_may_be_rounded():
    """tf32 keeps 10 bits of each factor: with unit vectors, a score of 20 moves by at most 20 * 2 * 2^-11."""
    pool, exact = make_pool(ROWS, 64, torch.float32)
    queries = queries_for(exact.embeddings, 40)
    truth = dense_scores(Search(20 * queries.double(), exact)).logsumexp(1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = retrieve(Search(queries, pool, Scale(20.0)), generator())
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((found.lse - truth).abs().max()) < 20 * 2 * 2.0**-11


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_from_many_rows_follow_the_softmax(dtype: torch.dtype):
    """Rows are counted in cells of equal probability, in the order of their scores; and by their position."""
    pool, exact = make_pool(ROWS, 64, dtype)
    queries = queries_for(exact.embeddings, 1).expand(512, -1)
    found = retrieve(Search(queries, pool, Scale(20.0), num_samples=16), generator())
    scores = dense_scores(Search(as_multiplied(queries[:1], dtype), exact))[0]
    probabilities = scores.softmax(0)
    order = scores.argsort()
    cells = torch.empty_like(order)
    cells[order] = (probabilities[order].cumsum(0) * 64).long().clamp(max=63)

    def p_value(cell_of: Tensor, probabilities: Tensor) -> float:
        expected = torch.zeros(64, dtype=torch.float64, device=DEVICE).index_add(0, cell_of, probabilities)
        return chi_square(cell_of[found.rows.flatten()].cpu(), expected.cpu())

    numbers = torch.arange(ROWS, device=DEVICE)
    for cell_of in (cells, numbers * 64 // ROWS, numbers % 64):
        assert p_value(cell_of, probabilities) > ALPHA
    assert p_value(cells, (scores * 1.1).softmax(0)) < ALPHA


@pytest.mark.parametrize("is_shared", [True, False])
def test_the_loss_is_exact_and_its_gradient_unbiased(is_shared: bool):
    """Against the dense loss in float64; a wrong temperature is rejected.

    A query draws each document in at least a seventh of the passes. With rare draws, of which some seeds have too few,
    the mean of the gradients has no t-distribution.
    """
    rng = torch.Generator().manual_seed(3)
    dim, documents, passes = 4, torch.tensor([0, 12, 13]), 400
    queries, table = torch.randn(3, dim, generator=rng), 0.8 * torch.randn(14, dim, generator=rng)
    stale = table[:12] + 0.4 * torch.randn(12, dim, generator=rng)
    nothing = torch.empty(0, dtype=torch.int64)
    scale = torch.tensor(0.5).double()
    problem = Problem(
        queries=queries.double(),
        table=table.double(),
        documents=documents,
        given=nothing,
        positives=torch.full((3, 1), -1),
        stale=stale.double(),
        scale=scale,
    )
    on_device, outputs = table.to(DEVICE), []

    def encode(features: dict[str, Tensor]) -> Tensor:
        outputs.append((features["row"], on_device[features["row"]].clone().requires_grad_()))
        return outputs[-1][1]

    specs = {"row": FixedLenFeature([], torch.int64)}
    loss_fn = NegativeCacheLoss(encode, 20, float(scale), num_samples=1, shared=is_shared, specs=specs, seed=0)
    rows = torch.arange(12, device=DEVICE)
    loss_fn(stale.to(DEVICE), stale.to(DEVICE), {"row": rows}, rows)
    cache, gradients = loss_fn.cache, []
    truth = exact(problem)
    given = documents.to(DEVICE)
    for _ in range(passes):
        loss_fn.cache = copy.deepcopy(cache)
        leaves = [x.to(DEVICE).requires_grad_() for x in (queries.clone(), table[documents])]
        with no_synchronization():
            loss = loss_fn(*leaves, {"row": given}, given)
            loss.backward()
        drawn, output = outputs[-1]
        of_table = torch.zeros_like(on_device).index_add(0, drawn, output.grad)
        gradients.append(torch.cat([*(leaf.grad.flatten() for leaf in leaves), of_table.flatten()]))
        torch.testing.assert_close(loss.detach().double().cpu(), truth.value, rtol=1e-5, atol=1e-5)
    found = torch.stack(gradients).double().cpu()
    # Constant components (the batch's own documents) are equal but for rounding: scores up to 2 in three TF32 products
    # have errors up to 2e-7. Noise of 1e-5, whose mean over the passes varies by 5e-7, covers it.
    assert mean_gradient(found + 1e-5 * torch.randn(found.shape, generator=rng), truth.gradient[:-1]) > ALPHA
    wrong = exact(problem._replace(scale=1.1 * scale)).gradient[:-1]
    assert mean_gradient(found + 1e-5 * torch.randn(found.shape, generator=rng), wrong) < ALPHA


@needs_gpu
def test_no_kind_of_step_synchronizes_the_gpu(monkeypatch: pytest.MonkeyPatch):
    """The steps of the fake device, with values."""
    monkeypatch.setattr(fake_gpu_job, "GPU", "cuda")
    loss = fake_gpu_job.CacheClassificationLoss
    losses = [loss("embedding", ("row",), lambda s: 20.0 * s, top_k=top_k) for top_k in (None, 16)]
    encoder = fake_gpu_job.Encoder()
    nn.init.normal_(encoder.table)
    synchronizing = []
    for name, run in fake_gpu_job.scenarios(encoder, losses).items():
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        try:
            with no_synchronization():
                run()
        except RuntimeError as error:
            synchronizing.append((name, str(error)[:200]))
    # The width of drawn ragged features is read once; features on the host are read there; a step that waits until the
    # cache counts reads whether it does.
    expected = {"ragged", "features on the host", "waiting", "three waits"}
    assert {name for name, _ in synchronizing} <= expected, synchronizing


class Tower(nn.Module):
    """Mean of word vectors, by a small network; without operations whose sums have no fixed order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(VOCABULARY, DIM), nn.Linear(DIM, DIM)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        words, mask = features["input_ids"].long(), features["attention_mask"]
        bags = (nn.functional.one_hot(words, VOCABULARY) * mask[:, :, None]).sum(1).float()
        return normalize(self.second(torch.tanh(self.first(bags))), dim=1)


def batch_of(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Queries, documents, and ids of the documents."""
    with torch.device("cpu"):
        ids = torch.randperm(2_000, generator=torch.Generator().manual_seed(step))[:BATCH]
        words = (ids[:, None] * torch.tensor([7, 11, 13, 17, 19, 23]) + torch.arange(LENGTH)) % (VOCABULARY - 1) + 1
        mask = torch.arange(LENGTH) < (2 + ids % (LENGTH - 1))[:, None]
    document = {"input_ids": (words * mask).to(DEVICE), "attention_mask": mask.long().to(DEVICE)}
    query = {"input_ids": words[:, :2].to(DEVICE), "attention_mask": torch.ones(BATCH, 2, device=DEVICE).long()}
    return query, document, ids.to(DEVICE)


def ragged_specs() -> dict[str, Any]:
    return {
        "input_ids": RaggedFeature(torch.int32, LENGTH),
        "attention_mask": RaggedFeature(torch.int8, LENGTH),
    }


class Run:
    """A tower that is trained."""

    def __init__(self, autocast: torch.dtype | None = None, is_compiled: bool = False, **settings: Any) -> None:
        torch.manual_seed(0)
        with torch.device("cpu"):  # whatever the default device is, the weights are the same
            self.tower = Tower().to(DEVICE)
        settings = {"num_samples": 1, "seed": 0, "learnable_scale": True, **settings}
        self.loss_fn = NegativeCacheLoss(self.tower, SIZE, **settings).to(DEVICE)
        parameters = [*self.tower.parameters(), *self.loss_fn.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=0.01, capturable=ON_GPU, foreach=False)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=autocast == torch.float16 and ON_GPU)
        self.autocast = autocast
        self.compute = self.plain

    def plain(self, query: dict[str, Tensor], document: dict[str, Tensor], ids: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, self.autocast, enabled=self.autocast is not None):
            return self.loss_fn(self.tower(query), self.tower(document), document, ids)

    def train(self, first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            loss = self.compute(*batch_of(step))
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of queries of 100 other batches whose own document is the best of its batch."""
        hits = []
        for step in range(10_000, 10_010):
            query, document, _ = batch_of(step)
            scores = self.tower(query) @ self.tower(document).T
            hits.append((scores.argmax(1) == torch.arange(BATCH, device=DEVICE)).float().mean())
        return float(torch.stack(hits).mean())


KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 autocast and rows": {"autocast": torch.bfloat16, "embedding_dtype": torch.bfloat16},
    "float16 with a scaler": {"autocast": torch.float16, "embedding_dtype": torch.float16},
    "int8 rows": {"embedding_dtype": torch.int8},
    "ragged features": {"specs": ragged_specs()},
    "features on the host": {"feature_device": "cpu", "specs": ragged_specs()},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_training_learns(settings: dict[str, Any]):
    run = Run(**settings)
    before = run.accuracy()
    run.train(0, 120 if ON_GPU else 60)
    health = run.loss_fn.metrics()
    assert health["fill"] == 1.0
    assert health["staleness"] < 0.5
    assert run.accuracy() > before + 0.3
    assert run.loss_fn.cache is not None
    assert run.loss_fn.cache.device.type == DEVICE.type
    if "feature_device" in settings:
        columns = run.loss_fn.cache.get_submodule("feature_input_ids")
        places = {buffer.device.type for name, buffer in columns.named_buffers() if buffer.numel() > SIZE}
        assert places == {"cpu"}


def test_a_run_resumes_bit_exactly_from_a_checkpoint(tmp_path: Path):
    """From a file of `torch.save` and from a folder of `save_checkpoint`."""
    whole = Run()
    whole.train(0, 20)
    torch.save(
        {"loss": whole.loss_fn.state_dict(), "tower": whole.tower.state_dict(), "opt": whole.optimizer.state_dict()},
        tmp_path / "run.pt",
    )
    checkpoint.save_checkpoint(whole.loss_fn, tmp_path / "cache")
    last = whole.train(20, 10)
    for way in ("file", "folder"):
        again = Run()
        saved = torch.load(tmp_path / "run.pt", map_location=DEVICE)
        again.tower.load_state_dict(saved["tower"])
        if way == "file":
            again.loss_fn.load_state_dict(saved["loss"])
        else:
            checkpoint.load_checkpoint(again.loss_fn, tmp_path / "cache")
        again.loss_fn.to(DEVICE)
        again.optimizer.load_state_dict(saved["opt"])
        assert again.train(20, 10) == last
        for key, value in snapshot(whole.loss_fn).items():
            assert torch.equal(value, snapshot(again.loss_fn)[key]), key


@needs_compiling_of_whole_steps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8] if ON_GPU else [torch.int8], ids=str)
def test_a_compiled_step_is_one_graph_and_equals_the_plain_one(dtype: torch.dtype):
    torch.compiler.reset()
    results = []
    for is_compiled in (False, True):
        specs = {key: FixedLenFeature([LENGTH], torch.int64) for key in ("input_ids", "attention_mask")}
        run = Run(embedding_dtype=dtype, specs=specs)  # the width of a ragged feature is unknown before it is read
        run.train(0, 3)  # the first step creates the cache
        if is_compiled:
            run.compute = torch.compile(run.plain, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
        with as_on_a_gpu():  # the branches that a compiled step takes
            results.append(run.train(3, 10))
    torch.testing.assert_close(torch.tensor(results[0]), torch.tensor(results[1]), rtol=2e-3, atol=2e-3)


def test_a_default_device_changes_nothing():
    plain = Run()
    losses = plain.train(0, 8)
    torch.set_default_device(DEVICE)
    try:
        run = Run()
        assert run.train(0, 8) == losses
        run.loss_fn.metrics()
        run.loss_fn.load_state_dict(plain.loss_fn.state_dict())
    finally:
        torch.set_default_device(None)
    assert run.loss_fn.cache is not None
    assert run.loss_fn.cache.device.type == DEVICE.type


def test_one_rank_computes_what_no_rank_does(tmp_path: Path):
    """With NCCL on a GPU: the same numbers as without ranks, and a checkpoint."""
    losses = Run().train(0, 8)
    backend = "nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        run = Run(process_group="world")
        assert run.train(0, 8) == losses
        checkpoint.save_checkpoint(run.loss_fn, tmp_path / "cache")
        checkpoint.load_checkpoint(run.loss_fn, tmp_path / "cache")
        values = torch.randn(3, 2, device=DEVICE)
        assert torch.equal(util.cross_replica_concat(values), values)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if ON_GPU else [torch.bfloat16], ids=str)
def test_the_trainer_of_sentence_transformers_trains_and_resumes(dtype: torch.dtype, tmp_path: Path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    from datasets import Dataset

    from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
    from negative_cache.integrations.trainer import NegativeCacheTrainer
    from negative_cache.workbench.models import load_model

    anchors, positives = [f"w{i} w{i * 7 % 90}" for i in range(90)], [f"w{i} w{i * 3 % 90} w{i}" for i in range(90)]
    model = load_model("tiny", anchors + positives, 0).to(DEVICE)
    loss = NegativeCacheRankingLoss(model, cache_size=64, embedding_dtype=dtype, seed=0)

    def trainer(steps: int) -> NegativeCacheTrainer:
        args = sentence_transformers.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            per_device_train_batch_size=8,
            max_steps=steps,
            save_steps=10,
            logging_steps=5,
            report_to=[],
            use_cpu=not ON_GPU,
            bf16=dtype == torch.bfloat16,
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"anchor": anchors, "positive": positives})
        return NegativeCacheTrainer(model=model, args=args, train_dataset=data, loss=loss)

    trainer(20).train()
    metrics = loss.metrics()
    assert metrics["fill"] == 1.0
    cache = loss.cache_loss.cache
    assert cache is not None
    assert cache.device.type == DEVICE.type
    trainer(25).train(resume_from_checkpoint=True)
    assert int(cache.step) >= 20
