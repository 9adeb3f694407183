"""`NegativeCacheRankingLoss` by itself: its value, known positives, guide, both directions, and what it refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss, wrappers
from negative_cache.integrations.sentence_transformers.anchors import merge_anchors
from support import ANCHORS, HARD, POSITIVES, columns
from text_models import VERSION, encode, make_router, make_static, make_tiny


@pytest.fixture
def model() -> SentenceTransformer:
    return make_static()


@pytest.fixture
def guide() -> SentenceTransformer:
    """Another model, with another tokenizer."""
    return make_static(dim=24, seed=1, texts=[*ANCHORS, *HARD])


def steps(loss: NegativeCacheRankingLoss, count: int = 4) -> Tensor:
    """The value of the last of some steps with gradient."""
    for step in range(count):
        at = slice(4 * (step % 3), 4 * (step % 3) + 4)
        value: Tensor = loss(columns(loss.model, ANCHORS[at], POSITIVES[at]))
        value.backward()
    return value.detach()


@pytest.mark.parametrize("kind", ["tiny", "static"])
def test_extra_columns_are_negatives_and_enter_the_cache(kind: str):
    """The first batch has no cache: its loss is the cross-entropy against the batch and the extra column."""
    model = make_tiny(dropout=0.0) if kind == "tiny" else make_static()
    loss = NegativeCacheRankingLoss(model, cache_size=64, seed=0)
    first = loss(columns(model, ANCHORS[:4], POSITIVES[:4], HARD[:4]), None)
    q, p, n = (encode(model, texts[:4]) for texts in (ANCHORS, POSITIVES, HARD))
    torch.testing.assert_close(first.detach(), cross_entropy(20 * q @ torch.cat([p, n]).T, torch.arange(4)))
    assert int(loss.cache_loss.cache.num_filled) == 8


def test_a_hard_negative_with_the_positives_text_is_no_negative(model: SentenceTransformer):
    loss = NegativeCacheRankingLoss(model, cache_size=16)
    value = loss(columns(model, ANCHORS[:1], POSITIVES[:1], POSITIVES[:1]), None)
    assert value.item() == 0.0  # its only negative is the positive itself


def test_bad_input_is_refused_with_the_reason(model: SentenceTransformer):
    loss = NegativeCacheRankingLoss(model, cache_size=16)
    with pytest.raises(ValueError, match="1 text column"):
        loss(columns(model, ANCHORS[:2]), None)
    with pytest.raises(ValueError, match="integer document ids"):
        loss(columns(model, ANCHORS[:2], POSITIVES[:2]), torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match=r"expected \[2\]"):
        loss(columns(model, ANCHORS[:2], POSITIVES[:2]), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="inner product"):
        NegativeCacheRankingLoss(model, similarity_fct=util.euclidean_sim)
    assert loss.cache_loss.cache is None


def test_a_guide_hides_documents_that_it_finds_better_than_the_positive(
    model: SentenceTransformer, guide: SentenceTransformer
):
    """With no room for negatives at all the loss is 0; with all room it is that without a guide."""
    free = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
    closed = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0, guide=guide, guide_margin=3.0)
    opened = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0, guide=guide, guide_margin=-3.0)
    values = [steps(loss) for loss in (free, closed, opened)]
    assert values[1] == 0
    assert values[0] > 0
    torch.testing.assert_close(values[2], values[0])
    assert closed.metrics()["masked"] == pytest.approx(8 / 12)  # the batch's own rows were hidden before
    assert opened.metrics()["masked"] == 0
    assert not any("guide" in name for name, _ in closed.named_modules())
    torch.testing.assert_close(closed.cache_loss.cache.data["guide_embedding"][:12], encode(guide, POSITIVES))


def test_a_guide_decides_by_its_own_similarities(model: SentenceTransformer, guide: SentenceTransformer):
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0, guide=guide).eval()
    with torch.no_grad():
        value = loss(columns(model, ANCHORS, POSITIVES), None)
    similarities = encode(guide, ANCHORS) @ encode(guide, POSITIVES).T
    hidden = similarities > similarities.diagonal()[:, None]
    assert hidden.any()
    scores = (20 * encode(model, ANCHORS) @ encode(model, POSITIVES).T).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(value, cross_entropy(scores, torch.arange(12)))


class ListeningGuide(SentenceTransformer):
    """Keeps the texts that it encodes."""

    def __init__(self) -> None:
        super().__init__(modules=list(make_static(dim=16, seed=1).children()), device="cpu")
        self.texts: list[str] = []

    def encode(self, sentences: list[str], **options: Any) -> Tensor:
        self.texts.extend(sentences)
        return super().encode(sentences, **options)


def test_a_guide_encodes_each_text_once(model: SentenceTransformer):
    guide = ListeningGuide()
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0, symmetric=True, guide=guide)
    for start in (0, 4):
        at = slice(start, start + 4)
        loss(columns(model, ANCHORS[at], POSITIVES[at], HARD[at])).backward()
    assert sorted(guide.texts) == sorted([*ANCHORS[:8], *POSITIVES[:8], *HARD[:8]])
    stored = loss.query_cache_loss.cache.data["guide_embedding"][:8]
    torch.testing.assert_close(stored, encode(guide, ANCHORS[:8]))


def test_a_guide_reads_queries_by_their_own_route():
    """Two tokenizers: the texts are decoded by the tokenizer of their route."""
    model, guide = make_router(), ListeningGuide()
    loss = NegativeCacheRankingLoss(model, 32, guide=guide)
    loss([model.preprocess(ANCHORS[:3], task="query"), model.preprocess(POSITIVES[:3], task="document")])
    assert sorted(guide.texts) == sorted([*ANCHORS[:3], *POSITIVES[:3]])


def test_both_directions_are_the_mean_of_two_losses(model: SentenceTransformer):
    """The first step has no cache: it is the symmetric in-batch loss."""
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, symmetric=True, learnable_scale=True, seed=0)
    value = loss(columns(model, ANCHORS[:4], POSITIVES[:4]), None)
    a, b = (encode(model, texts[:4]) for texts in (ANCHORS, POSITIVES))
    there, back = (cross_entropy(20 * scores, torch.arange(4)) for scores in (a @ b.T, b @ a.T))
    torch.testing.assert_close(value.detach(), (there + back) / 2)
    steps(loss)
    assert len(list(loss.parameters())) == len(list(model.parameters())) + 1  # one scale for both
    cache = loss.query_cache_loss.cache
    assert int(cache.num_filled) == 12
    cached = loss.query_cache_loss.document_encoder(cache.read(torch.arange(12), ["tokens"]))
    assert sorted(cached[:, 0].tolist()) == pytest.approx(sorted(encode(model, ANCHORS)[:, 0].tolist()), abs=1e-5)
    assert {"query_staleness", "staleness"} <= set(loss.metrics())


def test_equal_anchors_are_no_negatives_of_each_others_documents(model: SentenceTransformer):
    """In the batch, and from the cache: an anchor is identified by its text."""
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0, symmetric=True)
    same = [ANCHORS[0]] * 3
    loss(columns(model, same, POSITIVES[:3]))
    assert int(loss.query_cache_loss.cache.num_filled) == 1
    assert loss.metrics()["query_interpretable_loss"] == 0
    loss(columns(model, same[:1], POSITIVES[3:4]))
    assert loss.metrics()["query_interpretable_loss"] == 0
    loss(columns(model, ANCHORS[1:2], POSITIVES[4:5]))
    assert loss.metrics()["query_interpretable_loss"] > 0


def test_known_anchors_are_merged_without_duplicates_the_own_first():
    known = torch.tensor([[5, 1, -1, -1], [5, -1, -1, -1], [-1, -1, -1, -1]])
    merged = merge_anchors(torch.tensor([7, 7, -1]), torch.tensor([1, 2, 3]), known)
    assert [[anchor for anchor in row if anchor >= 0] for row in merged.tolist()] == [[1, 2, 5], [2, 1, 5], [3]]
    assert (merged[:, :1] >= 0).all()
    assert ((merged[:, 1:] < 0) | (merged[:, :-1] >= 0)).all()  # padding is at the end


def test_a_guide_that_is_the_model_stays_in_training_mode():
    model = make_tiny().train()
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0, guide=model)
    for _ in range(2):
        loss(columns(model, ANCHORS[:4], POSITIVES[:4]))
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("with_labels", [False, True])
def test_other_anchors_of_a_document_are_not_its_negatives(model: SentenceTransformer, with_labels: bool):
    """Whether they are in the batch, or were in an earlier one."""
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0, symmetric=True)
    label = torch.tensor([7]) if with_labels else None
    for anchor in ANCHORS[:4]:
        loss(columns(model, [anchor], POSITIVES[:1]), label)
        assert loss.metrics()["query_interpretable_loss"] == 0
    assert int(loss.query_cache_loss.cache.num_filled) == 4
    loss(columns(model, ANCHORS[4:6], POSITIVES[:1] * 2), None if label is None else label.expand(2))
    assert loss.metrics()["query_interpretable_loss"] == 0
    loss(columns(model, ANCHORS[6:7], POSITIVES[1:2]), None if label is None else label + 1)
    assert loss.metrics()["query_interpretable_loss"] > 0


def test_autocast_changes_nothing_but_the_encoder(model: SentenceTransformer):
    """A static model computes the same under autocast, and so must the loss."""
    values, gradients = [], []
    for enabled in (False, True):
        model = make_static()
        loss = NegativeCacheRankingLoss(model, 32, seed=0, num_samples=2, matryoshka_dims=(8,))
        steps(loss)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss(columns(model, ANCHORS[:4], POSITIVES[:4], HARD[:4]), None)
        value.backward()
        values.append(value.detach())
        gradients.append(model[0].embedding.weight.grad)
    assert torch.equal(*values)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gradients_are_near_those_of_float32(dtype: torch.dtype):
    found = []
    for enabled in (False, True):
        model = make_tiny(dropout=0.0)
        loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
        for start in (0, 6):
            model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                value = loss(columns(model, ANCHORS[start : start + 6], POSITIVES[start : start + 6]))
            value.backward()
        assert value.dtype == torch.float32
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.skipif(VERSION < (5, 7), reason="MatryoshkaLoss before 5.7 does not pass its dimensions to the loss")
def test_the_first_step_of_matryoshka_loss_is_that_of_the_in_batch_loss(model: SentenceTransformer):
    gradients = []
    for inner in (NegativeCacheRankingLoss, MultipleNegativesRankingLoss):
        model.zero_grad()
        value = MatryoshkaLoss(model, inner(model), [32, 16, 8])(columns(model, ANCHORS, POSITIVES), None)
        value.backward()
        gradients.append((value.detach(), model[0].embedding.weight.grad.clone()))
    torch.testing.assert_close(*gradients)


@pytest.mark.skipif(VERSION < (5, 7), reason="MatryoshkaLoss before 5.7 does not pass its dimensions to the loss")
@pytest.mark.parametrize(
    ("dims", "options", "error"),
    [
        ([32, 8], {"matryoshka_weights": [1, 0.5]}, "weight 1 and be used in each step"),
        ([32, 8], {"n_dims_per_step": 1}, "weight 1 and be used in each step"),
        ([16, 8], {}, "the model's 32"),
    ],
)
def test_dimensions_that_the_loss_cannot_use_are_refused(
    model: SentenceTransformer, dims: list[int], options: dict[str, Any], error: str
):
    loss = MatryoshkaLoss(model, NegativeCacheRankingLoss(model, 32), dims, **options)
    with pytest.raises(ValueError, match=error):
        loss(columns(model, ANCHORS, POSITIVES), None)


def test_losses_that_repeat_forward_passes_are_refused():
    model = make_tiny()
    batch = columns(model, ANCHORS, POSITIVES)
    warns = pytest.warns(UserWarning, match="not compatible") if VERSION >= (5, 7) else contextlib.nullcontext()
    with warns:
        layers = AdaptiveLayerLoss(model, NegativeCacheRankingLoss(model, 32))
        both = Matryoshka2dLoss(model, NegativeCacheRankingLoss(model, 32), [128, 64])
    with pytest.raises(ValueError, match="those of the last layer"):
        layers(batch, None)
    with pytest.raises(ValueError, match=r"AdaptiveLayerLoss|matryoshka_dims"):
        both(batch, None)
    if VERSION < (5, 7):
        with pytest.raises(ValueError, match="matryoshka_dims="):
            MatryoshkaLoss(model, NegativeCacheRankingLoss(model, 32), [128, 64])(batch, None)


def test_flat_inputs_in_data_parallel_are_refused():
    """Padded inputs have a row per text, which nn.DataParallel can split over GPUs; flat ones have not."""
    for model, is_refused in ((make_static(), True), (make_tiny(), False)):
        loss = NegativeCacheRankingLoss(model, 32)
        loss.model = nn.DataParallel(model)  # on a machine without two GPUs it has no devices, and just runs the model
        assert loss(columns(model, ANCHORS, POSITIVES)) > 0
        loss.model.forward = model.forward
        loss.model.device_ids = [0, 1]
        if is_refused:
            with pytest.raises(ValueError, match="torchrun"):
                loss(columns(model, ANCHORS, POSITIVES))
        else:
            assert loss(columns(model, ANCHORS, POSITIVES)) > 0


def routed(model: SentenceTransformer, at: slice) -> list[dict[str, Any]]:
    """The inputs of some anchors and positives, each by its route."""
    return [model.preprocess(texts[at], task=task) for task, texts in (("query", ANCHORS), ("document", POSITIVES))]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_router_needs_ddp_without_a_search_for_unused_parameters(monkeypatch: pytest.MonkeyPatch):
    """The last pass of a step is the documents' one: the queries' parameters would count as unused."""
    queries, documents = (list(make_static(seed=seed).children()) for seed in (0, 1))
    model = SentenceTransformer(modules=[Router.for_query_document(queries, documents)], device="cpu")

    def step(**settings: Any) -> Tensor:
        loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
        loss.model = DistributedDataParallel(model, **settings)
        for at in (slice(6), slice(6, 12)):
            value: Tensor = loss(routed(model, at))
            value.backward()
        return value

    assert step().isfinite()
    assert step(static_graph=True).isfinite()
    with pytest.raises(ValueError, match="ddp_find_unused_parameters=False"):
        step(find_unused_parameters=True)
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
    loss.model = DistributedDataParallel(model, find_unused_parameters=True)
    with torch.no_grad():  # an evaluation has no backward pass
        assert loss.eval()(routed(model, slice(6))).isfinite()
    # what the error is about
    monkeypatch.setattr(wrappers, "_check_unused_parameters", lambda model: None)
    with pytest.raises(RuntimeError, match="mark a variable ready only once"):
        step(find_unused_parameters=True)


def test_wrong_arguments_are_refused_by_name(model: SentenceTransformer):
    with pytest.raises(TypeError, match="`model` is str; expected a SentenceTransformer"):
        NegativeCacheRankingLoss("all-MiniLM-L6-v2", 32)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`scale` is '20'"):
        NegativeCacheRankingLoss(model, 32, scale="20")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`documents` is a str; expected a list of texts"):
        NegativeCacheRankingLoss(model, 32).fill_from("a text")


def test_one_number_is_a_matryoshka_dimension(model: SentenceTransformer):
    losses = []
    for dims in (16, (16,)):
        loss = NegativeCacheRankingLoss(model, 32, matryoshka_dims=dims, seed=0)
        losses.append(loss(columns(model, ANCHORS, POSITIVES)))
        assert loss.get_config_dict()["matryoshka_dims"] == (16,)
    assert torch.equal(*losses)


def test_the_model_card_gets_the_options(model: SentenceTransformer, guide: SentenceTransformer):
    loss = NegativeCacheRankingLoss(model, 64, 10.0, guide=guide, symmetric=True, num_samples=6)
    config = loss.get_config_dict()
    assert config["cache_size"] == 64
    assert config["scale"] == 10.0
    assert config["num_samples"] == 6
    assert config["symmetric"] is True
    assert config["guide"]
    assert config["shared"] is True
    assert config["similarity_fct"] == "cos_sim"
    assert config["embedding_dtype"] == "torch.float32"
    assert loss.temperature == 0.1


def test_a_model_without_pooling_is_refused_with_the_reason():
    model = SentenceTransformer(modules=[make_tiny()[0]], device="cpu")
    loss = NegativeCacheRankingLoss(model, cache_size=16)
    with pytest.raises(ValueError, match=r"\['.*token_embeddings.*\], without 'sentence_embedding'. Add a pooling"):
        loss(columns(model, ANCHORS[:4], POSITIVES[:4]))
