"""Lightning's trainer: automatic optimisation, checkpoints, resume, metrics, precision, compilation, DDP."""

from __future__ import annotations

import csv
import functools
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, DistributedSampler

from negative_cache import NegativeCacheLoss
from negative_cache.checkpoint import CheckpointError
from negative_cache.integrations.lightning import KEY, NegativeCacheMixin
from support import assert_same_state, needs_compiling_of_whole_steps, run_ranks, snapshot

NUM_DOCUMENTS, NUM_WORDS, BATCH = 24, 60, 4
SETTINGS: dict[str, Any] = {"num_samples": 1, "seed": 3, "learnable_scale": True}
DOCUMENTS = torch.randint(NUM_WORDS, (NUM_DOCUMENTS, 6), generator=torch.Generator().manual_seed(0))


class Towers(NegativeCacheMixin, LightningModule):
    """Queries are the first words of documents."""

    def __init__(self, cache_size: int = 15, process_group: Any = None, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.queries, self.documents = nn.EmbeddingBag(NUM_WORDS, 8), nn.EmbeddingBag(NUM_WORDS, 8)
        self.loss_fn = NegativeCacheLoss(
            self.encode, cache_size, process_group=process_group, **{**SETTINGS, **settings}
        )
        self.lr = 0.05

    def encode(self, features: dict[str, Tensor]) -> Tensor:
        return normalize(self.documents(features["words"]), dim=-1)

    def step(self, ids: Tensor) -> Tensor:
        features = {"words": DOCUMENTS[ids]}
        queries = normalize(self.queries(features["words"][:, :2]), dim=-1)
        loss: Tensor = self.loss_fn(queries, self.encode(features), features, document_ids=ids)
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch), batch_size=len(batch), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def loader(num_ranks: int = 1, rank: int = 0) -> DataLoader[int]:
    """Another order in each epoch, the same in a resumed run."""
    sampler: DistributedSampler[int] = DistributedSampler(range(NUM_DOCUMENTS), num_ranks, rank, seed=5)
    return DataLoader(range(NUM_DOCUMENTS), BATCH, sampler=sampler)  # type: ignore[arg-type]


def make_trainer(folder: Path, epochs: int = 3, **settings: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    if "callbacks" in settings:
        quiet["enable_checkpointing"] = True
    return Trainer(default_root_dir=folder, max_epochs=epochs, accelerator="cpu", **{"devices": 1, **quiet, **settings})


def everything(module: Towers, trainer: Trainer) -> dict[str, Tensor]:
    optimizer = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{key}": value for i, state in optimizer.items() for key, value in state.items()}
    return {**snapshot(module), **moments}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fit(folder: Path, epochs: int = 3, path: str | None = None, **settings: Any) -> tuple[Towers, Trainer]:
    module, trainer = Towers(), make_trainer(folder, epochs, **settings)
    trainer.fit(module, loader(), ckpt_path=path)
    return module, trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_one_that_was_not_stopped(accumulation: int, tmp_path: Path):
    settings = {"accumulate_grad_batches": accumulation}
    whole = everything(*fit(tmp_path, **settings))
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True)
    fit(tmp_path, 2, callbacks=[saving], **settings)
    resumed = everything(*fit(tmp_path, path=saving.last_model_path, **settings))
    assert_same_state(whole, resumed)
    assert int(resumed["loss_fn.cache.step"]) == 3 * NUM_DOCUMENTS // BATCH


def test_rows_are_deleted_with_their_checkpoint_and_are_not_among_the_weights(tmp_path: Path):
    saving = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_top_k=1, monitor="epoch", mode="max")
    light = ModelCheckpoint(tmp_path / "light", filename="light", save_weights_only=True)
    module, trainer = fit(tmp_path, callbacks=[saving, light])
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["epoch=2.ckpt"]
    for path in (saving.best_model_path, light.best_model_path):
        saved = torch.load(path, weights_only=True)
        assert not [key for key in saved["state_dict"] if "cache" in key]
        assert (KEY in saved) == (path == saving.best_model_path)
    trained = snapshot(module)
    loaded = Towers.load_from_checkpoint(saving.best_model_path)
    assert_same_state(trained, snapshot(loaded))
    assert Towers.load_from_checkpoint(light.best_model_path).loss_fn.cache is None
    trainer.test(module, loader(), ckpt_path=light.best_model_path, verbose=False)
    assert_same_state(trained, snapshot(module))
    exported = {key: value for key, value in trained.items() if "cache" not in key}
    plain = Towers()
    plain.load_state_dict(torch.load(saving.best_model_path, weights_only=True)["state_dict"])
    assert_same_state(exported, snapshot(plain))


def test_metrics_are_logged_and_checkpoints_without_the_mixin_are_loaded(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    module, trainer = fit(tmp_path, logger=logger, log_every_n_steps=4)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 7, 11, 15]
    assert all(float(row["cache/interpretable_prediction_loss"]) > 0 for row in rows)
    assert [float(row["cache/fill"]) for row in rows] == [1, 1, 1, 1]
    assert float(rows[1]["cache/staleness"]) > 0
    assert trainer.callback_metrics["cache/staleness"] == pytest.approx(float(rows[-1]["cache/staleness"]))
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": "2.2"}, tmp_path / "plain.ckpt")
    assert_same_state(snapshot(module), snapshot(Towers.load_from_checkpoint(tmp_path / "plain.ckpt")))


def test_validation_and_its_sanity_check_change_nothing(tmp_path: Path):
    plain = everything(*fit(tmp_path))
    module, trainer = Towers(), make_trainer(tmp_path, val_check_interval=2, num_sanity_val_steps=2)
    fixed = DataLoader(range(NUM_DOCUMENTS), BATCH)  # type: ignore[arg-type]
    trainer.fit(module, loader(), fixed)
    assert_same_state(plain, everything(module, trainer))
    module.eval()
    before = snapshot(module)
    with torch.no_grad():
        by_hand = torch.stack([module.step(batch) for batch in fixed]).mean()
    assert trainer.callback_metrics["val_loss"] == pytest.approx(float(by_hand), rel=1e-5)
    assert_same_state(before, snapshot(module))


def test_the_learning_rate_finder_leaves_no_trace(tmp_path: Path):
    plain = everything(*fit(tmp_path))
    module, trainer = Towers(), make_trainer(tmp_path)
    Tuner(trainer).lr_find(module, loader(), num_training=5, update_attr=False)
    assert module.loss_fn.cache is None
    trainer.fit(module, loader())
    assert_same_state(plain, everything(module, trainer))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(precision: Any, tmp_path: Path):
    module, _ = fit(tmp_path, 12, precision=precision)
    assert module.loss_fn.cache is not None
    assert module.loss_fn.cache.embeddings("embedding").dtype == torch.float32
    start, _ = fit(tmp_path, 1)
    assert module.loss_fn.metrics()["interpretable_loss"] < 0.7 * start.loss_fn.metrics()["interpretable_loss"]


@pytest.mark.parametrize("what", [pytest.param("module", marks=needs_compiling_of_whole_steps), "encoder"])
def test_a_compiled_module_or_encoder_trains(what: str, tmp_path: Path):
    module, trainer = Towers(), make_trainer(tmp_path, 1)
    before = snapshot(module)
    if what == "encoder":
        module.documents.compile(backend="aot_eager")
    trainer.fit(torch.compile(module, backend="eager") if what == "module" else module, loader())
    assert float((module.documents.weight - before["documents.weight"]).abs().mean()) > 0.05
    assert module.loss_fn.metrics()["fill"] == 1
    assert module.loss_fn.step_number() == NUM_DOCUMENTS // BATCH


def test_the_order_of_bases_is_checked():
    with pytest.raises(TypeError, match=r"class Wrong\(NegativeCacheMixin, LightningModule\)"):

        class Wrong(LightningModule, NegativeCacheMixin):
            pass


class WithoutSuper(Towers):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        pass


def check_ranks(process_group: Any, rank: int, world_size: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    os.environ.update(
        TORCHELASTIC_RUN_ID="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="localhost", MASTER_PORT="1",
    )  # fmt: skip

    def run(epochs: int, path: str | None = None, kind: type[Towers] = Towers, **settings: Any) -> dict[str, Tensor]:
        trainer = make_trainer(folder, epochs, strategy="ddp", devices=2, **settings)
        module = kind(process_group=process_group)
        trainer.fit(module, loader(2, rank), loader(2, rank), ckpt_path=path)
        return everything(module, trainer)

    whole = run(3)
    weights = [torch.empty_like(whole["queries.weight"]) for _ in range(2)]
    dist.all_gather(weights, whole["queries.weight"])
    assert torch.equal(weights[0], weights[1])
    saving = ModelCheckpoint(folder / "saved", filename="{epoch}", save_top_k=1)
    run(2, callbacks=[saving])
    resumed = run(3, saving.best_model_path)
    assert_same_state(whole, resumed)
    assert [path.name for path in (folder / "saved").iterdir()] == ["epoch=1.ckpt"]
    bad = ModelCheckpoint(folder / "bad", filename="bad")
    run(1, kind=WithoutSuper, callbacks=[bad])
    with pytest.raises(CheckpointError, match=r"call super\(\)"):
        run(2, bad.best_model_path)


@pytest.mark.parametrize("process_group", ["world", None])
def test_ranks_resume_whether_they_share_a_cache_or_not(process_group: Any, tmp_path: Path):
    run_ranks(functools.partial(check_ranks, process_group), 2, tmp_path)
    alone = Towers.load_from_checkpoint(tmp_path / "saved" / "epoch=1.ckpt", process_group=process_group)
    cache = alone.loss_fn.cache
    assert cache is not None
    assert len(set(cache.document_ids.tolist())) == 15  # all rows, or those of rank 0
    trainer = make_trainer(tmp_path)
    trainer.fit(alone, loader(), ckpt_path=tmp_path / "saved" / "epoch=1.ckpt")  # one rank resumes what two have saved
    assert trainer.current_epoch == 3


@pytest.mark.parametrize(
    "callback", [EarlyStopping("val_loss"), ModelCheckpoint(monitor="val_loss"), ModelCheckpoint()]
)
def test_monitoring_a_loss_is_warned_of(tmp_path: Path, callback: Any, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="negative_cache"):
        make_trainer(tmp_path, 1, callbacks=[callback]).fit(Towers(), loader(), loader())
    assert ("'val_loss'" in caplog.text) == (callback.monitor is not None)
