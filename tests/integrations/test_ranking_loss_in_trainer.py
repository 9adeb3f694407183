"""`NegativeCacheRankingLoss` in the real trainer, with everything that users combine it with."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from negative_cache.checkpoint import load_checkpoint, save_checkpoint
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.sentence_transformers.tokens import TOKENS
from negative_cache.integrations.trainer import NegativeCacheTrainer, cache_losses
from support import ANCHORS, HARD, POSITIVES, assert_same_state, columns, snapshot
from text_models import (
    PAIRS,
    TRIPLETS,
    VERSION,
    cached_texts,
    encode,
    encode_cached,
    make_router,
    make_static,
    make_tiny,
    make_trainer,
    train,
)

SHORT = {"anchor": ANCHORS, "positive": HARD}  # all of nearly one length, so that little is compiled


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Transformers 4 leaves settings of one trainer in the environment of the next."""
    with patch.dict(os.environ):
        yield


def logged_losses(trainer: NegativeCacheTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("kind", "with_labels"), [("minilm", True), ("static", False)])
def test_training_gives_each_document_a_row_and_evaluation_writes_nothing(
    kind: str, with_labels: bool, request: pytest.FixtureRequest, tmp_path: Path
):
    model = request.getfixturevalue("minilm") if kind == "minilm" else make_static()
    loss = NegativeCacheRankingLoss(model, cache_size=64, seed=0)
    data = PAIRS | ({"label": list(range(100, 112))} if with_labels else {})
    before = snapshot(model)
    learning_rate = 2e-5 if kind == "minilm" else 1e-2
    evaluated = Dataset.from_dict(data)
    trainer = train(model, loss, data, tmp_path, evaluated=evaluated, learning_rate=learning_rate)
    cache = loss.cache_loss.cache
    assert int(cache.num_filled) == 12  # after two epochs
    if with_labels:
        assert sorted(cache.document_ids[cache.filled, 1].tolist()) == list(range(100, 112))
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    state = snapshot(loss.cache_loss)
    assert 0 < trainer.evaluate()["eval_loss"] < 20
    assert_same_state(state, snapshot(loss.cache_loss))
    assert loss.metrics()["fill"] == 12 / 64


def test_a_column_of_negatives_enters_the_cache(tmp_path: Path):
    model = make_static()
    loss = NegativeCacheRankingLoss(model, cache_size=64, seed=0)
    train(model, loss, TRIPLETS, tmp_path, steps=3)
    assert cached_texts(loss) == sorted([*POSITIVES, *HARD])


def test_a_learnable_scale_is_trained(tmp_path: Path):
    model = make_static()
    loss = NegativeCacheRankingLoss(model, cache_size=32, learnable_scale=True, seed=0)
    train(model, loss, PAIRS, tmp_path, learning_rate=1e-2)
    assert loss.scale != pytest.approx(20.0)


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def test_accumulated_gradients_are_the_mean_of_the_parts(tmp_path: Path):
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0)
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
    assert int(loss.cache_loss.cache.step) == 6  # each part writes into the cache
    assert_same_state(snapshot(loss.cache_loss), snapshot(other.cache_loss))


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(is_reentrant: bool, tmp_path: Path):
    found = []
    for settings in ({}, {"gradient_checkpointing": True}):
        if settings:
            settings["gradient_checkpointing_kwargs"] = {"use_reentrant": is_reentrant}
        model = make_tiny()  # with dropout: it must be the same when activations are recomputed
        trainer = train(
            model, NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0), TRIPLETS, tmp_path, steps=3, **settings
        )
        found.append((logged_losses(trainer), snapshot(model)))
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


def test_only_adapters_are_trained_and_a_run_resumes_bit_exactly(tmp_path: Path):
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True}
    model = make_adapted(tmp_path / "base")
    before = snapshot(model)
    whole = train(
        model, NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0), PAIRS, tmp_path, steps=5, **settings
    )
    changed = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= changed
    if VERSION < (6, 0):
        return  # 5.4 itself cannot load a checkpoint of adapters
    again = make_adapted(tmp_path / "base")
    resumed = make_trainer(
        again, NegativeCacheRankingLoss(again, 32, num_samples=1, seed=0), PAIRS, tmp_path, steps=5, **settings
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(snapshot(model), snapshot(again))
    assert_same_state(snapshot(whole.loss.cache_loss), snapshot(resumed.loss.cache_loss))


def test_bfloat16_in_the_arguments(tmp_path: Path):
    logged = []
    for bf16 in (False, True):
        model = make_tiny(dropout=0.0)
        trainer = train(
            model, NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0), PAIRS, tmp_path, steps=3, bf16=bf16
        )
        logged.append(logged_losses(trainer))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert trainer.loss.cache_loss.cache.data["embedding"].dtype == torch.float32
    assert logged[0] == pytest.approx(logged[1], rel=0.05)
    assert logged[0] != logged[1]


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
    assert int(loss.cache_loss.cache.num_filled) == 24  # the same texts: each is written into its own row
    expected = encode(model, corpus, prompt="an essay ")
    torch.testing.assert_close(encode_cached(loss), expected, rtol=1e-4, atol=1e-5)
    bare = encode(model, corpus)
    assert (expected - bare).abs().max() > 1e-3


def test_two_towers(tmp_path: Path):
    model = make_router()
    loss = NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0, symmetric=True)
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


@pytest.mark.skipif(VERSION < (5, 7), reason="MatryoshkaLoss before 5.7 does not pass its dimensions to the loss")
def test_matryoshka_loss_trains_as_matryoshka_dims(tmp_path: Path):
    wrapped, plain = make_static(), make_static()
    loss = NegativeCacheRankingLoss(wrapped, 32, num_samples=1, seed=0)
    settings = {"steps": 12, "learning_rate": 0.02}
    first = train(wrapped, MatryoshkaLoss(wrapped, loss, [32, 8]), PAIRS, tmp_path, **settings)
    assert int(loss.cache_loss.cache.num_filled) == 12
    same = NegativeCacheRankingLoss(plain, 32, num_samples=1, seed=0, matryoshka_dims=(8,))
    assert logged_losses(first) == logged_losses(train(plain, same, PAIRS, tmp_path, **settings))


# The hashes of 5.4 fail with a newer xxhash.
@pytest.mark.parametrize("sampler", ["no_duplicates", *(["no_duplicates_hashed"] if VERSION >= (6, 0) else [])])
def test_samplers_without_duplicates(sampler: str, tmp_path: Path):
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    doubled = {"anchor": ANCHORS * 2, "positive": POSITIVES * 2, "label": list(range(12)) * 2}
    train(model, loss, doubled, tmp_path, steps=6, batch_sampler=sampler)
    assert sorted(loss.cache_loss.cache.document_ids[:12, 1].tolist()) == list(range(12))
    assert int(loss.cache_loss.cache.num_filled) == 12


def test_evaluation_is_the_loss_against_the_batch_and_writes_nothing(tmp_path: Path):
    """The best checkpoint's weights come back at the end."""
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
    assert found == pytest.approx(cross_entropy(20 * queries @ documents.T, torch.arange(4)).item(), abs=1e-4)
    assert_same_state(state, snapshot(loss.cache_loss))


def test_a_compiled_model(tmp_path: Path):
    logged = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = make_tiny(dropout=0.0)
        trainer = train(
            model, NegativeCacheRankingLoss(model, 32, num_samples=1, seed=0), SHORT, tmp_path, steps=2, **settings
        )
        logged.append(logged_losses(trainer))
    assert logged[0] == pytest.approx(logged[1], abs=1e-3)
    assert type(trainer.loss.model).__name__ == "OptimizedModule"
    trainer.loss.fill_from(ANCHORS, show_progress_bar=False)
    assert int(trainer.loss.cache_loss.cache.num_filled) == 20


def test_a_stream_of_flat_inputs_is_not_dispatched(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Its batches are trained whole."""
    data = Dataset.from_dict(PAIRS)
    make_trainer(make_static(), NegativeCacheRankingLoss(make_static(), 32), data, tmp_path)
    assert not [message for message in caplog.messages if "dispatch_batches" in message]
    model, stream = make_static(), data.to_iterable_dataset()
    first = NegativeCacheRankingLoss(model, 32)(columns(model, ANCHORS[:4], POSITIVES[:4])).item()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    trainer = train(model, loss, stream, tmp_path, steps=3, evaluated=stream)
    assert logged_losses(trainer)[0] == pytest.approx(first, rel=1e-4)
    assert cached_texts(loss) == sorted(POSITIVES)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    (message,) = [message for message in caplog.messages if "dispatch_batches" in message]
    assert "dispatch_batches is set to False" in message


def test_a_dispatched_stream_of_flat_inputs_is_refused_with_the_setting(tmp_path: Path):
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    stream = Dataset.from_dict(PAIRS).to_iterable_dataset()
    with pytest.raises(ValueError, match=r'accelerator_config=\{"dispatch_batches": False\}'):
        train(model, loss, stream, tmp_path, accelerator_config={"dispatch_batches": True})


def test_a_streaming_dataset(tmp_path: Path):
    model = make_tiny()
    loss = NegativeCacheRankingLoss(model, 32, seed=0)
    stream = Dataset.from_dict({**PAIRS, "label": list(range(100, 112))}).to_iterable_dataset()
    train(model, loss, stream, tmp_path, steps=4, prompts={"anchor": "what is ", "positive": "an essay "})
    assert sorted(loss.cache_loss.cache.document_ids[:12, 1].tolist()) == list(range(100, 112))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"anchor": ANCHORS, "label": list(range(12))}, "1 text column"),
        ({**PAIRS, "score": [0.5] * 12}, "integer document ids"),
        ({**PAIRS, "label": [[0.5, 0.25]] * 12}, "integer document ids"),
        ({**PAIRS, "label": [1, 0] * 6}, "'n-tuple'"),
        ({**PAIRS, "label": [[1, 0, 0]] * 12}, "'n-tuple'"),
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


def test_the_model_card_shows_configuration_and_citation(tmp_path: Path):
    model = make_static()
    train(model, NegativeCacheRankingLoss(model, 48, num_samples=3), PAIRS, tmp_path / "run", steps=1)
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "loss:NegativeCacheRankingLoss" in card
    assert '"cache_size": 48' in card
    assert '"num_samples": 3' in card
    assert "#### NegativeCacheRankingLoss\n```bibtex" in card
    assert "lindgren2021efficient" in card
    assert "model's inputs" not in card


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


def test_every_trial_of_a_search_starts_anew(tmp_path: Path):
    """With `model_init`, each call of train() has a new model, which must not meet the rows of the model before."""
    model = make_static()
    args = make_trainer(model, NegativeCacheRankingLoss(model, 32), PAIRS, tmp_path, steps=4, learning_rate=0.05).args
    trainer = NegativeCacheTrainer(
        model_init=lambda: make_static(),
        args=args,
        train_dataset=Dataset.from_dict(PAIRS),
        loss=lambda made: NegativeCacheRankingLoss(made, 32, num_samples=1, seed=0, learnable_scale=True),
    )
    states = []
    for _ in range(2):
        trainer.train()
        states.append({**snapshot(trainer.loss.cache_loss), **snapshot(trainer.model)})
    assert_same_state(*states)
    assert int(trainer.loss.cache_loss.cache.step) == 4


def test_everything_at_once_trains_logs_and_is_restored(tmp_path: Path):
    options = {"symmetric": True, "matryoshka_dims": (64, 32), "relative_margin": 0.05, "refresh_per_step": 2}
    model = make_tiny()
    loss = NegativeCacheRankingLoss(model, 64, num_samples=1, seed=0, **options)
    trainer = train(model, loss, TRIPLETS, tmp_path, steps=4)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("cache_loss", "query_cache_loss"):
        for metric in ("interpretable_prediction_loss", "staleness", "gradient_norm_ratio", "masked"):
            assert all(math.isfinite(entry[f"cache/{name}/{metric}"]) for entry in logged)
    restored = cache_losses(NegativeCacheRankingLoss(model, 64, num_samples=1, seed=0, **options))
    for name, saved in cache_losses(loss).items():
        save_checkpoint(saved, tmp_path / name)
        load_checkpoint(restored[name], tmp_path / name)
        assert_same_state(snapshot(saved), snapshot(restored[name]))
