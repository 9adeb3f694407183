"""The sharded loss under DDP, FSDP2, gradient checkpointing, accumulation and autocast equals averaging by hand."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from negative_cache import NegativeCacheLoss
from support import run_ranks

DIM, BATCH, STEPS = 16, 4, 6


class Encoder(nn.Module):
    def __init__(self, uses_checkpoint: bool) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.words = nn.Embedding(200, DIM)
        self.body = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Dropout(0.0), nn.Linear(2 * DIM, DIM))
        self.uses_checkpoint = uses_checkpoint

    def forward(self, words: Tensor) -> Tensor:
        pooled = self.words(words).mean(dim=1)
        out = checkpoint(self.body, pooled, use_reentrant=False) if self.uses_checkpoint else self.body(pooled)
        return nn.functional.normalize(pooled + out, dim=1)


def wrap(kind: str, world_size: int) -> nn.Module:
    encoder = Encoder(uses_checkpoint=kind == "checkpointing")
    if kind == "by hand":
        return encoder
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(encoder.body, mesh=mesh)
        return fully_shard(encoder, mesh=mesh)
    return DistributedDataParallel(encoder)


def make_loss(model: Any) -> NegativeCacheLoss:
    """With a seed for which rounding to bfloat16 changes few draws; with others, models differ by up to 0.06."""
    return NegativeCacheLoss(
        lambda features: model(features["words"]),
        64,
        10.0,
        num_samples=1,
        seed=1,
        learnable_scale=True,
        process_group="world",
    )


def train(kind: str, rank: int, world_size: int, accumulation: int = 1, with_negatives: bool = False) -> list[Tensor]:
    """Parameters after some steps, and the scale."""
    model = wrap(kind, world_size)
    loss_fn = make_loss(model)
    optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.5)
    autocast = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else contextlib.nullcontext()
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(accumulation):
            is_last = micro == accumulation - 1
            later = model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else None
            with later or contextlib.nullcontext(), autocast:
                batch(
                    model, loss_fn, (step * accumulation + micro) * world_size + rank, rank, with_negatives
                ).backward()
        if kind == "by hand":
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
        optimizer.step()
    return [full(parameter).detach() for parameter in [*model.parameters(), *loss_fn.parameters()]]


def batch(model: Any, loss_fn: NegativeCacheLoss, number: int, rank: int, with_negatives: bool) -> Tensor:
    ids = torch.arange(BATCH) + BATCH * number
    words = torch.stack([ids % 190 + i for i in range(8)], dim=1)
    given: dict[str, Any] = {}
    if with_negatives:  # one or two; a model over ranks must run equally often on all of them
        others = words[: 1 + rank] + 2
        given = {"negative_embeddings": model(others), "negative_features": {"words": others}}
    loss: Tensor = loss_fn(model(words[:, :3]), model(words), {"words": words}, document_ids=ids, **given)
    return loss


def full(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def check(
    kind: str, accumulation: int, with_negatives: bool, tolerance: float, rank: int, world_size: int, folder: Path
) -> None:
    wrapped = train(kind, rank, world_size, accumulation, with_negatives)
    by_hand = train("by hand", rank, world_size, accumulation, with_negatives)
    start = [parameter.detach() for parameter in Encoder(False).parameters()]
    assert not torch.allclose(start[0], by_hand[0], atol=0.05)
    for mine, truth in zip(wrapped, by_hand, strict=True):
        torch.testing.assert_close(mine, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "accumulation", "with_negatives", "tolerance"),
    [
        ("ddp", 1, False, 1e-5),
        ("ddp", 3, False, 1e-5),
        ("ddp", 1, True, 1e-5),
        ("fsdp2", 1, False, 1e-5),
        ("fsdp2", 2, True, 1e-5),
        ("checkpointing", 1, False, 1e-5),
        ("autocast", 1, False, 0.03),
    ],
)
def test_wrapped_models_train_as_by_hand(
    kind: str, accumulation: int, with_negatives: bool, tolerance: float, tmp_path: Path
):
    run_ranks(functools.partial(check, kind, accumulation, with_negatives, tolerance), 2, tmp_path)


def check_deepspeed(rank: int, world_size: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed

    for stage in range(4):
        encoder = Encoder(False)
        config = {
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        engine, *_ = deepspeed.initialize(model=encoder, model_parameters=encoder.parameters(), config=config)
        loss_fn = make_loss(engine)
        optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.5)
        for step in range(STEPS):
            optimizer.zero_grad()
            engine.backward(batch(engine, loss_fn, step * world_size + rank, rank, False))
            engine.step()
            optimizer.step()
        by_hand = train("by hand", rank, world_size)
        with deepspeed.zero.GatheredParameters(list(encoder.parameters()), enabled=stage == 3):
            for mine, truth in zip([*encoder.parameters(), *loss_fn.parameters()], by_hand, strict=True):
                torch.testing.assert_close(mine.float(), truth, rtol=1e-5, atol=1e-5)


def test_deepspeed_trains_as_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; pip install --no-build-isolation deepspeed")
    run_ranks(check_deepspeed, 2, tmp_path)
