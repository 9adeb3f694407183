"""transformers' `Trainer` with two towers, the loss in the model or in the trainer."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel, PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from negative_cache import NegativeCacheLoss
from negative_cache.checkpoint import CheckpointError
from negative_cache.integrations.hugging_face import NegativeCacheTrainerMixin
from support import assert_same_state, needs_resuming_on_ranks_of_a_cpu, run_ranks, snapshot

NUM_DOCUMENTS, BATCH = 24, 4
WORDS = torch.randint(1, 50, (NUM_DOCUMENTS, 6), generator=torch.Generator().manual_seed(0))


def bert() -> BertModel:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=8,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


class Towers(nn.Module):
    """The loss is in the model, as `Trainer` expects it: forward returns a dict with the loss."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.queries, self.documents = bert(), bert()
        settings = {"num_samples": 1, "seed": 0, "learnable_scale": True, **settings}
        self.loss_fn = NegativeCacheLoss(self.encode, 15, **settings)

    def encode(self, features: dict[str, Tensor]) -> Tensor:
        return embed(self.documents, features["words"].long())

    def forward(self, query: Tensor, words: Tensor, ids: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        features = {"words": words}
        return {"loss": self.loss_fn(embed(self.queries, query), self.encode(features), features, document_ids=ids)}


class Pretrained(PreTrainedModel):
    """The towers in a PreTrainedModel."""

    config_class = PretrainedConfig

    def __init__(self, **settings: Any) -> None:
        super().__init__(PretrainedConfig())
        self.towers = Towers(**settings)

    def forward(self, query: Tensor, words: Tensor, ids: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        return self.towers(query, words, ids)


class Bare(nn.Module):
    """Two towers without a loss, which is in the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.documents = bert(), bert()

    def forward(self, query: Tensor | None, words: Tensor, ids: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        return None if query is None else embed(self.queries, query), embed(self.documents, words)


def embed(encoder: BertModel, words: Tensor) -> Tensor:
    return normalize(encoder(words).last_hidden_state.mean(dim=1), dim=-1)


class CacheTrainer(NegativeCacheTrainerMixin, Trainer):
    pass


class OwnLossTrainer(CacheTrainer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = NegativeCacheLoss(self.encode, 15, num_samples=1, seed=0)

    def encode(self, features: dict[str, Tensor]) -> Tensor:
        documents: Tensor = self.model(None, features["words"].long())[1]
        return documents

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        queries, documents = model(inputs["query"], inputs["words"])
        loss = self.loss(queries, documents, {"words": inputs["words"]}, document_ids=inputs["ids"])
        return (loss, {}) if return_outputs else loss


def make_trainer(folder: Path, kind: str = "model", max_steps: int = 8, **settings: Any) -> Any:
    set_seed(0)
    own = settings.pop("own", {})
    model = {"model": Towers, "pretrained": Pretrained, "trainer": Bare}[kind](**own)
    args: dict[str, Any] = {
        "per_device_train_batch_size": BATCH, "max_steps": max_steps, "learning_rate": 0.01, "logging_steps": 2,
        "lr_scheduler_type": "constant", "save_steps": 3, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "dataloader_drop_last": True, "label_names": [], **settings,
    }  # fmt: skip
    data = [{"query": words[:2], "words": words, "ids": number} for number, words in enumerate(WORDS)]
    trainer = OwnLossTrainer if kind == "trainer" else CacheTrainer
    return trainer(model=model, args=TrainingArguments(str(folder), **args), train_dataset=data, eval_dataset=data)


def everything(trainer: Any) -> dict[str, Tensor]:
    return {**snapshot(trainer.model), **(snapshot(trainer.loss) if hasattr(trainer, "loss") else {})}


@pytest.mark.parametrize(("kind", "accumulation"), [("model", 1), ("model", 2), ("pretrained", 1), ("trainer", 1)])
def test_a_resumed_run_equals_one_that_was_not_stopped(kind: str, accumulation: int, tmp_path: Path):
    whole = make_trainer(tmp_path / "whole", kind, gradient_accumulation_steps=accumulation)
    whole.train()
    make_trainer(tmp_path, kind, max_steps=6, gradient_accumulation_steps=accumulation, save_total_limit=1).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    weights = [*(tmp_path / "checkpoint-6").glob("model.safetensors")]
    assert len(weights) == 1
    resumed = make_trainer(tmp_path, kind, gradient_accumulation_steps=accumulation)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(everything(whole), everything(resumed))
    if kind == "model":
        from safetensors import safe_open

        with safe_open(weights[0], "pt") as file:
            assert not [key for key in file.keys() if ".cache." in key]  # noqa: SIM118


def test_metrics_are_logged_and_evaluation_and_the_best_model_leave_the_cache(tmp_path: Path):
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    both = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_strategy": "steps"}
    both["greater_is_better"] = True  # the best model by the highest loss is not the last one
    trainer = make_trainer(tmp_path / "evaluated", **both)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(row["cache/interpretable_prediction_loss"] > 0 for row in rows)
    assert rows[-1]["cache/staleness"] > 0
    assert rows[-1]["cache/fill"] == 1
    assert all(row["eval_loss"] > 0 for row in trainer.state.log_history if "eval_loss" in row)
    first, second = everything(plain), everything(trainer)
    cached = [key for key in first if key.startswith("loss_fn.cache") or "extra" in key]
    assert_same_state({key: first[key] for key in cached}, {key: second[key] for key in cached})
    assert not torch.equal(first["loss_fn.log_scale"], second["loss_fn.log_scale"])  # of the best model


def test_a_cache_with_another_dtype_is_refused(tmp_path: Path):
    make_trainer(tmp_path, max_steps=3).train()
    trainer = make_trainer(tmp_path, own={"embedding_dtype": torch.float64})
    before = everything(trainer)
    with pytest.raises(CheckpointError, match="embedding"):
        trainer.train(resume_from_checkpoint=True)
    assert_same_state(before, everything(trainer))


def check_ranks(kind: str, rank: int, world_size: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost"
    )
    own = {"process_group": "world"} if kind == "shared" else {}
    whole = make_trainer(folder / "whole", own=own, ddp_find_unused_parameters=False)
    whole.train()
    make_trainer(folder, max_steps=6, own=own).train()
    resumed = make_trainer(folder, own=own)
    resumed.train(resume_from_checkpoint=True)
    assert_same_state(everything(whole), everything(resumed))
    assert whole.model.loss_fn.cache.num_rows == ((8 - rank) if kind == "shared" else 15)


@needs_resuming_on_ranks_of_a_cpu
@pytest.mark.parametrize("kind", ["shared", "own"])
def test_ranks_resume_whether_they_share_a_cache_or_not(kind: str, tmp_path: Path):
    run_ranks(functools.partial(check_ranks, kind), 2, tmp_path)


def test_the_mixin_needs_no_sentence_transformers():
    """Imports the integrations again where sentence-transformers is missing; the core's contract forbids it anyway."""
    with patch.dict(sys.modules):  # restored at the end
        for name in [name for name in sys.modules if name.startswith("negative_cache.integrations.")]:
            del sys.modules[name]
        sys.modules["sentence_transformers"] = None
        mixin = importlib.import_module("negative_cache.integrations.hugging_face").NegativeCacheTrainerMixin
        assert mixin is not NegativeCacheTrainerMixin
        assert issubclass(type("Mine", (mixin, Trainer), {}), Trainer)
        with pytest.raises(ModuleNotFoundError, match="sentence_transformers"):
            importlib.import_module("negative_cache.integrations.trainer")
