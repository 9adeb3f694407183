"""Everything that users of sentence-transformers combine with a loss, each tried in the real trainer."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import sentence_transformers
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from test_sentence_transformers import columns
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import TrainerCallback

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.sentence_transformers.text import TextSide
from negative_cache.integrations.sentence_transformers.tokens import TOKENS, hash_tokens
from negative_cache.integrations.trainer import NegativeCacheTrainer, cache_losses
from negative_cache.workbench.models import load_model
from support import ANCHORS, HARD, POSITIVES, assert_same_state, run_ranks, snapshot

VERSION = tuple(int(part) for part in sentence_transformers.__version__.split(".")[:2])
TEXTS = [*ANCHORS, *POSITIVES, *HARD]
PAIRS = {"anchor": ANCHORS, "positive": POSITIVES}
SHORT = {"anchor": ANCHORS, "positive": HARD}  # all of nearly one length, so that little is compiled
TRIPLETS = {**PAIRS, "negative": HARD}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Transformers 4 leaves settings of one trainer in the environment of the next."""
    with patch.dict(os.environ):
        yield


@functools.cache  # a tokenizer that is trained again numbers its tokens in another way
def _tiny() -> SentenceTransformer:
    return load_model("tiny", TEXTS, 0).to("cpu")


def make_tiny(dropout: float = 0.1) -> SentenceTransformer:
    """A transformer of two layers."""
    model = copy.deepcopy(_tiny())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def make_static(dim: int = 32, seed: int = 0) -> SentenceTransformer:
    torch.manual_seed(seed)
    words = sorted({word for text in TEXTS for word in text.split()})
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=dim)], device="cpu")


def make_trainer(
    model: SentenceTransformer,
    loss: Any,
    data: Any,
    folder: Path,
    steps: int = 6,
    evaluated: Any = None,
    **settings: Any,
) -> NegativeCacheTrainer:
    defaults = {"learning_rate": 1e-3, "save_strategy": "no", "per_device_train_batch_size": 4, "logging_steps": 1}
    args = SentenceTransformerTrainingArguments(
        str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        lr_scheduler_type="constant", **defaults | settings,
    )  # fmt: skip
    data = Dataset.from_dict(data) if isinstance(data, dict) and isinstance(next(iter(data.values())), list) else data
    return NegativeCacheTrainer(model=model, args=args, train_dataset=data, eval_dataset=evaluated, loss=loss)


def train(*args: Any, **settings: Any) -> NegativeCacheTrainer:
    trainer = make_trainer(*args, **settings)
    trainer.train()
    return trainer


def losses_of(trainer: NegativeCacheTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def cached_texts(loss: NegativeCacheRankingLoss) -> list[str]:
    """The texts of all cached documents, as the tokenizer gives them back."""
    cache = loss.cache_loss.cache
    return sorted(loss._sides[1].decode(cache.read(cache.filled.nonzero()[:, 0], [TOKENS])))


def encode(model: SentenceTransformer, texts: list[str], **how: Any) -> Tensor:
    return model.eval().encode(texts, convert_to_tensor=True, normalize_embeddings=True, **how)


def encode_cached(loss: NegativeCacheRankingLoss) -> Tensor:
    """Cached documents encoded anew, in the order of their rows."""
    loss.model.eval()
    cache = loss.cache_loss.cache
    rows = cache.filled.nonzero()[:, 0]
    with torch.no_grad():
        return loss.cache_loss.document_encoder(cache.read(rows, [k for k in cache.specs if k != "embedding"]))


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def test_accumulated_gradients_are_the_mean_of_the_parts(tmp_path: Path):
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    other = copy.deepcopy(loss)
    parts: list[Any] = []
    loss.register_forward_pre_hook(lambda _, inputs: parts.append(copy.deepcopy(inputs)))
    gradients = Gradients()
    settings = {"gradient_accumulation_steps": 3, "learning_rate": 0.0, "max_grad_norm": 0.0}
    trainer = make_trainer(model, loss, PAIRS, tmp_path, steps=2, **settings)
    trainer.add_callback(gradients)
    trainer.train()
    assert len(parts) == 6
    for number, found in enumerate(gradients.steps):
        other.zero_grad()
        for features, labels in parts[3 * number : 3 * number + 3]:
            (other(features, labels) / 3).backward()
        expected = {name: p.grad for name, p in other.model.named_parameters()}
        torch.testing.assert_close(found, expected)
    assert int(loss.cache_loss.cache.step) == 6  # the cache is written with each part
    assert_same_state(snapshot(loss.cache_loss), snapshot(other.cache_loss))


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(is_reentrant: bool, tmp_path: Path):
    found = []
    for settings in ({}, {"gradient_checkpointing": True}):
        if settings:
            settings["gradient_checkpointing_kwargs"] = {"use_reentrant": is_reentrant}
        model = make_tiny()  # with dropout: it must be the same when activations are made again
        trainer = train(model, NegativeCacheRankingLoss(model, 32, seed=0), TRIPLETS, tmp_path, steps=3, **settings)
        found.append((losses_of(trainer), snapshot(model)))
    assert found[0][0] == pytest.approx(found[1][0], abs=2e-3)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def make_adapted(folder: Path) -> SentenceTransformer:
    from peft import LoraConfig

    if not folder.exists():
        make_tiny().save_pretrained(str(folder))
    model = SentenceTransformer(str(folder), device="cpu")
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]))
    return model


def test_adapters_alone_are_trained_and_a_run_goes_on(tmp_path: Path):
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True}
    model = make_adapted(tmp_path / "base")
    before = snapshot(model)
    whole = train(model, NegativeCacheRankingLoss(model, 32, seed=0), PAIRS, tmp_path, steps=5, **settings)
    changed = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= changed
    if VERSION < (6, 0):
        return  # 5.4 itself cannot load a checkpoint of adapters
    again = make_adapted(tmp_path / "base")
    resumed = make_trainer(again, NegativeCacheRankingLoss(again, 32, seed=0), PAIRS, tmp_path, steps=5, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(snapshot(model), snapshot(again))
    assert_same_state(snapshot(whole.loss.cache_loss), snapshot(resumed.loss.cache_loss))


def test_bfloat16_in_the_arguments(tmp_path: Path):
    logged = []
    for bf16 in (False, True):
        model = make_tiny(dropout=0.0)
        trainer = train(model, NegativeCacheRankingLoss(model, 32, seed=0), PAIRS, tmp_path, steps=3, bf16=bf16)
        logged.append(losses_of(trainer))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert trainer.loss.cache_loss.cache.data["embedding"].dtype == torch.float32
    assert logged[0] == pytest.approx(logged[1], rel=0.05)
    assert logged[0] != logged[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gradients_are_near_those_of_float32(dtype: torch.dtype):
    found = []
    for enabled in (False, True):
        model = make_tiny(dropout=0.0)
        loss = NegativeCacheRankingLoss(model, 32, seed=0)
        for start in (0, 6):
            model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                value = loss(columns(model, ANCHORS[start : start + 6], POSITIVES[start : start + 6]))
            value.backward()
        assert value.dtype == torch.float32
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*found, dim=0) > 0.99


def halves() -> DatasetDict:
    first = Dataset.from_dict({"anchor": ANCHORS[:6], "positive": POSITIVES[:6]})
    second = {"anchor": ANCHORS[6:], "positive": POSITIVES[6:], "negative": HARD[6:]}
    return DatasetDict({"pairs": first, "triplets": Dataset.from_dict(second)})


def test_several_datasets_with_a_loss_each(tmp_path: Path):
    model = make_static()
    losses = {name: NegativeCacheRankingLoss(model, 32, seed=0) for name in ("pairs", "triplets")}
    trainer = train(model, losses, halves(), tmp_path, steps=8, save_strategy="steps", save_steps=8)
    assert cached_texts(losses["pairs"]) == sorted(POSITIVES[:6])
    assert cached_texts(losses["triplets"]) == sorted([*POSITIVES[6:], *HARD[6:]])
    saved = sorted(path.name for path in (tmp_path / "checkpoint-8" / "negative_cache").iterdir())
    assert saved == ["pairs.cache_loss", "triplets.cache_loss"]
    assert {"cache/pairs.cache_loss/fill", "cache/triplets.cache_loss/fill"} <= set(trainer.state.log_history[-2])


@pytest.mark.parametrize("is_named", [False, True])
def test_several_datasets_with_one_loss_share_its_cache(is_named: bool, tmp_path: Path):
    """One loss for all datasets, or the same one under the name of each: saved and restored once."""

    def make(steps: int) -> NegativeCacheTrainer:
        model = make_static()
        loss: Any = NegativeCacheRankingLoss(model, 32, seed=0)
        loss = {"pairs": loss, "triplets": loss} if is_named else loss
        return make_trainer(model, loss, halves(), tmp_path, steps, save_strategy="steps", save_steps=4)

    trainer = make(8)
    trainer.train()
    loss = trainer.loss["pairs"] if is_named else trainer.loss
    assert cached_texts(loss) == sorted([*POSITIVES, *HARD[6:]])
    assert len(list((tmp_path / "checkpoint-8" / "negative_cache").iterdir())) == 1
    assert len(cache_losses(trainer.loss)) == 1
    assert any("cache/fill" in entry for entry in trainer.state.log_history)
    resumed = make(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (other,) = cache_losses(resumed.loss).values()
    assert_same_state(snapshot(loss.cache_loss), snapshot(other))


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_are_part_of_cached_documents(include_prompt: bool, tmp_path: Path):
    model = make_tiny(dropout=0.0)
    next(module for module in model.modules() if isinstance(module, Pooling)).include_prompt = include_prompt
    prompts = {"anchor": "what is known about ", "positive": "an essay "}
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    corpus = [*POSITIVES, *HARD]
    loss.fill_from(corpus, prompt="an essay ", show_progress_bar=False)
    expected = encode(model, corpus, prompt="an essay ")
    torch.testing.assert_close(loss.cache_loss.cache.data["embedding"][:24], expected, rtol=1e-4, atol=1e-5)
    train(model, loss, PAIRS, tmp_path, steps=3, prompts=prompts)
    assert int(loss.cache_loss.cache.num_filled) == 24  # the same texts: each went into its own row
    expected = encode(model, corpus, prompt="an essay ")
    torch.testing.assert_close(encode_cached(loss), expected, rtol=1e-4, atol=1e-5)
    bare = encode(model, corpus)
    assert (expected - bare).abs().max() > 1e-3


def test_prompts_of_other_lengths_are_refused_where_the_pooling_leaves_them_out():
    model = make_tiny()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)

    def batch(prompt: str) -> list[dict[str, Any]]:
        return [model.preprocess(ANCHORS[:3]), model.preprocess(POSITIVES[:3], prompt=prompt)]

    loss(batch("an essay "))
    loss(batch("what is known about "))  # here the prompt is a part of the text like any other
    next(module for module in model.modules() if isinstance(module, Pooling)).include_prompt = False
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    loss(batch("an essay "))
    with pytest.raises(ValueError, match=r"prompt_length.*loss of its own"):
        loss(batch("what is known about "))
    with torch.no_grad():
        assert loss.eval()(batch("what is known about ")) > 0  # in evaluation nothing is encoded again
    per_row = batch("an essay ")
    per_row[1]["prompt_length"] = torch.tensor([per_row[1]["prompt_length"]] * 3)  # as a streaming dataset has it
    loss.train()(per_row)


def make_router() -> SentenceTransformer:
    """Queries by a static model, documents by a transformer: other tokenizers, other inputs."""
    towers = Router.for_query_document(
        query_modules=list(make_static(dim=128).children()), document_modules=list(make_tiny(dropout=0.0).children())
    )
    return SentenceTransformer(modules=[towers], device="cpu")


def test_two_towers(tmp_path: Path):
    model = make_router()
    loss = NegativeCacheRankingLoss(model, 32, seed=0, symmetric=True)
    loss.fill_from(HARD, task="document", show_progress_bar=False)
    torch.testing.assert_close(
        loss.cache_loss.cache.data["embedding"][:12], encode(model, HARD, task="document"), rtol=1e-4, atol=1e-5
    )
    before = snapshot(model)
    mapping = {"anchor": "query", "positive": "document"}
    train(model, loss, PAIRS, tmp_path, steps=6, router_mapping=mapping, learning_rate=1e-2)
    changed = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert {name.split(".")[2] for name in changed} == {"query", "document"}
    expected = encode(model, [*HARD, *POSITIVES], task="document")
    found = encode_cached(loss)
    assert (found @ expected.T).amax(dim=1).min() > 0.9999
    assert (found @ encode(model, POSITIVES, task="query").T).max() < 0.99
    with torch.no_grad():
        anchors = loss.query_cache_loss.document_encoder(loss.query_cache_loss.cache.read(torch.arange(12), [TOKENS]))
    assert (anchors @ encode(model, ANCHORS, task="query").T).amax(dim=1).min() > 0.9999


def test_documents_by_two_routes_are_refused():
    model = make_router()
    loss = NegativeCacheRankingLoss(model, 32)
    with pytest.raises(ValueError, match="the same route"):
        loss(
            [
                model.preprocess(ANCHORS, task="query"),
                *(model.preprocess(POSITIVES, task=t) for t in ("document", "query")),
            ]
        )


@pytest.mark.skipif(VERSION < (5, 7), reason="before 5.7, MatryoshkaLoss tells a loss nothing: see the next test")
def test_matryoshka_loss_around(tmp_path: Path):
    """The first step has no cache: it is MatryoshkaLoss around the in-batch loss."""
    gradients = []
    for inner in (NegativeCacheRankingLoss, MultipleNegativesRankingLoss):
        model = make_static()
        loss = inner(model)
        value = MatryoshkaLoss(model, loss, [32, 16, 8])(columns(model, ANCHORS, POSITIVES), None)
        value.backward()
        gradients.append((value.detach(), model[0].embedding.weight.grad))
    torch.testing.assert_close(*gradients)
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    trainer = train(model, MatryoshkaLoss(model, loss, [32, 8]), PAIRS, tmp_path, steps=30, learning_rate=0.02)
    assert int(loss.cache_loss.cache.num_filled) == 12
    plain = make_static()
    same = NegativeCacheRankingLoss(plain, 32, seed=0, matryoshka_dims=(8,))
    assert losses_of(trainer) == losses_of(train(plain, same, PAIRS, tmp_path, steps=30, learning_rate=0.02))
    for settings in ({"matryoshka_weights": [1, 0.5]}, {"n_dims_per_step": 1}):
        with pytest.raises(ValueError, match="weight 1 and in each step"):
            MatryoshkaLoss(model, NegativeCacheRankingLoss(model, 32), [32, 8], **settings)(
                columns(model, ANCHORS, POSITIVES), None
            )
    with pytest.raises(ValueError, match="the model's 32"):
        MatryoshkaLoss(model, NegativeCacheRankingLoss(model, 32), [16, 8])(columns(model, ANCHORS, POSITIVES), None)


def test_losses_that_repeat_forward_passes_are_refused():
    model = make_tiny()
    batch = columns(model, ANCHORS, POSITIVES)
    with pytest.warns(UserWarning, match="not compatible") if VERSION >= (5, 7) else _nothing():
        layers = AdaptiveLayerLoss(model, NegativeCacheRankingLoss(model, 32))
    with pytest.raises(ValueError, match="the last layer embeds them"):
        layers(batch, None)
    with pytest.warns(UserWarning, match="not compatible") if VERSION >= (5, 7) else _nothing():
        both = Matryoshka2dLoss(model, NegativeCacheRankingLoss(model, 32), [128, 64])
    with pytest.raises(ValueError, match=r"AdaptiveLayerLoss|matryoshka_dims"):
        both(batch, None)
    if VERSION < (5, 7):
        with pytest.raises(ValueError, match="matryoshka_dims="):
            MatryoshkaLoss(model, NegativeCacheRankingLoss(model, 32), [128, 64])(batch, None)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


# The hashes of 5.4 fail with a newer xxhash.
@pytest.mark.parametrize("sampler", ["no_duplicates", *(["no_duplicates_hashed"] if VERSION >= (6, 0) else [])])
def test_samplers_without_duplicates(sampler: str, tmp_path: Path):
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    doubled = {"anchor": ANCHORS * 2, "positive": POSITIVES * 2, "label": list(range(12)) * 2}
    train(model, loss, doubled, tmp_path, steps=6, batch_sampler=sampler)
    assert sorted(loss.cache_loss.cache.document_ids[:12].tolist()) == list(range(12))
    assert int(loss.cache_loss.cache.num_filled) == 12


def test_evaluation_is_the_exact_loss_and_writes_nothing(tmp_path: Path):
    """Against the batch and all that is cached; the best checkpoint's weights come back at the end."""
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    other = Dataset.from_dict({"anchor": ANCHORS[:4], "positive": HARD[:4]})
    trainer = train(
        model, loss, PAIRS, tmp_path, steps=6, evaluated=other, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        learning_rate=0.5,
    )  # fmt: skip
    state = snapshot(loss.cache_loss)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(evaluated)
    best = SentenceTransformer(trainer.state.best_model_checkpoint, device="cpu")
    assert torch.equal(best[0].embedding.weight, model[0].embedding.weight)
    found = trainer.evaluate()["eval_loss"]
    queries, documents = encode(model, ANCHORS[:4]), encode(model, HARD[:4])
    cache = loss.cache_loss.cache
    everything = torch.cat([documents, cache.data["embedding"][cache.filled]])
    expected = nn.functional.cross_entropy(20 * queries @ everything.T, torch.arange(4))
    assert found == pytest.approx(expected.item(), abs=1e-4)
    assert_same_state(state, snapshot(loss.cache_loss))


def test_a_compiled_model(tmp_path: Path):
    logged = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = make_tiny(dropout=0.0)
        trainer = train(model, NegativeCacheRankingLoss(model, 32, seed=0), SHORT, tmp_path, steps=2, **settings)
        logged.append(losses_of(trainer))
    assert logged[0] == pytest.approx(logged[1], abs=1e-3)
    assert type(trainer.loss.model).__name__ == "OptimizedModule"
    trainer.loss.fill_from(ANCHORS, show_progress_bar=False)
    assert int(trainer.loss.cache_loss.cache.num_filled) == 20


def test_a_streaming_dataset(tmp_path: Path):
    model = make_tiny()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    labelled = {**PAIRS, "label": list(range(100, 112))}
    stream = Dataset.from_dict(labelled).to_iterable_dataset()
    train(model, loss, stream, tmp_path, steps=4, prompts={"anchor": "what is ", "positive": "an essay "})
    assert sorted(loss.cache_loss.cache.document_ids[:12].tolist()) == list(range(100, 112))


def test_flat_inputs_in_data_parallel_are_refused():
    """Padded inputs have a row per text, which nn.DataParallel can deal out to GPUs; flat ones have not."""
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


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"anchor": ANCHORS, "label": list(range(12))}, "1 text column"),
        ({**PAIRS, "score": [0.5] * 12}, "integer document ids"),
        ({**PAIRS, "label": [[0.5, 0.25]] * 12}, "integer document ids"),
        ({**PAIRS, "label": [1, 0] * 6}, "'n-tuple'"),
        ({"anchor": ANCHORS, "positive": POSITIVES, "label": [[1, 0, 0]] * 12}, "'n-tuple'"),
    ],
    ids=["one column", "scores", "n-tuple-scores", "labeled-pair", "labeled-list"],
)
def test_formats_without_positives_or_ids_are_refused(data: dict[str, list[Any]], error: str, tmp_path: Path):
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 32)
    with pytest.raises(ValueError, match=error):
        train(model, loss, data, tmp_path)
    assert loss.cache_loss.cache is None


def test_mined_negatives_are_columns(tmp_path: Path):
    from sentence_transformers.util import mine_hard_negatives

    pairs = Dataset.from_dict(PAIRS)
    mined = mine_hard_negatives(pairs, make_static(), num_negatives=2, output_format="n-tuple", verbose=False)
    assert len(mined.column_names) == 4
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    train(model, loss, mined, tmp_path, steps=4)
    assert set(cached_texts(loss)) <= set(POSITIVES)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"pixel_values": torch.zeros(2, 3, 4, 4), "image_grid_thw": torch.ones(2, 3)}, "Images"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 8]), "max_length_q": 4}, "flattened flash-attention"),
        ({"input_features": torch.zeros(2, 8, 8)}, "audio"),
    ],
)
def test_what_is_not_padded_text_is_refused(given: dict[str, Any], error: str):
    model = make_tiny()
    loss = NegativeCacheRankingLoss(model, 32)
    anchors, positives = columns(model, ANCHORS[:2], POSITIVES[:2])
    with pytest.raises(ValueError, match=error):
        loss([anchors, {**positives, **given}], None)
    if "cu_seq_lens_q" in given:
        positives["input_ids"] = positives["input_ids"].reshape(1, -1)
        del positives["attention_mask"]
        with pytest.raises(ValueError, match=error):
            loss([anchors, {**positives, **given}], None)
    assert loss.cache_loss.cache is None


def test_the_model_card_tells_what_was_done(tmp_path: Path):
    model = make_static()
    train(model, NegativeCacheRankingLoss(model, 48, num_samples=3), PAIRS, tmp_path / "run", steps=1)
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "loss:NegativeCacheRankingLoss" in card
    assert '"num_samples": 3' in card
    assert "#### NegativeCacheRankingLoss\n```bibtex" in card
    assert "model's inputs" not in card


def symmetric(model: SentenceTransformer, **settings: Any) -> NegativeCacheRankingLoss:
    return NegativeCacheRankingLoss(model, 32, seed=0, symmetric=True, **settings)


def test_equal_anchors_are_no_negatives_of_each_others_documents(static: SentenceTransformer):
    """In the batch, and from the cache: an anchor is known by its text."""
    loss = symmetric(static)
    same = [ANCHORS[0]] * 3
    loss(columns(static, same, POSITIVES[:3]))
    assert int(loss.query_cache_loss.cache.num_filled) == 1
    assert loss.metrics()["query_interpretable_loss"] == 0
    loss(columns(static, same[:1], POSITIVES[3:4]))
    assert loss.metrics()["query_interpretable_loss"] == 0
    loss(columns(static, ANCHORS[1:2], POSITIVES[4:5]))
    assert loss.metrics()["query_interpretable_loss"] > 0


@pytest.mark.parametrize("with_labels", [False, True])
def test_other_anchors_of_a_document_are_not_its_negatives(static: SentenceTransformer, with_labels: bool):
    """Whether they are in the batch, or were in an earlier one."""
    loss = symmetric(static)
    label = torch.tensor([7]) if with_labels else None
    for anchor in ANCHORS[:4]:
        loss(columns(static, [anchor], POSITIVES[:1]), label)
        assert loss.metrics()["query_interpretable_loss"] == 0
    assert int(loss.query_cache_loss.cache.num_filled) == 4
    loss(columns(static, ANCHORS[4:6], POSITIVES[:1] * 2), None if label is None else label.expand(2))
    assert loss.metrics()["query_interpretable_loss"] == 0
    loss(columns(static, ANCHORS[6:7], POSITIVES[1:2]), None if label is None else label + 1)
    assert loss.metrics()["query_interpretable_loss"] > 0


def test_a_guide_encodes_each_text_once(static: SentenceTransformer):
    texts: list[str] = []

    class Counted(SentenceTransformer):
        def encode(self, sentences: list[str], **settings: Any) -> Tensor:
            texts.extend(sentences)
            return super().encode(sentences, **settings)

    guide = Counted(modules=list(make_static(dim=16, seed=1).children()), device="cpu")
    loss = symmetric(static, guide=guide)
    for start in (0, 4):
        at = slice(start, start + 4)
        loss(columns(static, ANCHORS[at], POSITIVES[at], HARD[at])).backward()
    assert sorted(texts) == sorted([*ANCHORS[:8], *POSITIVES[:8], *HARD[:8]])
    stored = loss.query_cache_loss.cache.data["guide_embedding"][:8]
    torch.testing.assert_close(stored, encode(guide, ANCHORS[:8]))


def test_a_guide_reads_queries_by_their_own_route():
    """Two tokenizers: the texts come back from the tokens of the route they came by."""
    model, texts = make_router(), []

    class Listening(SentenceTransformer):
        def encode(self, sentences: list[str], **settings: Any) -> Tensor:
            texts.extend(sentences)
            return super().encode(sentences, **settings)

    guide = Listening(modules=list(make_static(dim=16, seed=1).children()), device="cpu")
    loss = NegativeCacheRankingLoss(model, 32, guide=guide)
    loss([model.preprocess(ANCHORS[:3], task="query"), model.preprocess(POSITIVES[:3], task="document")])
    assert sorted(texts) == sorted([*ANCHORS[:3], *POSITIVES[:3]])


def check_ranks(rank: int, world_size: int, folder: Path) -> None:
    """A corpus with equal texts, a guide and both directions, within DDP."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost"
    )
    model = make_static()
    settings = {"guide": make_static(dim=16, seed=1), "symmetric": True, "gather_across_devices": True}
    loss = NegativeCacheRankingLoss(model, 64, seed=0, **settings)
    loss.fill_from([*HARD[:5], HARD[0], HARD[1].upper(), *HARD[2:]], batch_size=4, show_progress_bar=False)
    cache = loss.cache_loss.cache
    (ids,) = loss.cache_loss.ranks.gather([cache.document_ids[cache.filled]], [[6], [6]])
    assert len(set(ids.tolist())) == 12
    trainer = train(model, loss, PAIRS, folder / "run", steps=4, per_device_train_batch_size=2)
    assert type(loss.model).__name__ == "DistributedDataParallel"
    assert all(value > 0 for value in losses_of(trainer)) or rank


def test_on_several_ranks_equal_texts_have_one_row(tmp_path: Path):
    run_ranks(functools.partial(check_ranks), 2, tmp_path)


def test_equal_ids_of_a_corpus_have_one_row(static: SentenceTransformer):
    loss = NegativeCacheRankingLoss(static, 12)
    loss.fill_from([*POSITIVES[:3], HARD[0]], ids=[5, 6, 7, 5], show_progress_bar=False)
    assert loss.cache_loss.cache.document_ids[:4].tolist() == [5, 6, 7, -1]
    assert cached_texts(loss) == sorted(POSITIVES[:3])


def test_the_padding_is_that_of_the_documents_tokenizer():
    """RoBERTa numbers positions by what is no padding: another token there would be another input."""
    model = make_tiny()
    model.tokenizer.pad_token_id = 3
    side = TextSide("documents", lambda: model, lambda features: features["input_ids"])
    kept = side.take(model.preprocess(POSITIVES[:3]))
    ids = side.encode(kept)
    assert set(ids[kept[TOKENS] == 0].tolist()) == {3}
    assert torch.equal(hash_tokens(kept[TOKENS]), hash_tokens(side.take(model.preprocess(POSITIVES[:3]))[TOKENS]))


def test_the_plain_trainer_takes_the_loss_as_a_function(tmp_path: Path):
    """As hyperparameter searches give it."""
    model = make_static()
    args = make_trainer(model, NegativeCacheRankingLoss(model, 32), PAIRS, tmp_path, steps=2).args
    trainer = SentenceTransformerTrainer(
        model_init=lambda: make_static(),
        args=args,
        train_dataset=Dataset.from_dict(PAIRS),
        loss=lambda made: NegativeCacheRankingLoss(made, 32, seed=0),
    )
    trainer.train()
    assert trainer.loss.model is trainer.model
    assert int(trainer.loss.cache_loss.cache.num_filled) == 8
