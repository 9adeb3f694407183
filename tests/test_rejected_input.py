"""Input of a wrong type or range is refused up front: the error names the argument, and the cache stays as it was."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from negative_cache import FixedLenFeature, NegativeCacheLoss, RaggedFeature, infer_specs
from negative_cache.cache.validation import check_finite
from support import as_on_a_gpu, assert_same_state, snapshot

BATCH, DIM = 4, 8
TABLE = torch.nn.EmbeddingBag(100, DIM)
WORDS = torch.arange(BATCH * 5).view(BATCH, 5)


def encode(features: dict[str, Any]) -> Tensor:
    return normalize(TABLE(features["words"]), dim=-1)


def make_loss(encoder: Any = encode, cache_size: Any = 16, **settings: Any) -> NegativeCacheLoss:
    return NegativeCacheLoss(encoder, cache_size, **{"num_samples": 1, "seed": 0, **settings})


def step(loss_fn: NegativeCacheLoss, **changes: Any) -> Tensor:
    batch = {
        "query_embeddings": encode({"words": WORDS[:, :2]}),
        "document_embeddings": encode({"words": WORDS}),
        "document_features": {"words": WORDS},
    }
    loss: Tensor = loss_fn(**batch | changes)
    return loss


# Settings

WRONG_SETTINGS: list[tuple[str, Any, type[Exception], str]] = [
    ("encoder", "a name", TypeError, "`document_encoder` is str, which is not callable; expected a module or function"),
    ("encoder", None, TypeError, "`document_encoder` is NoneType"),
    ("cache_size", True, TypeError, "`cache_size` is True; it must be an integer of at least 1"),
    ("cache_size", "16", TypeError, "`cache_size` is '16'"),
    ("cache_size", 16.0, ValueError, "`cache_size` is 16.0; it must be an integer"),
    ("cache_size", torch.tensor(16), TypeError, "`cache_size` is tensor"),
    ("scale", "20", TypeError, "`scale` is '20'; it must be a finite number"),
    ("scale", None, TypeError, "`scale` is None"),
    ("scale", True, TypeError, "`scale` is True"),
    ("scale", torch.tensor(20.0), TypeError, "`scale` is tensor.* To learn it, set learnable_scale=True"),
    ("scale", np.float32("nan"), ValueError, "`scale` is nan"),
    ("scale", 10**400, ValueError, "`scale` is inf"),
    ("scale", np.float64(-1), ValueError, "`scale` is -1.0; it must be positive"),
    ("scale", 1e39, ValueError, "`scale` is 1e.39; it must be positive, 1.2e-38 to 3.4e.38"),
    ("scale", 1e-60, ValueError, "`scale` is 1e-60"),
    ("num_samples", True, TypeError, "`num_samples` is True"),
    ("num_samples", "1", TypeError, "`num_samples` is '1'; it must be a finite number. Or \"auto\""),
    ("num_samples", "Auto", TypeError, "`num_samples` is 'Auto'"),
    ("num_samples", None, TypeError, "`num_samples` is None"),
    ("num_samples", torch.tensor(1), TypeError, "`num_samples` is tensor"),
    ("num_samples", np.array(["auto", "auto"]), TypeError, "`num_samples` is array"),
    ("num_samples", np.float32("nan"), ValueError, "`num_samples` is nan"),
    ("num_samples", np.float64(-0.25), ValueError, "`num_samples` is -0.25; it must be above 0, such as 0.25"),
    ("refresh_per_step", 1.5, ValueError, "`refresh_per_step` is 1.5; it must be an integer from 0 to 16"),
    ("refresh_per_step", False, TypeError, "`refresh_per_step` is False"),
    ("refresh_per_step", None, TypeError, "`refresh_per_step` is None"),
    ("absolute_margin", float("nan"), ValueError, "`absolute_margin` is nan"),
    ("absolute_margin", "0.1", TypeError, "`absolute_margin` is '0.1'"),
    ("absolute_margin", True, TypeError, "`absolute_margin` is True"),
    ("relative_margin", torch.tensor(0.1), TypeError, "`relative_margin` is tensor"),
    ("guide_margin", None, TypeError, "`guide_margin` is None"),
    ("matryoshka_dims", 4.0, ValueError, "`matryoshka_dims` is 4.0"),
    ("matryoshka_dims", (4, 2.5), ValueError, "`matryoshka_dims` is 2.5"),
    ("matryoshka_dims", "42", TypeError, "`matryoshka_dims` is '4'"),
    ("matryoshka_dims", (True,), TypeError, "`matryoshka_dims` is True"),
    ("matryoshka_dims", None, TypeError, r"`matryoshka_dims` is None; expected a sequence of integers, \(\) for none"),
    ("seed", 1.5, ValueError, "`seed` is 1.5"),
    ("seed", True, TypeError, "`seed` is True"),
    ("seed", 2**64, ValueError, "`seed` is 18446744073709551616"),
    ("embedding_dtype", torch.float8_e4m3fn, ValueError, "`embedding_dtype` is torch.float8_e4m3fn"),
    ("feature_device", "gpu", ValueError, "`feature_device` is 'gpu'; expected a device such as 'cpu'"),
    ("feature_device", 5.0, ValueError, "`feature_device` is 5.0"),
    ("process_group", "gloo", ValueError, "`process_group` is 'gloo'; expected a process group, \"world\""),
    ("process_group", True, ValueError, "`process_group` is True"),
    ("learnable_scale", 1, TypeError, "`learnable_scale` is 1; expected True or False"),
    ("shared", "no", TypeError, "`shared` is 'no'"),
    ("in_batch", None, TypeError, "`in_batch` is None"),
    ("use_lru", torch.tensor(True), TypeError, "`use_lru` is tensor"),
    ("specs", {"words": [5]}, TypeError, r"specs\['words'\] is list; expected FixedLenFeature"),
    ("specs", ["words"], TypeError, "`specs` is list; expected a dict"),
    ("specs", {}, ValueError, "`specs` is empty; expected a spec for each feature"),
    ("specs", {5: RaggedFeature(torch.int64)}, TypeError, "feature name 5 is int; expected str"),
    ("specs", {"words": FixedLenFeature([5], torch.uint16)}, ValueError, "dtype torch.uint16, which the cache cannot"),
]


def test_a_batch_that_is_no_dict_is_refused_by_fill_from():
    with pytest.raises(
        TypeError, match="A batch is tuple; expected a dict with `document_features` and `document_ids`"
    ):
        make_loss().fill_from([({"words": WORDS}, torch.arange(BATCH))])  # type: ignore[list-item]


def test_a_temperature_is_refused_with_its_scale():
    with pytest.raises(TypeError, match=r"`score_transform` is not an option.* set scale=20.0"):
        make_loss(score_transform=lambda score: 20.0 * score)
    with pytest.raises(TypeError, match=r"`temperature` is not an option. Use its inverse: scale=1 / 0.05"):
        make_loss(temperature=0.05)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperatur'"):
        make_loss(temperatur=0.05)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("top_k", "use CacheClassificationLoss, which has it"),
        ("data_keys", "All of `document_features` are stored"),
        ("filter_fn", "Documents with equal `document_ids`, .* have one row"),
    ],
)
def test_options_of_the_earlier_implementations_are_refused_with_what_takes_their_place(name: str, said: str):
    with pytest.raises(TypeError, match=rf"`{name}` is not an option. .*{said}"):
        make_loss(**{name: object()})


def test_an_encoder_in_the_call_is_refused_with_the_order_of_the_arguments():
    documents = torch.ones(BATCH, 2)
    with pytest.raises(TypeError, match=r"is an encoder.* call loss\(query_embeddings, document_embeddings, doc"):
        make_loss()(torch.nn.Linear(2, 2), documents, documents, {"words": WORDS})


def test_settings_are_printed():
    assert "cache_size=64, scale=20, num_samples='auto'" in repr(NegativeCacheLoss(torch.nn.Linear(2, 2), 64))


def test_texts_are_refused_with_the_next_step():
    with pytest.raises(TypeError, match=r"is list of str; .* Tokenize the texts first"):
        step(make_loss(), document_features={"words": ["a text"] * BATCH})


def test_a_cache_smaller_than_the_batch_is_named_with_both_sizes():
    with pytest.raises(ValueError, match="`cache_size` is 3; the batch has 4 documents, given negatives included"):
        step(make_loss(cache_size=3))
    negatives = {"negative_embeddings": encode({"words": WORDS[:1]}), "negative_features": {"words": WORDS[:1]}}
    with pytest.raises(ValueError, match="`cache_size` is 4; the batch has 5 documents"):
        step(make_loss(cache_size=4), **negatives)


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG_SETTINGS)
def test_wrong_settings_are_refused_at_construction(name: str, value: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make_loss(**{name: value})


def test_numbers_of_numpy_are_numbers():
    settings = {"num_samples": 2, "refresh_per_step": 1, "scale": 5, "relative_margin": 1, "matryoshka_dims": 4}
    numpy = make_loss(cache_size=np.int32(16), seed=np.int64(0), **{k: np.int64(v) for k, v in settings.items()})
    plain = make_loss(cache_size=16, seed=0, **settings)
    assert numpy.matryoshka_dims == (4,)
    for _ in range(3):
        assert torch.equal(step(numpy), step(plain))
    assert type(numpy.scale) is type(plain.scale) is float
    assert type(numpy.num_samples) is type(make_loss(num_samples=2.0).num_samples) is int
    assert make_loss(num_samples=np.float32(0.25)).num_samples == 0.25


def test_an_encoder_that_cannot_be_called_is_refused_when_it_is_set():
    loss_fn = make_loss()
    with pytest.raises(TypeError, match="`document_encoder` is dict, which is not callable"):
        loss_fn.document_encoder = {}  # type: ignore[assignment]
    assert loss_fn.document_encoder is encode


# Batches

SPARSE = torch.eye(BATCH).to_sparse()
META = torch.ones(BATCH, 2, device="meta")
NESTED = torch.nested.nested_tensor([[1.0]] * BATCH, layout=torch.jagged)
NO_FEATURES: dict[str, tuple[Any, str]] = {
    "a constant": ("document", "str"),
    "a number": (5, "int"),
    "none": (None, "None"),
    "strings": (["a"] * BATCH, "list of str"),
    "lists": (WORDS.tolist(), "list of list"),
    "a mixed list": ([WORDS[0], None], "list of None, a tensor"),
    "an empty list": ([], "an empty list"),
    "numpy": (WORDS.numpy(), "ndarray"),
    "a nested dict": ({"words": WORDS}, "dict"),
    "sparse": (SPARSE, "a sparse_coo tensor"),
    "nested": (NESTED, "a nested tensor"),
    "of no device": (META, "a tensor on the meta device"),
}


def assert_refused(loss_fn: NegativeCacheLoss, error: type[Exception], message: str, **changes: Any) -> None:
    before = snapshot(loss_fn)
    with pytest.raises(error, match=message):
        step(loss_fn, **changes)
    assert_same_state(before, snapshot(loss_fn))


@pytest.mark.parametrize(("value", "kind"), NO_FEATURES.values(), ids=NO_FEATURES.keys())
@pytest.mark.parametrize("key", ["words", "task"])
def test_features_that_are_no_tensors_are_named(key: str, value: Any, kind: str):
    message = rf"_features\['{key}'\]` is {kind}; expected a tensor \[batch, ...\] or a list of tensors \[length\]"
    features = {"words": WORDS, key: value}
    specs = {name: FixedLenFeature([], torch.int64) for name in features}
    for settings in ({}, {"specs": specs}):
        assert_refused(make_loss(**settings), TypeError, f"document{message}", document_features=features)
    loss_fn = make_loss()
    step(loss_fn)
    assert_refused(loss_fn, TypeError, f"document{message}", document_features=features)
    given = {"negative_embeddings": encode({"words": WORDS}), "negative_features": features}
    assert_refused(loss_fn, TypeError, f"negative{message}", **given)
    with pytest.raises(TypeError, match=f"document{message}"):
        loss_fn.fill_from([{"document_features": features, "document_ids": torch.arange(BATCH)}])
    with pytest.raises(TypeError, match=f"document{message}"):
        infer_specs(features)


EMBEDDINGS = torch.ones(BATCH, DIM)
WRONG_INPUT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a tuple of queries": (
        {"query_embeddings": (EMBEDDINGS,)},
        TypeError,
        r"`query_embeddings` is tuple; expected a dense tensor \[n, dim\]. Take the embeddings out of the output",
    ),
    "an output of a model": (
        {"document_embeddings": {"sentence_embedding": EMBEDDINGS}},
        TypeError,
        "`document_embeddings` is dict",
    ),
    "no queries": ({"query_embeddings": None}, TypeError, "`query_embeddings` is None"),
    "documents of numpy": ({"document_embeddings": EMBEDDINGS.numpy()}, TypeError, "`document_embeddings` is ndarray"),
    "sparse queries": (
        {"query_embeddings": EMBEDDINGS.to_sparse()},
        TypeError,
        "`query_embeddings` is a sparse_coo tensor",
    ),
    "complex queries": (
        {"query_embeddings": EMBEDDINGS.to(torch.complex64)},
        TypeError,
        "`query_embeddings` is torch.complex64",
    ),
    "a list of negatives": (
        {"negative_embeddings": [[1.0] * DIM], "negative_features": {"words": WORDS[:1]}},
        TypeError,
        "`negative_embeddings` is list",
    ),
    "a scalar as feature": (
        {"document_features": {"words": torch.tensor(1)}},
        TypeError,
        r"`document_features\['words'\]` is a tensor without dimensions",
    ),
    "features of negatives in a list": (
        {"negative_embeddings": EMBEDDINGS, "negative_features": [WORDS]},
        TypeError,
        "`negative_features` is list; expected a dict",
    ),
    "queries that overflow": (
        {"query_embeddings": 1e20 * EMBEDDINGS},
        ValueError,
        r"`query_embeddings` has values up to 1.0e\+20; dot products of values above 1.8e\+15 may overflow",
    ),
    "documents that overflow": (
        {"document_embeddings": (-1e20 * EMBEDDINGS).bfloat16()},
        ValueError,
        "`document_embeddings` has values up to 1.0e.20; .* normalize the embeddings",
    ),
    "negatives that overflow": (
        {"negative_embeddings": 1e20 * EMBEDDINGS, "negative_features": {"words": WORDS}},
        ValueError,
        "`negative_embeddings` has values up to 1.0e.20",
    ),
    "ids in a list": ({"document_ids": [0, 1, 2, 3]}, TypeError, "`document_ids` is list"),
    "ids in a string": ({"document_ids": "0123"}, TypeError, "`document_ids` is str"),
    "ids of numpy": ({"document_ids": np.arange(BATCH)}, TypeError, "`document_ids` is ndarray"),
    "floats as ids": ({"document_ids": torch.ones(BATCH)}, TypeError, "`document_ids` is torch.float32"),
    "complex ids": ({"document_ids": torch.ones(BATCH) + 0j}, TypeError, "`document_ids` is torch.complex64"),
    "sparse ids": ({"document_ids": SPARSE.long()}, TypeError, "`document_ids` is a sparse_coo tensor"),
    "ids above int64": (
        {"document_ids": torch.tensor(np.full(BATCH, 2**63 + 5, np.uint64))},
        TypeError,
        r"`document_ids` is torch.uint64; expected a tensor of integers that fit int64. Convert ids to int64, from 0 ",
    ),
    "uint32 as ids": (
        {"document_ids": torch.ones(BATCH).to(torch.uint32)},
        TypeError,
        "`document_ids` is torch.uint32",
    ),
    "positive ids in lists": ({"positive_ids": [[1]] * BATCH}, TypeError, "`positive_ids` is list"),
    "negative ids in a list": (
        {"negative_embeddings": EMBEDDINGS, "negative_features": {"words": WORDS}, "negative_ids": [0, 1, 2, 3]},
        TypeError,
        "`negative_ids` is list",
    ),
    "log_q in a list": ({"log_q": [-1.0] * BATCH}, TypeError, "`log_q` is list; expected a dense tensor"),
    "a guide of numpy": (
        {"guide_queries": EMBEDDINGS.numpy(), "guide_documents": EMBEDDINGS},
        TypeError,
        "`guide_queries` is ndarray",
    ),
}


@pytest.mark.parametrize("case", WRONG_INPUT)
@pytest.mark.parametrize("is_first", [True, False])
def test_wrong_input_is_refused_and_changes_nothing(case: str, is_first: bool):
    changes, error, message = WRONG_INPUT[case]
    loss_fn = make_loss()
    if not is_first:
        step(loss_fn)
    assert_refused(loss_fn, error, message, **changes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"document_ids": [0, 1, 2, 3]}, TypeError, "`document_ids` is list"),
        ({"document_ids": torch.arange(BATCH).to(torch.uint64)}, TypeError, "`document_ids` is torch.uint64"),
        ({"document_features": [WORDS]}, TypeError, "`document_features` is list; expected a dict"),
    ],
)
def test_wrong_documents_are_refused_before_they_are_encoded(change: Any, error: type[Exception], message: str):
    calls: list[Any] = []
    loss_fn = make_loss(calls.append)
    with pytest.raises(error, match=message):
        loss_fn.fill_from([{"document_features": {"words": WORDS}, "document_ids": torch.arange(BATCH), **change}])
    assert not calls


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda out: {"embedding": out},
            TypeError,
            r"The document encoder returned dict; expected a tensor \[4, dim\]",
        ),
        (lambda out: out[0], TypeError, r"The document encoder returned shape \[8\]; expected a tensor \[4, dim\]"),
        (lambda out: out / 0, ValueError, "The document encoder's output has NaN or infinity"),
        (lambda out: out * 1e20, ValueError, "The document encoder's output has values up to"),
    ],
)
def test_filling_names_the_encoder_that_returned_something_else(change: Any, error: type[Exception], message: str):
    loss_fn = make_loss(lambda features: change(encode(features)))
    with pytest.raises(error, match=message):
        loss_fn.fill_from([{"document_features": {"words": WORDS}, "document_ids": torch.arange(BATCH)}])
    assert loss_fn.cache is None


def test_a_re_encoded_document_that_overflows_is_refused():
    loss_fn = make_loss()
    step(loss_fn)
    loss_fn.document_encoder = lambda features: 1e20 * encode(features)
    before = snapshot(loss_fn.cache)
    others = {"document_features": {"words": WORDS + 50}}  # the cached documents are negatives of these queries
    with pytest.raises(ValueError, match=r"The document encoder's output, stored as .*, has values up to"):
        step(loss_fn, **others)
    assert_same_state(before, snapshot(loss_fn.cache))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_accepted_embeddings_do_not_overflow(dtype: torch.dtype):
    """Scores are computed in at least float32; the limit leaves a factor of 1e8 for the dimension times the scale."""
    scored = torch.promote_types(dtype, torch.float32)
    limit = min(torch.finfo(dtype).max, 1e-4 * torch.finfo(scored).max ** 0.5)
    largest = torch.full((1, 1024), 0.99 * limit, dtype=scored).to(dtype)
    check_finite("`x`", largest, is_embedding=True)
    assert bool((97_000 * (largest.to(scored) @ largest.to(scored).T)).isfinite())
    if dtype != torch.float16:
        with pytest.raises(ValueError, match="`x` has values up to"):
            check_finite("`x`", 1.02 * largest, is_embedding=True)
    check_finite("`log_q`", torch.tensor([-1e30]))


@pytest.mark.parametrize("settings", [{}, {"in_batch": False, "shared": False}], ids=["default", "own draws"])
def test_embeddings_that_overflow_on_a_gpu_give_a_loss_that_is_not_finite(settings: dict[str, Any]):
    """There, the values cannot be read without synchronizing the device."""
    loss_fn = make_loss(**settings)
    step(loss_fn)
    with as_on_a_gpu():
        huge = 1e20 * encode({"words": WORDS})
        loss = step(loss_fn, query_embeddings=huge, document_embeddings=huge.roll(1, 0))
        assert not bool(loss.isfinite())


def test_a_training_step_without_any_gradient_warns_once(caplog: pytest.LogCaptureFixture):
    queries, documents = encode({"words": WORDS[:, :2]}), encode({"words": WORDS})
    trained = [
        {},
        {"query_embeddings": queries.detach()},
        {
            "query_embeddings": queries.detach(),
            "document_embeddings": documents.detach(),
            "negative_embeddings": documents,
            "negative_features": {"words": WORDS},
        },
    ]
    frozen = {"query_embeddings": queries.detach(), "document_embeddings": documents.detach()}
    with caplog.at_level(logging.WARNING, "negative_cache"):
        loss_fn = make_loss()
        for changes in trained:
            step(loss_fn, **changes)
        step(make_loss(learnable_scale=True), **frozen)  # trains the scale
        step(make_loss().eval(), **frozen)
        with torch.no_grad():
            step(make_loss(), **frozen)
        assert not caplog.messages
        for _ in range(3):
            step(loss_fn, **frozen)
    (message,) = caplog.messages
    assert "`query_embeddings` and `document_embeddings` have no gradient" in message
    assert "loss_fn.eval()" in message
