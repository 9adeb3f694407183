"""Features beside the embeddings, in host memory or behind staged copies: training gives the same results."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from negative_cache import NegativeCacheLoss
from negative_cache.cache import device_copies as placement
from negative_cache.cache.columns import FixedColumn, QuantizedColumn, RaggedColumn
from negative_cache.cache.specs import FixedLenFeature, QuantizedFeature, RaggedFeature, Specs
from support import as_on_a_gpu, assert_same_state, snapshot

SPECS: Specs = {
    "tokens": RaggedFeature(torch.int64, max_length=6),
    "kind": FixedLenFeature([2], torch.int32),
    "weights": QuantizedFeature([3]),
}


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(40, 8)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        tokens = self.table(features["tokens"]) * (features["tokens"] > 0)[:, :, None]
        summed = tokens.sum(dim=1) + self.table(features["kind"].long()).sum(dim=1)
        return torch.nn.functional.normalize(summed * features["weights"].mean(dim=1, keepdim=True), dim=1)


def make_loss(device: str = "cpu", **options: Any) -> NegativeCacheLoss:
    return NegativeCacheLoss(Encoder().to(device), 32, num_samples=1, specs=SPECS, seed=0, **options)


def batch(number: int, size: int = 6, device: str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    chance = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, 7, (size, 1), generator=chance)
    tokens = torch.randint(1, 40, (size, 6), generator=chance) * (torch.arange(6) < lengths)
    kinds = torch.randint(0, 40, (size, 2), generator=chance)
    features = {"tokens": tokens, "kind": kinds, "weights": torch.rand(size, 3, generator=chance) + 0.1}
    ids = torch.randint(0, 60, (size,), generator=chance)
    return {key: value.to(device) for key, value in features.items()}, ids.to(device)


def train(loss_fn: NegativeCacheLoss, steps: range) -> list[float]:
    encoder = loss_fn.document_encoder
    assert isinstance(encoder, Encoder)
    losses = []
    for number in steps:
        features, ids = batch(number, device=str(encoder.table.weight.device))
        documents = encoder(features)
        loss = loss_fn(documents.roll(1, 0), documents, features, document_ids=ids)
        encoder.zero_grad()
        loss.backward()
        with torch.no_grad():
            encoder.table.weight -= 0.1 * encoder.table.weight.grad
        losses.append(loss.item())
    return losses


class Late(Tensor):
    """Page-locked memory as on an accelerator: an asynchronous copy has arrived after a synchronization."""

    pending: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Late:
        if non_blocking:
            Late.pending.append((self, source))
            return self
        return super().copy_(source)


@pytest.fixture
def as_off_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns claim to be on another device than the rows, and copies between the two are staged."""

    def wait_for(device: torch.device) -> None:
        for target, source in Late.pending:
            Tensor.copy_(target, source)
        Late.pending.clear()

    def new_staging(like: Tensor) -> Tensor:
        garbage = torch.full(like.shape, 1, dtype=like.dtype)
        return garbage.as_subclass(Late)

    monkeypatch.setattr(placement, "is_staged", lambda first, second: True)
    monkeypatch.setattr(placement, "new_staging", new_staging)
    monkeypatch.setattr(placement, "wait_for", wait_for)
    for kind in (FixedColumn, QuantizedColumn, RaggedColumn):
        monkeypatch.setattr(kind, "device", torch.device("cpu", 0))  # the same device, but not equal to "cpu"


def test_staged_copies_are_read_after_a_synchronization(as_off_the_accelerator: None) -> None:
    values = [torch.arange(5), torch.rand(3, 2), torch.tensor(False)]
    arrived = placement.bring(values, torch.device("cpu"))
    assert all(isinstance(copied, Late) for copied in arrived)
    assert all(torch.equal(copied, value) for copied, value in zip(arrived, values, strict=True))


@pytest.mark.parametrize("host_reads", [True, False])
def test_training_with_staged_copies_is_bit_identical(host_reads: bool, request: pytest.FixtureRequest) -> None:
    losses = [make_loss(use_lru=False) for _ in range(2)]
    results = []
    for loss_fn in losses:
        if host_reads:
            results.append(train(loss_fn, range(12)))
        else:
            with as_on_a_gpu():
                results.append(train(loss_fn, range(12)))
        if len(results) == 1:
            request.getfixturevalue("as_off_the_accelerator")
    assert results[0] == results[1]
    assert_same_state(snapshot(losses[0]), snapshot(losses[1]))
    assert not Late.pending


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_with_features_in_host_memory_agrees_on_a_gpu() -> None:
    losses = [make_loss("cuda"), make_loss("cuda", feature_device="cpu")]
    results = [train(loss_fn, range(12)) for loss_fn in losses]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    first, second = (snapshot(loss_fn) for loss_fn in losses)
    for key in ("cache.filled", "cache.document_ids", "cache.feature_tokens.lengths", "cache.feature_kind.values"):
        assert torch.equal(first[key].cpu(), second[key].cpu())
    kinds = losses[1].cache._columns["kind"]
    assert kinds.device.type == "cpu"
    assert kinds.values.is_pinned()
    assert copy.deepcopy(kinds).values.is_pinned()
