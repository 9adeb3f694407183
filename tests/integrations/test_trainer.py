"""The trainer that saves the cache in its checkpoints, on one rank and on several."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import EarlyStoppingCallback

from negative_cache.checkpoint import CheckpointError
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.integrations.trainer import NegativeCacheTrainer, cache_losses
from support import assert_same_state, needs_resuming_on_ranks_of_a_cpu, run_ranks, snapshot

WORDS = [f"word{first}{second}" for first in "abcdefgh" for second in "klmnopqr"]
ANCHORS = [f"about {word}" for word in WORDS]
POSITIVES = [f"{word} and {word[::-1]} and {WORDS[i // 2]}" for i, word in enumerate(WORDS)]
VOCABULARY = ["about", "and", *WORDS, *(word[::-1] for word in WORDS)]
BATCH = 4


def make_trainer(
    folder: Path,
    max_steps: int = 6,
    dim: int = 16,
    save_steps: int = 2,
    truncate_dim: int | None = None,
    use_cpu: bool = True,
    first: int = 0,
    **options: Any,
) -> NegativeCacheTrainer:
    torch.manual_seed(first)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="about"))
    tokenizer.pre_tokenizer = Whitespace()
    modules = [StaticEmbedding(tokenizer, embedding_dim=dim)]
    model = SentenceTransformer(modules=modules, device="cpu", truncate_dim=truncate_dim)
    options = {"num_samples": 1, "seed": 0, "learnable_scale": True, **options}
    loss = NegativeCacheRankingLoss(model, cache_size=40, **options)
    args = SentenceTransformerTrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=max_steps,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=save_steps,
        report_to=[],
        use_cpu=use_cpu,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
        batch_sampler="no_duplicates",
    )
    dataset = Dataset.from_dict({"anchor": ANCHORS, "positive": POSITIVES})
    return NegativeCacheTrainer(model=model, args=args, train_dataset=dataset, loss=loss)


def everything(trainer: NegativeCacheTrainer) -> dict[str, Tensor]:
    (cache_loss,) = cache_losses(trainer.loss).values()
    return {**snapshot(cache_loss), **{f"model.{key}": v for key, v in snapshot(trainer.model).items()}}


def test_a_loss_without_a_seed_draws_with_that_of_the_arguments(tmp_path: Path):
    states = {}
    for seed in (None, 42, 43):
        for number in range(2):
            trainer = make_trainer(tmp_path / f"{seed}-{number}", seed=seed, first=number)
            assert trainer.args.seed == 42
            (loss,) = cache_losses(trainer.loss).values()
            states[seed, number] = loss.generator.get_state()
    assert all(torch.equal(states[None, number], states[42, 0]) for number in range(2))
    assert not torch.equal(states[43, 0], states[42, 0])
    torch.rand(1, generator=loss.generator)
    loss._is_seeded, drawn = False, loss.generator.get_state()
    loss._seed_draws(7)  # too late: the second trainer of a loss goes on
    assert torch.equal(loss.generator.get_state(), drawn)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator, the trainer joins the ranks")
def test_ranks_that_would_train_alone_are_refused(tmp_path: Path):
    run_ranks(check_ranks_without_use_cpu, 2, tmp_path)


def check_ranks_without_use_cpu(rank: int, world_size: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    with pytest.raises(ValueError, match=r"has 2 ranks, .* a model of its own. On CPUs, set use_cpu=True"):
        make_trainer(folder / str(rank), use_cpu=False, gather_across_devices=True)


def test_a_resumed_trainer_equals_one_that_was_not_stopped(tmp_path: Path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    make_trainer(tmp_path / "stopped", max_steps=5).train()
    resumed = make_trainer(tmp_path / "stopped")
    (tmp_path / "stopped" / "checkpoint-5" / "trainer_state.json").unlink()  # as if killed while writing it
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(everything(whole), everything(resumed))


def test_a_checkpoint_of_the_last_step_is_not_trained_further(tmp_path: Path):
    whole = make_trainer(tmp_path)
    whole.train()
    again = make_trainer(tmp_path)
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert_same_state(everything(whole), everything(again))


def test_missing_damaged_and_mismatched_checkpoints_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    make_trainer(tmp_path).train()
    file = next((tmp_path / "checkpoint-6" / "negative_cache").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    trainer = make_trainer(tmp_path)
    before = everything(trainer)
    with pytest.raises(CheckpointError, match="bytes; it was written with"):
        trainer.train(resume_from_checkpoint=True)
    assert_same_state(before, everything(trainer))
    with pytest.raises(CheckpointError, match="embedding"):
        make_trainer(tmp_path, embedding_dtype=torch.float64).train(str(tmp_path / "checkpoint-4"))
    with pytest.raises(CheckpointError, match=r"feature 'embedding'.*\[16\].*\[8\]"):  # before any step
        make_trainer(tmp_path, dim=8).train(str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_without_a_cache_is_refused_with_both_reasons(tmp_path: Path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.args.save_only_model = True
    trainer.train()
    with pytest.raises(
        CheckpointError, match="save_only_model=True, or by a trainer without NegativeCacheTrainerMixin"
    ):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_model_that_truncates_its_results_resumes(tmp_path: Path):
    """`truncate_dim` shortens what `encode` returns, but not the embeddings in training."""
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    make_trainer(tmp_path / "stopped", max_steps=4).train()
    resumed = make_trainer(tmp_path / "stopped", truncate_dim=8)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(everything(whole), everything(resumed))


def test_gradients_of_the_losses_own_parameters_do_not_accumulate(tmp_path: Path):
    trainer = make_trainer(tmp_path, max_steps=3)
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "_OptimizerZeroGradCallback":  # sentence-transformers' own, from 6.2 on
            trainer.remove_callback(callback)
    gradients = []
    trainer.loss.cache_loss.log_scale.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.clone()))
    trainer.train()
    assert len(gradients) == 3
    assert all(gradient != 0 for gradient in gradients)
    assert not trainer.loss.cache_loss.log_scale.grad


def test_caches_are_found_in_wrapped_losses_and_dicts(tmp_path: Path):
    trainer = make_trainer(tmp_path)
    loss = trainer.loss
    wrapped = MatryoshkaLoss(trainer.model, loss, [16, 8])
    assert list(cache_losses({"other": wrapped})) == ["other.loss.cache_loss"]
    assert list(cache_losses({"pairs": loss, "other": wrapped})) == ["pairs.cache_loss"]  # it is the same one


def check_ranks(is_shared: bool, rank: int, world_size: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost"
    )
    options = {"gather_across_devices": is_shared, "save_steps": 12}
    whole = make_trainer(folder / "whole", 14, **options)  # 8 steps per epoch
    whole.train()
    scale = whole.loss.cache_loss.log_scale.detach()
    scales = [torch.empty_like(scale) for _ in range(world_size)]
    dist.all_gather(scales, scale)
    assert float(scale) != torch.tensor(20.0).log()
    assert all(torch.equal(scales[0], other) for other in scales)
    names = sorted(path.name for path in (folder / "whole" / "checkpoint-14" / "negative_cache").iterdir())
    assert names == (["cache_loss"] if is_shared else ["cache_loss-of-rank-0", "cache_loss-of-rank-1"])
    make_trainer(folder / "stopped", 12, **options).train()
    resumed = make_trainer(folder / "stopped", 14, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(everything(whole), everything(resumed))


@needs_resuming_on_ranks_of_a_cpu
@pytest.mark.parametrize("is_shared", [True, False])
def test_ranks_resume_whether_they_share_a_cache_or_not(is_shared: bool, tmp_path: Path):
    run_ranks(functools.partial(check_ranks, is_shared), 2, tmp_path)


@pytest.mark.parametrize("metric", [None, "eval_loss", "eval_cosine_ndcg@10"])
@pytest.mark.parametrize("stops", [False, True])
def test_selecting_checkpoints_by_a_loss_is_warned_of(
    tmp_path: Path, metric: str | None, stops: bool, caplog: pytest.LogCaptureFixture
):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.args.metric_for_best_model = metric
    trainer.args.load_best_model_at_end = not stops
    if stops:
        trainer.add_callback(EarlyStoppingCallback(2))
    with caplog.at_level(logging.WARNING), contextlib.suppress(AssertionError):  # the callback wants evaluations
        trainer.train()
    assert ("Checkpoints are selected by" in caplog.text) == (metric != "eval_cosine_ndcg@10")
    trainer.loss = torch.nn.Identity()
    caplog.clear()
    trainer._warn_of_selection_by_loss()
    assert not caplog.records


def test_evaluations_of_a_trainer_do_not_depend_on_the_cache(tmp_path: Path):
    """The trainer disables gradients, but leaves the loss in training mode."""
    trainer = make_trainer(tmp_path, max_steps=4)
    held_out = Dataset.from_dict({"anchor": ANCHORS[:8], "positive": POSITIVES[:8]})
    trainer.train()
    full = trainer.evaluate(held_out)["eval_loss"]
    written = trainer.loss.cache_loss.cache.written.clone()
    del trainer.loss.cache_loss.cache
    assert trainer.evaluate(held_out)["eval_loss"] == full
    assert trainer.loss.cache_loss.cache is None
    assert len(written)
