"""The memory bank: the loss against a dense formula, the queue against a list, checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn
from torch.nn.functional import normalize

from negative_cache.workbench.data import load_data
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training import processes
from negative_cache.workbench.training.config import RunConfig, RunError
from negative_cache.workbench.training.driver import run
from negative_cache.workbench.training.losses import make_loss
from negative_cache.workbench.training.memory_bank import MemoryBankLoss
from resume_job import configuration, make_data

DIM, SCALE = 8, 20.0


class Identity(nn.Module):
    """A model whose inputs are embeddings."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {"sentence_embedding": features["x"]}

    def get_embedding_dimension(self) -> int:
        return DIM


def batch(labels: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n = len(labels)
    return torch.randn(n, DIM, requires_grad=True), torch.randn(n, DIM, requires_grad=True), torch.tensor(labels)


def call(loss: MemoryBankLoss, queries: torch.Tensor, documents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return loss([{"x": queries}, {"x": documents}], labels)


def dense(queries: Any, documents: Any, labels: list[list[int]], queue: list[tuple[int, Any]]) -> torch.Tensor:
    """The loss written out, in float64, one query after the other."""
    q, d = (normalize(values.double(), dim=-1) for values in (queries, documents))
    losses = []
    for i, own in enumerate(labels):
        others = [d[j] for j in range(len(labels)) if j != i and labels[j][0] not in own]
        others += [embedding.double() for number, embedding in queue if number not in own]
        scores = torch.stack([SCALE * (q[i] @ other) for other in [d[i], *others]])
        losses.append(scores.logsumexp(0) - scores[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("size", [3, 4, 7, 64])
def test_loss_gradients_and_queue_are_those_of_a_list(size: int):
    torch.manual_seed(0)
    loss = MemoryBankLoss(Identity(), size, SCALE)
    queue: list[tuple[int, Any]] = []
    # repeated documents, a document that is the positive of two queries, and further positives
    for labels in ([[0, 1], [1, -1], [2, 0], [0, 4]], [[3, 0], [0, -1], [4, 5]], [[5, 2], [1, 9], [6, -1], [7, 3]]):
        queries, documents, tensor = batch(labels)
        found = call(loss, queries, documents, tensor)
        expected = dense(queries, documents, labels, queue)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        for a, b in zip(
            torch.autograd.grad(found, [queries, documents]),
            torch.autograd.grad(expected, [queries, documents]),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        embeddings = normalize(documents.detach(), dim=-1)
        queue = [*queue, *zip([row[0] for row in labels], embeddings, strict=True)][-size:]
        assert sorted(number for number, _ in queue) == sorted(loss.ids[loss.ids >= 0].tolist())


def test_given_negatives_count_for_every_query_and_enter_the_queue():
    torch.manual_seed(0)
    loss = MemoryBankLoss(Identity(), 32, SCALE)
    queue: list[tuple[int, Any]] = []
    # given negatives of any number, some of which are later positives
    for labels, given in ([[[0, 1], [2, -1]], [7, 8, 9]], [[[8, 3], [4, 9], [5, -1]], []], [[[6, -1]], [2, 10]]):
        queries, documents, tensor = batch(labels)
        negatives = torch.randn(len(given), DIM, requires_grad=True)
        ids = torch.tensor([[number] + [-1] * (tensor.shape[1] - 1) for number in given], dtype=torch.int64)
        found = loss(
            [{"x": queries}, {"x": documents}, {"x": negatives}],
            torch.cat([tensor, ids.view(len(given), tensor.shape[1])]),
        )
        normalized = list(zip(given, normalize(negatives, dim=-1), strict=True))
        expected = dense(queries, documents, labels, [*normalized, *queue])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        leaves = [queries, documents, negatives] if given else [queries, documents]
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        own = zip([row[0] for row in labels], normalize(documents.detach(), dim=-1), strict=True)
        queue += [*own, *((number, value.detach()) for number, value in normalized)]
    assert loss.ids[: len(queue)].tolist() == [number for number, _ in queue]


def test_the_first_step_is_in_batch_and_evaluation_writes_nothing():
    torch.manual_seed(0)
    queries, documents, labels = batch([[0], [1], [2]])
    loss = MemoryBankLoss(Identity(), 16, SCALE)
    plain = MultipleNegativesRankingLoss(Identity(), scale=SCALE)
    plain = plain.compute_loss_from_embeddings([queries, documents], labels)
    loss.eval()
    torch.testing.assert_close(call(loss, queries, documents, labels), plain)
    loss.train()
    with torch.no_grad():
        call(loss, queries, documents, labels)
    assert int(loss.num_written) == 0
    torch.testing.assert_close(call(loss, queries, documents, labels), plain)
    assert int(loss.num_written) == 3


def test_labels_of_floats_are_refused():
    queries, documents, _ = batch([[0], [1]])
    with pytest.raises(ValueError, match="integer document ids"):
        call(MemoryBankLoss(Identity(), 4, SCALE), queries, documents, torch.tensor([0.5, 1.0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory-bank")
    make_data(path)
    return path


class Stopped(Exception):
    """Ends a run."""


CACHE_SIZES = {"memory-bank": 64, "in-batch": RunConfig.cache_size}


def plain(folder: Path, output: str, **options: Any) -> RunConfig:
    """A run without options of the negative cache."""
    return dataclasses.replace(configuration(folder, output), num_samples=RunConfig.num_samples, **options)


@pytest.mark.parametrize("loss", CACHE_SIZES)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(folder: Path, loss: str):
    data = load_data(str(folder / "pairs.jsonl"))

    def stop(step: int, steps: int, logs: dict[str, float]) -> None:
        if step == 20:
            raise Stopped

    weights = []
    for name in ("whole", "stopped"):
        config = plain(folder, f"{loss}-{name}", loss=loss, cache_size=CACHE_SIZES[loss])
        if name == "stopped":
            with pytest.raises(Stopped):
                run(config, data, on_step=stop)
        record = run(config, data, resume=True)
        assert record is not None
        assert record.resumed_from_step == (18 if name == "stopped" else 0)
        weights.append((Path(config.output) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_several_ranks_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    config = plain(folder, "ranks", loss="memory-bank")
    with pytest.raises(RunError, match="one process only"):
        run(config, load_data(config.data))
    assert not (folder / "ranks.partial").exists()


def test_gradient_caching_of_a_static_model_is_the_plain_loss(folder: Path):
    config = plain(folder, "x", loss="gradcache", batch_size=64, cache_size=RunConfig.cache_size)
    model = load_model(config.model, [], 0)
    assert type(make_loss(config, model)) is MultipleNegativesRankingLoss
