"""What PyTorch and its users do with modules: copy, move, keep and restore them. Every loss must survive all of it."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.testing import assert_close
from transformers import PretrainedConfig, PreTrainedModel

from negative_cache import NegativeCacheLoss
from negative_cache.cache.rows import CacheHolder, NegativeCache
from negative_cache.filter_fns import IsInCacheFilterFn
from negative_cache.handlers import CacheLossHandler, MultiCacheLossHandler
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.losses import CacheClassificationLoss, DistributedCacheClassificationLoss
from negative_cache.negative_cache import CacheManager, FixedLenFeature, QuantizedFeature, RaggedFeature
from support import ANCHORS, POSITIVES, assert_same_state, columns, run_ranks
from text_models import make_static

BATCH, DIM, WORDS = 4, 8, 50
WARM, MORE = 3, 2  # steps before and after what is tested; the former fill all rows


class Tower(nn.Module):
    """The mean embedding of the words of a document, padded with 0, plus a number."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, DIM)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        is_word = (features["words"] > 0).unsqueeze(-1)
        mean = (self.words(features["words"]) * is_word).sum(dim=1) / is_word.sum(dim=1).clamp(min=1)
        if "number" in features:
            mean = mean + features["number"].to(mean.dtype)[:, None]
        return nn.functional.normalize(mean, dim=1)


def documents(number: int) -> dict[str, Tensor]:
    """The documents of a batch: ragged words, and a number."""
    with torch.device("cpu"):
        rng = torch.Generator().manual_seed(number)
        words = torch.randint(1, WORDS, (BATCH, 5), generator=rng)
        is_word = torch.arange(5) < torch.randint(2, 6, (BATCH, 1), generator=rng)
        return {"words": torch.where(is_word, words, 0), "number": torch.rand(BATCH, generator=rng)}


def twenty(scores: Tensor) -> Tensor:
    return 20 * scores


# A model with each of the losses


class Training(nn.Module):
    """A model with its loss, as one module. A step trains on the batch of a number."""

    loss: Any

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = Tower()

    def forward(self, number: int) -> Tensor:
        raise NotImplementedError

    def step(self, number: int) -> list[float]:
        """The value of the loss and the norms of all gradients."""
        self.zero_grad()
        loss = self(number)
        loss.backward()
        gradients = [(value, value.grad) for value in self.parameters() if value.grad is not None]
        with torch.no_grad():
            for value, gradient in gradients:
                value -= 0.1 * gradient
        return [float(loss.detach()), *(float(gradient.norm()) for _, gradient in gradients)]


class Default(Training):
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.loss = NegativeCacheLoss(self.tower, cache_size=10, seed=1, **{"num_samples": 1, **self.options})

    def forward(self, number: int) -> Tensor:
        features = documents(number)
        ids = (torch.arange(BATCH, device="cpu") + 3 * number) % 40
        return self.loss(self.tower({"words": features["words"][:, :2]}), self.tower(features), features, ids)


class Ragged(Default):
    options: ClassVar[dict[str, Any]] = {
        "learnable_scale": True,
        "embedding_dtype": torch.int8,
        "specs": {"words": RaggedFeature(torch.int64), "number": FixedLenFeature([], torch.float32)},
        "refresh_per_step": 2,
    }


class Automatic(Default):
    """The cache counts from the second step on, whatever the noise."""

    options: ClassVar[dict[str, Any]] = {"num_samples": "auto"}

    def forward(self, number: int) -> Tensor:
        self.loss.is_waiting = self.loss.is_waiting and number != 1
        return super().forward(number)


class OnHost(Default):
    options: ClassVar[dict[str, Any]] = {
        "feature_device": "cpu",
        "embedding_dtype": torch.bfloat16,
        "in_batch": False,
        "shared": False,
    }


class Ranking(Training):
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        nn.Module.__init__(self)
        with torch.device("cpu"):
            self.tower = make_static(dim=DIM)
        self.loss = NegativeCacheRankingLoss(self.tower, cache_size=10, num_samples=1, seed=1, **self.options)

    def forward(self, number: int) -> Tensor:
        numbers = [(number + i) % len(ANCHORS) for i in range(BATCH)]
        with torch.device("cpu"):
            inputs = columns(self.tower, [ANCHORS[i] for i in numbers], [POSITIVES[i] for i in numbers])
        return self.loss(inputs)


class Symmetric(Ranking):
    options: ClassVar[dict[str, Any]] = {"symmetric": True, "learnable_scale": True}


SPECS = {
    "embedding": FixedLenFeature([DIM], torch.float32),
    "words": RaggedFeature(torch.int64, 5),
    "number": FixedLenFeature([], torch.float32),
}
FIXED = {**SPECS, "words": FixedLenFeature([5], torch.int64)}
KEYS: tuple[Any, ...] = ("embedding", ("words", "number"))


class Handler(Training):
    specs: dict[str, Any] = SPECS

    def __init__(self) -> None:
        super().__init__()
        self.loss = CacheLossHandler(CacheManager(self.specs, 10), CacheClassificationLoss(*KEYS, twenty), *KEYS)

    def forward(self, number: int) -> Tensor:
        features = documents(number)
        queries, positives = self.tower({"words": features["words"][:, :2]}), self.tower(features)
        return self.loss.update_cache_and_compute_loss(self.tower, queries, positives, features)


class FixedHandler(Handler):
    specs = FIXED


class SeveralCaches(Training):
    def __init__(self) -> None:
        super().__init__()
        quantized = {**SPECS, "embedding": QuantizedFeature([DIM])}
        managers = {"a": CacheManager(SPECS, 10), "b.c": CacheManager(quantized, 8, use_lru=False)}
        loss = CacheClassificationLoss(*KEYS, twenty, top_k=8)
        self.loss = MultiCacheLossHandler(managers, loss, *KEYS, filter_fn=IsInCacheFilterFn(["number"]))

    def forward(self, number: int) -> Tensor:
        features, other = documents(number), documents(100 + number % 3)
        queries, positives = self.tower({"words": features["words"][:, :2]}), self.tower(features)
        embeddings, both = {"a": positives, "b.c": self.tower(other)}, {"a": features, "b.c": other}
        return self.loss.update_cache_and_compute_loss(self.tower, queries, positives, embeddings, both)


class ByHand(Training):
    """A cache and a loss of the earlier implementations without a handler; the user saves the generator."""

    specs: dict[str, Any] = SPECS

    def __init__(self) -> None:
        super().__init__()
        self.manager, self.cache_loss = CacheManager(self.specs, 10), CacheClassificationLoss(*KEYS, twenty)
        self.loss = self.manager.init_cache()

    def forward(self, number: int) -> Tensor:
        features = documents(number)
        queries, positives = self.tower({"words": features["words"][:, :2]}), self.tower(features)
        before = self.cache_loss.generator.get_state()
        result = self.cache_loss(self.tower, queries, positives, {"x": self.loss})
        if not (self.training and torch.is_grad_enabled()):
            self.cache_loss.generator.set_state(before)
            return result.training_loss
        self.loss = self.manager.update_cache(
            self.loss,
            new_items={"embedding": positives.detach(), **features},
            updated_item_data=result.updated_item_data["x"],
            updated_item_indices=result.updated_item_indices["x"],
            updated_item_mask=result.updated_item_mask["x"],
        )
        return result.training_loss

    def get_extra_state(self) -> Tensor:
        return self.cache_loss.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.cache_loss.generator.set_state(state)


class FixedByHand(ByHand):
    specs = FIXED


LOSSES = [Default, Ragged, Automatic, OnHost, Ranking, Symmetric, Handler, SeveralCaches, ByHand]


def warm(kind: type[Training], steps: int = WARM) -> Training:
    training = kind()
    for number in range(steps):
        training.step(number)
    return training


def more(training: Training) -> list[list[float]]:
    return [training.step(number) for number in range(WARM, WARM + MORE)]


@functools.cache
def of_the_twin(kind: type[Training]) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The next steps of an untouched twin, and its state after them."""
    twin = warm(kind)
    return more(twin), copy.deepcopy(twin.state_dict())


def assert_equals_the_twin(training: Training) -> None:
    values, state = of_the_twin(next(kind for kind in LOSSES if type(training) is kind))
    assert more(training) == values
    assert_same_state(training.state_dict(), state)


# Ways to get a module that must go on like the given one


def unpickled(training: Training) -> Training:
    return pickle.loads(pickle.dumps(training))


def saved(training: Training) -> Training:
    file = io.BytesIO()
    torch.save(training, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def restored(training: Training) -> Training:
    other = type(training)()
    other.load_state_dict(training.state_dict())
    return other


def restored_over_another(training: Training) -> Training:
    other = warm(type(training), 1)
    other.load_state_dict(training.state_dict())
    return other


def restored_in_inference_mode(training: Training) -> Training:
    other = type(training)()
    with torch.inference_mode():
        other.load_state_dict(training.state_dict())
    return other


def restored_and_evaluated(training: Training) -> Training:
    return evaluated(restored(training))


def assigned_to_meta(training: Training) -> Training:
    with torch.device("meta"):
        other = type(training)()
    other.load_state_dict(copy.deepcopy(training.state_dict()), assign=True)
    return other


def assigned_after_moving_to_meta(training: Training) -> Training:
    other = copy.deepcopy(training).to("meta")
    other.load_state_dict(copy.deepcopy(training.state_dict()), assign=True)
    return other


def emptied_from_meta(training: Training) -> Training:
    with torch.device("meta"):
        other = type(training)()
    other.to_empty(device="cpu").load_state_dict(training.state_dict())
    return other


def emptied(training: Training) -> Training:
    other = copy.deepcopy(training)
    other.to_empty(device="cpu").load_state_dict(training.state_dict())
    return other


def evaluated(training: Training) -> Training:
    training.eval()
    with torch.inference_mode():
        training(5)
    with torch.no_grad():
        training(6)
    training(7)
    return training.train()


def moved(training: Training) -> Training:
    return training.to("cpu").to(torch.device("cpu"), torch.float32).requires_grad_(False).requires_grad_(True)


def in_shared_memory(training: Training) -> Training:
    return training.share_memory()


COPIES = [
    unpickled, saved, copy.deepcopy, restored, restored_over_another, restored_in_inference_mode,
    restored_and_evaluated, assigned_to_meta, assigned_after_moving_to_meta, emptied_from_meta, emptied,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*do not change the dtypes:UserWarning")
@pytest.mark.parametrize("way", [*COPIES, evaluated, moved, in_shared_memory])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_next_steps_are_those_of_an_untouched_twin(kind: type[Training], way: Callable[[Training], Training]):
    training = warm(kind)
    other = way(training)
    assert (other is not training) == (way in COPIES)
    assert_equals_the_twin(other)
    if way in COPIES:
        assert_equals_the_twin(training)  # the copy has changed nothing of the original


def go_on(trainings: list[Training], answers: Any) -> None:
    answers.put([more(training) for training in trainings])


def test_a_started_process_trains_a_pickled_module_like_its_twin():
    kinds = [Ragged, Symmetric, Handler]
    context = mp.get_context("forkserver")
    answers = context.SimpleQueue()
    process = context.Process(target=go_on, args=([warm(kind) for kind in kinds], answers))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert answers.get() == [of_the_twin(kind)[0] for kind in kinds]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_kept_state_dict_of_a_loss_is_from_one_moment(kind: type[Training]):
    training = warm(kind)
    kept, expected = training.loss.state_dict(), copy.deepcopy(training.loss.state_dict())
    more(training)
    of_the_model = [key for key in kept if key.startswith("model.")]  # live, as in every module of PyTorch
    assert [key for key in kept if not torch.equal(kept[key], expected[key])] == of_the_model
    live = training.loss.state_dict(keep_vars=True)
    assert {value.data_ptr() for value in buffers(training.loss)} <= {value.data_ptr() for value in live.values()}


def caches(module: nn.Module) -> list[NegativeCache]:
    """All caches in a module, which a `CacheHolder` hides."""
    found = [part for part in module.modules() if isinstance(part, NegativeCache)]
    return found + [
        cache for part in module.modules() if isinstance(part, CacheHolder) for cache in part._held.values()
    ]


def buffers(module: nn.Module) -> list[Tensor]:
    """The tensors of all caches that are part of a state dict, without arenas, which are saved without gaps."""
    state = [cache.state_dict(keep_vars=True) for cache in caches(module)]
    return [value for part in state for key, value in part.items() if not key.endswith(("arena", "offsets", "_state"))]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_creates_nothing_on_the_default_device(kind: type[Training]):
    training, (values, state) = warm(kind), of_the_twin(kind)
    with torch.device("meta"):
        assert more(training) == values
        found = training.state_dict()
        training.load_state_dict(found)
        training.loss.to("cpu")
    assert_same_state(found, state)


@pytest.mark.parametrize("kind", [Default, Ragged, OnHost])
def test_what_is_created_in_inference_mode_can_be_trained(kind: type[Default]):
    """A cache, its table of ids, and arenas: `fill_from`, and an evaluation before the first step."""
    training, twin = kind(), kind()
    with torch.inference_mode():
        training(0)
    corpus = [{"document_features": documents(7), "document_ids": torch.arange(100, 100 + BATCH)}]
    with torch.inference_mode():
        training.loss.fill_from(corpus)
        evaluated(training)
    twin.loss.fill_from(corpus)
    assert more(training) == more(twin)
    assert_same_state(training.state_dict(), twin.state_dict())


def test_a_cache_of_inference_tensors_can_be_updated():
    with torch.inference_mode():
        cache = NegativeCache({"embedding": torch.zeros(4, DIM)}, torch.zeros(4, dtype=torch.int64))
    manager = CacheManager({"embedding": FixedLenFeature([DIM], torch.float32)}, 4)
    for _ in range(2):
        cache = manager.update_cache(cache, new_items={"embedding": torch.ones(1, DIM)})
    assert cache.data["embedding"].sum(dim=1).tolist() == [DIM, DIM, 0, 0]


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("kind", [Default, OnHost, Handler, SeveralCaches, ByHand])
def test_a_cast_of_the_loss_changes_no_stored_value(kind: type[Training], cast: str):
    training, (values, state) = warm(kind), of_the_twin(kind)
    is_warned = kind is OnHost or cast != "float"
    with pytest.warns(UserWarning, match="do not change the dtypes") if is_warned else contextlib.nullcontext():
        getattr(training.loss, cast)()
    assert more(training) == values
    assert_same_state(training.state_dict(), state)


@pytest.mark.filterwarnings("ignore:.*do not change the dtypes:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [Ragged, Symmetric, Handler])
def test_a_model_can_be_cast_with_its_loss(kind: type[Training], dtype: torch.dtype):
    training = warm(kind)
    before = [value.dtype for value in buffers(training)]
    training.to(dtype)
    assert {value.dtype for value in training.parameters()} == {dtype}
    values = [value for step in more(training) for value in step]
    assert torch.tensor(values).isfinite().all()
    assert [value.dtype for value in buffers(training)] == before


def test_type_casts_no_ids():
    loss = warm(Ragged).loss
    with pytest.warns(UserWarning, match="do not change the dtypes"):
        loss.type(torch.float16)
    assert loss.cache.document_ids.dtype == loss.cache.step.dtype == torch.int64


@pytest.mark.parametrize("kind", [Ragged, Handler, SeveralCaches, ByHand])
def test_to_empty_leaves_no_rows(kind: type[Training]):
    training = warm(kind)
    training.loss.to_empty(device="cpu")
    assert caches(training.loss)
    for cache in caches(training.loss):
        assert not cache.has_rows()
        assert_same_state(cache.state_dict(), NegativeCache.empty(cache.specs, cache.num_rows).state_dict())


def test_share_memory_shares_all_tensors_of_a_cache():
    assert all(value.is_shared() for value in buffers(warm(OnHost).share_memory()))


# Copies


def test_a_copy_has_the_copied_encoder():
    training = warm(Default)
    assert (
        copy.deepcopy(training).loss.document_encoder.words.weight.data_ptr() != training.tower.words.weight.data_ptr()
    )
    both = copy.deepcopy(training)
    assert both.loss.document_encoder is both.tower
    alone = copy.deepcopy(training.loss)
    assert alone.document_encoder is not training.tower
    ranking = copy.deepcopy(warm(Symmetric, 1)).loss
    assert ranking.cache_loss.document_encoder.__self__ is ranking._documents
    assert ranking._documents._embed.__self__ is ranking


def test_a_copy_says_that_its_encoder_is_the_function_of_the_original():
    training = Default()
    training.loss.document_encoder = lambda features: training.tower(features)
    with pytest.warns(UserWarning, match="Assign `document_encoder` of the copy"):
        assert copy.deepcopy(training.loss).document_encoder is training.loss.document_encoder


# transformers


class Config(PretrainedConfig):
    model_type = "towers"

    def __init__(self, kind: str = "Training", **options: Any) -> None:
        super().__init__(**options)
        self.kind = kind


class Pretrained(PreTrainedModel):
    """A model of transformers with an encoder and, unless `kind` is `Training`, a loss."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.loop = globals()[config.kind]()
        self.post_init()


def reloaded(model: Pretrained, folder: Path, kind: str) -> Pretrained:
    """Saved by one class of models, and loaded by another."""
    model.save_pretrained(folder)
    return Pretrained.from_pretrained(folder, config=Config(kind)).train()


@pytest.mark.parametrize("kind", [Default, Ragged, FixedHandler, FixedByHand])
def test_from_pretrained_leaves_a_loss_without_saved_values_as_it_was_made(kind: type[Training], tmp_path: Path):
    model = reloaded(Pretrained(Config()), tmp_path, kind.__name__)
    fresh = kind()
    assert_same_state(dict(model.loop.loss.named_parameters()), dict(fresh.loss.named_parameters()))
    fresh.load_state_dict(model.loop.state_dict())  # the weights of the encoder, and the state of a random generator
    for restored, made in zip(caches(model.loop), caches(kind()), strict=True):
        assert_same_state(restored.state_dict(), made.state_dict())
    assert_close(more(model.loop), more(fresh), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [FixedHandler, FixedByHand])
def test_from_pretrained_restores_a_cache_of_fixed_features(kind: type[Training], tmp_path: Path):
    model = Pretrained(Config(kind.__name__))
    for number in range(WARM):
        model.loop.step(number)
    assert_close(more(reloaded(model, tmp_path, kind.__name__).loop), more(model.loop), rtol=1e-5, atol=0)


def test_from_pretrained_restores_a_learnable_scale(tmp_path: Path):
    model = Pretrained(Config("Ragged"))
    nn.init.constant_(model.loop.loss.log_scale, 1.5)
    model = reloaded(model, tmp_path, "Ragged")
    model.init_weights()  # a second time, which skips what is initialized
    assert model.loop.loss.log_scale.tolist() == [1.5]


# Process groups


def copies_on_ranks(rank: int, world_size: int, folder: Path) -> None:
    """A copy has the group of the original, and averages the gradient of a scale as the original does."""
    for group in ("world", dist.group.WORLD):
        loss = NegativeCacheLoss(Tower(), 32, process_group=group)
        assert loss.ranks.size == world_size
        assert copy.deepcopy(loss).ranks.group is loss.ranks.group
    with pytest.raises(TypeError, match="with a process group cannot be pickled"):
        pickle.dumps(loss)
    earlier = DistributedCacheClassificationLoss(*KEYS, process_group=dist.group.WORLD)
    assert copy.deepcopy(earlier).process_group is dist.group.WORLD
    with pytest.raises(TypeError, match="with a process group cannot be pickled"):
        pickle.dumps(earlier)
    assert unpickled(NegativeCacheLoss(Tower(), 32, process_group="world")).ranks.size == world_size
    for way in (lambda training: training, copy.deepcopy, unpickled, assigned_to_meta):
        training = way(warm(Symmetric))
        training.step(WARM + rank)  # another batch on each rank
        scale = training.loss.cache_loss.log_scale
        assert training.loss.query_cache_loss.log_scale is scale
        both = [torch.zeros_like(scale) for _ in range(world_size)]
        dist.all_gather(both, scale.grad)
        assert torch.equal(*both)
        assert both[0] != 0


def sharded_on_ranks(rank: int, world_size: int, folder: Path) -> None:
    """FSDP shards a model with its loss, learnable scale included, also if they are made on the device "meta"."""
    mesh, first = init_device_mesh("cpu", (world_size,)), Ragged()(0).item()
    training = fully_shard(Ragged(), mesh=mesh)
    whole = FullyShardedDataParallel(Ragged(), device_id=torch.device("cpu"), sync_module_states=False)
    for sharded in (training, whole):
        loss = sharded(0)
        loss.backward()
        assert loss.item() == first
    assert training.loss.log_scale.grad.full_tensor() != 0
    with torch.device("meta"):
        training, other = Ragged(), ByHand()
    fully_shard(training, mesh=mesh)
    training.to_empty(device="cpu")
    training.loss.reset_parameters()
    nn.init.ones_(training.tower.words.weight)
    assert training.loss.log_scale.full_tensor().tolist() == Ragged().loss.log_scale.tolist()
    training(0).backward()
    FullyShardedDataParallel(other, device_id=torch.device("cpu"))  # empties each module, and then initializes it
    assert_same_state(other.loss.state_dict(), ByHand().loss.state_dict())


@pytest.mark.parametrize("job", [copies_on_ranks, sharded_on_ranks])
def test_on_two_ranks(job: Callable[..., None], tmp_path: Path):
    run_ranks(job, 2, tmp_path)
