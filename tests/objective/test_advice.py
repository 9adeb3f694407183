"""Inputs that are valid but probably mistakes: one warning that says what to do, and none for usual inputs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from negative_cache import NegativeCacheLoss
from support import as_on_a_gpu

WORDS = torch.arange(64 * 5).view(64, 5) % 97


class Tower(nn.Module):
    """The sum of word vectors, whose mean norm is about 9; normalized or not."""

    def __init__(self, is_normalized: bool = True) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(97, 16, generator=torch.Generator().manual_seed(0)))
        self.is_normalized = is_normalized

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        embeddings = self.words[features["words"]].sum(dim=1)
        return normalize(embeddings, dim=-1) if self.is_normalized else embeddings


def train(
    encoder: Any = None,
    documents: Callable[[Tower, dict[str, Tensor]], Tensor] = lambda tower, features: tower(features),
    is_normalized: bool = True,
    reads: bool = True,
    **settings: Any,
) -> NegativeCacheLoss:
    """Some steps. The default encoder is the tower that encodes the batch, too."""
    tower = Tower(is_normalized)
    loss_fn = NegativeCacheLoss(encoder or tower, 64, **{"num_samples": 1, "seed": 0, **settings})
    for step in range(4):
        features = {"words": WORDS[16 * step : 16 * step + 16]}
        loss_fn(tower({"words": features["words"][:, :3]}), documents(tower, features), features).backward()
    if reads:
        loss_fn.metrics()
    return loss_fn


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a temperature": ({"scale": 0.05}, ["`scale` is 0.05", "set scale=20"]),
    "what remains of the similarity": (
        {"relative_margin": 0.95},
        ["`relative_margin` is 0.95", "above 5 %", "above 95 %", "set relative_margin=0.05"],
    ),
    "not normalized": ({"is_normalized": False}, ["are not normalized", "norm is", "scale=20", "such as 0."]),
    "the encoder does not normalize": (
        {"encoder": Tower(is_normalized=False)},
        ["`document_encoder` returned embeddings with a mean norm of", "`document_embeddings` is 1.", "normalized"],
    ),
    "the encoder alone normalizes": (
        {"encoder": Tower(), "is_normalized": False, "scale": 1.0},
        ["`document_encoder` returned embeddings with a mean norm of 1;"],
    ),
    "detached documents": (
        {"documents": lambda tower, features: tower(features).detach()},
        ["`document_embeddings` have no gradient", "without detach or no_grad", "requires_grad_(False)"],
    ),
}


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_warning_with_advice(mistake: str, on_gpu: bool, caplog: pytest.LogCaptureFixture):
    given, parts = MISTAKES[mistake]
    if on_gpu:
        with as_on_a_gpu():
            train(**given)
    else:
        train(**given)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert [part for part in parts if part not in record.getMessage()] == []


RIGHT: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "a cache that waits": {"num_samples": "auto"},
    "dot products": {"is_normalized": False, "scale": 1.0},
    "a scale of 1": {"scale": 1.0},
    "a usual margin": {"relative_margin": 0.05},
    "a frozen encoder": {
        "encoder": Tower().requires_grad_(False),
        "documents": lambda tower, features: tower(features).detach(),
    },
    "bfloat16": {"embedding_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", RIGHT)
def test_usual_inputs_give_no_warning(case: str, caplog: pytest.LogCaptureFixture):
    train(**RIGHT[case])
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("shift", [0, 16])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_ids_that_are_places_in_the_batch_give_one_warning(shift: int, on_gpu: bool, caplog: pytest.LogCaptureFixture):
    tower = Tower()
    loss_fn = NegativeCacheLoss(tower, 64, seed=0)
    with as_on_a_gpu() if on_gpu else contextlib.nullcontext():
        for step in range(4):
            features = {"words": WORDS[16 * step : 16 * step + 16]}
            loss_fn(tower(features), tower(features), features, torch.arange(16) + shift * step).backward()
            assert not (on_gpu and caplog.records)
        loss_fn.metrics()
    assert [record.getMessage()[:48] for record in caplog.records] == (
        [] if shift else ["The first two batches have the same ids and othe"]
    )


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    ("ids", "is_warned"),
    [
        (torch.arange(16) % 4, True),  # classes
        (torch.stack([torch.arange(16) % 4, torch.arange(16)], dim=1), True),
        (torch.arange(16).clamp(min=3), False),  # a few
        (torch.full((16,), -1), False),
    ],
)
def test_ids_that_documents_share_give_one_warning(
    ids: Tensor, is_warned: bool, on_gpu: bool, caplog: pytest.LogCaptureFixture
):
    tower = Tower()
    loss_fn = NegativeCacheLoss(tower, 64, seed=0)
    with as_on_a_gpu() if on_gpu else contextlib.nullcontext():
        for step in range(3):
            features = {"words": WORDS[16 * step : 16 * step + 16]}
            loss_fn(tower(features), tower(features), features, ids + 16 * step * (ids >= 0)).backward()
        loss_fn.metrics()
    said = [record.getMessage() for record in caplog.records]
    assert ["100 % of the documents of the first batch have the id of another" in line for line in said] == (
        [True] if is_warned else []
    )


def test_equal_documents_may_share_an_id(caplog: pytest.LogCaptureFixture):
    tower, features = Tower(), {"words": WORDS[:4].repeat(4, 1)}
    loss_fn = NegativeCacheLoss(tower, 64, seed=0)
    loss_fn(tower(features), tower(features), features, torch.arange(16) % 4).backward()
    assert caplog.records == []


@pytest.mark.parametrize("words", [WORDS, WORDS.float()], ids=["the same documents", "without a hash"])
def test_equal_ids_give_no_warning_where_documents_may_be_equal(words: Tensor, caplog: pytest.LogCaptureFixture):
    tower = Tower()
    loss_fn = NegativeCacheLoss(lambda features: tower({"words": features["words"].long()}), 64, seed=0)
    for step in range(2):
        rows = slice(0, 16) if words is WORDS else slice(16 * step, 16 * step + 16)
        documents = tower({"words": WORDS[rows]})
        loss_fn(tower({"words": WORDS[rows]}), documents, {"words": words[rows]}, torch.arange(16)).backward()
    assert caplog.records == []


@pytest.mark.parametrize("encoder", ["module", "method", "function", "calls"])
@pytest.mark.parametrize("num_samples", [1, "auto"])
def test_detached_documents_are_seen_in_the_first_step_of_a_module(
    encoder: str, num_samples: Any, caplog: pytest.LogCaptureFixture
):
    """Of a function that names no module, it is known only from what it returns: in the first step that calls it."""
    tower = Tower()
    named = {"tower": tower}
    encoders = {
        "module": tower,
        "method": tower.forward,
        "function": lambda features: tower(features),
        "calls": lambda features: named["tower"](features),
    }
    loss_fn = NegativeCacheLoss(encoders[encoder], 64, num_samples=num_samples, seed=0)
    counts = []
    for step in range(2):
        features = {"words": WORDS[16 * step : 16 * step + 16]}
        loss_fn(tower(features), tower(features).detach(), features).backward()
        counts.append(len(caplog.records))
    assert counts == [0 if encoder == "calls" and num_samples == 1 else 1, 1]


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("num_samples", [1, "auto"])
def test_a_function_that_detaches_documents_is_seen_by_the_modules_that_it_names(
    num_samples: Any, is_frozen: bool, caplog: pytest.LogCaptureFixture
):
    tower, queries = Tower().requires_grad_(not is_frozen), Tower()
    loss_fn = NegativeCacheLoss(lambda features: tower(features).detach(), 64, num_samples=num_samples, seed=0)
    for step in range(2):
        features = {"words": WORDS[16 * step : 16 * step + 16]}
        loss_fn(queries(features), tower(features).detach(), features).backward()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (0 if is_frozen else 1)
    if num_samples == "auto":  # the encoder was tried
        assert all("no document trains it" in message for message in said)


@pytest.mark.parametrize("num_samples", ["auto", 0.25, 1])
@pytest.mark.parametrize("mistake", ["none", "dropout", "other tower", "other inputs"])
def test_an_encoder_that_is_not_that_of_the_batch_is_seen_when_it_is_first_called(
    mistake: str, num_samples: Any, caplog: pytest.LogCaptureFixture
):
    torch.manual_seed(1)
    queries, documents, dropout = Tower(), Tower(), nn.Dropout(0.5 if mistake == "dropout" else 0.0)
    nn.init.normal_(queries.words)
    encoder = queries if mistake == "other tower" else documents

    def encode(features: dict[str, Tensor]) -> Tensor:
        return normalize(dropout(encoder(features)), dim=1)

    loss_fn = NegativeCacheLoss(encode, 64, num_samples=num_samples, seed=0)
    counts = []
    for step in range(3):
        features, others = ({"words": WORDS[16 * number : 16 * number + 16]} for number in (step, step + 1))
        embeddings = normalize(dropout(documents(features)), dim=1)
        loss_fn(queries(others), embeddings, others if mistake == "other inputs" else features).backward()
        counts.append(sum("computes other embeddings" in record.getMessage() for record in caplog.records))
    is_seen = int(mistake.startswith("other"))
    assert counts == [is_seen if num_samples == "auto" else 0, is_seen, is_seen]


def test_old_embeddings_of_other_weights_are_no_other_encoder(caplog: pytest.LogCaptureFixture):
    """A resumed run begins with documents that are older than a step."""
    torch.manual_seed(1)
    tower = Tower()
    state = train(tower, lambda _, features: tower(features)).state_dict()
    nn.init.normal_(tower.words)
    loss_fn = NegativeCacheLoss(tower, 64, num_samples=1, seed=0)
    loss_fn.load_state_dict(state)
    loss_fn.cache.written.sub_(5)
    features = {"words": WORDS[:16]}
    loss_fn(tower(features), tower(features), features).backward()
    assert loss_fn.metrics()["age"] > 5
    assert loss_fn.metrics()["staleness"] > 1.5
    assert caplog.records == []


def test_norms_are_read_with_the_metrics_where_that_synchronizes(caplog: pytest.LogCaptureFixture):
    with as_on_a_gpu():
        loss_fn = train(is_normalized=False, reads=False)
        assert caplog.records == []
        loss_fn.metrics()
        assert len(caplog.records) == 1
        loss_fn.metrics()
        assert len(caplog.records) == 1


def test_evaluation_gives_no_advice(caplog: pytest.LogCaptureFixture):
    tower = Tower(is_normalized=False)
    loss_fn = NegativeCacheLoss(tower, 64, num_samples=1, seed=0).eval()
    with torch.no_grad():
        loss_fn(tower({"words": WORDS[:8]}), tower({"words": WORDS[:8]}), {"words": WORDS[:8]})
    assert caplog.records == []
